// gram for many positions on sm_90a, bfloat16: TMA copies behind mbarriers, both products by wgmma. Launched by gram_sm90_launch.cuh.
//
// form: a cluster of 1, 2 or 4 blocks forms units of as many tiles, 128 × I each, one below the other, of one sample's gradient
// after the other. Factors come through a ring of stages of 32 positions: each block copies its own 128 columns of b, and its share
// of the I columns of a, which all blocks need, into all of them. Two warpgroups a block, 64 × I each by m64nIk16 with both
// operands read transposed where TMA put them; tiles go to a scratch that fits the L2, each thread's accumulators together: what
// order a tile's elements have is free, it is the same for every sample. Factors stream past the scratch (evict first).
// accumulate: X Xᵀ of the scratch's rows by m64n64k16 (n ≤ 64: the warpgroups share the columns) or m64n128k16, each block
// its columns into its own partial Gram; 128 < n ≤ 256: a cluster of two reads every row once for both, and has three of the six
// 64 × 128 on and above the diagonal each. The two alternate over chunks of the weight.
//
// They are a chain of kernels (ptx.cuh), which add_partials ends: beside the end of the kernel before come the launch, mbarriers, the
// cluster's barrier and the tensor maps' way to TMA; whatever touches memory stands behind the wait. Of a later chunk the factors' copies
// could come before it too, all but the stores to the scratch: not taken as long as nobody has measured the gaps that are left.
//
// Counted for a tile of 128 × 256, n 128, in ns of the whole chip at 5.5 TB/s of L2, 790 TFLOP/s, 3.35 TB/s of DRAM (an H200's 4.8):
//   bytes of L2, form           t 197: L2  tensor  DRAM    t 1024: L2  tensor  DRAM
//   1 block    768 t + 64 Ki        39    19     25              155    85     130      before: 24 MiB of scratch
//   2 blocks   512 t + 64 Ki        30    19     23 (16)         107    85     117 (82)
//   4 blocks   384 t + 64 Ki        26    19     23 (16)          83    85     117 (82)
// accumulate: 64 Ki, 12 ns, tensor 11; n 256: 12 and 16, was 24. In all, gaps between launches apart, of 790 TFLOP/s, at t 197, 1024:
//   before                   n 64: 37, 53 %    n 128: 42, 54 %            n 256: 39 (43), 37 (51) %
//   2 blocks, d_out 768      n 64: 45, 74 %    n 128: 51, 70 (76) %       n 256: 58, 55 (76) %    chunks of 256 × 256: DRAM
//   4 blocks, d_out 4096     n 64: 51, 80 (90) %    n 128: 58, 70 (93) %  n 256: they would not fit the scratch
// At t 197 the scratch is most of it: with factors for nothing 71 % at n 128. Not taken: 128 × 512 by two blocks, 640 t; blocks of 192 by
// three warpgroups, 427 t and 55, 63 % at n 128, 160 registers a thread at most; the second product through the cluster's shared
// memory, no scratch: 8 blocks hold 128 samples' 64 × 96 at most, 1.6 times the bytes of 4 blocks at t 197, 3.3 at 1024; n > 256 in
// clusters of 2 × 2 blocks of accumulate: 48 → 32 ns at n 512.
// Counted from SASS: per 32 positions two HGMMA of 64 × 256 × 16 a warpgroup, one group left in flight, 162 registers; the
// others 62 to 136; no spills. A block's 13 warps, as for 256 samples, could have 128 each. 70 to 78 instructions of form and 66 to 152
// of accumulate stand ahead of the wait.
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
#ifdef EF_CUDA_HOST  // so that a stage comes round in a small test
constexpr int form_stages(int) { return 2; }
#else
constexpr int form_stages(int I) { return I == 256 ? 8 : 12; }
#endif
constexpr int add_stage(int rows, bool same) { return (same ? 1 : 2) * rows * kK * 2; }
constexpr int add_consumers(int rows) { return rows == 256 ? 384 : kConsumers; }
constexpr int kAddStages = 3;
constexpr int kBeside = 1024 + 256;  // bytes to align, mbarriers
static_assert(form_stages(256) * form_stage(256) + kBeside <= 232448 && form_stages(128) * form_stage(128) + kBeside <= 232448);
static_assert(kAddStages * add_stage(128, false) + kBeside <= 232448 && kAddStages * add_stage(256, true) + kBeside <= 232448);

