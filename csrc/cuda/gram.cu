// gram, the form for many positions: K_ij = <G_i, G'_j> of per-sample weight gradients, on tensor cores: by mma.sync here, in
// bfloat16 on sm_90a by wgmma through a scratch in the L2 (gram_sm90.cuh).
//
// A block holds the samples of two blocks of 64, [I | J]. For each of its weight tiles it forms the gradient tiles of all of
// them into shared memory (first product, over positions) and adds their Gram to register accumulators (second product);
// no gradient reaches device memory. Weight tiles are dealt out over the splits; every split writes one partial Gram,
// which a second kernel adds in the order of the splits: the same bits every time, no atomics.
//
// Symmetric: pairs of blocks I < J only, elements i ≤ j only; the blocks (I, I) ride along with a neighbour.
// FLOPs: R·2n·t·d_in·d_out (first) + n²·d_in·d_out (second), where a sample's tiles are formed anew for each partner block:
//   R = max(1, ⌈n/64⌉ - 1) (cross: 1 + ⌈m/64⌉ for the left side, ...). The Triton form has R = 1 and pays 2 bytes written
//   and n/128 read an element through the L2 instead.
// Bytes: a tile of O × I weights reads (O + I)·t elements a sample, from the L2 where the blocks in flight stay in step:
//   O·I/(O + I) = 10.7 FLOP a byte in bfloat16 (32 × 16). Limit: the L2's bandwidth, long before the tensor cores.
#include "gradient_tile.cuh"
#include "gram_pairs.cuh"
#include "gram_sm90_launch.cuh"

namespace ef::cuda {

constexpr int kBlock = 64, kWarps = 8;  // samples of a block; warps
constexpr int kPitch = 1040;  // ldmatrix reads 16 bytes of eight rows at a time

// total (16, 32) += rows left.. · (rows right..)ᵀ over one weight tile; a tile's sum apart, so that no float32 sum is long
template <class T> struct Second {
  using G = GradientTile<T>;
  using Kept = typename G::Kept;
  static EF_DEVICE void add(float (&total)[4][4], const unsigned char* left, const unsigned char* right, int lane) {
    float d[4][4] = {};
    if constexpr (sizeof(Kept) == 2) {
#pragma unroll 2
      for (int k = 0; k < G::WIDTH * 2; k += 32) {  // bytes
        uint32_t x[4], y[4];
        ptx::ldmatrix_x4(x, left + (lane % 8 + (lane / 8 & 1) * 8) * kPitch + k + lane / 16 * 16);
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          ptx::ldmatrix_x4(y, right + (c * 16 + lane % 8 + lane / 16 * 8) * kPitch + k + (lane / 8 & 1) * 16);
          ptx::mma_bf16(d[2 * c], x, y);
          ptx::mma_bf16(d[2 * c + 1], x, y + 2);
        }
      }
    } else {
      const int g = lane / 4, q = lane % 4;
      auto at = [q](const unsigned char* p, int row, int k) { return reinterpret_cast<const float*>(p + row * kPitch)[k + q]; };
      for (int k = 0; k < G::WIDTH; k += 8) {
        const float x[4] = {at(left, g, k), at(left, g + 8, k), at(left, g, k + 4), at(left, g + 8, k + 4)};
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const float y[2] = {at(right, c * 8 + g, k), at(right, c * 8 + g, k + 4)};
          G::multiply_float(d[c], x, y, std::is_same_v<T, float>);
        }
      }
    }
#pragma unroll
    for (int c = 0; c < 4; ++c)
#pragma unroll
      for (int e = 0; e < 4; ++e) total[c][e] += d[c][e];
  }
};

// Blocks: (pairs, splits), 256 threads. Shared: 128 rows of 1040 bytes, and two stages a warp: 165,888 bytes at most.
template <class T, bool ALIGNED>
__global__ void __launch_bounds__(kWarps * 32, 1) gram_mma(Side<T> x, Side<T> y, bool symmetric, int64_t d_in, int64_t d_out,
    Span<float> partial) {
  using G = GradientTile<T>;
  EF_DYNAMIC_SHARED(unsigned char, rows);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  T* stages = reinterpret_cast<T*>(rows + 2 * kBlock * kPitch + warp * G::WARP_BYTES);
  int I, J;
  const int blocks = (int)cdiv<int64_t>(x.n, kBlock), right = (int)cdiv<int64_t>(y.n, kBlock);
  pair_of(blockIdx.x, blocks, right, symmetric, I, J);
  const bool alone = symmetric && I == J, with_i = symmetric && (alone || J == I + 1), with_j = symmetric && !alone && I == blocks - 2;
  const int left_count = (int)min(x.n - I * (int64_t)kBlock, (int64_t)kBlock);
  const int right_count = alone ? 0 : (int)min(y.n - J * (int64_t)kBlock, (int64_t)kBlock);

  // rows without a sample stay zero for good
  for (int r = warp; r < 2 * kBlock; r += kWarps)
    if (r < kBlock ? r >= left_count : r - kBlock >= right_count)
      for (int c = lane; c < kPitch / 16; c += 32) *reinterpret_cast<uint4*>(rows + r * kPitch + c * 16) = uint4{};

  float ij[4][4] = {}, ii[4][4] = {}, jj[4][4] = {};
  const int row0 = warp / 2 * 16, column0 = warp % 2 * 32;
  const bool upper = row0 < column0 + 32;  // some element on or above the diagonal
  unsigned char *rows_i = rows, *rows_j = rows + kBlock * kPitch;
  const int64_t high = cdiv<int64_t>(d_out, G::O), tiles = high * cdiv<int64_t>(d_in, G::I);
  for (int64_t tile = blockIdx.y; tile < tiles; tile += gridDim.y) {
    const int64_t o = tile % high * G::O, i = tile / high * G::I;
    form_rows<T, ALIGNED, kPitch>(x, I * (int64_t)kBlock, left_count, o, d_out, i, d_in, rows_i, stages, warp, kWarps, lane);
    if (!alone) form_rows<T, ALIGNED, kPitch>(y, J * (int64_t)kBlock, right_count, o, d_out, i, d_in, rows_j, stages, warp, kWarps, lane);
    __syncthreads();  // the tiles of all samples are there
    if (!alone) Second<T>::add(ij, rows_i + row0 * kPitch, rows_j + column0 * kPitch, lane);
    if (with_i && upper) Second<T>::add(ii, rows_i + row0 * kPitch, rows_i + column0 * kPitch, lane);
    if (with_j && upper) Second<T>::add(jj, rows_j + row0 * kPitch, rows_j + column0 * kPitch, lane);
    __syncthreads();  // and have been read
  }

  const int64_t base = (int64_t)blockIdx.y * x.n * y.n;
  auto store = [&](const float (&d)[4][4], int64_t first_row, int64_t first_column) {
#pragma unroll
    for (int c = 0; c < 4; ++c)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int64_t r = first_row + row0 + lane / 4 + e / 2 * 8, k = first_column + column0 + c * 8 + lane % 4 * 2 + e % 2;
        if (r < x.n && k < y.n && (!symmetric || r <= k)) partial[base + r * y.n + k] = d[c][e];
      }
  };
  const int64_t at_i = I * (int64_t)kBlock, at_j = J * (int64_t)kBlock;
  if (!alone) store(ij, at_i, at_j);
  if (with_i) store(ii, at_i, at_i);
  if (with_j) store(jj, at_j, at_j);
}

