// The math of the CUDA kernels, run on the host: the headers of csrc/cuda, the two phases of gae, and threads as loops.
#include <vector>

#include "gae.h"
#include "loss.h"

namespace {

template <class Loss>
void run(const Loss& loss, int64_t num_tokens, float* slopes, double* stats) {
  typename Loss::Stats sums;
  for (int64_t i = 0; i < num_tokens; ++i) slopes[i] = loss.add(loss.load(i), sums);
  for (int i = 0; i < Loss::Stats::FIELDS; ++i) stats[i] = sums.field[i];
}

}  // namespace

extern "C" void host_gae(const float* rewards, const float* values, const uint8_t* mask, const int32_t* starts,
                         const float* bootstrap, int64_t num_tokens, int32_t num_sequences, float gamma, float decay,
                         float blend, int threads_a_block, float* advantages, float* returns) {
  const orz::GaeInputs in{rewards,    values,        mask,  starts, bootstrap,
                          num_tokens, num_sequences, gamma, decay,  blend};
  const int64_t items = orz::GaeTokens::ITEMS, block = items * threads_a_block;
  const int64_t num_blocks = (num_tokens + block - 1) / block;
  const auto map_of = [&](int64_t begin) {
    orz::GaeTokens tokens;
    tokens.load(in, begin);
    return tokens.map(decay, blend);
  };
  std::vector<orz::Affine> aggregates(num_blocks);
  for (int64_t b = 0; b < num_blocks; ++b) {
    for (int thread = threads_a_block - 1; thread >= 0; --thread) {
      aggregates[b] = orz::compose(map_of(b * block + thread * items), aggregates[b]);
    }
  }
  for (int64_t b = 0; b < num_blocks; ++b) {
    orz::Affine carry;
    for (int64_t later = b + 1; later < num_blocks && carry.a != 0.0f; ++later) carry = orz::compose(carry, aggregates[later]);
    float x = carry.b;
    for (int thread = threads_a_block - 1; thread >= 0; --thread) {
      const int64_t begin = b * block + thread * items;
      orz::GaeTokens tokens;
      tokens.load(in, begin);
      tokens.write(x, decay, blend, begin, num_tokens, advantages, returns);
      x = map_of(begin)(x);
    }
  }
}

extern "C" void host_ppo_loss(const float* current, const float* sampled, const float* advantages, const float* proximal,
                              const float* entropy, const uint8_t* mask, const float* denominator, int per_token,
                              float lowest, float highest, float dual, float cap, int64_t num_tokens, float* slopes,
                              double* stats) {
  run(orz::PolicyLoss{current, sampled, advantages, proximal, entropy, mask, denominator, per_token != 0, lowest, highest,
                      dual, cap},
      num_tokens, slopes, stats);
}

extern "C" void host_value_loss(const float* values, const float* old_values, const float* returns, const uint8_t* mask,
                                const float* denominator, int per_token, float clip, int64_t num_tokens, float* slopes,
                                double* stats) {
  run(orz::ValueLoss{values, old_values, returns, mask, denominator, per_token != 0, clip}, num_tokens, slopes, stats);
}
