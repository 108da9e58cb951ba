// project_random: per-sample weight gradients onto k random directions, neither the gradients nor the basis ever in device memory.
//
// A block forms the gradient tiles of 64 samples into shared memory (gradient_tile.cuh) and multiplies them by the same tile of
// up to 256 directions, whose entries every thread draws by Philox straight into its tensor-core fragments: four
// neighbouring elements, one Philox block, are the thread's four rows of a fragment (the order of a sum's terms is free).
// Each warp holds all 64 samples for 32 directions of its own, so an entry is drawn once a block. Every split of the
// weight tiles writes a partial result; a second kernel adds them in order.
//
// FLOPs: ⌈k/256⌉·2n·t·d_in·d_out + 2n·k·d_in·d_out. Integer work: ⌈n/64⌉·k·d_in·d_out/4 Philox blocks of about 70
// operations (twice that where d_in or the layer's size is no multiple of 4). Limit: integer arithmetic for large k, else the L2 that
// feeds the tiles. Entry (j, e): element j·d_out·d_in + e of stream (seed, offset), as reference/project.py.
// ±1 is exact; normals are rounded to the type of the kept tile: bfloat16, tf32 (float16), or two tf32 (float32).
#include "gradient_tile.cuh"
#include "philox.cuh"

namespace ef::cuda {

constexpr int kRows = 64, kWarps = 8, kPieces = 4, kDirections = kWarps * kPieces * 8;

struct Stream {
  uint64_t seed, offset;
};

EF_DEVICE void values(const uint32_t (&w)[4], bool gaussian, float (&v)[4]) {
  if (gaussian) {
    box_muller(w[0], w[1], &v[0], &v[1]);
    box_muller(w[2], w[3], &v[2], &v[3]);
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) v[e] = bits_as<float>(0x3F800000u | (w[e] & 0x80000000u));  // top bit set: -1
  }
}

// elements first .. first + 3
template <bool WHOLE> EF_DEVICE void draw(int64_t first, Stream s, bool gaussian, float (&v)[4]) {
  uint32_t w[4];
  philox((uint64_t)first >> 2, s.seed, s.offset, w);
  values(w, gaussian, v);
  if constexpr (!WHOLE) {
    const int shift = (int)(first & 3);
    float next[4], both[8];
    philox(((uint64_t)first >> 2) + 1, s.seed, s.offset, w);
    values(w, gaussian, next);
#pragma unroll
    for (int e = 0; e < 4; ++e) both[e] = v[e], both[4 + e] = next[e];
#pragma unroll
    for (int e = 0; e < 4; ++e) v[e] = shift == 0 ? both[e] : shift == 1 ? both[e + 1] : shift == 2 ? both[e + 2] : both[e + 3];
  }
}

EF_DEVICE uint32_t pack(float low, float high) { return (uint32_t)narrow<Bf16>(high).bits << 16 | narrow<Bf16>(low).bits; }

// d (64, 8) += rows (64 × 16 columns from `column`) · v, the thread's elements 4q .. 4q + 3 of its direction
template <class T> EF_DEVICE void multiply(float (&d)[4][4], const unsigned char* rows, int column, const float (&v)[4], int lane) {
  using Kept = typename GradientTile<T>::Kept;
  const int g = lane / 4, q = lane % 4;
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    const unsigned char *low = rows + (m * 16 + g) * kPitch + (column + 4 * q) * sizeof(Kept), *high = low + 8 * kPitch;
    if constexpr (sizeof(Kept) == 2) {
      const uint2 x = *reinterpret_cast<const uint2*>(low), y = *reinterpret_cast<const uint2*>(high);
      const uint32_t left[4] = {x.x, y.x, x.y, y.y}, right[2] = {pack(v[0], v[1]), pack(v[2], v[3])};
      ptx::mma_bf16(d[m], left, right);
    } else {
      const float4 x = *reinterpret_cast<const float4*>(low), y = *reinterpret_cast<const float4*>(high);
      const float first[4] = {x.x, y.x, x.y, y.y}, second[4] = {x.z, y.z, x.w, y.w}, right[2] = {v[0], v[1]}, right2[2] = {v[2], v[3]};
      GradientTile<T>::multiply_float(d[m], first, right, std::is_same_v<T, float>);
      GradientTile<T>::multiply_float(d[m], second, right2, std::is_same_v<T, float>);
    }
  }
}

