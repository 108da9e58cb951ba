// The launchers of gram.cu and project.cu. No CUDA and no torch here; conventions as in launchers.h.
#pragma once

#include <stdint.h>

#include "launchers.h"

namespace ef::cuda {
// Factors of n samples with t positions; strides in elements, unit stride inside a row.
struct Factors {
  const void *a, *b;
  int64_t n, t, a_sample, a_position, b_sample, b_position;
};
enum GramForm : int { kMma = 0, kWgmma = 1 };
}  // namespace ef::cuda

extern "C" {
// 0 where this form serves the call on the current device, 1 where it does not (then the other, or another backend)
int ef_cuda_gram_refuses(int form, int type, const ef::cuda::Factors* left, const ef::cuda::Factors* right, int64_t d_in, int64_t d_out);
// how many partial Grams (each n × m float) the caller provides
int64_t ef_cuda_gram_partials(int form, int type, const ef::cuda::Factors* left, const ef::cuda::Factors* right, int64_t d_in,
                              int64_t d_out);
// bytes of gradients, 16-byte aligned, that the caller provides; 0: none
int64_t ef_cuda_gram_scratch(int form, const ef::cuda::Factors* left, const ef::cuda::Factors* right, int64_t d_in, int64_t d_out);
// out (n, m) float; right null: symmetric. n, m, t, d_in, d_out ≥ 1. partial: (partials, n, m) float, partial and scratch: no input
int ef_cuda_gram(int form, int type, const ef::cuda::Factors* left, const ef::cuda::Factors* right, int64_t d_in, int64_t d_out,
                 float* partial, int64_t partials, void* scratch, float* out, void* stream);

// how many partial projections (each n × k float) the caller provides
int64_t ef_cuda_project_random_partials(int type, const ef::cuda::Factors* x, int64_t d_in, int64_t d_out, int64_t k);
// out (n, k) float: gradients onto k directions of (seed, offset), as reference/philox.py defines them
int ef_cuda_project_random(int type, const ef::cuda::Factors* x, int64_t d_in, int64_t d_out, int64_t k, uint64_t seed,
                           uint64_t offset, int gaussian, float* partial, int64_t partials, float* out, void* stream);
}
