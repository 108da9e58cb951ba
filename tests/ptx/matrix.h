// ldmatrix, stmatrix, mma.sync and wgmma, by the fragment layouts of the PTX ISA. Sums of exact products are rounded toward zero.
#pragma once

#include "arithmetic.h"
#include "memory.h"

namespace ptx {

// d + sum as a float, toward zero: as tensor cores do (Fasi et al. 2021), so that long sums of one sign drift
inline float truncated(float d, double sum) {
  const double exact = double(d) + sum;
  const float near = float(exact);
  return std::fabs(double(near)) > std::fabs(exact) && std::fabs(exact) < 0x1p128 ? get<float>(put(near) - 1) : canonical(near);
}

enum Type { kBf16, kF16, kTf32 };

inline float tf32(uint64_t bits) { return get<float>(bits & 0xFFFFE000); }
inline float half_of(int type, uint64_t word, int h) {
  const uint16_t bits = uint16_t(word >> 16 * h);
  return type == kBf16 ? bf16(bits) : f16(bits);
}
inline float value_of(int type, const unsigned char* from, int e) {
  return type == kTf32 ? tf32(value(from + 4 * e, 4, false)) : half_of(type, value(from + 2 * e, 2, false), 0);
}

// shape: matrices (1, 2, 4), transposed, to memory
inline void matrices(Warp& w, const Instruction& i, Mask m) {
  w.all_here(m, "ldmatrix or stmatrix");
  for (int q = 0; q < i.shape[0]; ++q) {
    uint32_t starts[8];
    uint16_t tile[8][8];
    for (int r = 0; r < 8; ++r) starts[r] = uint32_t(w.row(i.from[0])[q * 8 + r] + i.offset);
    for (int r = 0; r < 8 && !i.shape[2]; ++r) std::memcpy(tile[r], w.block.shared.read(w.id, starts[r], 16), 16);
    for (int l = 0; l < 32; ++l) {
      uint64_t& x = w.row(i.shape[2] ? i.from[1 + q] : i.to[q])[l];
      if (!i.shape[2]) x = 0;
      for (int h = 0; h < 2; ++h) {
        uint16_t& element = i.shape[1] ? tile[l % 4 * 2 + h][l / 4] : tile[l / 4][l % 4 * 2 + h];
        if (i.shape[2]) element = uint16_t(x >> 16 * h);
        else x |= uint64_t(element) << 16 * h;
      }
    }
    for (int r = 0; r < 8 && i.shape[2]; ++r) w.block.shared.write(w.id, starts[r], tile[r], 16);
    count_shared(w, starts, 8, 16);
  }
}

// One warp's D (16, columns) = A (16, depth) B (depth, columns) + C, where there is a C. d, c: rows of its fragments
inline void product(Warp& w, const int* d, const int* c, int columns, int depth, const float (*a)[16], const float (*b)[256]) {
  for (int r = 0; r < 16; ++r) {
    double sums[256] = {};
    for (int k = 0; k < depth; ++k) {
      const double x = a[r][k];
      for (int n = 0; n < columns; ++n) sums[n] += x * double(b[k][n]);
    }
    for (int n = 0; n < columns; ++n) {
      const int e = n / 8 * 4 + r / 8 * 2 + n % 2, l = r % 8 * 4 + n % 8 / 2;
      w.row(d[e])[l] = put(truncated(c ? get<float>(w.row(c[e])[l]) : 0.0f, sums[n]));
    }
  }
}

// A (16, depth) in registers from `first` on
inline void in_registers(Warp& w, const int* first, int type, int depth, float (*a)[16]) {
  for (int r = 0; r < 16; ++r)
    for (int k = 0; k < depth; ++k)
      a[r][k] = type == kTf32 ? tf32(w.row(first[r / 8 + k / 4 * 2])[r % 8 * 4 + k % 4])
                              : half_of(type, w.row(first[r / 8 + k / 8 * 2])[r % 8 * 4 + k % 8 / 2], k % 2);
}

// mma.sync m16n8: shape[0] the type, shape[1] its depth. from: A, B, C
inline void mma(Warp& w, const Instruction& i, Mask m) {
  w.all_here(m, "mma.sync");
  const int type = i.shape[0], depth = i.shape[1], registers = type == kTf32 ? depth / 2 : depth / 4;
  const int *first = i.from.data(), *second = first + registers;
  float a[16][16], b[16][256];
  in_registers(w, first, type, depth, a);
  for (int k = 0; k < depth; ++k)
    for (int n = 0; n < 8; ++n)
      b[k][n] = type == kTf32 ? tf32(w.row(second[k / 4])[n * 4 + k % 4]) : half_of(type, w.row(second[k / 8])[n * 4 + k % 8 / 2], k % 2);
  product(w, i.to.data(), second + registers / 2, 8, depth, a, b);
}

// The tile behind a matrix descriptor, by pieces of 16 bytes: f(piece, line, k) for the first element of each. A line is a row of A
// or a column of B; `depth` elements of each line, 32 bytes
template <class F> void behind(Warp& w, uint64_t descriptor, int type, int line, int lines, bool k_major, F f) {
  const uint64_t start = (descriptor & 0x3FFF) << 4, leading = (descriptor >> 16 & 0x3FFF) << 4, stride = (descriptor >> 32 & 0x3FFF) << 4;
  const int code = int(descriptor >> 62), mode = code == 1 ? 128 : code == 2 ? 64 : code == 3 ? 32 : 16;
  if (descriptor >> 49 & 7 || (!code && !k_major)) fail("wgmma: a matrix descriptor that this machine does not cover");
  auto piece = [&](uint64_t at, int l, int k) {
    if (code) at ^= at >> 3 & (code == 1 ? 0x70 : code == 2 ? 0x30 : 0x10);
    f(w.block.shared.read(w.id, at, 16, true), l, k);
  };
  const int wide = mode / 2, end = line + lines;
  if (k_major) {  // a tile is one pattern wide; without a swizzle, 16 bytes
    for (int l = line; l < end; ++l)
      for (int half = 0; half < 2; ++half)
        piece(start + l / 8 * stride + l % 8 * mode + half * (code ? 16 : leading), l - line, half * (type == kTf32 ? 4 : 8));
  } else {
    for (int k = 0; k < 16; ++k)
      for (int l = line; l < end; l += 8) piece(start + l / wide * leading + k / 8 * stride + k % 8 * mode + l % wide * 2, l - line, k);
  }
}

template <class F, class G> void tiles(Warp& w, const Product& x, F left, G right) {
  const Instruction& i = *x.of;
  if (i.many == 1) behind(w, x.left, i.shape[0], int(w.id % 4) * 16, 16, !i.shape[2], left);
  behind(w, x.right, i.shape[0], 0, i.shape[1], !i.shape[3], right);
}
inline void multiply(Warp& w, const Product& x) {
  const Instruction& i = *x.of;
  const int type = i.shape[0], depth = type == kTf32 ? 8 : 16;
  float a[16][16], b[16][256];
  if (i.many == 4) in_registers(w, i.from.data(), type, depth, a);
  auto into = [&](bool k_major, auto element) {
    return [=](const unsigned char* from, int line, int k) {
      for (int e = 0; e < (type == kTf32 ? 4 : 8); ++e) element(line + (k_major ? 0 : e), k + (k_major ? e : 0)) = value_of(type, from, e);
    };
  };
  tiles(w, x, into(!i.shape[2], [&](int l, int k) -> float& { return a[l][k]; }),
        into(!i.shape[3], [&](int l, int k) -> float& { return b[k][l]; }));
  product(w, i.to.data(), x.more ? i.to.data() : nullptr, i.shape[1], depth, a, b);
}

// From its issue until it has been waited for, accumulators and A's registers belong to a product
inline void hold(Warp& w, const Product& x, int by) {
  for (int r : x.of->to) w.held[r].accumulating += by;
  for (int k = 0; x.of->many == 4 && k < 4; ++k) w.held[x.of->from[k]].multiplied += by;
}

// shape: type, columns, A is transposed, B is. from: A (4 registers or a descriptor), B's descriptor, whether to add; the accumulator
// is `to`. Each warp of the four forms its own 16 rows.
inline void wgmma(Warp& w, const Instruction& i, Mask m) {
  w.all_here(m, "wgmma");
  const Product x{&i, w.row(i.from[0])[0], w.row(i.from[i.many])[0], bool(w.row(i.from[i.many + 1])[0] & 1)};
  if (!w.fences) fail("wgmma before any wgmma.fence");
  for (int r : i.to) {
    if (x.more && w.held[r].written == w.fences) fail("wgmma adds to a register that was written after wgmma.fence");
    if (w.held[r].read == w.fences) fail("wgmma writes a register that was read after wgmma.fence");
  }
  for (int k = 0; i.many == 4 && k < 4; ++k)
    if (w.held[i.from[k]].written == w.fences) fail("wgmma reads a register that was written after wgmma.fence");
  hold(w, x, 1), w.products.push_back(x);
  if (w.block.launch.eager) multiply(w, x);
  else tiles(w, x, [](auto...) {}, [](auto...) {});  // what it reads must be there already
}
inline void wgmma_fence(Warp& w, const Instruction&, Mask m) {
  w.all_here(m, "wgmma.fence");
  ++w.fences;
}
inline void wgmma_commit(Warp& w, const Instruction&, Mask m) {
  w.all_here(m, "wgmma.commit_group");
  w.batches.push_back(std::move(w.products));
  w.products.clear();
}
inline void wgmma_wait(Warp& w, const Instruction& i, Mask m) {
  w.all_here(m, "wgmma.wait_group");
  for (; w.batches.size() > size_t(i.offset); w.batches.pop_front())
    for (auto& x : w.batches.front()) {
      if (!w.block.launch.eager) multiply(w, x);
      hold(w, x, -1);
    }
}
inline void proxy_fence(Warp& w, const Instruction&, Mask) { w.block.shared.fence(w.id); }

// What an instruction may not touch while products are under way
inline void check_held(Warp& w, const Instruction& i) {
  if (i.run == wgmma) return;
  for (int r : i.from)
    if (w.held[r].accumulating) fail("a register that wgmma adds to is read before wgmma.wait_group");
  for (int r : i.to)
    if (w.held[r].accumulating || w.held[r].multiplied) fail("a register of wgmma is written before wgmma.wait_group");
}

}  // namespace ptx
