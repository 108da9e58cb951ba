// Philox4x32-10 and Box-Muller: the very numbers of reference/philox.py, csrc/cpu/isa/loops.cpp and kernels/philox.py.
//
// Element e takes word e % 4 of the block with counter (e / 4, offset) and key seed. Words are equal to the bit on every
// backend; normals differ by the last place of log, sin and cos.
#pragma once

#include <math.h>

#include "common.cuh"

namespace ef::cuda {

EF_DEVICE void philox(uint64_t block, uint64_t seed, uint64_t offset, uint32_t (&c)[4]) {
  c[0] = (uint32_t)block, c[1] = (uint32_t)(block >> 32), c[2] = (uint32_t)offset, c[3] = (uint32_t)(offset >> 32);
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = (uint64_t)0xD2511F53u * c[0], p1 = (uint64_t)0xCD9E8D57u * c[2];
    c[0] = (uint32_t)(p1 >> 32) ^ c[1] ^ k0, c[1] = (uint32_t)p1;
    c[2] = (uint32_t)(p0 >> 32) ^ c[3] ^ k1, c[3] = (uint32_t)p0;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
}

// (0, 1) from the top 24 bits, centred in its cell
EF_DEVICE float unit(uint32_t word) { return ((float)(word >> 8) + 0.5f) * 5.9604644775390625e-08f; }

// sin and cos of 2 pi u, 0 < u < 1; sincospif has no slow path, so no local memory
EF_DEVICE void sin_cos_turn(float u, float* s, float* c) {
#ifdef EF_CUDA_HOST
  *s = (float)sin(6.283185307179586 * u), *c = (float)cos(6.283185307179586 * u);
#else
  sincospif(2.0f * u, s, c);
#endif
}

EF_DEVICE void box_muller(uint32_t w0, uint32_t w1, float* z0, float* z1) {
  const float radius = sqrtf(-2.0f * logf(unit(w0)));
  float s, c;
  sin_cos_turn(unit(w1), &s, &c);
  *z0 = radius * c, *z1 = radius * s;
}

// standard normals of elements start .. start + N
template <int N> EF_DEVICE void normals(int64_t start, uint64_t seed, uint64_t offset, float (&z)[N]) {
  static_assert(N % 4 == 0, "whole blocks");
  const int shift = (int)(start & 3);
  float all[N + 4];
#pragma unroll
  for (int b = 0; b <= N / 4; ++b) {
    if (b == N / 4 && shift == 0) continue;
    uint32_t w[4];
    philox((uint64_t)(start >> 2) + b, seed, offset, w);
    box_muller(w[0], w[1], &all[4 * b], &all[4 * b + 1]);
    box_muller(w[2], w[3], &all[4 * b + 2], &all[4 * b + 3]);
  }
#pragma unroll
  for (int i = 0; i < N; ++i)  // by selection: an index known at run time would put `all` into local memory
    z[i] = shift == 0 ? all[i] : shift == 1 ? all[i + 1] : shift == 2 ? all[i + 2] : all[i + 3];
}

}  // namespace ef::cuda
