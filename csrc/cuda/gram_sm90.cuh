// gram for many positions on sm_90a: TMA copies behind mbarriers, both products by wgmma; bfloat16. Included by gram.cu.
//
// A block of 288 threads holds 64 samples, [I | J] of 32 each, and forms weight tiles of 64 × 16. One warp issues TMA
// copies of (64 positions × 64 columns of b) and (64 × 16 of a) into a ring of 8 stages; two warpgroups take the
// samples in turn, form G (64, 16) by m64n16k16 with both operands read transposed where TMA put them, and store it as
// bfloat16 into X (64 samples × 1024), swizzled as wgmma reads it. Then each warpgroup adds X Xᵀ over half of the columns
// to its own (64, 64) accumulator, by m64n64k16, and writes its own partial Gram.
//
// R = max(1, ⌈n/32⌉ - 1) formings of a tile; 12.8 FLOP a byte of L2: made for n ≤ 64 with many positions.
// TMA needs 16-byte strides and fills zeros outside of the tensors. Never run on a GPU.
#pragma once

#ifndef EF_CUDA_HOST
#include <cuda.h>
#endif

#include "gradient_tile.cuh"
#include "gram_pairs.cuh"

namespace ef::cuda::sm90 {

constexpr int kBlock = 32, kO = 64, kI = 16, kT = 64, kStages = 8, kConsumers = 256, kThreads = kConsumers + 32;
constexpr int kBytesB = kT * kO * 2, kBytesA = kT * kI * 2, kStage = kBytesB + kBytesA;
constexpr int kX = 2 * kBlock * kO * kI * 2;  // 16 panels of 64 rows × 128 bytes
constexpr int kShared = kX + kStages * kStage + 2 * kStages * 8 + 1024;  // 1024: to align
static_assert(kShared <= 232448 && kStage % 1024 == 0);

#ifdef EF_CUDA_HOST
using TensorMap = cuda_host::TensorMap;
#else
using TensorMap = CUtensorMap;
#endif
struct Maps {
  TensorMap a, b, a2, b2;
};

#ifdef EF_SM90A
struct Samples {  // rows 0..31: samples from i0 of the left side, rows 32..63: from j0 of the right one
  int64_t i0, j0;
  int left, right;
  EF_DEVICE int count() const { return left + right; }
  EF_DEVICE int row(int v) const { return v < left ? v : kBlock + v - left; }
};

EF_DEVICE void produce(const Maps& maps, const Samples& s, int64_t t, int64_t t2, int64_t d_out, int64_t tiles, unsigned char* ring,
    uint64_t* full,
                       uint64_t* empty) {
  const int64_t high = cdiv<int64_t>(d_out, kO);
  int64_t q = 0;
  for (int64_t tile = blockIdx.y; tile < tiles; tile += gridDim.y)
    for (int v = 0; v < s.count(); ++v) {
      const bool left = v < s.left;
      const int sample = (int)(left ? s.i0 + v : s.j0 + v - s.left);
      for (int64_t t0 = 0; t0 < (left ? t : t2); t0 += kT, ++q) {
        const int slot = q % kStages;
        if (q >= kStages) ptx::mbarrier_wait(&empty[slot], (q / kStages - 1) & 1);  // both products of its last use are done
        ptx::mbarrier_arrive_expect(&full[slot], kStage);
        unsigned char* stage = ring + slot * kStage;
        ptx::tma_load_3d(stage, left ? &maps.b : &maps.b2, (int)(tile % high * kO), (int)t0, sample, &full[slot]);
        ptx::tma_load_3d(stage + kBytesB, left ? &maps.a : &maps.a2, (int)(tile / high * kI), (int)t0, sample, &full[slot]);
      }
    }
}

// G (64, 16) of one sample, as row `row` of X: panel o / 4, chunk (o % 4, i / 8) moved by the 128-byte swizzle
EF_DEVICE void keep(unsigned char* x, const float (&d)[8], int row, int thread) {
  const int lane = thread % 32, o0 = thread / 32 * 16 + lane / 4, i0 = lane % 4 * 2;
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int o = o0 + 8 * h, chunk = (o % 4 * 2 + c) ^ (row % 8);
      const float* v = d + 4 * c + 2 * h;
      const uint32_t pair = (uint32_t)narrow<Bf16>(v[1]).bits << 16 | narrow<Bf16>(v[0]).bits;
      ptx::store_shared(x + o / 4 * (2 * kBlock * 128) + row * 128 + chunk * 16 + i0 * 2, pair);
    }
}

