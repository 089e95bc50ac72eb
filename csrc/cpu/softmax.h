// Rows of logits to log-probs, entropies and gradients: one pass for the maximum and one for everything else, while the
// row is in the cache. The equations are those of orz_async/ops/reference/head.py.
//
// A logit of -inf is legal and has probability 0; NaN makes the whole row NaN (max and min return their second operand
// for NaN, so the constant comes first). exp is a polynomial good to two units in the last place; sums are
// folded into float64 every kFold terms, so that V = 152,064 costs no digits.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "dispatch.h"

namespace orz::softmax {

constexpr size_t kFold = 1024;
// exp of less is a denormal float: 0 here.
constexpr float kExpFloor = -87.0f;

struct RowSums {
  double total = 0.0;  // sum of exp(u), u = z / temperature - max
  double dot = 0.0;    // sum of exp(u) * u
};

inline float row_max_scalar(const float* z, size_t count) {
  float top = -std::numeric_limits<float>::infinity();
  for (size_t v = 0; v < count; ++v) top = std::max(top, z[v]);
  return top;
}

// exp(u) goes to `out` unless it is null; `out` may be `z`.
inline RowSums row_exp_scalar(const float* z, size_t count, float scale, float shift, float* out) {
  RowSums sums;
  for (size_t v = 0; v < count; ++v) {
    const float u = std::max(z[v] * scale - shift, kExpFloor);
    const float e = u <= kExpFloor ? 0.0f : std::exp(u);
    sums.total += static_cast<double>(e);
    sums.dot += static_cast<double>(e * u);
    if (out != nullptr) out[v] = e;
  }
  return sums;
}

// out = -p * (slope + g * (log p + entropy)), p = exp(z * scale - lse); the target's own term is added by the caller.
inline void row_gradient_scalar(const float* z, size_t count, float scale, float lse, float slope, float g,
                                float entropy, float* out) {
  for (size_t v = 0; v < count; ++v) {
    const float log_p = std::max(z[v] * scale - lse, kExpFloor);
    const float p = log_p <= kExpFloor ? 0.0f : std::exp(log_p);
    out[v] = -p * (slope + g * (log_p + entropy));
  }
}

#if ORZ_X86
// Cody-Waite reduction to |r| <= ln 2 / 2 and a polynomial of degree 6 (Cephes expf).
ORZ_TARGET_AVX2 inline __m256 exp8(__m256 x) {
  const __m256 floor8 = _mm256_set1_ps(kExpFloor);
  const __m256 alive = _mm256_cmp_ps(x, floor8, _CMP_NLE_UQ);
  x = _mm256_min_ps(_mm256_set1_ps(88.0f), _mm256_max_ps(floor8, x));
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504088896341f)),
                                   _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
  __m256 p = _mm256_set1_ps(1.9875691500e-4f);
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.3981999507e-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(8.3334519073e-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(4.1665795894e-2f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.6666665459e-1f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(5.0000001201e-1f));
  p = _mm256_fmadd_ps(p, _mm256_mul_ps(r, r), _mm256_add_ps(r, _mm256_set1_ps(1.0f)));
  const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_and_ps(alive, _mm256_mul_ps(p, _mm256_castsi256_ps(power)));
}

// Adds eight floats in float64, always in the same order.
ORZ_TARGET_AVX2 inline double fold(__m256 x) {
  const __m256d halves =
      _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(x)), _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)));
  const __m128d pair = _mm_add_pd(_mm256_castpd256_pd128(halves), _mm256_extractf128_pd(halves, 1));
  return _mm_cvtsd_f64(pair) + _mm_cvtsd_f64(_mm_unpackhi_pd(pair, pair));
}

ORZ_TARGET_AVX2 inline float row_max_avx2(const float* z, size_t count) {
  const size_t whole = count / 8 * 8;
  float top = row_max_scalar(z + whole, count - whole);
  if (whole == 0) return top;
  __m256 top8 = _mm256_loadu_ps(z);
  for (size_t v = 8; v < whole; v += 8) top8 = _mm256_max_ps(top8, _mm256_loadu_ps(z + v));
  alignas(32) float lanes[8];
  _mm256_store_ps(lanes, top8);
  for (float lane : lanes) top = std::max(top, lane);
  return top;
}

