// Causal attention within the sequences of a packed batch, forward and backward, without padding and without a matrix
// of scores: the attention of the learner on a CPU. Sequences may share leading rows (the prompt of several samples),
// which are queries once, in the first sequence that has them, and keys of all.
//
// Products of queries and keys are summed in float64 (see _Attend in orz_async/ops/attention.py); the rest is float32.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "attend.h"

namespace orz::attend {

struct Packed {
  const float* query;     // [tokens, kv_heads * group, dim]
  const float* key;       // [tokens, kv_heads, dim]
  const float* value;     // the same
  const int64_t* rows;    // the packed row of each position of each sequence, one sequence after the other
  const int64_t* ends;    // [sequences + 1]: sequence b is rows[ends[b]] to rows[ends[b + 1] - 1]
  const int64_t* owned;   // [sequences]: the first position that is a query; those before are an earlier sequence's
  size_t sequences;
  size_t kv_heads;
  size_t group;           // query heads that share a key head
  size_t dim;
  double scale;
  size_t window;          // keys a query sees, itself included; 0: all before it

  size_t heads() const { return kv_heads * group; }
  size_t length(size_t b) const { return static_cast<size_t>(ends[b + 1] - ends[b]); }
  // The packed row of a position of sequence b.
  size_t row(size_t b, size_t position) const {
    return static_cast<size_t>(rows[static_cast<size_t>(ends[b]) + position]);
  }
  size_t first_seen(size_t position) const {
    return window != 0 && position + 1 > window ? position + 1 - window : 0;
  }
};

// Of one sequence and key head: its rows of a [tokens, kv_heads, dim] tensor, next to each other.
inline void gather(const Packed& args, size_t b, size_t kv_head, const float* from, std::vector<float>& to) {
  to.resize(args.length(b) * args.dim);
  for (size_t k = 0; k < args.length(b); ++k)
    std::copy_n(from + (args.row(b, k) * args.kv_heads + kv_head) * args.dim, args.dim, to.data() + k * args.dim);
}

inline void scatter_add(const Packed& args, size_t b, size_t kv_head, const std::vector<float>& from, float* to) {
  for (size_t k = 0; k < args.length(b); ++k) {
    float* out = to + (args.row(b, k) * args.kv_heads + kv_head) * args.dim;
    for (size_t d = 0; d < args.dim; ++d) out[d] += from[k * args.dim + d];
  }
}

// Key heads [begin, end) of all sequences: out [tokens, heads, dim] and the logarithm of the sum of exp(score),
// [tokens, heads].
inline void forward(const Packed& args, float* out, double* logsumexp, size_t begin, size_t end) {
  std::vector<float> keys, values, weights;
  std::vector<double> scores, scaled(args.dim);
  for (size_t b = 0; b < args.sequences; ++b) {
    const size_t length = args.length(b);
    scores.resize(length);
    weights.resize(length);
    for (size_t h = begin; h < end; ++h) {
      gather(args, b, h, args.key, keys);
      gather(args, b, h, args.value, values);
      for (size_t i = static_cast<size_t>(args.owned[b]); i < length; ++i) {
        const size_t first = args.first_seen(i), row = args.row(b, i);
        for (size_t g = 0; g < args.group; ++g) {
          const size_t at = row * args.heads() + h * args.group + g;
          logsumexp[at] = head(args.query + at * args.dim, keys.data() + first * args.dim,
                               values.data() + first * args.dim, i + 1 - first, args.dim, args.scale, scores, weights,
                               scaled, out + at * args.dim);
        }
      }
    }
  }
}

inline float dot_float_scalar(const float* a, const float* b, size_t begin, size_t dim) {
  float sum = 0.0f;
  for (size_t d = begin; d < dim; ++d) sum += a[d] * b[d];
  return sum;
}

// out_a += a * x, out_b += b * y
inline void add_two_scalar(float a, const float* x, float* out_a, float b, const float* y, float* out_b, size_t begin,
                           size_t dim) {
  for (size_t d = begin; d < dim; ++d) {
    out_a[d] += a * x[d];
    out_b[d] += b * y[d];
  }
}

#if ORZ_X86
ORZ_TARGET_AVX2 inline float dot_float_avx2(const float* a, const float* b, size_t dim) {
  __m256 sum = _mm256_setzero_ps();
  size_t d = 0;
  for (; d + 8 <= dim; d += 8) sum = _mm256_fmadd_ps(_mm256_loadu_ps(a + d), _mm256_loadu_ps(b + d), sum);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four))) + dot_float_scalar(a, b, d, dim);
}

