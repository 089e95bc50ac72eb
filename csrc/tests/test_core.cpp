// Unit tests of csrc/cpu without Python, so that sanitizers see all of it. Run by csrc/sanitize.sh as the machine
// allows, with ORZ_AVX2=1 and with ORZ_SCALAR=1. Buffers are allocated to size, so that one element too far is an error.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/attend.h"
#include "cpu/attend_packed.h"
#include "cpu/crc32c.h"
#include "cpu/delta.h"
#include "cpu/gae.h"
#include "cpu/layers.h"
#include "cpu/loss.h"
#include "cpu/pack.h"
#include "cpu/softmax.h"
#include "tests/check.h"
#include "tests/test_decode.h"

namespace {

// Against sums in float64; with a window, grouped heads, and dims that end inside a vector.
void test_attend() {
  Rng rng(7);
  const size_t rows = 3, kv_heads = 2, group = 2, max_tokens = 40;
  const int64_t positions[rows] = {0, 39, 17};
  for (size_t dim : {1u, 8u, 13u, 32u, 64u, 77u}) {
    for (size_t window : {0u, 5u}) {
      const size_t packed = rows * kv_heads * dim, cached = packed * max_tokens;
      const std::vector<float> query = normal(rng, packed * group), key = normal(rng, packed), value = normal(rng, packed);
      std::vector<float> keys = normal(rng, cached), values = normal(rng, cached), out(packed * group);
      const double scale = 1.0 / std::sqrt(static_cast<double>(dim));
      orz::attend::decode({query.data(), key.data(), value.data(), keys.data(), values.data(), positions, out.data(),
                           kv_heads, group, max_tokens, dim, scale, window, nullptr}, 0, rows);
      for (size_t r = 0; r < rows; ++r)
        for (size_t h = 0; h < kv_heads * group; ++h) {
          const size_t slot = (r * kv_heads + h / group) * max_tokens, last = static_cast<size_t>(positions[r]);
          const float* q = query.data() + (r * kv_heads * group + h) * dim;
          std::vector<double> want(dim);
          double total = 0.0;
          for (size_t k = window != 0 && last + 1 > window ? last + 1 - window : 0; k <= last; ++k) {
            double score = 0.0;
            for (size_t d = 0; d < dim; ++d) score += static_cast<double>(q[d]) * keys[(slot + k) * dim + d];
            const double weight = std::exp(score * scale);
            total += weight;
            for (size_t d = 0; d < dim; ++d) want[d] += weight * values[(slot + k) * dim + d];
          }
          for (size_t d = 0; d < dim; ++d)
            CHECK(near(out[(r * kv_heads * group + h) * dim + d], want[d] / total, 1e-5));
        }
    }
  }
}

// The gradients are compared with differences of the forward pass.
void test_attend_packed() {
  Rng rng(8);
  const size_t tokens = 8, kv_heads = 2, group = 2, heads = kv_heads * group;
  // Rows 0 to 2 are shared by two sequences; the third is alone.
  const std::vector<int64_t> rows = {0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7}, ends = {0, 5, 9, 11}, owned = {0, 3, 0};
  for (size_t dim : {1u, 8u, 13u, 64u}) {
    for (size_t window : {0u, 2u}) {
      std::vector<float> inputs[3] = {normal(rng, tokens * heads * dim), normal(rng, tokens * kv_heads * dim),
                                      normal(rng, tokens * kv_heads * dim)};
      const std::vector<float> slope = normal(rng, tokens * heads * dim);
      const orz::attend::Packed args{inputs[0].data(), inputs[1].data(), inputs[2].data(), rows.data(), ends.data(),
                                     owned.data(), 3, kv_heads, group, dim, 0.5, window};
      std::vector<float> out(tokens * heads * dim);
      std::vector<double> sums(tokens * heads);
      const auto loss = [&] {
        orz::attend::forward(args, out.data(), sums.data(), 0, kv_heads);
        double total = 0.0;
        for (size_t i = 0; i < out.size(); ++i) total += static_cast<double>(out[i]) * slope[i];
        return total;
      };
      loss();
      const std::vector<float> made = out;
      std::vector<float> grads[3] = {std::vector<float>(inputs[0].size()), std::vector<float>(inputs[1].size()),
                                     std::vector<float>(inputs[2].size())};
      orz::attend::backward(args, {made.data(), sums.data(), slope.data(), grads[0].data(), grads[1].data(),
                                   grads[2].data()}, 0, kv_heads);
      for (size_t n = 0; n < 3; ++n)
        for (size_t i = 0; i < inputs[n].size(); i += 5) {
          const float at = inputs[n][i], step = 1e-2f;
          inputs[n][i] = at + step;
          const double above = loss();
          inputs[n][i] = at - step;
          const double below = loss();
          inputs[n][i] = at;
          CHECK(std::abs((above - below) / (2.0 * step) - grads[n][i]) < 5e-3);
        }
    }
  }
}

// Against differences of the forward pass, as above.
void test_layers() {
  Rng rng(9);
  for (size_t dim : {1u, 7u, 33u}) {
    const size_t rows = 300, count = rows * dim;
    std::vector<float> x = normal(rng, count), weight = normal(rng, dim), out(count), inverse(rows), grad_x(count);
    const std::vector<float> slope = normal(rng, count);
    const orz::layers::Norm norm{x.data(), weight.data(), rows, dim, 1e-3};
    std::vector<float> parts(norm.blocks() * dim);
    const auto loss = [&] {
      orz::layers::norm_forward(norm, out.data(), inverse.data(), 0, rows);
      double total = 0.0;
      for (size_t i = 0; i < count; ++i) total += static_cast<double>(out[i]) * slope[i];
      return total;
    };
    const auto difference = [&](float& at) {
      const float before = at;
      at = before + 1e-3f;
      const double above = loss();
      at = before - 1e-3f;
      const double below = loss();
      at = before;
      return (above - below) / 2e-3;
    };
    loss();
    orz::layers::norm_backward(norm, inverse.data(), slope.data(), grad_x.data(), parts.data(), 0, norm.blocks());
    for (size_t i = 0; i < count; i += 97) CHECK(std::abs(difference(x[i]) - grad_x[i]) < 2e-2 * (1 + std::abs(grad_x[i])));
    for (size_t d = 0; d < dim; ++d) {
      double sum = 0.0;
      for (size_t block = 0; block < norm.blocks(); ++block) sum += parts[block * dim + d];
      CHECK(std::abs(difference(weight[d]) - sum) < 2e-2 * (1 + std::abs(sum)));
    }

    std::vector<float> grad_gate(count), grad_up(count);
    orz::layers::gate_forward(x.data(), slope.data(), out.data(), 0, count);
    orz::layers::gate_backward(x.data(), slope.data(), inverse.data(), grad_gate.data(), grad_up.data(), 0, rows);
    for (size_t i = 0; i < rows; ++i) {
      const double g = x[i], s = 1.0 / (1.0 + std::exp(-g));
      CHECK(near(out[i], g * s * slope[i], 1e-6));
      CHECK(near(grad_up[i], inverse[i] * g * s, 1e-6));
      CHECK(near(grad_gate[i], static_cast<double>(inverse[i]) * slope[i] * (s + g * s * (1.0 - s)), 1e-6));
    }
  }
}

void test_crc32c() {
  CHECK(orz::crc32c("123456789", 9) == 0xE3069283u);
  CHECK(orz::crc32c(nullptr, 0) == 0u);
  Rng rng(1);
  for (size_t size : {1u, 7u, 8u, 9u, 4096u, 12287u, 12288u, 12289u, 40000u}) {
    std::vector<uint8_t> data(size);
    for (uint8_t& byte : data) byte = static_cast<uint8_t>(rng());
    const uint32_t whole = orz::crc32c(data.data(), size);
    CHECK(whole == ~orz::crc_state_software(~0u, data.data(), size));
    for (size_t cut : {size_t{0}, size / 3, size}) {
      const uint32_t first = orz::crc32c(data.data(), cut);
      CHECK(orz::crc32c(data.data() + cut, size - cut, first) == whole);
      CHECK(orz::crc32c_combine(first, orz::crc32c(data.data() + cut, size - cut), size - cut) == whole);
    }
    // From every alignment.
    if (size > 8) CHECK(orz::crc32c(data.data() + 3, size - 3) == ~orz::crc_state_software(~0u, data.data() + 3, size - 3));
  }
}

void test_gae() {
  Rng rng(2);
  for (int32_t length : {0, 1, 2, 7, 8, 9, 10, 16, 17, 33, 1000}) {
    const std::vector<int32_t> cu_seqlens = {0, 3, 3 + length, 3 + length, 8 + length};
    const auto count = static_cast<size_t>(cu_seqlens.back());
    const auto rewards = normal(rng, count), values = normal(rng, count), bootstrap = normal(rng, 4);
    std::vector<uint8_t> mask(count);
    for (uint8_t& keep : mask) keep = rng() % 3 != 0;
    for (const uint8_t* kept : {static_cast<const uint8_t*>(nullptr), static_cast<const uint8_t*>(mask.data())}) {
      std::vector<float> advantages(count, NAN), returns(count, NAN);
      orz::gae({rewards.data(), values.data(), cu_seqlens.data(), 4, 0.99f, 0.9f, kept, bootstrap.data(),
                advantages.data(), returns.data()});
      for (size_t b = 0; b < 4; ++b) {
        double next_value = bootstrap[b], next_advantage = 0.0;
        for (int32_t t = cu_seqlens[b + 1] - 1; t >= cu_seqlens[b]; --t) {
          const auto i = static_cast<size_t>(t);
          if (kept != nullptr && !kept[i]) {
            CHECK(advantages[i] == 0.0f && returns[i] == 0.0f);
            continue;
          }
          const double delta = rewards[i] + 0.99 * next_value - values[i];
          next_advantage = delta + 0.99 * 0.9 * next_advantage;
          next_value = values[i];
          CHECK(near(advantages[i], next_advantage, 1e-5) && near(returns[i], next_advantage + next_value, 1e-5));
        }
      }
    }
  }
}

void test_pack() {
  Rng rng(3);
  for (int round = 0; round < 200; ++round) {
    std::vector<int64_t> lengths(rng() % 80);
    for (int64_t& length : lengths) length = 1 + static_cast<int64_t>(rng() % 300);
    const size_t ranks = 1 + rng() % 9;
    const orz::Packed packed = orz::pack(lengths, 400, ranks, 1.0, 0.001 * static_cast<double>(rng() % 2));
    CHECK(packed.size() == ranks);
    std::vector<int> seen(lengths.size(), 0);
    for (const auto& rank : packed) {
      CHECK(rank.size() == packed[0].size());
      for (const auto& bin : rank) {
        int64_t tokens = 0;
        for (orz::Index i : bin) {
          ++seen.at(static_cast<size_t>(i));
          tokens += lengths[static_cast<size_t>(i)];
        }
        CHECK(tokens <= 400 || bin.size() == 1);
      }
    }
    for (int count : seen) CHECK(count == 1);
  }
}

void test_softmax() {
  Rng rng(4);
  for (size_t columns : {1u, 7u, 8u, 9u, 100u, 1024u, 1032u, 3001u}) {
    const size_t rows = 4;
    std::vector<float> logits = normal(rng, rows * columns, 8.0f);
    if (columns > 2) logits[columns + 1] = logits[2 * columns - 1] = -std::numeric_limits<float>::infinity();
    std::vector<int64_t> targets(rows);
    for (int64_t& target : targets) target = static_cast<int64_t>(rng() % columns);
    targets[1] = 0;
    std::vector<float> exp(logits.size()), logprobs(rows), entropy(rows), lse(rows), total(rows);
    const float scale = 0.8f;
    orz::softmax::forward({logits.data(), columns, targets.data(), scale, exp.data(), logprobs.data(), entropy.data(),
                           lse.data(), total.data()},
                          0, rows);
    const std::vector<float> slopes = normal(rng, rows), mixes = normal(rng, rows);
    std::vector<float> gradient = logits;  // in place
    orz::softmax::backward({gradient.data(), columns, targets.data(), scale, lse.data(), entropy.data(), slopes.data(),
                            mixes.data(), gradient.data()},
                           0, rows);
    for (size_t row = 0; row < rows; ++row) {
      const float* z = &logits[row * columns];
      const auto target = static_cast<size_t>(targets[row]);
      double top = -INFINITY, sum = 0.0, want_entropy = 0.0;
      for (size_t v = 0; v < columns; ++v) top = std::max(top, double{z[v]} * scale);
      for (size_t v = 0; v < columns; ++v) sum += std::exp(double{z[v]} * scale - top);
      const auto log_p = [&](size_t v) { return double{z[v]} * scale - top - std::log(sum); };
      for (size_t v = 0; v < columns; ++v)
        if (std::isfinite(log_p(v))) want_entropy -= std::exp(log_p(v)) * log_p(v);
      CHECK(near(logprobs[row], log_p(target), 1e-5) && near(entropy[row], want_entropy, 1e-5));
      for (size_t v = 0; v < columns; ++v) {
        const double p = std::exp(log_p(v));
        CHECK(near(exp[row * columns + v], p * sum, 1e-5));
        const double spread = p > 0 ? p * (log_p(v) + want_entropy) : 0.0;
        const double want = scale * (slopes[row] * ((v == target) - p) - mixes[row] * spread);
        CHECK(near(gradient[row * columns + v], want, 2e-5));
      }
    }
  }
  std::vector<float> bad = {1.0f, NAN, 2.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
  const std::vector<int64_t> target = {0};
  float out[4];
  orz::softmax::forward({bad.data(), 9, target.data(), 1.0f, nullptr, &out[0], &out[1], &out[2], &out[3]}, 0, 1);
  CHECK(std::isnan(out[0]));
}

void test_losses() {
  Rng rng(7);
  for (size_t count : {0u, 1u, 511u, 512u, 513u, 3000u}) {
    const auto current = normal(rng, count), sampled = normal(rng, count), advantages = normal(rng, count);
    std::vector<uint8_t> mask(count);
    for (uint8_t& keep : mask) keep = rng() % 3 != 0;
    const std::vector<float> denominator(1, 2.0f);
    const orz::PolicyLoss policy{current.data(), sampled.data(),     advantages.data(), nullptr, nullptr,  mask.data(),
                                 denominator.data(), false, 0.8f, 1.2f, INFINITY, INFINITY};
    std::vector<float> slopes(count, NAN);
    std::vector<double> stats(orz::PolicyLoss::Stats::FIELDS, NAN);
    orz::run_loss(policy, static_cast<int64_t>(count), slopes.data(), stats.data());
    double loss = 0.0, tokens = 0.0;
    for (size_t i = 0; i < count; ++i) {
      const double ratio = std::exp(double{current[i]} - sampled[i]), a = advantages[i];
      const double clipped = std::min(std::max(ratio, 0.8), 1.2);
      tokens += mask[i];
      if (mask[i]) loss -= std::min(ratio * a, clipped * a) / 2.0;
      CHECK(near(slopes[i], !mask[i] || ratio * a > clipped * a ? 0.0 : -ratio * a / 2.0, 1e-5));
    }
    CHECK(stats[0] == tokens && near(stats[orz::kLossField], loss, 1e-5));
    const orz::ValueLoss value{current.data(), sampled.data(), advantages.data(), nullptr, denominator.data(), false, 0.2f};
    std::vector<double> sums(orz::ValueLoss::Stats::FIELDS, NAN);
    orz::run_loss(value, static_cast<int64_t>(count), slopes.data(), sums.data());
    CHECK(sums[0] == static_cast<double>(count) && std::isfinite(sums[1]));
  }
}

template <typename Word>
std::vector<uint8_t> encode(const std::vector<Word>& fresh, const std::vector<Word>& old, size_t threads) {
  orz::delta::Encoder encoder(fresh.data(), old.data(), fresh.size(), threads);
  std::vector<uint8_t> payload(encoder.size());
  encoder.write(payload.data());
  return payload;
}

template <typename Word>
void test_delta_round_trips() {
  Rng rng(5);
  for (size_t count : {0u, 1u, 63u, 64u, 65u, 70000u, 600000u}) {
    for (uint64_t rarity : {1u, 3u, 50u, 2000u, 1000000u}) {
      std::vector<Word> old(count);
      for (Word& word : old) word = static_cast<Word>(rng());
      std::vector<Word> fresh = old;
      for (Word& word : fresh)
        if (rng() % rarity == 0) word = static_cast<Word>(word + 1);
      const auto payload = encode(fresh, old, 1);
      CHECK(payload == encode(fresh, old, 3));
      CHECK(payload.size() <= orz::delta::kHeaderBytes + count * sizeof(Word));
      for (size_t threads : {1u, 3u}) {
        std::vector<Word> words = old;
        orz::delta::apply(words.data(), count, payload.data(), payload.size(), threads);
        CHECK(words == fresh);
      }
    }
  }
}

// Payloads an attacker could make: their checksums are right, their content is not. Every one must be refused, or be
// what it claims; none may touch the words on the way to being refused.
void test_delta_against_forgeries() {
  Rng rng(6);
  const size_t count = 70000;
  std::vector<uint16_t> old(count);
  for (uint16_t& word : old) word = static_cast<uint16_t>(rng());
  std::vector<uint16_t> fresh = old;
  for (uint16_t& word : fresh)
    if (rng() % 50 == 0) word = static_cast<uint16_t>(word + 1);
  const auto good = encode(fresh, old, 1);
  int accepted = 0;
  for (int round = 0; round < 3000; ++round) {
    auto payload = good;
    const size_t edits = 1 + rng() % 4;
    for (size_t e = 0; e < edits; ++e) {
      // Block headers and the ends of the sections are where the arithmetic is.
      const size_t reach = rng() % 2 == 0 ? std::min<size_t>(payload.size(), 64) : payload.size();
      if (reach == 0) break;
      payload[rng() % reach] = static_cast<uint8_t>(rng() % 4 == 0 ? 255 : rng());
    }
    if (rng() % 4 == 0) payload.resize(rng() % (payload.size() + 40));
    if (payload.size() >= orz::delta::kHeaderBytes) {
      orz::delta::Header header;
      header.word_bytes = rng() % 16 == 0 ? payload[5] : 2;
      header.kind = rng() % 16 == 0 ? payload[6] : static_cast<uint8_t>(rng() % 2);
      header.num_words = rng() % 16 == 0 ? rng() : count;
      header.old_crc = orz::crc32c(old.data(), count * 2);
      header.new_crc = orz::crc32c(fresh.data(), count * 2);
      header.body_bytes = payload.size() - orz::delta::kHeaderBytes;
      header.body_crc = orz::crc32c(payload.data() + orz::delta::kHeaderBytes, header.body_bytes);
      header.write(payload.data());
    }
    std::vector<uint16_t> words = old;
    try {
      orz::delta::apply(words.data(), count, payload.data(), payload.size(), 1 + rng() % 3);
      CHECK(words == fresh);
      ++accepted;
    } catch (const orz::delta::Error&) {
      CHECK(words == old);
    }
  }
  CHECK(accepted < 300);
}

}  // namespace

int main() {
  test_attend();
  test_attend_packed();
  test_layers();
  test_gemm();
  test_decode();
  test_sample();
  test_crc32c();
  test_gae();
  test_pack();
  test_softmax();
  test_losses();
  test_delta_round_trips<uint16_t>();
  test_delta_round_trips<uint32_t>();
  test_delta_against_forgeries();
  const char* widest = orz::has_avx512() ? "avx512" : orz::has_avx2() ? "avx2" : "scalar";
  std::printf("csrc/tests: passed (%s%s)\n", widest, orz::has_sse42() ? ", sse4.2" : "");
  return 0;
}
