// Math that a GPU kernel and a test on the host share: everything marked ORZ_HD compiles with nvcc and with any C++17.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define ORZ_HD __host__ __device__ __forceinline__
#else
#define ORZ_HD inline
#endif

// Only where the device code is made: the host compiler would warn about a pragma that it does not know.
#ifdef __CUDA_ARCH__
#define ORZ_UNROLL _Pragma("unroll")
#else
#define ORZ_UNROLL
#endif
