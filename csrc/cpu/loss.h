// The policy loss and the value loss over many tokens. What one token adds is csrc/cuda/loss.h, which the GPU shares;
// here are the loop and the sums: float32 within kFold tokens, float64 across, in one order.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "cuda/loss.h"

namespace orz {

constexpr int64_t kLossFold = 512;
constexpr int kLossField = 1;

inline float prediction(const PolicyLoss::Token& token) { return token.current; }
inline float prediction(const ValueLoss::Token& token) { return token.value; }

// Fills slopes [num_tokens] and stats [Loss::Stats::FIELDS]; the loss is stats[kLossField].
template <typename Loss>
void run_loss(const Loss& loss, int64_t num_tokens, float* slopes, double* stats) {
  using Stats = typename Loss::Stats;
  for (int f = 0; f < Stats::FIELDS; ++f) stats[f] = Stats::template neutral<double>(f);
  for (int64_t start = 0; start < num_tokens; start += kLossFold) {
    Stats block;
    for (int64_t i = start; i < std::min(num_tokens, start + kLossFold); ++i) {
      const auto token = loss.load(i);
      slopes[i] = loss.add(token, block);
      // The limits inside would turn a NaN into a number, and a broken model into a finite loss.
      if (std::isnan(prediction(token)))
        slopes[i] = block.field[kLossField] = std::numeric_limits<float>::quiet_NaN();
    }
    for (int f = 0; f < Stats::FIELDS; ++f)
      stats[f] = Stats::merge(f, stats[f], static_cast<double>(block.field[f]));
  }
}

}  // namespace orz
