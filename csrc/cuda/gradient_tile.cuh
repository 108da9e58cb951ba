// Shared by gram.cu and project.cu: a warp forms a tile of one sample's weight gradient, G[o, i] = Σ_t b[t, o] a[t, i], on
// tensor cores (mma.sync), its factors coming through a two-stage cp.async pipeline of the warp's own: no block barrier.
//
//   type      products       tile (o × i)   positions a stage   kept in shared memory as
//   bfloat16  bf16           32 × 16        16                  bfloat16: one rounding, as plain PyTorch's per-sample gradient
//   float16   f16            16 × 16        16                  float32: gradients of float16 would underflow
//   float32   3 × tf32       16 × 16        8                   float32
//
// 3 × tf32: x = hi + lo, both tf32; hi·hi + hi·lo + lo·hi leaves a relative error of about 2^-21 a product, float32 sums.
#pragma once

#include "gram.h"
#include "ptx.cuh"

namespace ef::cuda {

template <class T> struct TileOf {
  static constexpr int O = 16, I = 16, K = sizeof(T) == 2 ? 16 : 8;
  using Kept = float;
};
template <> struct TileOf<Bf16> {
  static constexpr int O = 32, I = 16, K = 16;
  using Kept = Bf16;
};

// One side of the layer on the device; rows of weight tiles are d_out / O, columns d_in / I
template <class T> struct Side {
  Span<const T> a, b;
  int64_t n, t, a_sample, a_position, b_sample, b_position;
  bool aligned;  // every row begins on 16 bytes

  static Side of(const Factors& f) {
    auto whole = [](int64_t stride) { return stride * (int64_t)sizeof(T) % 16 == 0; };
    const bool aligned = (uintptr_t)f.a % 16 == 0 && (uintptr_t)f.b % 16 == 0 && whole(f.a_sample) && whole(f.a_position) &&
                         whole(f.b_sample) && whole(f.b_position);
    return {static_cast<const T*>(f.a), static_cast<const T*>(f.b), f.n, f.t, f.a_sample, f.a_position, f.b_sample, f.b_position, aligned};
  }
};

template <class T> struct GradientTile {
  using Tile = TileOf<T>;
  using Kept = typename Tile::Kept;
  static constexpr int O = Tile::O, I = Tile::I, K = Tile::K, WIDTH = O * I, E = 16 / sizeof(T);  // E: elements in 16 bytes
  // 16-bit rows are read by ldmatrix, 32-bit ones by lanes 4 columns and 8 rows apart: both pitches are free of conflicts
  static constexpr int PO = O + (sizeof(T) == 2 ? 8 : 8), PI = I + 8;
  static constexpr int STAGE = K * (PO + PI);          // elements
  static constexpr int WARP_BYTES = 2 * STAGE * sizeof(T);
  static_assert(WIDTH * sizeof(Kept) == 1024 && STAGE * sizeof(T) % 16 == 0);

  float acc[O / 16][2][4];

  EF_DEVICE void clear() {
    for (auto& x : acc)
      for (auto& y : x)
        for (float& z : y) z = 0;
  }

  // rows t0.. of p (positions × width), columns c0.. → stage (K × pitch); zero outside
  template <bool ALIGNED, int COLUMNS, int PITCH>
  static EF_DEVICE void copy(T* stage, Span<const T> p, int64_t at, int64_t position, int64_t t0, int64_t t, int64_t c0, int64_t width,
      int lane) {
    if constexpr (ALIGNED) {
      constexpr int EACH = COLUMNS / E;
#pragma unroll
      for (int q = lane; q < K * EACH; q += 32) {
        const int r = q / EACH, c = q % EACH * E;
        const int64_t left = t0 + r < t ? width - c0 - c : 0;
        const int many = left >= E ? E : left > 0 ? (int)left : 0;
        const int64_t from = many ? at + (t0 + r) * position + c0 + c : 0;
        ptx::cp_async_16(stage + r * PITCH + c, ptx::checked(p, from, many), many * (int)sizeof(T));
      }
    } else {
#pragma unroll
      for (int q = lane; q < K * COLUMNS; q += 32) {
        const int r = q / COLUMNS, c = q % COLUMNS;
        T v{};
        if (t0 + r < t && c0 + c < width) v = p[at + (t0 + r) * position + c0 + c];
        stage[r * PITCH + c] = v;
      }
    }
  }

  template <bool ALIGNED>
  static EF_DEVICE void fetch(T* stage, const Side<T>& s, int64_t sample, int64_t t0, int64_t o, int64_t d_out, int64_t i, int64_t d_in,
      int lane) {
    copy<ALIGNED, O, PO>(stage, s.b, sample * s.b_sample, s.b_position, t0, s.t, o, d_out, lane);
    copy<ALIGNED, I, PI>(stage + K * PO, s.a, sample * s.a_sample, s.a_position, t0, s.t, i, d_in, lane);
    ptx::cp_async_commit();
  }

  EF_DEVICE void add(const T* stage, int lane) {
    const T *sb = stage, *sa = stage + K * PO;
    if constexpr (sizeof(T) == 2) {
      uint32_t left[O / 16][4], right[4];
      for (int m = 0; m < O / 16; ++m)
        ptx::ldmatrix_x4_trans(left[m], sb + (lane % 8 + lane / 16 * 8) * PO + m * 16 + (lane / 8 & 1) * 8);
      ptx::ldmatrix_x4_trans(right, sa + (lane % 8 + (lane / 8 & 1) * 8) * PI + lane / 16 * 8);
#pragma unroll
      for (int m = 0; m < O / 16; ++m)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          if constexpr (std::is_same_v<T, Bf16>) ptx::mma_bf16(acc[m][c], left[m], right + 2 * c);
          else ptx::mma_f16(acc[m][c], left[m], right + 2 * c);
        }
    } else {
      const int g = lane / 4, q = lane % 4;
      float left[4], right[2];
      for (int r = 0; r < 4; ++r) left[r] = sb[(q + r / 2 * 4) * PO + g + r % 2 * 8];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        for (int r = 0; r < 2; ++r) right[r] = sa[(q + r * 4) * PI + c * 8 + g];
        multiply_float(acc[0][c], left, right, true);
      }
    }
  }

  // d += left · right by tf32. exact: three products, in an accumulator of their own that is added with rounding to nearest:
  // tensor cores truncate their sums, and a long sum of one sign drifts by 2^-25 a product
  static EF_DEVICE void multiply_float(float (&d)[4], const float (&left)[4], const float (&right)[2], bool exact) {
    uint32_t hi[4], rhi[2];
#pragma unroll
    for (int r = 0; r < 4; ++r) hi[r] = ptx::to_tf32(left[r]);
#pragma unroll
    for (int r = 0; r < 2; ++r) rhi[r] = ptx::to_tf32(right[r]);
    if (!exact) {
      ptx::mma_tf32(d, hi, rhi);
      return;
    }
    uint32_t lo[4], rlo[2];
    float sum[4] = {};
#pragma unroll
    for (int r = 0; r < 4; ++r) lo[r] = ptx::to_tf32(left[r] - bits_as<float>(hi[r]));
#pragma unroll
    for (int r = 0; r < 2; ++r) rlo[r] = ptx::to_tf32(right[r] - bits_as<float>(rhi[r]));
    ptx::mma_tf32(sum, lo, rhi);
    ptx::mma_tf32(sum, hi, rlo);
    ptx::mma_tf32(sum, hi, rhi);
#pragma unroll
    for (int e = 0; e < 4; ++e) d[e] += sum[e];
  }

  struct alignas(2 * sizeof(Kept)) Two {
    Kept x, y;
  };
  // → row: element o·I + i
  EF_DEVICE void keep(Kept* row, int lane) const {
    const int g = lane / 4, q = lane % 4;
#pragma unroll
    for (int m = 0; m < O / 16; ++m)
#pragma unroll
      for (int c = 0; c < 2; ++c)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          Kept* to = row + (m * 16 + g + h * 8) * I + c * 8 + q * 2;
          *reinterpret_cast<Two*>(to) = {narrow<Kept>(acc[m][c][2 * h]), narrow<Kept>(acc[m][c][2 * h + 1])};
        }
  }
};

