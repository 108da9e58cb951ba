// project_random: per-sample weight gradients onto k random directions, neither the gradients nor the basis ever in device memory.
//
// A block forms the gradient tiles of 64 samples into shared memory (gradient_tile.cuh) and multiplies them by the same tile of
// up to 256 directions, drawn by Philox as reference/philox.py says. Each warp holds all 64 samples for 32 directions of its own:
// column g of its product p is direction 4g + p of them, so that a lane's column of the four products is one quadruple of normals,
// or four neighbouring bits of the warp's word; its four elements of a fragment follow one another in the weight (the order of a
// sum's terms is free). Words are drawn by all threads beside the gradients, two calls an element for 256 directions, and stand in
// shared memory; normals are drawn by each lane for itself, one call for its products. Every split of the weight tiles writes a
// partial result; a second kernel adds them in order.
//
// FLOPs: ⌈k/256⌉·2n·t·d_in·d_out + 2n·⌈k/32⌉·32·d_in·d_out. Integer work for each block of samples, an element and a direction: a sign
// takes 70/128 operations of Philox and 1.3 (16 bits) or 2 (32 bits) to become a factor, a normal 18, logarithm and sine apart.
// Limit: tensor cores by mma.sync; for normals integer arithmetic.
// ±1 is exact; normals are rounded to the type of the kept tile: bfloat16, tf32 (float16), or two tf32 (float32).
#include "gradient_tile.cuh"
#include "philox.cuh"

namespace ef::cuda {

constexpr int kRows = 64, kWarps = 8, kProducts = 4, kDirections = kWarps * kProducts * 8;
// bytes between rows: a half of a warp reads 32 bytes of four rows at a time, or a quarter 64 bytes of two
template <class T> constexpr int kPitch = sizeof(typename GradientTile<T>::Kept) == 2 ? 1056 : 1088;

struct Stream {
  uint64_t seed, offset;
};

// A lane's elements 4q .. 4q + 3 of one direction: two pairs of bfloat16, or four floats
template <class T> struct Right {
  static constexpr bool kPairs = sizeof(typename GradientTile<T>::Kept) == 2;
  std::conditional_t<kPairs, uint32_t[2], float[4]> x;

  EF_DEVICE void from_values(float v0, float v1, float v2, float v3) {
    if constexpr (kPairs) x[0] = pair(v0, v1), x[1] = pair(v2, v3);
    else x[0] = v0, x[1] = v1, x[2] = v2, x[3] = v3;
  }
  // bit 28 + p of each word, set: -1
  EF_DEVICE void from_bits(const uint32_t (&w)[4], int p) {
    if constexpr (kPairs) {
#pragma unroll
      for (int h = 0; h < 2; ++h)  // both upper halves side by side
        x[h] = (__byte_perm(w[2 * h], w[2 * h + 1], 0x7632) << (3 - p) & 0x80008000u) | 0x3F803F80u;
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e) x[e] = bits_as<float>((w[e] << (3 - p) & 0x80000000u) | 0x3F800000u);
    }
  }

 private:
  static EF_DEVICE uint32_t pair(float low, float high) { return (uint32_t)narrow<Bf16>(high).bits << 16 | narrow<Bf16>(low).bits; }
};

// products whose tile sums are in registers together: of float32, whose factors are two tf32 each, all four would spill
template <class T> constexpr int kAtOnce = std::is_same_v<T, float> ? 2 : kProducts;

