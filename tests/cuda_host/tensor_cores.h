// mma.sync, ldmatrix and wgmma for cuda_host.h: the PTX ISA's fragment layouts. mma.sync adds its exact products to the
// accumulator and rounds the sum toward zero, as tensor cores do (Fasi et al. 2021: with a few bits less than here).
//
// Not modelled: the truncation of wgmma's sums. wgmma: both operands in shared memory behind matrix
// descriptors, eager or lazy like the copies; each thread forms its own part of the accumulator.
#pragma once

#include "async_copy.h"

namespace cuda_host {

inline float from_bf16(uint16_t v) { return __uint_as_float(uint32_t(v) << 16); }
inline float from_f16(uint16_t v) { return float(cuda_host_bits<_Float16>(v)); }

// d + sum as a float, toward zero: long sums of one sign drift
inline float truncated(float d, double sum) {
  const double exact = double(d) + sum;
  const float near = float(exact);
  return std::fabs(double(near)) > std::fabs(exact) ? std::nextafter(near, 0.0f) : near;
}

struct Fragments { uint32_t a[4], b[2]; };

// m16n8k16 of 16-bit types: D (16, 8) += A (16, 16) B (16, 8)
template <float (*widen)(uint16_t)>
void mma_16816(float* d, const uint32_t* a, const uint32_t* b, const Where& w) {
  auto all = exchange(~0u, Fragments{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, w);
  unsigned g = lane() / 4, t = lane() % 4;
  float left[2][16], right[2][16];
  for (unsigned q = 0; q < 4; q++) {
    Fragments f = all(g * 4 + q);
    for (int i = 0; i < 4; i++)  // register i: row g + 8 (i & 1), columns 2q + 8 (i >> 1)
      for (int h = 0; h < 2; h++) left[i & 1][2 * q + 8 * (i >> 1) + h] = widen(uint16_t(f.a[i] >> 16 * h));
    for (int c = 0; c < 2; c++) {
      Fragments e = all((2 * t + c) * 4 + q);
      for (int i = 0; i < 2; i++)
        for (int h = 0; h < 2; h++) right[c][2 * q + 8 * i + h] = widen(uint16_t(e.b[i] >> 16 * h));
    }
  }
  for (int i = 0; i < 4; i++) {
    double sum = 0;
    for (int k = 0; k < 16; k++) sum += double(left[i >> 1][k]) * right[i & 1][k];
    d[i] = truncated(d[i], sum);
  }
}

// m16n8k8 of tf32: the hardware reads the upper 19 bits
inline void mma_1688_tf32(float* d, const uint32_t* a, const uint32_t* b, const Where& w) {
  auto all = exchange(~0u, Fragments{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, w);
  unsigned g = lane() / 4, t = lane() % 4;
  auto tf32 = [](uint32_t v) { return __uint_as_float(v & 0xFFFFE000u); };
  double sum[4] = {};
  for (unsigned k = 0; k < 8; k++) {
    Fragments f = all(g * 4 + k % 4);
    for (int c = 0; c < 2; c++) {
      double right = tf32(all((2 * t + c) * 4 + k % 4).b[k / 4]);
      sum[c] += tf32(f.a[2 * (k / 4)]) * right, sum[2 + c] += tf32(f.a[2 * (k / 4) + 1]) * right;
    }
  }
  for (int i = 0; i < 4; i++) d[i] = truncated(d[i], sum[i]);
}

struct Row { uint16_t x[8]; };

// Four 8×8 matrices; lane l brings the address of row l % 8 of matrix l / 8.
inline void ldmatrix_x4(uint32_t* r, const void* row, bool transposed, const Where& w) {
  shared_offset(row, 16, "ldmatrix");
  if (reinterpret_cast<uintptr_t>(row) % 16) fail("misaligned ldmatrix");
  Row mine;
  memcpy(&mine, row, 16);
  auto all = exchange(~0u, mine, w);
  unsigned g = lane() / 4, t = lane() % 4;
  for (unsigned m = 0; m < 4; m++) {
    uint16_t low = transposed ? all(m * 8 + 2 * t).x[g] : all(m * 8 + g).x[2 * t];
    uint16_t high = transposed ? all(m * 8 + 2 * t + 1).x[g] : all(m * 8 + g).x[2 * t + 1];
    r[m] = uint32_t(high) << 16 | low;
  }
}

// ---- wgmma

// Element (line, k) of an operand: line is a row of A or a column of B. k_major: k is contiguous.
inline float operand(uint64_t descriptor, unsigned line, unsigned k, bool k_major) {
  size_t start = (descriptor & 0x3FFF) << 4, leading = (descriptor >> 16 & 0x3FFF) << 4, stride = (descriptor >> 32 & 0x3FFF) << 4;
  unsigned code = descriptor >> 62;
  int mode = code == 1 ? 128 : code == 2 ? 64 : code == 3 ? 32 : 0;
  if (!mode || (descriptor >> 49 & 7)) fail("a matrix descriptor that the host header does not cover");
  if ((start & ~size_t(mode - 1)) % (mode * 8) && !k_major) fail("an operand that does not begin on a swizzle pattern");
  size_t at = k_major ? start + line / 8 * stride + line % 8 * mode + k * 2
                      : start + line / (mode / 2) * leading + k / 8 * stride + k % 8 * mode + line % (mode / 2) * 2;
  at = swizzled(at, mode) - SHARED_BASE;
  if (at + 2 > block->shared_bytes) fail("wgmma reads outside of shared memory");
  if (block->unfenced[at]) fail("wgmma reads what a plain store wrote, without fence.proxy.async");
  uint16_t bits;
  memcpy(&bits, block->shared + at, 2);
  return from_bf16(bits);
}

// D (64, N) = A (64, 16) B (16, N), added to D where `more`, bf16; d: this thread's N / 2 values
inline void wgmma(float* d, int n, uint64_t a, uint64_t b, bool k_major, bool more, const Where& w) {
  if (!me().registers_fenced) fail("wgmma at " + at(w) + " without wgmma.fence");
  unsigned row = warp() % 4 * 16 + lane() / 4, column = lane() % 4 * 2;
  auto product = [=] {
    float left[2][16];
    for (unsigned k = 0; k < 16; k++) left[0][k] = operand(a, row, k, k_major), left[1][k] = operand(a, row + 8, k, k_major);
    for (int i = 0; i < n / 2; i += 4)
      for (int c = 0; c < 2; c++) {
        float low = 0, high = 0;
        for (unsigned k = 0; k < 16; k++) {
          float right = operand(b, i * 2 + column + c, k, k_major);
          low += left[0][k] * right, high += left[1][k] * right;
        }
        d[i + c] = more ? d[i + c] + low : low, d[i + 2 + c] = more ? d[i + 2 + c] + high : high;
      }
  };
  options.eager ? product() : me().products.push_back(product);
}
inline void wgmma_fence(const Where& w) {
  if (!skipped(w)) me().registers_fenced = true;
}
inline void wgmma_commit(const Where& w) {
  if (skipped(w)) return;
  me().batches.push_back(std::move(me().products));
  me().products.clear();
}
inline void wgmma_wait(size_t left, const Where& w) {
  if (skipped(w)) return;
  for (auto& batches = me().batches; batches.size() > left; batches.pop_front())
    for (auto& product : batches.front()) product();
  if (!left) me().registers_fenced = false;
}

}  // namespace cuda_host