// rows (samples first..first + count of s) of this weight tile, PITCH bytes apart, each warp every warps-th: the copy of the next
// stage runs beside the products of this one. Ends without a barrier. PITCH: 1024 and what keeps its readers' banks apart
template <class T, bool ALIGNED, int PITCH>
EF_DEVICE void form_rows(const Side<T>& s, int64_t first, int count, int64_t o, int64_t d_out, int64_t i, int64_t d_in,
                         unsigned char* rows, T* stages, int warp, int warps, int lane) {
  using G = GradientTile<T>;
  G tile;
  tile.clear();
  const int64_t steps = cdiv<int64_t>(s.t, G::K), mine = warp < count ? (count - warp - 1) / warps + 1 : 0, total = mine * steps;
  int64_t step = 0, row = warp, next_step = 0, next_row = warp;
  auto fetch = [&](int64_t q) {
    if (q >= total) return;
    G::template fetch<ALIGNED>(stages + (q & 1) * G::STAGE, s, first + next_row, next_step * G::K, o, d_out, i, d_in, lane);
    if (++next_step == steps) next_step = 0, next_row += warps;
  };
  fetch(0);
  for (int64_t q = 0; q < total; ++q) {
    ptx::cp_async_wait<0>();
    __syncwarp();  // every lane's part of stage q is there, and stage q - 1 has been read
    fetch(q + 1);
    tile.add(stages + (q & 1) * G::STAGE, lane);
    if (++step == steps) {
      tile.keep(reinterpret_cast<typename G::Kept*>(rows + row * PITCH), lane);
      tile.clear();
      step = 0, row += warps;
    }
  }
}

// out (n, m) = Σ_s partial[s], in order; symmetric: from on and above the diagonal. May be launched early
static __global__ void __launch_bounds__(256) add_partials(Span<const float> partial, Span<float> out, int64_t n, int64_t m,
    int64_t count, bool symmetric) {
  const int64_t e = (int64_t)blockIdx.x * 256 + threadIdx.x;
  ptx::griddepcontrol_wait();
  if (e >= n * m) return;
  const int64_t i = e / m, j = e % m, at = symmetric ? min(i, j) * m + max(i, j) : e;
  float sum = 0;
  for (int64_t s = 0; s < count; ++s) sum += partial[s * n * m + at];
  out[e] = sum;
}

}  // namespace ef::cuda
