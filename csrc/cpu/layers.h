// The elementwise parts of a Llama-like layer on a CPU, forward and backward: RMSNorm (Zhang and Sennrich 2019, eq. 4)
// and the gate silu(gate) * up of SwiGLU (Shazeer 2020, eq. 6). One pass over memory where torch makes five to ten.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

#include "dispatch.h"
#include "softmax.h"

namespace orz::layers {

// Rows whose share of a weight's gradient is summed together, whoever does it: the bits depend on no number of threads.
constexpr size_t kBlockRows = 256;

inline double dot_scalar(const float* a, const float* b, size_t begin, size_t count) {
  double sum = 0.0;
  for (size_t i = begin; i < count; ++i) sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  return sum;
}

#if ORZ_X86
ORZ_TARGET_AVX2 inline double dot_avx2(const float* a, const float* b, size_t count) {
  __m256 low = _mm256_setzero_ps(), high = low;
  size_t i = 0;
  for (; i + 16 <= count; i += 16) {
    low = _mm256_fmadd_ps(_mm256_loadu_ps(a + i), _mm256_loadu_ps(b + i), low);
    high = _mm256_fmadd_ps(_mm256_loadu_ps(a + i + 8), _mm256_loadu_ps(b + i + 8), high);
  }
  return softmax::fold(low) + softmax::fold(high) + dot_scalar(a, b, i, count);
}
#endif

inline double dot(const float* a, const float* b, size_t count) {
#if ORZ_X86
  if (has_avx2()) return dot_avx2(a, b, count);
#endif
  return dot_scalar(a, b, 0, count);
}

struct Norm {
  const float* x;       // [rows, dim]
  const float* weight;  // [dim]
  size_t rows;
  size_t dim;
  double eps;

  size_t blocks() const { return (rows + kBlockRows - 1) / kBlockRows; }
};

// Rows [begin, end): out = weight * x / rms(x), and 1 / rms(x).
inline void norm_forward(const Norm& args, float* out, float* inverse, size_t begin, size_t end) {
  for (size_t row = begin; row < end; ++row) {
    const float* x = args.x + row * args.dim;
    const double mean = dot(x, x, args.dim) / static_cast<double>(args.dim);
    const float scale = inverse[row] = static_cast<float>(1.0 / std::sqrt(mean + args.eps));
    float* y = out + row * args.dim;
    for (size_t d = 0; d < args.dim; ++d) y[d] = args.weight[d] * (x[d] * scale);
  }
}

// Row blocks [begin, end). With g = grad_out * weight and r = 1 / rms(x):
//   grad_x = r g - x r^3 (g . x) / dim,   grad_weight = sum over rows of grad_out * x * r
// The latter goes to the block's own row of `parts` [blocks, dim].
inline void norm_backward(const Norm& args, const float* inverse, const float* grad_out, float* grad_x, float* parts,
                          size_t begin, size_t end) {
  std::vector<float> slopes(args.dim);
  for (size_t block = begin; block < end; ++block) {
    float* part = parts + block * args.dim;
    std::fill_n(part, args.dim, 0.0f);
    const size_t last = std::min(args.rows, (block + 1) * kBlockRows);
    for (size_t row = block * kBlockRows; row < last; ++row) {
      const float *x = args.x + row * args.dim, *g = grad_out + row * args.dim;
      const float r = inverse[row];
      for (size_t d = 0; d < args.dim; ++d) slopes[d] = g[d] * args.weight[d];
      const double along = dot(slopes.data(), x, args.dim) / static_cast<double>(args.dim);
      const float pull = static_cast<float>(along * r * r * r);
      float* out = grad_x + row * args.dim;
      for (size_t d = 0; d < args.dim; ++d) {
        out[d] = slopes[d] * r - x[d] * pull;
        part[d] += g[d] * (x[d] * r);
      }
    }
  }
}

inline float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

inline void gate_forward_scalar(const float* gate, const float* up, float* out, size_t begin, size_t end) {
  for (size_t i = begin; i < end; ++i) out[i] = gate[i] * sigmoid(gate[i]) * up[i];
}

// d silu(g) / dg = s + g s (1 - s), s = sigmoid(g)
inline void gate_backward_scalar(const float* gate, const float* up, const float* grad, float* grad_gate,
                                 float* grad_up, size_t begin, size_t end) {
  for (size_t i = begin; i < end; ++i) {
    const float s = sigmoid(gate[i]), silu = gate[i] * s;
    grad_up[i] = grad[i] * silu;
    grad_gate[i] = grad[i] * up[i] * (s + silu * (1.0f - s));
  }
}

#if ORZ_X86
ORZ_TARGET_AVX2 inline __m256 sigmoid8(__m256 x) {
  const __m256 one = _mm256_set1_ps(1.0f);
  return _mm256_div_ps(one, _mm256_add_ps(one, softmax::exp8(_mm256_xor_ps(x, _mm256_set1_ps(-0.0f)))));
}

ORZ_TARGET_AVX2 inline void gate_forward_avx2(const float* gate, const float* up, float* out, size_t begin,
                                              size_t end) {
  size_t i = begin;
  for (; i + 8 <= end; i += 8) {
    const __m256 g = _mm256_loadu_ps(gate + i);
    _mm256_storeu_ps(out + i, _mm256_mul_ps(_mm256_mul_ps(g, sigmoid8(g)), _mm256_loadu_ps(up + i)));
  }
  gate_forward_scalar(gate, up, out, i, end);
}

ORZ_TARGET_AVX2 inline void gate_backward_avx2(const float* gate, const float* up, const float* grad, float* grad_gate,
                                               float* grad_up, size_t begin, size_t end) {
  const __m256 one = _mm256_set1_ps(1.0f);
  size_t i = begin;
  for (; i + 8 <= end; i += 8) {
    const __m256 g = _mm256_loadu_ps(gate + i), dy = _mm256_loadu_ps(grad + i), s = sigmoid8(g);
    const __m256 silu = _mm256_mul_ps(g, s);
    _mm256_storeu_ps(grad_up + i, _mm256_mul_ps(dy, silu));
    const __m256 slope = _mm256_fmadd_ps(silu, _mm256_sub_ps(one, s), s);
    _mm256_storeu_ps(grad_gate + i, _mm256_mul_ps(_mm256_mul_ps(dy, _mm256_loadu_ps(up + i)), slope));
  }
  gate_backward_scalar(gate, up, grad, grad_gate, grad_up, i, end);
}
#endif

// Elements [begin, end).
inline void gate_forward(const float* gate, const float* up, float* out, size_t begin, size_t end) {
#if ORZ_X86
  if (has_avx2()) return gate_forward_avx2(gate, up, out, begin, end);
#endif
  gate_forward_scalar(gate, up, out, begin, end);
}

inline void gate_backward(const float* gate, const float* up, const float* grad, float* grad_gate, float* grad_up,
                          size_t begin, size_t end) {
#if ORZ_X86
  if (has_avx2()) return gate_backward_avx2(gate, up, grad, grad_gate, grad_up, begin, end);
#endif
  gate_backward_scalar(gate, up, grad, grad_gate, grad_up, begin, end);
}

}  // namespace orz::layers