// d (N, 64, 8) += rows (64 × 16 columns from `column`) · right
template <class T, int N>
EF_DEVICE void multiply(float (&d)[N][4][4], const unsigned char* rows, int column, const Right<T> (&right)[N], int lane) {
  using Kept = typename GradientTile<T>::Kept;
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    const unsigned char *low = rows + (m * 16 + lane / 4) * kPitch<T> + (column + lane % 4 * 4) * sizeof(Kept), *high = low + 8 * kPitch<T>;
    if constexpr (Right<T>::kPairs) {
      const uint2 x = *reinterpret_cast<const uint2*>(low), y = *reinterpret_cast<const uint2*>(high);
      const uint32_t left[4] = {x.x, y.x, x.y, y.y};
#pragma unroll
      for (int p = 0; p < N; ++p) ptx::mma_bf16(d[p][m], left, right[p].x);
    } else {
      const float4 x = *reinterpret_cast<const float4*>(low), y = *reinterpret_cast<const float4*>(high);
      const float first[4] = {x.x, y.x, x.y, y.y}, second[4] = {x.z, y.z, x.w, y.w};
#pragma unroll
      for (int p = 0; p < N; ++p) {
        const float v[2] = {right[p].x[0], right[p].x[1]}, v2[2] = {right[p].x[2], right[p].x[3]};
        GradientTile<T>::multiply_float(d[p][m], first, v, std::is_same_v<T, float>);
        GradientTile<T>::multiply_float(d[p][m], second, v2, std::is_same_v<T, float>);
      }
    }
  }
}

// Blocks: (sample blocks × groups of 256 directions, splits), 256 threads. ALIGNED: rows of the factors begin on 16 bytes
template <class T, bool ALIGNED>
__global__ void __launch_bounds__(kWarps * 32, 1) project_random(Side<T> x, int64_t d_in, int64_t d_out, int64_t k, Stream stream,
                                                                  bool gaussian, Span<float> partial) {
  using G = GradientTile<T>;
  EF_DYNAMIC_SHARED(unsigned char, rows);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  T* stages = reinterpret_cast<T*>(rows + kRows * kPitch<T> + warp * G::WARP_BYTES);
  uint32_t* words = reinterpret_cast<uint32_t*>(rows + kRows * kPitch<T> + kWarps * G::WARP_BYTES);  // (warp, element of the tile)
  const int64_t groups = cdiv<int64_t>(k, kDirections), first = blockIdx.x / groups * kRows;
  const int64_t j0 = blockIdx.x % groups * kDirections, j = j0 + warp * 32;
  const int count = (int)min(x.n - first, (int64_t)kRows);
  for (int r = count + warp; r < kRows; r += kWarps)  // rows without a sample stay zero for good
    for (int c = lane; c < kPitch<T> / 16; c += 32) *reinterpret_cast<uint4*>(rows + r * kPitch<T> + c * 16) = uint4{};

  float acc[kProducts][4][4] = {};
  const int64_t high = cdiv<int64_t>(d_out, G::O), tiles = high * cdiv<int64_t>(d_in, G::I), size = d_in * d_out;
  for (int64_t tile = blockIdx.y; tile < tiles; tile += gridDim.y) {
    const int64_t o0 = tile % high * G::O, i0 = tile / high * G::I;
    form_rows<T, ALIGNED, kPitch<T>>(x, first, count, o0, d_out, i0, d_in, rows, stages, warp, kWarps, lane);
    const int calls = gaussian ? 0 : (int)min(k - j0, (int64_t)kDirections) > 128 ? 2 * G::WIDTH : G::WIDTH;
    for (int c = threadIdx.x; c < calls; c += kWarps * 32) {
      const int block = c / G::WIDTH, e = c % G::WIDTH;
      uint32_t w[4];
      philox((uint64_t)((j0 / 128 + block) * size + (o0 + e / G::I) * d_in + i0 + e % G::I), stream.seed, stream.offset, w);
#pragma unroll
      for (int i = 0; i < 4; ++i) words[(block * 4 + i) * G::WIDTH + e] = w[i];
    }
    __syncthreads();  // the tiles of all samples and the words are there
    if (j < k) {  // the same for the whole warp
      constexpr int N = kAtOnce<T>;
      const int tall = (int)min(d_out - o0, (int64_t)G::O), quad = lane / 4;
#pragma unroll
      for (int p0 = 0; p0 < kProducts; p0 += N) {
        float d[N][4][4] = {};  // a tile's sum apart, so that no float32 sum is long
        for (int o = 0; o < tall; ++o) {
          Right<T> right[N];
          if (gaussian) {
            const int64_t block = (j / 4 + quad) * size + (o0 + o) * d_in + i0 + lane % 4 * 4;
            float z[4][4];
#pragma unroll
            for (int e = 0; e < 4; ++e) normal_block((uint64_t)(block + e), stream.seed, stream.offset, z[e]);
#pragma unroll
            for (int p = 0; p < N; ++p) right[p].from_values(z[0][p0 + p], z[1][p0 + p], z[2][p0 + p], z[3][p0 + p]);
          } else {
            const uint4 all = *reinterpret_cast<const uint4*>(words + warp * G::WIDTH + o * G::I + lane % 4 * 4);
            const int up = 28 - 4 * quad;
            const uint32_t w[4] = {all.x << up, all.y << up, all.z << up, all.w << up};
#pragma unroll
            for (int p = 0; p < N; ++p) right[p].from_bits(w, p0 + p);
          }
          multiply<T, N>(d, rows, o * G::I, right, lane);  // columns beyond d_in are zero in the rows
        }
#pragma unroll
        for (int p = 0; p < N; ++p)
#pragma unroll
          for (int m = 0; m < 4; ++m)
#pragma unroll
            for (int e = 0; e < 4; ++e) acc[p0 + p][m][e] += d[p][m][e];
      }
    }
    __syncthreads();  // and have been read
  }

  const int64_t base = (int64_t)blockIdx.y * x.n * k;
#pragma unroll
  for (int p = 0; p < kProducts; ++p)
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int64_t i = first + m * 16 + lane / 4 + e / 2 * 8, to = j + 4 * (lane % 4 * 2 + e % 2) + p;
        if (i < x.n && to < k) partial[base + i * k + to] = acc[p][m][e];
      }
}

