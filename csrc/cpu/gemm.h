// Rows of float32 times a weight that is packed once and used for many steps: out = x W^T + bias.
//
// An element of the result is a sum over the inputs in one fixed order, whatever the number of rows: kFold products in
// turn, then the sums of these runs. So a row's bits depend on that row alone. AVX2 and AVX-512 give the same bits.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <utility>
#include <vector>

#include "dispatch.h"

namespace orz::gemm {

constexpr size_t kPanel = 32;  // columns of the result that are computed together: two vectors of AVX-512, four of AVX2
// About what BLAS adds in turn, and a learner that uses it: up to here both give the same bits. With 64 an engine was
// closer to float64 by a third, and farther from its learner.
constexpr size_t kFold = 256;

struct alignas(64) Line {
  float values[16];
};

struct Linear {
  size_t inputs = 0;
  size_t outputs = 0;
  std::vector<Line> panels;  // [panels][inputs][kPanel] floats, 0 behind the last output
  std::vector<float> bias;   // [panels * kPanel], 0 if there is none

  // Floats that a row of the result takes.
  size_t stride() const { return bias.size(); }
  const float* panel(size_t index) const {
    return reinterpret_cast<const float*>(panels.data()) + index * inputs * kPanel;
  }
};

// `weight` [outputs, inputs]; `bias` [outputs] or null.
inline Linear pack(const float* weight, const float* bias, size_t outputs, size_t inputs) {
  const size_t panels = (outputs + kPanel - 1) / kPanel;
  Linear made{inputs, outputs, std::vector<Line>(panels * inputs * kPanel / 16), std::vector<float>(panels * kPanel)};
  float* out = reinterpret_cast<float*>(made.panels.data());
  for (size_t n = 0; n < outputs; ++n)
    for (size_t k = 0; k < inputs; ++k)
      out[(n / kPanel * inputs + k) * kPanel + n % kPanel] = weight[n * inputs + k];
  if (bias != nullptr) std::copy_n(bias, outputs, made.bias.data());
  return made;
}

// Some rows of the input times one panel.
struct Tile {
  const float* rows;
  size_t stride;
  const float* panel;
  const float* bias;  // [kPanel]
  size_t inputs;
  float* out;
  size_t out_stride;
};

inline void tile_scalar(const Tile& tile) {
  for (size_t start = 0; start < tile.inputs; start += kFold) {
    const size_t stop = std::min(tile.inputs, start + kFold);
    float sums[kPanel] = {};
    for (size_t k = start; k < stop; ++k)
      for (size_t n = 0; n < kPanel; ++n) sums[n] += tile.rows[k] * tile.panel[k * kPanel + n];
    const float* before = start == 0 ? tile.bias : tile.out;
    for (size_t n = 0; n < kPanel; ++n) tile.out[n] = before[n] + sums[n];
  }
}

#if ORZ_X86
template <size_t Rows>
ORZ_TARGET_AVX512 inline void tile_avx512(const Tile& tile) {
  for (size_t start = 0; start < tile.inputs; start += kFold) {
    const size_t stop = std::min(tile.inputs, start + kFold);
    __m512 low[Rows], high[Rows];
#pragma GCC unroll 16
    for (size_t r = 0; r < Rows; ++r) low[r] = high[r] = _mm512_setzero_ps();
    for (size_t k = start; k < stop; ++k) {
      const __m512 left = _mm512_load_ps(tile.panel + k * kPanel), right = _mm512_load_ps(tile.panel + k * kPanel + 16);
#pragma GCC unroll 16
      for (size_t r = 0; r < Rows; ++r) {
        const __m512 x = _mm512_set1_ps(tile.rows[r * tile.stride + k]);
        low[r] = _mm512_fmadd_ps(x, left, low[r]);
        high[r] = _mm512_fmadd_ps(x, right, high[r]);
      }
    }
#pragma GCC unroll 16
    for (size_t r = 0; r < Rows; ++r) {
      float* out = tile.out + r * tile.out_stride;
      const float* before = start == 0 ? tile.bias : out;
      _mm512_storeu_ps(out, _mm512_add_ps(_mm512_loadu_ps(before), low[r]));
      _mm512_storeu_ps(out + 16, _mm512_add_ps(_mm512_loadu_ps(before + 16), high[r]));
    }
  }
}

// Sixteen columns at a time: the sums of six rows and 32 columns are more than the registers hold.
template <size_t Rows>
ORZ_TARGET_AVX2 inline void tile_avx2(const Tile& tile) {
  for (size_t half = 0; half < kPanel; half += 16)
    for (size_t start = 0; start < tile.inputs; start += kFold) {
      const size_t stop = std::min(tile.inputs, start + kFold);
      __m256 low[Rows], high[Rows];
#pragma GCC unroll 8
      for (size_t r = 0; r < Rows; ++r) low[r] = high[r] = _mm256_setzero_ps();
      for (size_t k = start; k < stop; ++k) {
        const float* panel = tile.panel + k * kPanel + half;
        const __m256 left = _mm256_load_ps(panel), right = _mm256_load_ps(panel + 8);
#pragma GCC unroll 8
        for (size_t r = 0; r < Rows; ++r) {
          const __m256 x = _mm256_set1_ps(tile.rows[r * tile.stride + k]);
          low[r] = _mm256_fmadd_ps(x, left, low[r]);
          high[r] = _mm256_fmadd_ps(x, right, high[r]);
        }
      }
#pragma GCC unroll 8
      for (size_t r = 0; r < Rows; ++r) {
        float* out = tile.out + r * tile.out_stride + half;
        const float* before = start == 0 ? tile.bias + half : out;
        _mm256_storeu_ps(out, _mm256_add_ps(_mm256_loadu_ps(before), low[r]));
        _mm256_storeu_ps(out + 8, _mm256_add_ps(_mm256_loadu_ps(before + 8), high[r]));
      }
    }
}

using Kernel = void (*)(const Tile&);

template <size_t... Less>
std::array<Kernel, sizeof...(Less)> kernels_avx512(std::index_sequence<Less...>) {
  return {&tile_avx512<Less + 1>...};
}

template <size_t... Less>
std::array<Kernel, sizeof...(Less)> kernels_avx2(std::index_sequence<Less...>) {
  return {&tile_avx2<Less + 1>...};
}
#endif

// All rows times one panel, `kernels[n - 1]` for n rows.
template <typename Kernels>
void panel(Tile tile, size_t rows, const Kernels& kernels) {
  while (rows > 0) {
    const size_t taken = std::min(rows, kernels.size());
    kernels[taken - 1](tile);
    rows -= taken;
    tile.rows += taken * tile.stride;
    tile.out += taken * tile.out_stride;
  }
}

// x [rows, stride] -> out [rows, linear.stride()], of which the first linear.outputs columns are the result.
inline void multiply(const float* x, size_t stride, size_t rows, const Linear& linear, float* out) {
  for (size_t p = 0; p * kPanel < linear.outputs; ++p) {
    const size_t column = p * kPanel;
    const Tile tile{x, stride, linear.panel(p), &linear.bias[column], linear.inputs, out + column, linear.stride()};
#if ORZ_X86
    static const auto avx512 = kernels_avx512(std::make_index_sequence<12>());
    static const auto avx2 = kernels_avx2(std::make_index_sequence<6>());
    if (has_avx512()) {
      panel(tile, rows, avx512);
      continue;
    }
    if (has_avx2()) {
      panel(tile, rows, avx2);
      continue;
    }
#endif
    panel(tile, rows, std::array{&tile_scalar});
  }
}

}  // namespace orz::gemm
