// gram for many positions on sm_90a, bfloat16: TMA copies behind mbarriers, both products by wgmma. Included by gram.cu.
//
// form: a block forms tiles of 128 × I of one sample's gradient after the other, two warpgroups 64 × I each by m64nIk16 with both
// operands read transposed where TMA put them, a ring of stages of 32 positions ahead of them; tiles go to a scratch that fits
// the L2, each thread's accumulators together: what order a tile's elements have is free, it is the same for every sample.
// accumulate: X Xᵀ of the scratch's rows by m64n64k16 (n ≤ 64: the warpgroups share the columns) or m64n128k16, each block
// its columns into its own partial Gram. The two alternate over chunks of the weight.
//
// Counted, a tile of 128 × 256: (128 + 256)·2t bytes in, 64 KiB out and in again, for 2^16 t FLOP: 46 FLOP a byte of L2 at
// t 197, 73 at t 1024, where a form that keeps 64 samples' tiles in one block has 13. A clock of a multiprocessor's tensor
// cores: 4096 FLOP; of its shared memory, which feeds them: 128 bytes, m64n256k16 needs 10 KiB for 128 clocks.
// Counted from SASS: per 32 positions two HGMMA of 64 × 256 × 16 a warpgroup, one group left in flight, 164 registers, no spills.
// I: 256, 128, 64 by d_in. TMA needs 16-byte strides and fills zeros outside of the tensors. Never run on a GPU.
#pragma once

#ifndef EF_CUDA_HOST
#include <cuda.h>
#endif

#include "gradient_tile.cuh"
#include "gram_pairs.cuh"

namespace ef::cuda::sm90 {

constexpr int kO = 128, kT = 32, kConsumers = 256, kThreads = kConsumers + 32;
constexpr int kBox = 128 * kT;                  // bytes of kT positions × 64 columns
constexpr int kRun = 1024;  // columns of a float32 sum: tensor cores truncate, a longer one would drift
constexpr int kK = 128;     // columns of a stage of accumulate: two boxes of 64

constexpr int form_stage(int I) { return (kO + I) / 64 * kBox; }
#ifdef EF_CUDA_HOST  // so that a stage comes round, and the scratch is filled again, in a small test
constexpr int form_stages(int) { return 2; }
constexpr int64_t kScratch = 400 << 10;
#else
constexpr int form_stages(int I) { return I == 256 ? 8 : 12; }
constexpr int64_t kScratch = 24 << 20;  // bytes of a side's scratch: half of an H100's L2 for two
#endif
constexpr int add_stage(int rows, bool same) { return (same ? 1 : 2) * rows * kK * 2; }
constexpr int kAddStages = 3;
constexpr int kMost = 232448 - 1024 - 256;  // to align, mbarriers
static_assert(form_stages(256) * form_stage(256) <= kMost && form_stages(128) * form_stage(128) <= kMost);
static_assert(kAddStages * add_stage(128, false) <= kMost);

#ifdef EF_CUDA_HOST
using TensorMap = cuda_host::TensorMap;
#else
using TensorMap = CUtensorMap;
#endif
struct Maps {
  TensorMap left, right;
};

#ifdef EF_SM90A
// A ring of stages in shared memory behind mbarriers: the producer's thread fills them in order, the consumers' warps empty them.
template <int STAGES> struct Ring {
  unsigned char* stages;
  uint64_t *full, *empty;
  int bytes;

  EF_DEVICE Ring(unsigned char* shared, int bytes_) : bytes(bytes_) {
    stages = shared + (1024 - ptx::shared_address(shared) % 1024) % 1024;
    full = reinterpret_cast<uint64_t*>(stages + STAGES * bytes), empty = full + STAGES;
    if (threadIdx.x == 0) {
      for (int k = 0; k < STAGES; ++k) ptx::mbarrier_init(&full[k], 1), ptx::mbarrier_init(&empty[k], kConsumers / 32);
      ptx::fence_mbarrier_init();
    }
    __syncthreads();  // the mbarriers are there
  }
  // stage q is free; its copies may be issued
  EF_DEVICE unsigned char* begin(int64_t q) {
    const int slot = (int)(q % STAGES);
    if (q >= STAGES) ptx::mbarrier_wait(&empty[slot], (q / STAGES - 1) & 1);  // the products of its last use are done
    ptx::mbarrier_arrive_expect(&full[slot], bytes);
    return stages + slot * bytes;
  }
  EF_DEVICE uint64_t* bar(int64_t q) { return &full[q % STAGES]; }
  EF_DEVICE uint32_t wait(int64_t q) {
    ptx::mbarrier_wait(&full[q % STAGES], q / STAGES & 1);  // the copies have landed
    return ptx::shared_address(stages + q % STAGES * bytes);
  }
  EF_DEVICE void release(int64_t q) {
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&empty[q % STAGES]);
  }
};

