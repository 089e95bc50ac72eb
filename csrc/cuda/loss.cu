// Loss, slopes and statistics of all tokens in one launch. Every block leaves its sums in memory; the block that arrives
// last adds them up in the order of the blocks, in float64. Which one that is does not matter: results repeat bitwise.
#include "loss.h"
#include "orz_cuda.h"

namespace orz {
namespace {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int UNROLL = 4;  // tokens a thread has under way at a time
constexpr unsigned ALL = 0xffffffffu;

// Sums over the block, valid in its first warp's lane 0 for each field.
template <class Stats>
__device__ void reduce_block(const Stats& mine, float (&warps)[WARPS][Stats::FIELDS]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  ORZ_UNROLL
  for (int i = 0; i < Stats::FIELDS; ++i) {
    float x = mine.field[i];
    ORZ_UNROLL
    for (int step = 16; step > 0; step /= 2) x = Stats::merge(i, x, __shfl_down_sync(ALL, x, step));
    if (lane == 0) warps[warp][i] = x;
  }
  __syncthreads();
}

template <class Loss>
__global__ void __launch_bounds__(THREADS)
    token_loss(Loss loss, float* loss_out, float* slopes, double* stats_out, float* partials, unsigned* arrived,
               int64_t num_tokens) {
  using Stats = typename Loss::Stats;
  __shared__ float warps[WARPS][Stats::FIELDS];
  __shared__ bool is_last;
  Stats stats;
  const int64_t stride = int64_t(gridDim.x) * THREADS;
  for (int64_t first = int64_t(blockIdx.x) * THREADS + threadIdx.x; first < num_tokens; first += UNROLL * stride) {
    typename Loss::Token tokens[UNROLL];
    ORZ_UNROLL
    for (int u = 0; u < UNROLL; ++u) {
      if (first + u * stride < num_tokens) tokens[u] = loss.load(first + u * stride);
    }
    ORZ_UNROLL
    for (int u = 0; u < UNROLL; ++u) {
      if (first + u * stride < num_tokens) slopes[first + u * stride] = loss.add(tokens[u], stats);
    }
  }
  reduce_block<Stats>(stats, warps);
  if (threadIdx.x < Stats::FIELDS) {
    float x = warps[0][threadIdx.x];
    for (int w = 1; w < WARPS; ++w) x = Stats::merge(threadIdx.x, x, warps[w][threadIdx.x]);
    partials[threadIdx.x * gridDim.x + blockIdx.x] = x;
    // The sums must be seen by whoever sees this block's arrival.
    __threadfence();
  }
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(arrived, 1u) == gridDim.x - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  for (int i = threadIdx.x / 32; i < Stats::FIELDS; i += WARPS) {
    double x = Stats::template neutral<double>(i);
    for (unsigned block = threadIdx.x % 32; block < gridDim.x; block += 32) {
      x = Stats::merge(i, x, double(__ldcg(partials + i * gridDim.x + block)));
    }
    for (int step = 16; step > 0; step /= 2) x = Stats::merge(i, x, __shfl_down_sync(ALL, x, step));
    if (threadIdx.x % 32 == 0) stats_out[i] = x;
    if (threadIdx.x % 32 == 0 && i == 1) *loss_out = float(x);
  }
  if (threadIdx.x == 0) *arrived = 0;  // for the next call
}

template <class Loss>
int launch(const Loss& loss, float* loss_out, float* slopes, double* stats, float* partials, unsigned* arrived,
           long long num_tokens, int multiprocessors, void* stream) {
  const int blocks = orz_loss_blocks(num_tokens, multiprocessors);
  token_loss<<<blocks, THREADS, 0, static_cast<cudaStream_t>(stream)>>>(loss, loss_out, slopes, stats, partials, arrived,
                                                                        num_tokens);
  return cudaGetLastError();
}

}  // namespace
}  // namespace orz

// Two blocks a multiprocessor, fewer where there is not a token for each thread. At least one: it writes the zeros.
extern "C" int orz_loss_blocks(long long num_tokens, int multiprocessors) {
  const long long wanted = (num_tokens + orz::THREADS - 1) / orz::THREADS;
  const long long most = 2LL * multiprocessors;
  return static_cast<int>(wanted < 1 ? 1 : wanted < most ? wanted : most);
}

extern "C" int orz_ppo_loss(const float* current, const float* sampled, const float* advantages, const float* proximal,
                            const float* entropy, const unsigned char* mask, const float* denominator,
                            int denominator_per_token, float lowest, float highest, float dual, float cap, float* loss,
                            float* slopes, double* stats, float* partials, unsigned* arrived, long long num_tokens,
                            int multiprocessors, void* stream) {
  const orz::PolicyLoss terms{current, sampled,     advantages, proximal, entropy, mask, denominator, denominator_per_token != 0,
                              lowest,  highest, dual,       cap};
  return orz::launch(terms, loss, slopes, stats, partials, arrived, num_tokens, multiprocessors, stream);
}

extern "C" int orz_value_loss(const float* values, const float* old_values, const float* returns, const unsigned char* mask,
                              const float* denominator, int denominator_per_token, float clip, float* loss, float* slopes,
                              double* stats, float* partials, unsigned* arrived, long long num_tokens, int multiprocessors,
                              void* stream) {
  const orz::ValueLoss terms{values, old_values, returns, mask, denominator, denominator_per_token != 0, clip};
  return orz::launch(terms, loss, slopes, stats, partials, arrived, num_tokens, multiprocessors, stream);
}

extern "C" int orz_cuda_interface(void) { return ORZ_CUDA_INTERFACE; }

extern "C" const char* orz_cuda_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
