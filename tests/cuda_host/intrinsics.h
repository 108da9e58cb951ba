// The names that a kernel calls: indices, barriers, fences, shuffles, votes, atomics. Included by cuda_host.h.
#pragma once

#include "cuda_host.h"

#define threadIdx (cuda_host::me().thread)
#define blockIdx (cuda_host::block->index)
#define blockDim (cuda_host::block->size)
#define gridDim (cuda_host::block->grid)

inline void __syncthreads(cuda_host::Where w = cuda_host::Where::current()) {
  if (!cuda_host::skipped(w)) cuda_host::block_barrier(w);
}
inline int __syncthreads_count(int p, cuda_host::Where w = cuda_host::Where::current()) { return cuda_host::block_sum(p != 0, w); }
inline int __syncthreads_or(int p, cuda_host::Where w = cuda_host::Where::current()) { return cuda_host::block_sum(p != 0, w) > 0; }
inline int __syncthreads_and(int p, cuda_host::Where w = cuda_host::Where::current()) { return cuda_host::block_sum(p == 0, w) == 0; }
inline void __syncwarp(uint32_t mask = ~0u, cuda_host::Where w = cuda_host::Where::current()) {
  if (!cuda_host::skipped(w)) cuda_host::arrive(cuda_host::warp_gate(mask, w), cuda_host::warp_expected(mask), w);
}
inline void __threadfence(cuda_host::Where w = cuda_host::Where::current()) {
  if (cuda_host::skipped(w)) return;
  cuda_host::me().fenced = true, cuda_host::me().ticket = false;
}
inline void __threadfence_block() {}

inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t both = (uint64_t)y << 32 | x;
  unsigned out = 0;
  for (int i = 0; i < 4; i++) out |= (unsigned)(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return out;
}

template <class T>
T __shfl_sync(uint32_t mask, T v, int source, int width = 32, cuda_host::Where w = cuda_host::Where::current()) {
  int l = cuda_host::lane();
  return cuda_host::shuffle(mask, v, (l & ~(width - 1)) | (source & (width - 1)), w);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T v, int with, int width = 32, cuda_host::Where w = cuda_host::Where::current()) {
  int l = cuda_host::lane(), s = l ^ with;
  return cuda_host::shuffle(mask, v, s < (l | (width - 1)) + 1 ? s : l, w);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T v, unsigned by, int width = 32, cuda_host::Where w = cuda_host::Where::current()) {
  unsigned l = cuda_host::lane();
  return cuda_host::shuffle(mask, v, (l & (width - 1)) + by < unsigned(width) ? l + by : l, w);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T v, unsigned by, int width = 32, cuda_host::Where w = cuda_host::Where::current()) {
  unsigned l = cuda_host::lane();
  return cuda_host::shuffle(mask, v, (l & (width - 1)) >= by ? l - by : l, w);
}
inline uint32_t __ballot_sync(uint32_t mask, int p, cuda_host::Where w = cuda_host::Where::current()) {
  return cuda_host::ballot(mask, p != 0, w);
}
inline int __any_sync(uint32_t mask, int p, cuda_host::Where w = cuda_host::Where::current()) {
  return cuda_host::ballot(mask, p != 0, w) != 0;
}
inline int __all_sync(uint32_t mask, int p, cuda_host::Where w = cuda_host::Where::current()) {
  return cuda_host::ballot(mask, p == 0, w) == 0;
}

// Fibers never preempt each other: a plain read-modify-write is atomic.
template <class T>
T cuda_host_exchange(T* p, T v) { T old = *p; *p = v; return old; }
template <class T, class V>
T atomicAdd(T* p, V v) {
  if constexpr (std::is_same_v<T, unsigned>) cuda_host::ticket("atomicAdd");
  return cuda_host_exchange(p, T(*p + T(v)));
}
inline unsigned atomicInc(unsigned* p, unsigned top) {
  cuda_host::ticket("atomicInc");
  return cuda_host_exchange(p, *p >= top ? 0 : *p + 1);
}
template <class T, class V>
T atomicMax(T* p, V v) { return cuda_host_exchange(p, std::max(*p, T(v))); }
template <class T, class V>
T atomicMin(T* p, V v) { return cuda_host_exchange(p, std::min(*p, T(v))); }
template <class T, class V>
T atomicOr(T* p, V v) { return cuda_host_exchange(p, T(*p | T(v))); }
template <class T, class V>
T atomicExch(T* p, V v) { return cuda_host_exchange(p, T(v)); }
template <class T, class V>
T atomicCAS(T* p, V expected, V v) { return cuda_host_exchange(p, *p == T(expected) ? T(v) : *p); }