EF_DEVICE uint32_t pair_of_floats(float low, float high) { return (uint32_t)narrow<Bf16>(high).bits << 16 | narrow<Bf16>(low).bits; }

// 16 bytes that stay in the L2
EF_DEVICE void keep(Span<uint32_t> p, int64_t i, const Pack<4, uint32_t>& in) {
#ifdef EF_CUDA_HOST
  p.copy_in(i, 4, in.x);
#else
  *reinterpret_cast<uint4*>(p + i) = *reinterpret_cast<const uint4*>(in.x);
#endif
}
#endif

// Blocks: any number. scratch[sample · pitch + tile · kO · I]: the `tiles` weight tiles from `first` on, of every sample
template <int I> __global__ void __launch_bounds__(kThreads, 1)
form_wgmma(const __grid_constant__ Maps maps, int64_t n, int64_t t, int64_t high, int64_t first, int64_t tiles, int64_t pitch,
           Span<uint32_t> scratch) {
#ifdef EF_SM90A
  EF_DYNAMIC_SHARED(unsigned char, shared);
  constexpr int STAGES = form_stages(I);
  Ring<STAGES> ring(shared, form_stage(I));
  const int64_t items = n * tiles, steps = cdiv<int64_t>(t, kT);
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);  // the same for a whole warp, and the compiler sees it
  int64_t q = 0;
  if (group == kConsumers / 128) {
    if (threadIdx.x != kConsumers) return;
    for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
      const int64_t tile = first + item % tiles;
      const int sample = (int)(item / tiles), o = (int)(tile % high * kO), i = (int)(tile / high * I);
      for (int64_t step = 0; step < steps; ++step, ++q) {
        unsigned char* stage = ring.begin(q);
#pragma unroll
        for (int c = 0; c < kO / 64; ++c) ptx::tma_load_3d(stage + c * kBox, &maps.left, o + c * 64, (int)(step * kT), sample, ring.bar(q));
#pragma unroll
        for (int c = 0; c < I / 64; ++c)
          ptx::tma_load_3d(stage + (kO / 64 + c) * kBox, &maps.right, i + c * 64, (int)(step * kT), sample, ring.bar(q));
      }
    }
    return;
  }
  const int thread = threadIdx.x % 128;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    float d[I / 2];
    for (int64_t step = 0; step < steps; ++step, ++q) {
      const uint32_t b = ring.wait(q) + group * kBox, a = b + (kO / 64 - group) * kBox;
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < kT / 16; ++k)
        ptx::wgmma<I, true>(d, ptx::descriptor(b + k * 2048, 1024), ptx::descriptor(a + k * 2048, 1024, kBox), step + k > 0);
      ptx::wgmma_commit();
      if (step > 0) {
        ptx::wgmma_wait<1>();  // the stage before this one has been read
        ring.release(q - 1);
      }
    }
    ptx::wgmma_wait<0>();
    ring.release(q - 1);
    const int64_t row = item / tiles * pitch + item % tiles * (kO * I) + group * (64 * I);
#pragma unroll
    for (int e = 0; e < I / 2; e += 8) {  // 16 bytes a thread, a warp's side by side
      Pack<4, uint32_t> out;
#pragma unroll
      for (int p = 0; p < 4; ++p) out[p] = pair_of_floats(d[e + 2 * p], d[e + 2 * p + 1]);
      keep(scratch, row / 2 + e / 8 * (128 * 4) + thread * 4, out);
    }
  }
#endif
}

