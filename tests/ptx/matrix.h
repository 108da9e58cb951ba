// ldmatrix, stmatrix, mma.sync and wgmma, by the fragment layouts of the PTX ISA. Sums of exact products are rounded toward zero.
#pragma once

#include "arithmetic.h"
#include "memory.h"

namespace ptx {

// d + sum as a float, toward zero: as tensor cores do (Fasi et al. 2021), so that long sums of one sign drift
inline float truncated(float d, double sum) {
  const double exact = double(d) + sum;
  const float near = float(exact);
  return std::fabs(double(near)) > std::fabs(exact) ? std::nextafter(near, 0.0f) : near;
}

enum Type { kBf16, kF16, kTf32 };

inline double element(int type, const unsigned char* at) {
  if (type == kTf32) return get<float>(value(at, 4, false) & 0xFFFFE000);
  const uint16_t bits = uint16_t(value(at, 2, false));
  return type == kBf16 ? bf16(bits) : f16(bits);
}
inline double half_of(int type, uint64_t word, int h) {
  const uint16_t bits = uint16_t(word >> 16 * h);
  return type == kBf16 ? bf16(bits) : f16(bits);
}

// shape: matrices (1, 2, 4), transposed, to memory
inline void matrices(Warp& w, const Instruction& i, Mask m) {
  w.all_here(m, "ldmatrix or stmatrix");
  for (int q = 0; q < i.shape[0]; ++q) {
    unsigned char* rows[8];
    std::vector<uint32_t> starts;
    for (int r = 0; r < 8; ++r) {
      starts.push_back(uint32_t(w.row(i.from[0])[q * 8 + r] + i.offset));
      rows[r] = w.shared(starts[r], 16);
    }
    count_shared(w, starts, 16);
    for (int l = 0; l < 32; ++l) {
      const int g = l / 4, t = l % 4;
      unsigned char* at[2] = {i.shape[1] ? rows[2 * t] + 2 * g : rows[g] + 4 * t, i.shape[1] ? rows[2 * t + 1] + 2 * g : rows[g] + 4 * t + 2};
      uint64_t& x = w.row(i.shape[2] ? i.from[1 + q] : i.to[q])[l];
      if (i.shape[2])
        for (int h = 0; h < 2; ++h) {
          const uint16_t bits = uint16_t(x >> 16 * h);
          std::memcpy(at[h], &bits, 2);
        }
      else x = value(at[0], 2, false) | value(at[1], 2, false) << 16;
    }
  }
}

// One warp's D (16, N) = A (16, K) B (K, N) + C; `left` and `right` say what A and B are. d, c: rows of its fragments
template <class L, class R> void product(Warp& w, const int* d, const int* c, int columns, int depth, L left, R right, bool more) {
  std::vector<double> a(size_t(16) * depth), b(size_t(columns) * depth);
  for (int r = 0; r < 16; ++r)
    for (int k = 0; k < depth; ++k) a[r * depth + k] = left(r, k);
  for (int n = 0; n < columns; ++n)
    for (int k = 0; k < depth; ++k) b[n * depth + k] = right(k, n);
  for (int e = 0; e < columns / 2; ++e)
    for (int l = 0; l < 32; ++l) {
      const int r = l / 4 + e / 2 % 2 * 8, n = e / 4 * 8 + l % 4 * 2 + e % 2;
      double sum = 0;
      for (int k = 0; k < depth; ++k) sum += a[r * depth + k] * b[n * depth + k];
      w.row(d[e])[l] = put(truncated(more ? get<float>(w.row(c[e])[l]) : 0.0f, sum));
    }
}

// Element of A in registers from `first` on
inline double in_registers(Warp& w, const int* first, int type, int r, int k) {
  if (type == kTf32) return element(kTf32, reinterpret_cast<unsigned char*>(w.row(first[r / 8 + k / 4 * 2]) + r % 8 * 4 + k % 4));
  return half_of(type, w.row(first[r / 8 + k / 8 * 2])[r % 8 * 4 + k % 8 / 2], k % 2);
}

// mma.sync m16n8: shape[0] the type, shape[1] its depth. from: A, B, C
inline void mma(Warp& w, const Instruction& i, Mask m) {
  w.all_here(m, "mma.sync");
  const int type = i.shape[0], depth = i.shape[1], registers = type == kTf32 ? depth / 2 : depth / 4;
  const int *a = i.from.data(), *b = a + registers, *c = b + registers / 2;
  product(w, i.to.data(), c, 8, depth, [&](int r, int k) { return in_registers(w, a, type, r, k); },
          [&](int k, int n) {
            if (type == kTf32) return element(kTf32, reinterpret_cast<unsigned char*>(w.row(b[k / 4]) + n * 4 + k % 4));
            return half_of(type, w.row(b[k / 8])[n * 4 + k % 8 / 2], k % 2);
          }, true);
}

// Element (line, k) of a tile behind a matrix descriptor: line is a row of A or a column of B
inline double behind(Warp& w, uint64_t descriptor, int type, int line, int k, bool k_major) {
  const uint64_t start = (descriptor & 0x3FFF) << 4, leading = (descriptor >> 16 & 0x3FFF) << 4, stride = (descriptor >> 32 & 0x3FFF) << 4;
  const int code = int(descriptor >> 62), mode = code == 1 ? 128 : code == 2 ? 64 : code == 3 ? 32 : 16, size = type == kTf32 ? 4 : 2;
  if (descriptor >> 49 & 7 || (!code && !k_major)) fail("wgmma: a matrix descriptor that this machine does not cover");
  uint64_t at;
  if (k_major) {
    const uint64_t column = uint64_t(k) * size;  // a tile is one pattern wide; without a swizzle, 16 bytes
    at = code ? start + line / 8 * stride + line % 8 * mode + column : start + line / 8 * stride + line % 8 * 16 + column / 16 * leading + column % 16;
  } else {
    const int wide = mode / size;
    at = start + line / wide * leading + k / 8 * stride + k % 8 * mode + line % wide * size;
  }
  if (code) at ^= at >> 3 & (code == 1 ? 0x70 : code == 2 ? 0x30 : 0x10);
  return element(type, w.shared(at, size));
}

// shape: type, columns, A is transposed, B is. from: A (4 registers or a descriptor), B's descriptor, whether to add; the accumulator
// is `to`. Each warp of the four forms its own 16 rows.
inline void wgmma(Warp& w, const Instruction& i, Mask m) {
  w.all_here(m, "wgmma");
  const bool registers = i.many == 4;
  const uint64_t left = w.row(i.from[0])[0], right = w.row(i.from[i.many])[0];
  const bool more = w.row(i.from[i.many + 1])[0] & 1;
  auto run = [=, &w, &i] {  // A's registers belong to it until it has been waited for
    const int type = i.shape[0], depth = type == kTf32 ? 8 : 16;
    product(w, i.to.data(), i.to.data(), i.shape[1], depth,
            [&](int r, int k) { return registers ? in_registers(w, i.from.data(), type, r, k)
                                                 : behind(w, left, type, int(w.id % 4) * 16 + r, k, !i.shape[2]); },
            [&](int k, int n) { return behind(w, right, type, n, k, !i.shape[3]); }, more);
  };
  w.block.launch.eager ? run() : w.products.push_back(run);
}
inline void wgmma_commit(Warp& w, const Instruction&, Mask) {
  w.batches.push_back(std::move(w.products));
  w.products.clear();
}
inline void wgmma_wait(Warp& w, const Instruction& i, Mask) {
  for (; w.batches.size() > size_t(i.offset); w.batches.pop_front())
    for (auto& product : w.batches.front()) product();
}

}  // namespace ptx