#ifdef EF_CUDA_HOST
using TensorMap = cuda_host::TensorMap;
#else
using TensorMap = CUtensorMap;
#endif
struct Maps {
  TensorMap left, right;
};

#ifdef EF_SM90A
// A ring of stages in shared memory behind mbarriers: the producer's thread fills them in order, the warps of CONSUMERS threads
// empty them. The rings of a cluster turn together: a stage is filled again once all blocks are done with it, for each block copies
// into all of them.
template <int STAGES, int CONSUMERS> struct Ring {
  unsigned char* stages;
  uint64_t *full, *empty;
  int bytes;
  const uint32_t rank = ptx::cluster_rank(), blocks = ptx::cluster_blocks();

  EF_DEVICE Ring(unsigned char* shared, int bytes_) : bytes(bytes_) {
    stages = shared + (1024 - ptx::shared_address(shared) % 1024) % 1024;
    full = reinterpret_cast<uint64_t*>(stages + STAGES * bytes), empty = full + STAGES;
    if (threadIdx.x == 0) {
      for (int k = 0; k < STAGES; ++k) ptx::mbarrier_init(&full[k], 1), ptx::mbarrier_init(&empty[k], blocks * (CONSUMERS / 32));
      ptx::fence_mbarrier_init();
    }
    ptx::cluster_sync();  // the mbarriers are there, in every block
  }
  // stage q is free in every block; its copies may be issued
  EF_DEVICE unsigned char* begin(int64_t q) {
    const int slot = (int)(q % STAGES);
    if (q >= STAGES) ptx::mbarrier_wait(&empty[slot], (q / STAGES - 1) & 1);  // the products of its last use are done
    ptx::mbarrier_arrive_expect(&full[slot], bytes);
    return stages + slot * bytes;
  }
  EF_DEVICE uint64_t* bar(int64_t q) { return &full[q % STAGES]; }
  // q stages have been filled: the producer stays, and its block with it, until no block will arrive here any more
  EF_DEVICE void leave(int64_t q) {
    for (int64_t k = max(q - STAGES, (int64_t)0); k < q; ++k) ptx::mbarrier_wait(&empty[k % STAGES], k / STAGES & 1);
  }
  EF_DEVICE uint32_t wait(int64_t q) {
    ptx::mbarrier_wait(&full[q % STAGES], q / STAGES & 1);  // the copies have landed
    return ptx::shared_address(stages + q % STAGES * bytes);
  }
  // stage q's products have been issued: those of the stage before it are waited for, unless q is a sum's first
  EF_DEVICE void turn(int64_t q, bool first) {
    ptx::wgmma_commit();
    if (first) return;
    ptx::wgmma_wait<1>();  // the stage before this one has been read
    release(q - 1);
  }
  // of a sum's last stage
  EF_DEVICE void end(int64_t q) {
    ptx::wgmma_wait<0>();
    release(q);
  }
  EF_DEVICE void release(int64_t q) {
    const uint32_t lane = threadIdx.x % 32;
    if (lane < blocks) ptx::mbarrier_arrive_at(&empty[q % STAGES], lane);
  }
};

// kernel parameters, no memory that another kernel writes: they may go ahead of the wait
EF_DEVICE void prefetch(const Maps& maps) {
  ptx::prefetch_tensor_map(&maps.left), ptx::prefetch_tensor_map(&maps.right);
}

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

