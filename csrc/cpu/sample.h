// One token a row by inverse CDF, and its log-probability. The rule is that of orz_async/ops/reference/sampling.py:
// both sums are float64 and run over the vocabulary in turn, so that a draw below 1 stays below the total.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "dispatch.h"
#include "softmax.h"

namespace orz::sample {

struct Args {
  const float* logits;        // [rows, columns]
  size_t columns;
  const float* temperatures;  // [rows], above 0
  const double* uniforms;     // [rows], in [0, 1)
  int64_t* tokens;            // [rows]
  float* logprobs;            // [rows]
};

// (z - top) / temperature in float64, rounded once: exp of it, and the log-prob, are as good as float32 can be.
inline double difference(float z, float top, double inverse) {
  return (static_cast<double>(z) - static_cast<double>(top)) * inverse;
}

inline void differences_scalar(const float* z, size_t begin, size_t count, float top, double inverse, float* out) {
  for (size_t v = begin; v < count; ++v) out[v] = static_cast<float>(difference(z[v], top, inverse));
}

#if ORZ_X86
ORZ_TARGET_AVX2 inline void differences_avx2(const float* z, size_t count, float top, double inverse, float* out) {
  const __m256d top4 = _mm256_set1_pd(static_cast<double>(top)), inverse4 = _mm256_set1_pd(inverse);
  size_t v = 0;
  for (; v + 4 <= count; v += 4) {
    const __m256d u = _mm256_mul_pd(_mm256_sub_pd(_mm256_cvtps_pd(_mm_loadu_ps(z + v)), top4), inverse4);
    _mm_storeu_ps(out + v, _mm256_cvtpd_ps(u));
  }
  differences_scalar(z, v, count, top, inverse, out);
}
#endif

inline void differences(const float* z, size_t count, float top, double inverse, float* out) {
#if ORZ_X86
  if (has_avx2()) {
    differences_avx2(z, count, top, inverse, out);
    return;
  }
#endif
  differences_scalar(z, 0, count, top, inverse, out);
}

// Rows [begin, end).
inline void draw(const Args& args, size_t begin, size_t end) {
  std::vector<float> exp(args.columns);
  for (size_t row = begin; row < end; ++row) {
    const float* z = args.logits + row * args.columns;
    const float top = softmax::row_max(z, args.columns);
    const double inverse = 1.0 / static_cast<double>(args.temperatures[row]);
    differences(z, args.columns, top, inverse, exp.data());
    softmax::row_exp(exp.data(), args.columns, 1.0f, 0.0f, exp.data());
    double total = 0.0;
    for (float e : exp) total += static_cast<double>(e);
    const double threshold = args.uniforms[row] * total;
    size_t token = 0;
    double sum = static_cast<double>(exp[0]);
    // Only a row of NaN gets to the end; its log-prob then says so.
    while (token + 1 < args.columns && !(sum > threshold)) sum += static_cast<double>(exp[++token]);
    args.tokens[row] = static_cast<int64_t>(token);
    args.logprobs[row] = static_cast<float>(difference(z[token], top, inverse) - std::log(total));
  }
}

}  // namespace orz::sample
