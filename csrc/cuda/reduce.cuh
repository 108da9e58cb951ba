// Sums over a warp and a block in a fixed order, a scan, and the last block of a grid. No atomics on values: same bits every run.
#pragma once

#include "common.cuh"

namespace ef::cuda {

constexpr int kThreads = 256;
constexpr unsigned kAll = 0xffffffffu;

EF_DEVICE int lane() { return threadIdx.x & 31; }
EF_DEVICE int warp() { return threadIdx.x >> 5; }

template <class T> EF_DEVICE T warp_sum(T v) {
#pragma unroll
  for (int d = 16; d; d >>= 1) v += __shfl_xor_sync(kAll, v, d);
  return v;
}

// The sum over the block, in every thread; blockDim.x a multiple of 32.
template <class T> EF_DEVICE T block_sum(T v) {
  __shared__ T part[32];
  v = warp_sum(v);
  if (lane() == 0) part[warp()] = v;
  __syncthreads();
  T total = 0;
  for (unsigned w = 0; w < blockDim.x / 32; ++w) total += part[w];
  __syncthreads();  // part may be written again
  return total;
}

// The sum of v over the threads before this one; *total: over the block.
EF_DEVICE int block_scan(int v, int* total) {
  __shared__ int part[32];
  int before = v;
#pragma unroll
  for (int d = 1; d < 32; d <<= 1) {
    const int other = __shfl_up_sync(kAll, before, d);
    if (lane() >= d) before += other;
  }
  if (lane() == 31) part[warp()] = before;
  before -= v;
  __syncthreads();
  int sum = 0;
  for (int w = 0; w < (int)blockDim.x / 32; ++w) {
    if (w == warp()) before += sum;
    sum += part[w];
  }
  __syncthreads();
  *total = sum;
  return before;
}

// True in every thread of the block that comes last of `blocks`: what thread 0 of the others stored before is there to read.
// Stores of other threads need a barrier before the call. Once a kernel.
EF_DEVICE bool last_block(unsigned* counter, unsigned blocks) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(counter, 1u) == blocks - 1;
    __threadfence();
  }
  __syncthreads();
  return last;
}

}  // namespace ef::cuda