// Clusters: any number. high: units along d_out. scratch[sample · pitch + (unit - first) · unit's size + rank · kO · I]: the `units`
// units from `first` on, of every sample
template <int I> __global__ void __launch_bounds__(kThreads, 1)
form_wgmma(const __grid_constant__ Maps maps, int64_t n, int64_t t, int64_t high, int64_t first, int64_t units, int64_t pitch,
           Span<uint32_t> scratch) {
#ifdef EF_SM90A
  EF_DYNAMIC_SHARED(unsigned char, shared);
  if (threadIdx.x == kConsumers) prefetch(maps);
  Ring<form_stages(I), kConsumers> ring(shared, form_stage(I));
  ptx::griddepcontrol_wait();  // accumulate has read what the scratch held
  ptx::griddepcontrol_launch_dependents();
  const int64_t items = n * units, steps = cdiv<int64_t>(t, kT), stride = gridDim.x / ring.blocks;
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);  // the same for a whole warp, and the compiler sees it
  int64_t q = 0;
  if (group == kConsumers / 128) {
    if (threadIdx.x != kConsumers) return;
    const uint64_t once = ptx::evict_first();
    for (int64_t item = blockIdx.x / ring.blocks; item < items; item += stride) {
      const int64_t unit = first + item % units;
      const int sample = (int)(item / units), o = (int)((unit % high * ring.blocks + ring.rank) * kO), i = (int)(unit / high * I);
      for (int64_t step = 0; step < steps; ++step, ++q) {
        unsigned char* stage = ring.begin(q);
        const int from = (int)(step * kT);
#pragma unroll
        for (int c = 0; c < kO / 64; ++c) ptx::tma_load_3d(stage + c * kBox, &maps.left, o + c * 64, from, sample, ring.bar(q), once);
        for (int c = ring.rank; c < I / 64; c += ring.blocks)
          ptx::tma_multicast_3d(stage + (kO / 64 + c) * kBox, &maps.right, i + c * 64, from, sample, ring.bar(q), (1 << ring.blocks) - 1,
                                once);
      }
    }
    return ring.leave(q);
  }
  const int thread = threadIdx.x % 128;
  for (int64_t item = blockIdx.x / ring.blocks; item < items; item += stride) {
    float d[I / 2];
    for (int64_t step = 0; step < steps; ++step, ++q) {
      const uint32_t b = ring.wait(q) + group * kBox, a = b + (kO / 64 - group) * kBox;
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < kT / 16; ++k)
        ptx::wgmma<I, true>(d, ptx::descriptor(b + k * 2048, 1024), ptx::descriptor(a + k * 2048, 1024, kBox), step + k > 0);
      ring.turn(q, step == 0);
    }
    ring.end(q - 1);
    const int64_t row = item / units * pitch + (item % units * ring.blocks + ring.rank) * (kO * I) + group * (64 * I);
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