// Blocks: (pairs of blocks of ROWS samples, splits). partial: one of each split, of each warpgroup where ROWS is 64; set where
// `set`, else added to. left, right: the scratches as (samples, columns)
template <int ROWS> __global__ void __launch_bounds__(kThreads, 1)
add_wgmma(const __grid_constant__ Maps maps, int64_t n, int64_t m, bool symmetric, int64_t runs, bool set, Span<float> partial) {
#ifdef EF_SM90A
  EF_DYNAMIC_SHARED(unsigned char, shared);
  constexpr int BOX = ROWS * 128, PASS = kRun / kK;
  int I, J;
  tile_of(blockIdx.x, (int)cdiv<int64_t>(m, ROWS), symmetric, I, J);
  const bool same = symmetric && I == J;
  Ring<kAddStages> ring(shared, add_stage(ROWS, same));
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
  int64_t q = 0;
  if (group == kConsumers / 128) {
    if (threadIdx.x != kConsumers) return;
    for (int64_t run = blockIdx.y; run < runs; run += gridDim.y)
      for (int p = 0; p < PASS; ++p, ++q) {
        unsigned char* stage = ring.begin(q);
        const int column = (int)(run * kRun + p * kK);
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          ptx::tma_load_3d(stage + c * BOX, &maps.left, column + c * 64, I * ROWS, 0, ring.bar(q));
          if (!same) ptx::tma_load_3d(stage + (2 + c) * BOX, &maps.right, column + c * 64, J * ROWS, 0, ring.bar(q));
        }
      }
    return;
  }
  float gram[ROWS / 2] = {};
  for (int64_t run = blockIdx.y; run < runs; run += gridDim.y) {
    float sum[ROWS / 2];
    for (int p = 0; p < PASS; ++p, ++q) {
      const uint32_t x = ring.wait(q), y = same ? x : x + 2 * BOX;
      ptx::wgmma_fence();
      if constexpr (ROWS == 64) {  // a box a warpgroup
#pragma unroll
        for (int k = 0; k < 4; ++k)
          ptx::wgmma<64, false>(sum, ptx::descriptor(x + group * BOX + k * 32, 1024), ptx::descriptor(y + group * BOX + k * 32, 1024),
                                p + k > 0);
      } else {  // 64 rows a warpgroup
#pragma unroll
        for (int k = 0; k < 8; ++k)
          ptx::wgmma<128, false>(sum, ptx::descriptor(x + group * 8192 + k / 4 * BOX + k % 4 * 32, 1024),
                                 ptx::descriptor(y + k / 4 * BOX + k % 4 * 32, 1024), p + k > 0);
      }
      ptx::wgmma_commit();
      if (p > 0) {
        ptx::wgmma_wait<1>();  // the stage before this one has been read
        ring.release(q - 1);
      }
    }
    ptx::wgmma_wait<0>();
    ring.release(q - 1);
#pragma unroll
    for (int e = 0; e < ROWS / 2; ++e) gram[e] += sum[e];
  }

  const int thread = threadIdx.x % 128, lane = thread % 32;
  const int64_t base = (ROWS == 64 ? 2 * (int64_t)blockIdx.y + group : (int64_t)blockIdx.y) * n * m;
#pragma unroll
  for (int e = 0; e < ROWS / 2; ++e) {
    const int r = (ROWS == 64 ? 0 : group * 64) + thread / 32 * 16 + lane / 4 + e / 2 % 2 * 8, c = e / 4 * 8 + lane % 4 * 2 + e % 2;
    const int64_t i = I * (int64_t)ROWS + r, j = J * (int64_t)ROWS + c;
    if (i < n && j < m && (!symmetric || i <= j)) partial[base + i * m + j] = gram[e] + (set ? 0.0f : partial[base + i * m + j]);
  }
#endif
}

