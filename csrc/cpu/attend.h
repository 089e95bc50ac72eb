// One query a sequence over its keys and values in a slot cache: the attention of a decode step. Each row reads exactly
// the keys it has, so that no result depends on the rows beside it, and a long sequence costs the others nothing.
//
// Products of queries and keys are summed in float64 (see _Attend in orz_async/ops/attention.py); the rest is float32.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "dispatch.h"
#include "softmax.h"

namespace orz::attend {

struct Args {
  const float* query;   // [rows, kv_heads * group, dim]
  const float* key;     // [rows, kv_heads, dim]: of the token that is decoded; written to the cache
  const float* value;   // the same
  float* keys;          // [slots, kv_heads, max_tokens, dim]
  float* values;        // the same
  const int64_t* positions;  // [rows], of the token that is decoded; row r is in slot r. Checked by the caller
  float* out;           // [rows, kv_heads * group, dim]
  size_t kv_heads;
  size_t group;         // query heads that share a key head
  size_t max_tokens;
  size_t dim;
  double scale;
  size_t window;        // keys a query sees, itself included; 0: all before it
  const int64_t* slots;  // [rows], or null: row r is in slot r. Rows of one slot are in the order of their positions
};

inline double dot_scalar(const double* query, const float* key, size_t begin, size_t dim) {
  double sum = 0.0;
  for (size_t d = begin; d < dim; ++d) sum += query[d] * static_cast<double>(key[d]);
  return sum;
}

inline void weigh_scalar(const float* weights, const float* values, size_t count, size_t begin, size_t dim, float scale,
                         float* out) {
  for (size_t d = begin; d < dim; ++d) {
    float sum = 0.0f;
    for (size_t k = 0; k < count; ++k) sum += weights[k] * values[k * dim + d];
    out[d] = sum * scale;
  }
}

#if ORZ_X86
ORZ_TARGET_AVX2 inline double dot_avx2(const double* query, const float* key, size_t dim) {
  __m256d low = _mm256_setzero_pd(), high = _mm256_setzero_pd();
  size_t d = 0;
  for (; d + 8 <= dim; d += 8) {
    low = _mm256_fmadd_pd(_mm256_loadu_pd(query + d), _mm256_cvtps_pd(_mm_loadu_ps(key + d)), low);
    high = _mm256_fmadd_pd(_mm256_loadu_pd(query + d + 4), _mm256_cvtps_pd(_mm_loadu_ps(key + d + 4)), high);
  }
  const __m256d both = _mm256_add_pd(low, high);
  const __m128d pair = _mm_add_pd(_mm256_castpd256_pd128(both), _mm256_extractf128_pd(both, 1));
  return _mm_cvtsd_f64(pair) + _mm_cvtsd_f64(_mm_unpackhi_pd(pair, pair)) + dot_scalar(query, key, d, dim);
}

ORZ_TARGET_AVX2 inline void weigh_avx2(const float* weights, const float* values, size_t count, size_t dim, float scale,
                                       float* out) {
  const __m256 scale8 = _mm256_set1_ps(scale);
  size_t d = 0;
  for (; d + 32 <= dim; d += 32) {
    __m256 a = _mm256_setzero_ps(), b = a, c = a, e = a;
    for (size_t k = 0; k < count; ++k) {
      const __m256 weight = _mm256_set1_ps(weights[k]);
      const float* row = values + k * dim + d;
      a = _mm256_fmadd_ps(weight, _mm256_loadu_ps(row), a);
      b = _mm256_fmadd_ps(weight, _mm256_loadu_ps(row + 8), b);
      c = _mm256_fmadd_ps(weight, _mm256_loadu_ps(row + 16), c);
      e = _mm256_fmadd_ps(weight, _mm256_loadu_ps(row + 24), e);
    }
    _mm256_storeu_ps(out + d, _mm256_mul_ps(a, scale8));
    _mm256_storeu_ps(out + d + 8, _mm256_mul_ps(b, scale8));
    _mm256_storeu_ps(out + d + 16, _mm256_mul_ps(c, scale8));
    _mm256_storeu_ps(out + d + 24, _mm256_mul_ps(e, scale8));
  }
  for (; d + 8 <= dim; d += 8) {
    __m256 sum = _mm256_setzero_ps();
    for (size_t k = 0; k < count; ++k)
      sum = _mm256_fmadd_ps(_mm256_set1_ps(weights[k]), _mm256_loadu_ps(values + k * dim + d), sum);
    _mm256_storeu_ps(out + d, _mm256_mul_ps(sum, scale8));
  }
  weigh_scalar(weights, values, count, d, dim, scale, out);
}
#endif

inline double dot(const double* query, const float* key, size_t dim) {
#if ORZ_X86
  if (has_avx2()) return dot_avx2(query, key, dim);
#endif
  return dot_scalar(query, key, 0, dim);
}

inline void weigh(const float* weights, const float* values, size_t count, size_t dim, float scale, float* out) {
#if ORZ_X86
  if (has_avx2()) {
    weigh_avx2(weights, values, count, dim, scale, out);
    return;
  }
#endif
  weigh_scalar(weights, values, count, 0, dim, scale, out);
}

// One query head: `keys` and `values` [count, dim] are those it sees. Returns the logarithm of the sum of exp(score). A
// score that is not a number makes the whole head so.
inline double head(const float* query, const float* keys, const float* values, size_t count, size_t dim, double scale,
                   std::vector<double>& scores, std::vector<float>& weights, std::vector<double>& scaled, float* out) {
  for (size_t d = 0; d < dim; ++d) scaled[d] = static_cast<double>(query[d]) * scale;
  double top = -std::numeric_limits<double>::infinity();
  for (size_t k = 0; k < count; ++k) {
    scores[k] = dot(scaled.data(), keys + k * dim, dim);
    top = std::max(top, scores[k]);
  }
  for (size_t k = 0; k < count; ++k) weights[k] = static_cast<float>(scores[k] - top);
  const softmax::RowSums sums = softmax::row_exp(weights.data(), count, 1.0f, 0.0f, weights.data());
  weigh(weights.data(), values, count, dim, static_cast<float>(1.0 / sums.total), out);
  return top + std::log(sums.total);
}

// Rows [begin, end): write their key and value, then attend.
inline void decode(const Args& args, size_t begin, size_t end) {
  std::vector<double> scores(args.max_tokens), scaled(args.dim);
  std::vector<float> weights(args.max_tokens);
  for (size_t row = begin; row < end; ++row) {
    const size_t position = static_cast<size_t>(args.positions[row]);
    const size_t slot = args.slots == nullptr ? row : static_cast<size_t>(args.slots[row]);
    const size_t first = args.window != 0 && position + 1 > args.window ? position + 1 - args.window : 0;
    for (size_t h = 0; h < args.kv_heads; ++h) {
      const size_t cache = (slot * args.kv_heads + h) * args.max_tokens * args.dim;
      const size_t packed = (row * args.kv_heads + h) * args.dim;
      std::copy_n(args.key + packed, args.dim, args.keys + cache + position * args.dim);
      std::copy_n(args.value + packed, args.dim, args.values + cache + position * args.dim);
      for (size_t g = 0; g < args.group; ++g) {
        const size_t at = packed * args.group + g * args.dim;
        head(args.query + at, args.keys + cache + first * args.dim, args.values + cache + first * args.dim,
             position + 1 - first, args.dim, args.scale, scores, weights, scaled, args.out + at);
      }
    }
  }
}

}  // namespace orz::attend
