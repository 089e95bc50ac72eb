// The plain C face of the GPU kernels: pointers to device memory and a stream handle in, a CUDA error code out. No torch
// and no Python here; kernels/orz_kernels/cuda.py binds it.
#pragma once

#ifdef __cplusplus
extern "C" {
#endif

// Changes when a signature below does; the binding refuses any other.
#define ORZ_CUDA_INTERFACE 1
int orz_cuda_interface(void);
const char* orz_cuda_error(int code);

// `aggregates` is scratch of 2 * orz_gae_blocks(num_tokens) floats. mask and bootstrap may be null.
int orz_gae_blocks(long long num_tokens);
int orz_gae(const float* rewards, const float* values, const unsigned char* mask, const int* starts, const float* bootstrap,
            float* aggregates, float* advantages, float* returns, long long num_tokens, int num_sequences, float gamma,
            float decay, float blend, void* stream);

// The losses write the loss [], the slopes [N] and the statistics as float64, in one launch. `partials` is scratch of
// fields * orz_loss_blocks(N, multiprocessors) floats; `arrived` is one unsigned, 0 before the first call and after each:
// calls that share it must not overlap. proximal, entropy and mask may be null; clips that are off are infinite.
int orz_loss_blocks(long long num_tokens, int multiprocessors);
int orz_ppo_loss(const float* current, const float* sampled, const float* advantages, const float* proximal,
                 const float* entropy, const unsigned char* mask, const float* denominator, int denominator_per_token,
                 float lowest, float highest, float dual, float cap, float* loss, float* slopes, double* stats,
                 float* partials, unsigned* arrived, long long num_tokens, int multiprocessors, void* stream);
int orz_value_loss(const float* values, const float* old_values, const float* returns, const unsigned char* mask,
                   const float* denominator, int denominator_per_token, float clip, float* loss, float* slopes,
                   double* stats, float* partials, unsigned* arrived, long long num_tokens, int multiprocessors,
                   void* stream);

#ifdef __cplusplus
}
#endif