ORZ_TARGET_AVX2 inline void add_two_avx2(float a, const float* x, float* out_a, float b, const float* y, float* out_b,
                                         size_t dim) {
  const __m256 a8 = _mm256_set1_ps(a), b8 = _mm256_set1_ps(b);
  size_t d = 0;
  for (; d + 8 <= dim; d += 8) {
    _mm256_storeu_ps(out_a + d, _mm256_fmadd_ps(a8, _mm256_loadu_ps(x + d), _mm256_loadu_ps(out_a + d)));
    _mm256_storeu_ps(out_b + d, _mm256_fmadd_ps(b8, _mm256_loadu_ps(y + d), _mm256_loadu_ps(out_b + d)));
  }
  add_two_scalar(a, x, out_a, b, y, out_b, d, dim);
}
#endif

inline float dot_float(const float* a, const float* b, size_t dim) {
#if ORZ_X86
  if (has_avx2()) return dot_float_avx2(a, b, dim);
#endif
  return dot_float_scalar(a, b, 0, dim);
}

inline void add_two(float a, const float* x, float* out_a, float b, const float* y, float* out_b, size_t dim) {
#if ORZ_X86
  if (has_avx2()) {
    add_two_avx2(a, x, out_a, b, y, out_b, dim);
    return;
  }
#endif
  add_two_scalar(a, x, out_a, b, y, out_b, 0, dim);
}

struct Gradients {
  const float* out;        // of forward
  const double* logsumexp;
  const float* grad_out;   // [tokens, heads, dim]
  float* grad_query;       // [tokens, heads, dim]: every row is written
  float* grad_key;         // [tokens, kv_heads, dim]: added to
  float* grad_value;       // the same
};

// One query head over the `count` keys it sees. With P the weights and dP = grad_out V^T:
//   dS = scale * P * (dP - grad_out . out),  dQ = dS K,  dK += dS^T Q,  dV += P^T grad_out
inline void backward_head(const Packed& args, const Gradients& to, size_t at, const float* keys, const float* values,
                          size_t count, std::vector<float>& weights, std::vector<float>& slopes,
                          std::vector<double>& scaled, float* grad_keys, float* grad_values) {
  const size_t dim = args.dim;
  const float *query = args.query + at * dim, *grad_out = to.grad_out + at * dim;
  for (size_t d = 0; d < dim; ++d) scaled[d] = static_cast<double>(query[d]) * args.scale;
  for (size_t k = 0; k < count; ++k)
    weights[k] = static_cast<float>(dot(scaled.data(), keys + k * dim, dim) - to.logsumexp[at]);
  softmax::row_exp(weights.data(), count, 1.0f, 0.0f, weights.data());
  const float delta = dot_float(grad_out, to.out + at * dim, dim), scale = static_cast<float>(args.scale);
  for (size_t k = 0; k < count; ++k) {
    slopes[k] = weights[k] * (dot_float(grad_out, values + k * dim, dim) - delta) * scale;
    add_two(slopes[k], query, grad_keys + k * dim, weights[k], grad_out, grad_values + k * dim, dim);
  }
  weigh(slopes.data(), keys, count, dim, 1.0f, to.grad_query + at * dim);
}

// Key heads [begin, end) of all sequences. What several sequences add to a row is added in their order.
inline void backward(const Packed& args, const Gradients& to, size_t begin, size_t end) {
  std::vector<float> keys, values, grad_keys, grad_values, weights, slopes;
  std::vector<double> scaled(args.dim);
  for (size_t b = 0; b < args.sequences; ++b) {
    const size_t length = args.length(b);
    weights.resize(length);
    slopes.resize(length);
    for (size_t h = begin; h < end; ++h) {
      gather(args, b, h, args.key, keys);
      gather(args, b, h, args.value, values);
      grad_keys.assign(length * args.dim, 0.0f);
      grad_values.assign(length * args.dim, 0.0f);
      for (size_t i = static_cast<size_t>(args.owned[b]); i < length; ++i) {
        const size_t first = args.first_seen(i), row = args.row(b, i);
        const size_t from = first * args.dim;
        for (size_t g = 0; g < args.group; ++g)
          backward_head(args, to, row * args.heads() + h * args.group + g, keys.data() + from, values.data() + from,
                        i + 1 - first, weights, slopes, scaled, grad_keys.data() + from, grad_values.data() + from);
      }
      scatter_add(args, b, h, grad_keys, to.grad_key);
      scatter_add(args, b, h, grad_values, to.grad_value);
    }
  }
}

}  // namespace orz::attend