EF_DEVICE void consume(const Samples& s, int group, int64_t t, int64_t t2, int64_t tiles, unsigned char* x, unsigned char* ring,
    uint64_t* full, uint64_t* empty,
                       float (&gram)[32]) {
  const int thread = threadIdx.x % 128;
  const int64_t steps = cdiv<int64_t>(t, kT), steps2 = cdiv<int64_t>(t2, kT);
  for (int r = thread; r < 2 * kBlock; r += 128)  // rows without a sample stay zero for good; both groups store the same
    if (r < kBlock ? r >= s.left : r - kBlock >= s.right)
      for (int c = 0; c < kX / (2 * kBlock * 128) * 32; ++c) ptx::store_shared(x + c / 32 * (2 * kBlock * 128) + r * 128 + c % 32 * 4, 0);
  int64_t q0 = 0;
  for (int64_t tile = blockIdx.y; tile < tiles; tile += gridDim.y, q0 += s.left * steps + s.right * steps2) {
    for (int v = group; v < s.count(); v += 2) {
      const bool left = v < s.left;
      int64_t q = q0 + (left ? v * steps : s.left * steps + (v - s.left) * steps2);
      float d[8] = {};
      for (int64_t k = left ? steps : steps2; k > 0; --k, ++q) {
        const int slot = q % kStages;
        ptx::mbarrier_wait(&full[slot], q / kStages & 1);  // the copies have landed
        const uint32_t b = ptx::shared_address(ring + slot * kStage), a = b + kBytesB;
        ptx::wgmma_fence();
#pragma unroll
        for (int kk = 0; kk < kT / 16; ++kk)
          ptx::wgmma_m64n16_mn(d, ptx::descriptor(b + kk * 16 * 128, 1024, 128), ptx::descriptor(a + kk * 16 * 32, 256, 32));
        ptx::wgmma_commit();
        ptx::wgmma_wait_all();
        if (thread % 32 == 0) ptx::mbarrier_arrive(&empty[slot]);
      }
      keep(x, d, s.row(v), thread);
    }
    ptx::fence_proxy_async();              // plain stores to X, before wgmma reads it
    ptx::named_barrier(1, kConsumers);     // X is complete
    float sum[32] = {};  // of this tile apart, so that no float32 sum is long
    ptx::wgmma_fence();
    for (int panel = group; panel < kX / (2 * kBlock * 128); panel += 2)
#pragma unroll
      for (int kk = 0; kk < 4; ++kk) {
        const uint64_t rows = ptx::descriptor(ptx::shared_address(x + panel * 2 * kBlock * 128) + kk * 32, 1024, 128);
        ptx::wgmma_m64n64_k(sum, rows, rows);
      }
    ptx::wgmma_commit();
    ptx::wgmma_wait_all();
#pragma unroll
    for (int e = 0; e < 32; ++e) gram[e] += sum[e];
    ptx::named_barrier(1, kConsumers);     // X has been read
  }
}
#endif

// Blocks: (pairs, splits). partial (2 · splits, n, m): one of each warpgroup
__global__ void __launch_bounds__(kThreads, 1) gram_wgmma(const __grid_constant__ Maps maps, int64_t n, int64_t m, int64_t t, int64_t t2,
    bool symmetric,
                                                       int64_t d_in, int64_t d_out, Span<float> partial) {
#ifdef EF_SM90A
  EF_DYNAMIC_SHARED(unsigned char, shared);
  unsigned char* x = shared + (1024 - ptx::shared_address(shared) % 1024) % 1024;
  unsigned char* ring = x + kX;
  uint64_t *full = reinterpret_cast<uint64_t*>(ring + kStages * kStage), *empty = full + kStages;
  int I, J;
  const int blocks = (int)max(cdiv<int64_t>(n, kBlock), (int64_t)(symmetric ? 2 : 1));
  pair_of(blockIdx.x, blocks, (int)cdiv<int64_t>(m, kBlock), symmetric, I, J);
  Samples s{I * (int64_t)kBlock, J * (int64_t)kBlock, 0, 0};
  s.left = (int)min(n - s.i0, (int64_t)kBlock), s.right = (int)max(min(m - s.j0, (int64_t)kBlock), (int64_t)0);
  if (threadIdx.x == 0) {
    for (int k = 0; k < kStages; ++k) ptx::mbarrier_init(&full[k], 1), ptx::mbarrier_init(&empty[k], 4);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();  // the mbarriers are there

  const int64_t tiles = cdiv<int64_t>(d_out, kO) * cdiv<int64_t>(d_in, kI);
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);  // the same for a whole warp, and the compiler sees it
  if (group == kConsumers / 128) {
    if (threadIdx.x == kConsumers) produce(maps, s, t, t2, d_out, tiles, ring, full, empty);
    return;
  }
  float gram[32] = {};
  consume(s, group, t, t2, tiles, x, ring, full, empty, gram);

  const int thread = threadIdx.x % 128, lane = thread % 32;
  const bool with_i = symmetric && J == I + 1, with_j = symmetric && I == blocks - 2;
  const int64_t base = (2 * (int64_t)blockIdx.y + threadIdx.x / 128) * n * m;
#pragma unroll
  for (int e = 0; e < 32; ++e) {
    const int r = thread / 32 * 16 + lane / 4 + e / 2 % 2 * 8, c = e / 4 * 8 + lane % 4 * 2 + e % 2;
    const bool of_i = r < kBlock, to_i = c < kBlock;
    if (of_i && to_i ? !with_i : !of_i && !to_i ? !with_j : !of_i) continue;  // this pair's own elements, each once
    const int64_t i = of_i ? s.i0 + r : s.j0 + r - kBlock, j = to_i ? s.i0 + c : s.j0 + c - kBlock;
    if (i < n && j < m && (!symmetric || i <= j)) partial[base + i * m + j] = gram[e];
  }
#endif
}