// Blocks: (sample blocks × groups of 256 directions, splits), 256 threads
// WHOLE: rows of the factors begin on 16 bytes, runs of four elements on a Philox block
template <class T, bool WHOLE>
__global__ void __launch_bounds__(kWarps * 32, 1) project_random(Side<T> x, int64_t d_in, int64_t d_out, int64_t k, Stream stream,
    bool gaussian,
                                                                  Span<float> partial) {
  using G = GradientTile<T>;
  EF_DYNAMIC_SHARED(unsigned char, rows);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  T* stages = reinterpret_cast<T*>(rows + kRows * kPitch + warp * G::WARP_BYTES);
  const int64_t groups = cdiv<int64_t>(k, kDirections), first = blockIdx.x / groups * kRows;
  const int64_t j0 = blockIdx.x % groups * kDirections + warp * (kPieces * 8);
  const int count = (int)min(x.n - first, (int64_t)kRows);
  for (int r = count + warp; r < kRows; r += kWarps)  // rows without a sample stay zero for good
    for (int c = lane; c < kPitch / 16; c += 32) *reinterpret_cast<uint4*>(rows + r * kPitch + c * 16) = uint4{};

  float acc[kPieces][4][4] = {};
  const int64_t high = cdiv<int64_t>(d_out, G::O), tiles = high * cdiv<int64_t>(d_in, G::I), size = d_in * d_out;
  for (int64_t tile = blockIdx.y; tile < tiles; tile += gridDim.y) {
    const int64_t o0 = tile % high * G::O, i0 = tile / high * G::I;
    form_rows<T, WHOLE>(x, first, count, o0, d_out, i0, d_in, rows, stages, warp, kWarps, lane);
    __syncthreads();  // the tiles of all samples are there
    const int tall = (int)min(d_out - o0, (int64_t)G::O);
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      if (j0 + p * 8 >= k) continue;  // the same for the whole warp
      float d[4][4] = {}, v[4];       // a tile's sum apart, so that no float32 sum is long
      const int64_t element = (j0 + p * 8 + lane / 4) * size + i0 + lane % 4 * 4;
      for (int o = 0; o < tall; ++o) {
        draw<WHOLE>(element + (o0 + o) * d_in, stream, gaussian, v);
        multiply<T>(d, rows, o * G::I, v, lane);  // columns beyond d_in are zero in the rows
      }
#pragma unroll
      for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[p][m][e] += d[m][e];
    }
    __syncthreads();  // and have been read
  }

  const int64_t base = (int64_t)blockIdx.y * x.n * k;
#pragma unroll
  for (int p = 0; p < kPieces; ++p)
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int64_t i = first + m * 16 + lane / 4 + e / 2 * 8, j = j0 + p * 8 + lane % 4 * 2 + e % 2;
        if (i < x.n && j < k) partial[base + i * k + j] = acc[p][m][e];
      }
}

template <class T> int launch_project(const Factors& f, int64_t d_in, int64_t d_out, int64_t k, Stream s, bool gaussian, float* partial,
    int64_t splits, void* stream) {
  const auto x = Side<T>::of(f);
  const int shared = kRows * kPitch + kWarps * GradientTile<T>::WARP_BYTES;
  const dim3 grid((unsigned)(cdiv<int64_t>(x.n, kRows) * cdiv<int64_t>(k, kDirections)), (unsigned)splits);
  auto go = [&](auto kernel) {
    EF_TRY(allow_shared(kernel, shared));
    return launch(kernel, grid, dim3(kWarps * 32), shared, stream, x, d_in, d_out, k, s, gaussian, partial);
  };
  return x.aligned && d_in % 4 == 0 ? go(project_random<T, true>) : go(project_random<T, false>);
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