template <class T> int launch_mma(const Factors& left, const Factors* right, int64_t d_in, int64_t d_out, float* partial, int64_t count,
    void* stream) {
  const auto x = Side<T>::of(left), y = right ? Side<T>::of(*right) : x;
  const int64_t items = pairs(cdiv<int64_t>(x.n, kBlock), cdiv<int64_t>(y.n, kBlock), !right);
  const int shared = 2 * kBlock * kPitch + kWarps * GradientTile<T>::WARP_BYTES;
  auto go = [&](auto kernel) {
    EF_TRY(allow_shared(kernel, shared));
    return launch(kernel, dim3((unsigned)items, (unsigned)count), dim3(kWarps * 32), shared, stream, x, y, !right, d_in, d_out, partial);
  };
  return x.aligned && y.aligned ? go(gram_mma<T, true>) : go(gram_mma<T, false>);
}

}  // namespace ef::cuda

using namespace ef::cuda;

EF_LAUNCHER ef_cuda_gram_refuses(int form, int type, const Factors* left, const Factors* right, int64_t d_in, int64_t d_out) {
  if (type != kFloat && type != kBf16 && type != kHalf) return 1;
  return form == kWgmma ? sm90::refuses(type, *left, right, d_in, d_out) : 0;
}

extern "C" __attribute__((visibility("default"))) int64_t ef_cuda_gram_partials(int form, int type, const Factors* left,
    const Factors* right, int64_t d_in, int64_t d_out) {
  int count = 0;
  if (processors(&count)) return 0;
  if (form == kWgmma) return sm90::plan_of(*left, right, d_in, d_out, count).partials;
  const int64_t n = left->n, m = right ? right->n : n;
  const int64_t tiles = cdiv<int64_t>(d_out, type == kBf16 ? TileOf<Bf16>::O : TileOf<float>::O) * cdiv<int64_t>(d_in, 16);
  const int64_t items = pairs(cdiv<int64_t>(n, kBlock), cdiv<int64_t>(m, kBlock), !right);
  return max((int64_t)1, min(tiles, count / items));  // one block a multiprocessor: whole waves only
}

extern "C" __attribute__((visibility("default"))) int64_t ef_cuda_gram_scratch(int form, const Factors* left, const Factors* right,
    int64_t d_in, int64_t d_out) {
  int count = 0;
  if (form != kWgmma || processors(&count)) return 0;
  return 2 * (left->n + (right ? right->n : 0)) * sm90::plan_of(*left, right, d_in, d_out, count).pitch();
}

EF_LAUNCHER ef_cuda_gram(int form, int type, const Factors* left, const Factors* right, int64_t d_in, int64_t d_out, float* partial,
    int64_t partials, void* scratch, float* out, void* stream) {
  const int64_t n = left->n, m = right ? right->n : n;
  if (ef_cuda_gram_refuses(form, type, left, right, d_in, d_out) || partials < 1 || partials > 65535) return kBadArgument;
  if (form == kWgmma) {
    if (partials != ef_cuda_gram_partials(form, type, left, right, d_in, d_out)) return kBadArgument;
    EF_TRY(sm90::launch_wgmma(*left, right, d_in, d_out, partial, scratch, stream));
  } else if (type == kBf16) {
    EF_TRY(launch_mma<Bf16>(*left, right, d_in, d_out, partial, partials, stream));
  } else if (type == kHalf) {
    EF_TRY(launch_mma<Half>(*left, right, d_in, d_out, partial, partials, stream));
  } else {
    EF_TRY(launch_mma<float>(*left, right, d_in, d_out, partial, partials, stream));
  }
  return launch_clusters(add_partials, 1, form == kWgmma, dim3((unsigned)cdiv<int64_t>(n * m, 256)), dim3(256), 0, stream,
      static_cast<const float*>(partial), out, n, m, partials, !right);
}