// Blocks: (pairs of blocks of ROWS samples, splits); of 256 samples: a cluster of (2, 1), symmetric alone. partial: one of each split,
// of each warpgroup where ROWS is 64; set where `set`, else added to. left, right: the scratches as (samples, columns)
template <int ROWS> __global__ void __launch_bounds__(add_consumers(ROWS) + 32, 1)
add_wgmma(const __grid_constant__ Maps maps, int64_t n, int64_t m, bool symmetric, int64_t runs, bool set, Span<float> partial) {
#ifdef EF_SM90A
  EF_DYNAMIC_SHARED(unsigned char, shared);
  constexpr int CONSUMERS = add_consumers(ROWS), N = ROWS == 64 ? 64 : 128, BOX = N * 128, PASS = kRun / kK;
  int I = 0, J = 0;
  if constexpr (ROWS < 256) tile_of(blockIdx.x, (int)cdiv<int64_t>(m, ROWS), symmetric, I, J);
  const bool same = symmetric && I == J;
  if (threadIdx.x == CONSUMERS) prefetch(maps);
  Ring<kAddStages, CONSUMERS> ring(shared, add_stage(ROWS, same));
  ptx::griddepcontrol_wait();  // the scratch is full, and the partial sums of the chunk before are there
  ptx::griddepcontrol_launch_dependents();
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
  int64_t q = 0;
  if (group == CONSUMERS / 128) {
    if (threadIdx.x != CONSUMERS) return;
    const uint64_t policy = ptx::evict_normal();
    for (int64_t run = blockIdx.y; run < runs; run += gridDim.y)
      for (int p = 0; p < PASS; ++p, ++q) {
        unsigned char* stage = ring.begin(q);
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int column = (int)(run * kRun + p * kK) + c * 64;
          if constexpr (ROWS == 256) {
            const int half = ring.rank;
            ptx::tma_multicast_3d(stage + (2 * half + c) * BOX, &maps.left, column, half * N, 0, ring.bar(q), 3, policy);
          } else {
            ptx::tma_load_3d(stage + c * BOX, &maps.left, column, I * ROWS, 0, ring.bar(q), policy);
            if (!same) ptx::tma_load_3d(stage + (2 + c) * BOX, &maps.right, column, J * ROWS, 0, ring.bar(q), policy);
          }
        }
      }
    return ring.leave(q);
  }
  // this warpgroup's 64 × N of the Gram: strip of 64 rows, band of N columns; and where in a stage they begin
  const int strip = ROWS == 64 ? I : ROWS == 128 ? 2 * I + group : ring.rank ? 1 + group : group % 2;
  const int band = ROWS < 256 ? J : ring.rank || group == 2;
  const int left = ROWS < 256 ? group * 8192 : strip / 2 * (2 * BOX) + strip % 2 * 8192;
  const int right = ROWS < 256 ? (same ? 0 : 2 * BOX) + (ROWS == 64 ? group * BOX : 0) : band * (2 * BOX);
  const int lane = threadIdx.x % 32, at_row = threadIdx.x / 32 % 4 * 16 + lane / 4, at_column = lane % 4 * 2;
  const int64_t base = (ROWS == 64 ? 2 * (int64_t)blockIdx.y + group : (int64_t)blockIdx.y) * n * m;
  auto store = [&](const float(&value)[N / 2], bool fresh) {
#pragma unroll
    for (int e = 0; e < N / 2; ++e) {
      const int64_t i = strip * (int64_t)64 + at_row + e / 2 % 2 * 8, j = band * (int64_t)N + e / 4 * 8 + at_column + e % 2;
      if (i < n && j < m && (!symmetric || i <= j)) partial[base + i * m + j] = value[e] + (fresh ? 0.0f : partial[base + i * m + j]);
    }
  };
  [[maybe_unused]] float gram[N / 2] = {};
  for (int64_t run = blockIdx.y; run < runs; run += gridDim.y) {
    float sum[N / 2];
    for (int p = 0; p < PASS; ++p, ++q) {
      const uint32_t stage = ring.wait(q), x = stage + left, y = stage + right;
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < (ROWS == 64 ? 4 : 8); ++k) {  // ROWS 64: a box a warpgroup
        const int at = k / 4 * BOX + k % 4 * 32;
        ptx::wgmma<N, false>(sum, ptx::descriptor(x + at, 1024), ptx::descriptor(y + at, 1024), p + k > 0);
      }
      ring.turn(q, p == 0);
    }
    ring.end(q - 1);
    if constexpr (ROWS == 256) {  // 13 warps have 128 registers a thread, and mostly one run
      store(sum, set && run == blockIdx.y);
    } else {
#pragma unroll
      for (int e = 0; e < N / 2; ++e) gram[e] += sum[e];
    }
  }
  if constexpr (ROWS < 256) store(gram, set);
#endif
}

}  // namespace ef::cuda::sm90