inline int encode(TensorMap* map, const void* p, int64_t d, int64_t t, int64_t n, int64_t position, int64_t sample, int columns) {
  const uint64_t size[3] = {(uint64_t)d, (uint64_t)t, (uint64_t)n}, stride[2] = {2 * (uint64_t)position, 2 * (uint64_t)sample};
  const uint32_t box[3] = {(uint32_t)columns, kT, 1};
#ifdef EF_CUDA_HOST
  return cuda_host::encode(map, p, 2, 3, size, stride, box, columns * 2);
#else
  using Encode = CUresult(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                          const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static Encode* const function = [] {  // from the driver, without linking libcuda: the library loads where there is none
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    const auto rc = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    return rc == cudaSuccess && result == cudaDriverEntryPointSuccess ? (Encode*)found : nullptr;
  }();
  if (!function) return kBadArgument;
  const uint32_t one[3] = {1, 1, 1};
  return (int)function(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<void*>(p), (const cuuint64_t*)size,
      (const cuuint64_t*)stride, box, one,
                       CU_TENSOR_MAP_INTERLEAVE_NONE, columns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_32B,
                       CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
#endif
}

// 0: served. Strides must be whole 16 bytes and not 0 (an expanded tensor), positions and sizes within 32 bits.
inline int refuses(int type, const Factors& left, const Factors* right, int64_t d_in, int64_t d_out) {
#ifndef EF_CUDA_HOST
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) || cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) || major != 9 || minor != 0)
    return 1;
#endif
  auto fine = [&](const Factors& f) {
    auto stride = [](int64_t s) { return s > 0 && s % 8 == 0; };
    return (uintptr_t)f.a % 16 == 0 && (uintptr_t)f.b % 16 == 0 && stride(f.a_sample) && stride(f.a_position) && stride(f.b_sample) &&
           stride(f.b_position) && f.t < 1 << 30 && f.n < 1 << 30;
  };
  return !(type == kBf16 && fine(left) && (!right || fine(*right)) && d_in < 1 << 30 && d_out < 1 << 30);
}

inline int launch_wgmma(const Factors& left, const Factors* right, int64_t d_in, int64_t d_out, float* partial, int64_t splits,
    void* stream) {
  const Factors& other = right ? *right : left;
  Maps maps;
  EF_TRY(encode(&maps.a, left.a, d_in, left.t, left.n, left.a_position, left.a_sample, kI));
  EF_TRY(encode(&maps.b, left.b, d_out, left.t, left.n, left.b_position, left.b_sample, kO));
  EF_TRY(encode(&maps.a2, other.a, d_in, other.t, other.n, other.a_position, other.a_sample, kI));
  EF_TRY(encode(&maps.b2, other.b, d_out, other.t, other.n, other.b_position, other.b_sample, kO));
  const int64_t blocks = cdiv<int64_t>(left.n, kBlock), items = pairs(right ? blocks : max(blocks, (int64_t)2), cdiv<int64_t>(other.n,
      kBlock), !right);
  EF_TRY(allow_shared(gram_wgmma, kShared));
  return launch(gram_wgmma, dim3((unsigned)items, (unsigned)splits), dim3(kThreads), kShared, stream, maps, left.n, other.n, left.t,
      other.t, !right, d_in,
                d_out, partial);
}

}  // namespace ef::cuda::sm90
