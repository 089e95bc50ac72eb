// Generalised advantage estimation over packed sequences. The equation and why it is written for the return G = A + V
// are in orz_async/ops/reference/advantage.py:
//
//   G_t = x_t + c * G_{t+1},   x_t = r_t + gamma * (1 - lam) * V_{t+1},   c = gamma * lam,   A_t = G_t - V_t
//
// One token after the other this is a chain of multiply-adds, 4 cycles each. Eight tokens at a time, the scan inside the
// block does not wait for the block before it: only one multiply-add a block does.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace orz {

struct GaeArgs {
  const float* rewards;
  const float* values;
  const int32_t* cu_seqlens;  // [num_sequences + 1], checked by the caller
  int64_t num_sequences;
  float gamma;
  float lam;
  const uint8_t* mask;     // [N] or null: tokens that are 0 do not exist
  const float* bootstrap;  // [num_sequences] or null
  float* advantages;
  float* returns;
};

inline void gae_scalar(const GaeArgs& args, int64_t begin, int64_t end, float next_value, float next_return) {
  const float spread = args.gamma * (1.0f - args.lam), carry = args.gamma * args.lam;
  for (int64_t t = end - 1; t >= begin; --t) {
    if (args.mask != nullptr && args.mask[t] == 0) {
      args.advantages[t] = args.returns[t] = 0.0f;
      continue;
    }
    next_return = args.rewards[t] + spread * next_value + carry * next_return;
    next_value = args.values[t];
    args.returns[t] = next_return;
    args.advantages[t] = next_return - next_value;
  }
}

#if ORZ_X86
ORZ_TARGET_AVX2 inline void gae_avx2(const GaeArgs& args, int64_t begin, int64_t end, float bootstrap) {
  const float spread = args.gamma * (1.0f - args.lam), carry = args.gamma * args.lam;
  // The last token reads the bootstrap, so it and what does not fill a block go first, one by one.
  const int64_t blocks_end = begin + (end - 1 - begin) / 8 * 8;
  gae_scalar(args, blocks_end, end, bootstrap, bootstrap);
  if (blocks_end == begin) return;
  const float c2 = carry * carry, c4 = c2 * c2;
  const __m256 spread8 = _mm256_set1_ps(spread);
  const __m256 c1_8 = _mm256_set1_ps(carry), c2_8 = _mm256_set1_ps(c2), c4_8 = _mm256_set1_ps(c4);
  // What the return after the block contributes to each of its eight tokens.
  const __m256 reach = _mm256_setr_ps(c4 * c4, c4 * c2 * carry, c4 * c2, c4 * carry, c4, c2 * carry, c2, carry);
  const __m256 c8_8 = _mm256_set1_ps(c4 * c4);
  const __m256i up1 = _mm256_setr_epi32(1, 2, 3, 4, 5, 6, 7, 7);
  const __m256 zero = _mm256_setzero_ps();
  __m256 next = _mm256_set1_ps(args.returns[blocks_end]);
  for (int64_t t = blocks_end - 8; t >= begin; t -= 8) {
    const __m256 value = _mm256_loadu_ps(args.values + t);
    __m256 x = _mm256_fmadd_ps(spread8, _mm256_loadu_ps(args.values + t + 1), _mm256_loadu_ps(args.rewards + t));
    // x_t += c * x_{t+1}; then c^2 from two further on; then c^4 from four further on.
    x = _mm256_fmadd_ps(c1_8, _mm256_blend_ps(_mm256_permutevar8x32_ps(x, up1), zero, 0x80), x);
    const __m256 two = _mm256_shuffle_ps(x, _mm256_permute2f128_ps(x, x, 0x81), _MM_SHUFFLE(1, 0, 3, 2));
    x = _mm256_fmadd_ps(c2_8, two, x);
    x = _mm256_fmadd_ps(c4_8, _mm256_permute2f128_ps(x, x, 0x81), x);
    const __m256 total = _mm256_fmadd_ps(reach, next, x);
    _mm256_storeu_ps(args.returns + t, total);
    _mm256_storeu_ps(args.advantages + t, _mm256_sub_ps(total, value));
    // The first token of the block, from what the scan left: all that the next block waits for is this multiply-add.
    next = _mm256_fmadd_ps(c8_8, next, _mm256_broadcastss_ps(_mm256_castps256_ps128(x)));
  }
}
#endif

inline void gae(const GaeArgs& args) {
  for (int64_t b = 0; b < args.num_sequences; ++b) {
    const int64_t begin = args.cu_seqlens[b], end = args.cu_seqlens[b + 1];
    const float bootstrap = args.bootstrap != nullptr ? args.bootstrap[b] : 0.0f;
    if (begin == end) continue;
#if ORZ_X86
    if (args.mask == nullptr && has_avx2()) {
      gae_avx2(args, begin, end, bootstrap);
      continue;
    }
#endif
    gae_scalar(args, begin, end, bootstrap, bootstrap);
  }
}

}  // namespace orz
