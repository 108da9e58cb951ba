// Philox4x32-10 and Box-Muller: the very numbers of reference/philox.py, csrc/cpu/isa/draw.cpp and kernels/philox.py.
//
// Words are equal to the bit on every backend; normals differ by the last place of log, sin and cos.
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

EF_DEVICE void normal_block(uint64_t block, uint64_t seed, uint64_t offset, float (&z)[4]) {
  uint32_t w[4];
  philox(block, seed, offset, w);
  box_muller(w[0], w[1], &z[0], &z[1]);
  box_muller(w[2], w[3], &z[2], &z[3]);
}

// standard normals of elements start .. start + N; one block more where start is not a multiple of 4
template <int N> EF_DEVICE void normals(int64_t start, uint64_t seed, uint64_t offset, float (&z)[N]) {
  static_assert(N % 4 == 0, "whole blocks");
  const int shift = (int)(start & 3);
  float now[4], next[4];
  normal_block((uint64_t)(start >> 2), seed, offset, now);
#pragma unroll
  for (int b = 0; b < N / 4; ++b) {
    if (shift != 0 || b + 1 < N / 4) normal_block((uint64_t)(start >> 2) + b + 1, seed, offset, next);
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // by selection: an index known at run time would put the values into local memory
      const float one = i + 1 < 4 ? now[(i + 1) % 4] : next[(i + 1) % 4], two = i + 2 < 4 ? now[(i + 2) % 4] : next[(i + 2) % 4];
      const float three = i + 3 < 4 ? now[(i + 3) % 4] : next[(i + 3) % 4];
      z[4 * b + i] = shift == 0 ? now[i] : shift == 1 ? one : shift == 2 ? two : three;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) now[i] = next[i];
  }
}

}  // namespace ef::cuda