ORZ_TARGET_AVX2 inline RowSums row_exp_avx2(const float* z, size_t count, float scale, float shift, float* out) {
  const __m256 scale8 = _mm256_set1_ps(scale), shift8 = _mm256_set1_ps(shift), floor8 = _mm256_set1_ps(kExpFloor);
  RowSums sums;
  size_t v = 0;
  while (v + 8 <= count) {
    const size_t stop = std::min(count, v + kFold);
    __m256 total = _mm256_setzero_ps(), dot = _mm256_setzero_ps();
    for (; v + 8 <= stop; v += 8) {
      const __m256 u = _mm256_max_ps(floor8, _mm256_fmsub_ps(_mm256_loadu_ps(z + v), scale8, shift8));
      const __m256 e = exp8(u);
      total = _mm256_add_ps(total, e);
      dot = _mm256_fmadd_ps(e, u, dot);
      if (out != nullptr) _mm256_storeu_ps(out + v, e);
    }
    sums.total += fold(total);
    sums.dot += fold(dot);
  }
  const RowSums rest = row_exp_scalar(z + v, count - v, scale, shift, out == nullptr ? nullptr : out + v);
  sums.total += rest.total;
  sums.dot += rest.dot;
  return sums;
}

ORZ_TARGET_AVX2 inline void row_gradient_avx2(const float* z, size_t count, float scale, float lse, float slope,
                                              float g, float entropy, float* out) {
  const __m256 scale8 = _mm256_set1_ps(scale), lse8 = _mm256_set1_ps(lse), floor8 = _mm256_set1_ps(kExpFloor);
  const __m256 slope8 = _mm256_set1_ps(slope + g * entropy), g8 = _mm256_set1_ps(g);
  const __m256 sign = _mm256_set1_ps(-0.0f);
  size_t v = 0;
  for (; v + 8 <= count; v += 8) {
    const __m256 log_p = _mm256_max_ps(floor8, _mm256_fmsub_ps(_mm256_loadu_ps(z + v), scale8, lse8));
    const __m256 p = _mm256_xor_ps(exp8(log_p), sign);
    _mm256_storeu_ps(out + v, _mm256_mul_ps(p, _mm256_fmadd_ps(g8, log_p, slope8)));
  }
  row_gradient_scalar(z + v, count - v, scale, lse, slope, g, entropy, out + v);
}
#endif

inline float row_max(const float* z, size_t count) {
#if ORZ_X86
  if (has_avx2()) return row_max_avx2(z, count);
#endif
  return row_max_scalar(z, count);
}

inline RowSums row_exp(const float* z, size_t count, float scale, float shift, float* out) {
#if ORZ_X86
  if (has_avx2()) return row_exp_avx2(z, count, scale, shift, out);
#endif
  return row_exp_scalar(z, count, scale, shift, out);
}

inline void row_gradient(const float* z, size_t count, float scale, float lse, float slope, float g, float entropy,
                         float* out) {
#if ORZ_X86
  if (has_avx2()) {
    row_gradient_avx2(z, count, scale, lse, slope, g, entropy, out);
    return;
  }
#endif
  row_gradient_scalar(z, count, scale, lse, slope, g, entropy, out);
}

struct ForwardArgs {
  const float* logits;  // [rows, columns]
  size_t columns;
  const int64_t* targets;  // [rows], each in [0, columns): checked by the caller
  float scale;             // 1 / temperature
  float* exp;              // [rows, columns], may be `logits`, or null: not wanted
  float* logprobs;         // [rows], and so the rest
  float* entropy;
  float* logsumexp;
  float* total;
};

// Rows [begin, end).
inline void forward(const ForwardArgs& args, size_t begin, size_t end) {
  for (size_t row = begin; row < end; ++row) {
    const float* z = args.logits + row * args.columns;
    const float shift = row_max(z, args.columns) * args.scale;
    // Read before exp may overwrite it.
    const float picked = z[static_cast<size_t>(args.targets[row])] * args.scale - shift;
    float* out = args.exp == nullptr ? nullptr : args.exp + row * args.columns;
    const RowSums sums = row_exp(z, args.columns, args.scale, shift, out);
    const double log_total = std::log(sums.total);
    args.logprobs[row] = static_cast<float>(static_cast<double>(picked) - log_total);
    args.entropy[row] = static_cast<float>(log_total - sums.dot / sums.total);
    args.logsumexp[row] = static_cast<float>(static_cast<double>(shift) + log_total);
    args.total[row] = static_cast<float>(sums.total);
  }
}

struct BackwardArgs {
  const float* logits;
  size_t columns;
  const int64_t* targets;
  float scale;
  const float* logsumexp;
  const float* entropy;
  const float* grad_logprobs;
  const float* grad_entropy;  // or null
  float* grad_logits;         // may be `logits`
};

inline void backward(const BackwardArgs& args, size_t begin, size_t end) {
  for (size_t row = begin; row < end; ++row) {
    const float slope = args.grad_logprobs[row] * args.scale;
    const float g = args.grad_entropy == nullptr ? 0.0f : args.grad_entropy[row] * args.scale;
    float* out = args.grad_logits + row * args.columns;
    row_gradient(args.logits + row * args.columns, args.columns, args.scale, args.logsumexp[row], slope, g,
                 args.entropy[row], out);
    out[static_cast<size_t>(args.targets[row])] += slope;
  }
}

}  // namespace orz::softmax