template <class T> int launch_project(const Factors& f, int64_t d_in, int64_t d_out, int64_t k, Stream s, bool gaussian, float* partial,
                                      int64_t splits, void* stream) {
  const auto x = Side<T>::of(f);
  const int shared = kRows * kPitch<T> + kWarps * GradientTile<T>::WARP_BYTES + kWarps * GradientTile<T>::WIDTH * (int)sizeof(uint32_t);
  const dim3 grid((unsigned)(cdiv<int64_t>(x.n, kRows) * cdiv<int64_t>(k, kDirections)), (unsigned)splits);
  auto go = [&](auto kernel) {
    EF_TRY(allow_shared(kernel, shared));
    return launch(kernel, grid, dim3(kWarps * 32), shared, stream, x, d_in, d_out, k, s, gaussian, partial);
  };
  return x.aligned ? go(project_random<T, true>) : go(project_random<T, false>);
}

}  // namespace ef::cuda

using namespace ef::cuda;

extern "C" __attribute__((visibility("default"))) int64_t ef_cuda_project_random_partials(int type, const Factors* x, int64_t d_in,
    int64_t d_out, int64_t k) {
  int count = 0;
  if (processors(&count)) return 0;
  const int64_t tiles = cdiv<int64_t>(d_out, type == kBf16 ? TileOf<Bf16>::O : TileOf<float>::O) * cdiv<int64_t>(d_in, 16);
  const int64_t blocks = cdiv<int64_t>(x->n, kRows) * cdiv<int64_t>(k, kDirections);
  return max((int64_t)1, min(tiles, count / blocks));
}

EF_LAUNCHER ef_cuda_project_random(int type, const Factors* x, int64_t d_in, int64_t d_out, int64_t k, uint64_t seed, uint64_t offset,
    int gaussian,
                                   float* partial, int64_t partials, float* out, void* stream) {
  if (partials < 1 || partials > 65535) return kBadArgument;
  const Stream s{seed, offset};
  if (type == kBf16) {
    EF_TRY(launch_project<Bf16>(*x, d_in, d_out, k, s, gaussian, partial, partials, stream));
  } else if (type == kHalf) {
    EF_TRY(launch_project<Half>(*x, d_in, d_out, k, s, gaussian, partial, partials, stream));
  } else if (type == kFloat) {
    EF_TRY(launch_project<float>(*x, d_in, d_out, k, s, gaussian, partial, partials, stream));
  } else {
    return kBadArgument;
  }
  return launch(add_partials, dim3((unsigned)cdiv<int64_t>(x->n * k, 256)), dim3(256), 0, stream, static_cast<const float*>(partial),
      out, x->n, k, partials,
                false);
}