// boxes of 64 columns × `lines`
inline int encode(TensorMap* map, const void* p, int64_t d, int64_t t, int64_t n, int64_t position, int64_t sample, int lines) {
  const uint64_t size[3] = {(uint64_t)d, (uint64_t)t, (uint64_t)n}, stride[2] = {2 * (uint64_t)position, 2 * (uint64_t)sample};
  const uint32_t box[3] = {64, (uint32_t)lines, 1};
#ifdef EF_CUDA_HOST
  return cuda_host::encode(map, p, 2, 3, size, stride, box, 128);
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
  return (int)function(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<void*>(p), (const cuuint64_t*)size, (const cuuint64_t*)stride,
                       box, one, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                       CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
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

// How a call is cut up. n, m: samples of the two sides
struct Plan {
  int I, rows;                             // columns of a tile; samples of a block of accumulate
  int64_t high, tiles, each, runs, pairs;  // tiles along d_out, in all, of a chunk; runs of a chunk; pairs of blocks
  int64_t splits, partials;

  Plan(int64_t n, int64_t m, bool symmetric, int64_t d_in, int64_t d_out, int processors) {
    I = d_in <= 64 ? 64 : (d_in - 1) % 256 < 128 ? 128 : 256;
    while (I > 64 && kO * I * 2 * max(n, m) > kScratch) I /= 2;
    rows = n <= 64 && m <= 64 ? 64 : 128;
    high = cdiv<int64_t>(d_out, kO), tiles = high * cdiv<int64_t>(d_in, I);
    each = max((int64_t)1, min(tiles, kScratch / (kO * I * 2 * max(n, m))));
    runs = each * kO * I / kRun;
    const int64_t wide = cdiv<int64_t>(m, rows);
    pairs = symmetric ? wide * (wide + 1) / 2 : cdiv<int64_t>(n, rows) * wide;
    splits = max((int64_t)1, min(runs, processors / pairs));
    splits = cdiv(runs, cdiv(runs, splits));  // whole rounds only
    partials = rows == 64 ? 2 * splits : splits;
  }
  int64_t pitch() const { return each * kO * I; }  // elements of a row of the scratch
};

template <int I> int launch_form(const Maps& maps, const Plan& plan, int64_t n, int64_t t, int64_t first, int64_t tiles, void* scratch,
                                 int processors, void* stream) {
  const int shared = form_stages(I) * form_stage(I) + 1024 + 256;
  EF_TRY(allow_shared(form_wgmma<I>, shared));
  return launch(form_wgmma<I>, dim3((unsigned)min(n * tiles, (int64_t)processors)), dim3(kThreads), shared, stream, maps, n, t, plan.high,
                first, tiles, plan.pitch(), static_cast<uint32_t*>(scratch));
}

template <int ROWS> int launch_add(const Maps& maps, const Plan& plan, int64_t n, int64_t m, bool symmetric, int64_t tiles, bool set,
                                   float* partial, void* stream) {
  const int shared = kAddStages * add_stage(ROWS, symmetric && plan.pairs == 1) + 1024 + 256;
  EF_TRY(allow_shared(add_wgmma<ROWS>, shared));
  return launch(add_wgmma<ROWS>, dim3((unsigned)plan.pairs, (unsigned)plan.splits), dim3(kThreads), shared, stream, maps, n, m, symmetric,
                tiles * kO * plan.I / kRun, set, partial);
}

// of b and a
inline int encode_factors(Maps* maps, const Factors& f, int64_t d_in, int64_t d_out) {
  EF_TRY(encode(&maps->left, f.b, d_out, f.t, f.n, f.b_position, f.b_sample, kT));
  return encode(&maps->right, f.a, d_in, f.t, f.n, f.a_position, f.a_sample, kT);
}

// scratch: (n, pitch), and (m, pitch) behind it where there is a right side
inline int launch_wgmma(const Factors& left, const Factors* right, int64_t d_in, int64_t d_out, float* partial, void* scratch,
                        void* stream) {
  int count = 0;
  EF_TRY(processors(&count));
  const int64_t n = left.n, m = right ? right->n : n;
  const Plan plan(n, m, !right, d_in, d_out, count);
  const int64_t pitch = plan.pitch();
  void* const other = right ? static_cast<Bf16*>(scratch) + n * pitch : scratch;
  const auto form = plan.I == 64 ? launch_form<64> : plan.I == 128 ? launch_form<128> : launch_form<256>;
  const auto add = plan.rows == 64 ? launch_add<64> : launch_add<128>;
  Maps x, y, rows;
  EF_TRY(encode_factors(&x, left, d_in, d_out));
  if (right) EF_TRY(encode_factors(&y, *right, d_in, d_out));
  for (int64_t first = 0; first < plan.tiles; first += plan.each) {
    const int64_t tiles = min(plan.each, plan.tiles - first), width = tiles * kO * plan.I;
    if (first == 0 || tiles < plan.each) {
      EF_TRY(encode(&rows.left, scratch, width, n, 1, pitch, pitch * n, plan.rows));
      EF_TRY(encode(&rows.right, other, width, m, 1, pitch, pitch * m, plan.rows));
    }
    EF_TRY(form(x, plan, n, left.t, first, tiles, scratch, count, stream));
    if (right) EF_TRY(form(y, plan, m, right->t, first, tiles, other, count, stream));
    EF_TRY(add(rows, plan, n, m, !right, tiles, first == 0, partial, stream));
  }
  return 0;
}

}  // namespace ef::cuda::sm90
