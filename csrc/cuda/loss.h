// What one token adds to the policy loss, to the value loss and to their statistics. Equations: ppo_loss.py, value_loss.py.
#pragma once

#include "host_device.h"

namespace orz {

// exp(20) is half a thousand million: no token may count for more, and no square of it overflows float32.
constexpr float LOG_RATIO_LIMIT = 20.0f;

ORZ_HD float limit(float x) { return fminf(fmaxf(x, -LOG_RATIO_LIMIT), LOG_RATIO_LIMIT); }

// exp(d) - 1 - d. Below 0.5 by its series: there the difference cancels, to 0 for |d| under 3e-4.
ORZ_HD float kl3(float d, float exp_d) {
  const float tail = 1 + d * (1.0f / 6) * (1 + d * (1.0f / 7) * (1 + d * (1.0f / 8) * (1 + d * (1.0f / 9))));
  const float series = d * d * 0.5f * (1 + d * (1.0f / 3) * (1 + d * 0.25f * (1 + d * 0.2f * tail)));
  return fabsf(d) < 0.5f ? series : exp_d - 1.0f - d;
}

// Sums by field, but for two that are a maximum and a minimum. Fields are indexed by constants: registers, not memory.
template <int N, int MAX_FIELD, int MIN_FIELD>
struct Sums {
  static constexpr int FIELDS = N;
  float field[N];

  ORZ_HD Sums() {
    ORZ_UNROLL
    for (int i = 0; i < N; ++i) field[i] = i == MAX_FIELD ? -INFINITY : i == MIN_FIELD ? INFINITY : 0.0f;
  }

  template <class T>
  static ORZ_HD T merge(int i, T x, T y) {
    return i == MAX_FIELD ? (x > y ? x : y) : i == MIN_FIELD ? (x < y ? x : y) : x + y;
  }

  template <class T>
  static ORZ_HD T neutral(int i) {
    return i == MAX_FIELD ? -INFINITY : i == MIN_FIELD ? INFINITY : T(0);
  }
};

struct PolicyLoss {
  using Stats = Sums<15, 6, 7>;
  struct Token {
    float current, sampled, advantage, proximal, entropy, denominator;
    bool kept;
  };
  const float *current, *sampled, *advantages, *proximal, *entropy;
  const uint8_t* mask;
  const float* denominator;
  bool per_token;
  float lowest, highest, dual, cap;

  // What is masked out may hold anything, NaN included: it is not read.
  ORZ_HD Token load(int64_t i) const {
    if (mask != nullptr && mask[i] == 0) return {0, 0, 0, 0, 0, 1, false};
    return {current[i],  sampled[i],
            advantages[i], proximal != nullptr ? proximal[i] : 0,
            entropy != nullptr ? entropy[i] : 0, denominator[per_token ? i : 0], true};
  }

  // Adds the token's statistics and returns d loss / d logprob.
  ORZ_HD float add(const Token& t, Stats& stats) const {
    if (!t.kept) return 0.0f;
    const float drift = t.current - t.sampled;
    const float log_ratio = proximal != nullptr ? t.current - t.proximal : drift;
    const float raw = proximal != nullptr ? expf(limit(t.proximal - t.sampled)) : 1.0f;
    const float weight = fminf(raw, cap);
    const float rho = expf(limit(drift)), ratio = proximal != nullptr ? expf(limit(log_ratio)) : rho;
    const bool high = t.advantage > 0 && ratio > highest, low = t.advantage < 0 && ratio < lowest;
    const bool two = t.advantage < 0 && ratio > dual;
    const float used = high ? highest : low ? lowest : two ? dual : ratio;
    const float gain = -weight * t.advantage / t.denominator;
    const float terms[Stats::FIELDS] = {1,      gain * used, float(low), float(high),        float(two), ratio,
                                        ratio,  ratio,       -drift,     kl3(limit(drift), rho), weight,     float(raw > weight),
                                        rho,    rho * rho,   t.entropy};
    ORZ_UNROLL
    for (int i = 0; i < Stats::FIELDS; ++i) stats.field[i] = Stats::merge(i, stats.field[i], terms[i]);
    return high || low || two || fabsf(log_ratio) > LOG_RATIO_LIMIT ? 0.0f : gain * ratio;
  }
};

struct ValueLoss {
  using Stats = Sums<8, -1, -1>;
  struct Token {
    float value, old_value, total, denominator;
    bool kept;
  };
  const float *values, *old_values, *returns;
  const uint8_t* mask;
  const float* denominator;
  bool per_token;
  float clip;

  ORZ_HD Token load(int64_t i) const {
    if (mask != nullptr && mask[i] == 0) return {0, 0, 0, 1, false};
    return {values[i], old_values[i], returns[i], denominator[per_token ? i : 0], true};
  }

  ORZ_HD float add(const Token& t, Stats& stats) const {
    if (!t.kept) return 0.0f;
    const float error = t.total - t.value, moved = t.value - t.old_value;
    const float clipped_error = t.total - (t.old_value + fminf(fmaxf(moved, -clip), clip));
    // Inside the clip range both are the same value but for rounding; only outside can the gradient vanish.
    const bool flat = fabsf(moved) > clip && fabsf(clipped_error) > fabsf(error);
    const float worst = flat ? clipped_error : error;
    const float terms[Stats::FIELDS] = {1,       0.5f * worst * worst / t.denominator, float(flat), t.value,
                                        t.total, t.total * t.total,                    error,       error * error};
    ORZ_UNROLL
    for (int i = 0; i < Stats::FIELDS; ++i) stats.field[i] = Stats::merge(i, stats.field[i], terms[i]);
    return flat ? 0.0f : -error / t.denominator;
  }
};

}  // namespace orz
