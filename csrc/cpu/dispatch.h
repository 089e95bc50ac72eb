// Which instruction sets may be used, decided at run time: one binary serves every x86-64, and others build it too.
#pragma once

#include <cstdlib>

#if (defined(__x86_64__) || defined(_M_X64)) && (defined(__GNUC__) || defined(__clang__))
#define ORZ_X86 1
#include <immintrin.h>
#define ORZ_TARGET_AVX2 __attribute__((target("avx2,fma,bmi,popcnt")))
#define ORZ_TARGET_AVX512 __attribute__((target("avx512f,avx512dq,avx2,fma,bmi,popcnt")))
#define ORZ_TARGET_SSE42 __attribute__((target("sse4.2")))
#else
#define ORZ_X86 0
#endif

namespace orz {

inline bool is_set(const char* name) {
  const char* text = std::getenv(name);
  return text != nullptr && text[0] == '1';
}

// ORZ_SCALAR=1 turns every fast path off, so that the tests can compare all on one machine.
inline bool scalar_only() {
  static const bool value = is_set("ORZ_SCALAR");
  return value;
}

// With what came with it: FMA, BMI1, POPCNT.
inline bool has_avx2() {
#if ORZ_X86
  static const bool value = !scalar_only() && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                            __builtin_cpu_supports("bmi") && __builtin_cpu_supports("popcnt");
  return value;
#else
  return false;
#endif
}

// ORZ_AVX2=1 turns these off: what a machine without them computes.
inline bool has_avx512() {
#if ORZ_X86
  static const bool value =
      has_avx2() && !is_set("ORZ_AVX2") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq");
  return value;
#else
  return false;
#endif
}

inline bool has_sse42() {
#if ORZ_X86
  static const bool value = !scalar_only() && __builtin_cpu_supports("sse4.2");
  return value;
#else
  return false;
#endif
}

}  // namespace orz
