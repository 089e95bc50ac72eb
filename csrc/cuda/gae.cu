// Two launches, no atomics, bitwise repeatable: blocks compose their tokens' maps; then each block composes the maps of the
// blocks after it, as far as its last sequence reaches, and walks its tokens once more. Nothing but 8 bytes a block passes
// between the two.
#include "gae.h"
#include "orz_cuda.h"

namespace orz {
namespace {

constexpr int THREADS = 512;
constexpr int WARPS = THREADS / 32;
constexpr int ITEMS = GaeTokens::ITEMS;
constexpr int BLOCK = THREADS * ITEMS;
constexpr unsigned ALL = 0xffffffffu;

// Lane i gets the composition of the maps of lanes i to 31, i outermost.
__device__ Affine compose_lanes(Affine map, int lane) {
  ORZ_UNROLL
  for (int step = 1; step < 32; step *= 2) {
    const Affine other{__shfl_down_sync(ALL, map.a, step), __shfl_down_sync(ALL, map.b, step)};
    if (lane + step < 32) map = compose(map, other);
  }
  return map;
}

__global__ void __launch_bounds__(THREADS) gae_aggregate(GaeInputs in, Affine* aggregates) {
  __shared__ Affine warps[WARPS];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  GaeTokens tokens;
  tokens.load(in, int64_t(blockIdx.x) * BLOCK + threadIdx.x * ITEMS);
  const Affine map = compose_lanes(tokens.map(in.decay, in.blend), lane);
  if (lane == 0) warps[warp] = map;
  __syncthreads();
  if (threadIdx.x == 0) {
    Affine total;
    for (int i = WARPS - 1; i >= 0; --i) total = compose(warps[i], total);
    aggregates[blockIdx.x] = total;
  }
}

// What the blocks after this one hand back. A map with a = 0 ignores what comes later: there the walk may stop.
__device__ float carry_of(const Affine* aggregates, int num_blocks, int lane) {
  Affine carry;
  for (int block = blockIdx.x + 1; block < num_blocks && carry.a != 0.0f; block += 32) {
    Affine map;
    if (block + lane < num_blocks) map = aggregates[block + lane];
    map = compose_lanes(map, lane);
    carry = compose(carry, {__shfl_sync(ALL, map.a, 0), __shfl_sync(ALL, map.b, 0)});
  }
  return carry.b;
}

__global__ void __launch_bounds__(THREADS)
    gae_scan(GaeInputs in, const Affine* aggregates, int num_blocks, float* advantages, float* returns) {
  __shared__ Affine warps[WARPS];
  __shared__ float carry;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t begin = int64_t(blockIdx.x) * BLOCK + threadIdx.x * ITEMS;
  GaeTokens tokens;
  tokens.load(in, begin);
  const Affine map = compose_lanes(tokens.map(in.decay, in.blend), lane);
  if (lane == 0) warps[warp] = map;
  if (warp == 0) {
    const float x = carry_of(aggregates, num_blocks, lane);
    if (lane == 0) carry = x;
  }
  __syncthreads();
  float x = carry;
  for (int i = WARPS - 1; i > warp; --i) x = warps[i](x);
  const Affine later{__shfl_down_sync(ALL, map.a, 1), __shfl_down_sync(ALL, map.b, 1)};
  if (lane < 31) x = later(x);
  tokens.write(x, in.decay, in.blend, begin, in.num_tokens, advantages, returns);
}

}  // namespace
}  // namespace orz

extern "C" int orz_gae_blocks(long long num_tokens) {
  return static_cast<int>((num_tokens + orz::BLOCK - 1) / orz::BLOCK);
}

extern "C" int orz_gae(const float* rewards, const float* values, const unsigned char* mask, const int* starts,
                       const float* bootstrap, float* aggregates, float* advantages, float* returns, long long num_tokens,
                       int num_sequences, float gamma, float decay, float blend, void* stream) {
  const int num_blocks = orz_gae_blocks(num_tokens);
  if (num_blocks == 0) return cudaSuccess;
  const orz::GaeInputs in{rewards,    values,        mask,  starts, bootstrap,
                          num_tokens, num_sequences, gamma, decay,  blend};
  auto* const maps = reinterpret_cast<orz::Affine*>(aggregates);
  const auto queue = static_cast<cudaStream_t>(stream);
  if (num_blocks > 1) {
    orz::gae_aggregate<<<num_blocks, orz::THREADS, 0, queue>>>(in, maps);
    if (const cudaError_t error = cudaGetLastError()) return error;
  }
  orz::gae_scan<<<num_blocks, orz::THREADS, 0, queue>>>(in, maps, num_blocks, advantages, returns);
  return cudaGetLastError();
}
