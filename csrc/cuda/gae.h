// Generalised advantage estimation as a scan over affine maps. X_t is what the tokens after t hand back to it:
//
//   G_t = r_t + X_t,   A_t = G_t - V_t,   X_{t-1} = blend * V_t + decay * G_t
//
// with decay = gamma * lam and blend = gamma * (1 - lam). So a token maps X to a * X + b; one that is masked out is the
// identity; and before the last token of a sequence X is gamma * bootstrap whatever came: a = 0. Maps compose
// associatively. At gamma = lam = 1 no value enters a sum: the result is exactly "rewards to come, minus value".
#pragma once

#include "host_device.h"

namespace orz {

struct Affine {
  float a = 1.0f, b = 0.0f;

  ORZ_HD float operator()(float x) const { return a * x + b; }
};

// x -> outer(inner(x))
ORZ_HD Affine compose(Affine outer, Affine inner) { return {outer.a * inner.a, outer.a * inner.b + outer.b}; }

struct GaeInputs {
  const float* rewards;
  const float* values;
  const uint8_t* mask;     // [N] or null: tokens that are 0 do not exist
  const int32_t* starts;   // [num_sequences + 1]
  const float* bootstrap;  // [num_sequences] or null
  int64_t num_tokens;
  int32_t num_sequences;
  float gamma, decay, blend;
};

// The last sequence that begins at or before t; of several at one place all but the last are empty.
ORZ_HD int32_t sequence_of(const int32_t* starts, int32_t num_sequences, int64_t t) {
  int32_t low = 0, high = num_sequences;
  while (high - low > 1) {
    const int32_t middle = low + (high - low) / 2;
    if (starts[middle] <= t) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Four consecutive numbers, of which those at `end` and beyond do not exist and are 0. On the device one 16-byte load.
ORZ_HD void fetch(const float* from, int64_t begin, int64_t end, float (&to)[4]) {
#ifdef __CUDA_ARCH__
  if (begin + 4 <= end && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
    const float4 x = *reinterpret_cast<const float4*>(from + begin);
    to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
    return;
  }
#endif
  ORZ_UNROLL
  for (int i = 0; i < 4; ++i) to[i] = begin + i < end ? from[begin + i] : 0.0f;
}

ORZ_HD void put(float* to, int64_t begin, int64_t end, const float (&from)[4]) {
#ifdef __CUDA_ARCH__
  if (begin + 4 <= end && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
    *reinterpret_cast<float4*>(to + begin) = make_float4(from[0], from[1], from[2], from[3]);
    return;
  }
#endif
  ORZ_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (begin + i < end) to[begin + i] = from[i];
  }
}

// Four consecutive tokens in the registers of one thread. Loops have constant bounds, so that no array is indexed at run
// time and all of it stays in registers. `begin` is a multiple of 4.
struct GaeTokens {
  static constexpr int ITEMS = 4;
  float reward[ITEMS], value[ITEMS], reset[ITEMS];
  bool kept[ITEMS], last[ITEMS];

  ORZ_HD void load(const GaeInputs& in, int64_t begin) {
    const int64_t end = begin + ITEMS < in.num_tokens ? begin + ITEMS : in.num_tokens;
    fetch(in.rewards, begin, in.num_tokens, reward);
    fetch(in.values, begin, in.num_tokens, value);
    ORZ_UNROLL
    for (int i = 0; i < ITEMS; ++i) {
      kept[i] = begin + i < end && (in.mask == nullptr || in.mask[begin + i] != 0);
      // What is masked out may hold anything, NaN included.
      if (!kept[i]) reward[i] = value[i] = 0.0f;
      last[i] = false;
      reset[i] = 0.0f;
    }
    if (begin >= end) return;
    int32_t sequence = sequence_of(in.starts, in.num_sequences, end - 1);
    int32_t start = in.starts[sequence], stop = in.starts[sequence + 1];
    ORZ_UNROLL
    for (int i = ITEMS - 1; i >= 0; --i) {
      const int64_t t = begin + i;
      if (t < end) {
        while (start > t) {
          stop = start;
          start = in.starts[--sequence];
        }
        last[i] = stop == t + 1;
        if (last[i] && in.bootstrap != nullptr) reset[i] = in.gamma * in.bootstrap[sequence];
      }
    }
  }

  // From what is handed to the last of these tokens to what they hand to the one before the first.
  ORZ_HD Affine map(float decay, float blend) const {
    Affine total;
    ORZ_UNROLL
    for (int i = ITEMS - 1; i >= 0; --i) {
      if (last[i]) total = {0.0f, reset[i]};
      if (kept[i]) total = compose({decay, blend * value[i] + decay * reward[i]}, total);
    }
    return total;
  }

  ORZ_HD void write(float x, float decay, float blend, int64_t begin, int64_t num_tokens, float* advantages,
                    float* returns) const {
    float advantage[ITEMS], total[ITEMS];
    ORZ_UNROLL
    for (int i = ITEMS - 1; i >= 0; --i) {
      if (last[i]) x = reset[i];
      total[i] = kept[i] ? reward[i] + x : 0.0f;
      advantage[i] = kept[i] ? total[i] - value[i] : 0.0f;
      if (kept[i]) x = blend * value[i] + decay * total[i];
    }
    put(advantages, begin, num_tokens, advantage);
    put(returns, begin, num_tokens, total);
  }
};

}  // namespace orz
