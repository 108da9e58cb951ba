// Small kernels that test the host header itself: each uses one piece of it in the way that the real kernels do, or wrongly.
#include "gram_sm90_launch.cuh"
#include "reduce.cuh"

using namespace ef::cuda;

// out (5, 64): xor by 5, broadcast from lane 3, up by 2, ballot of odd lanes, block sum
__global__ void warps(Span<float> out) {
  const int t = threadIdx.x;
  const float v = t;
  out[t] = __shfl_xor_sync(kAll, v, 5);
  out[64 + t] = __shfl_sync(kAll, v, 3);
  out[128 + t] = __shfl_up_sync(kAll, v, 2);
  out[192 + t] = __ballot_sync(kAll, t & 1) == 0xAAAAAAAAu;
  out[256 + t] = block_sum(v);
}
EF_LAUNCHER probe_warps(float* out, void* stream) { return launch(warps, dim3(1), dim3(64), 0, stream, out); }

// D (16, 8) = A (16, 16) B (16, 8), A and Bᵀ row-major 16-bit; through ldmatrix, plain or transposed, in a padded tile
template <int TYPE> __global__ void mma(Span<const Bf16> a, Span<const Bf16> bt, Span<float> out) {
  EF_DYNAMIC_SHARED(Bf16, s);
  const int lane = threadIdx.x;
  for (int e = lane; e < 256; e += 32) s[e / 16 * 24 + e % 16] = a[e];
  for (int e = lane; e < 128; e += 32) s[384 + e % 16 * 24 + e / 16] = bt[e];  // B itself: k rows of n, for the transposed load
  for (int e = lane; e < 128; e += 32) s[384 + e % 16 * 24 + 8 + e / 16] = Bf16{};
  __syncwarp();
  uint32_t x[4], y[4];
  ptx::ldmatrix_x4(x, s + (lane % 8 + (lane / 8 & 1) * 8) * 24 + lane / 16 * 8);
  ptx::ldmatrix_x4_trans(y, s + 384 + (lane % 8 + (lane / 8 & 1) * 8) * 24 + lane / 16 * 8);
  float d[4] = {};
  if constexpr (TYPE == kBf16) ptx::mma_bf16(d, x, y);
  else ptx::mma_f16(d, x, y);
  for (int e = 0; e < 4; ++e) out[(lane / 4 + e / 2 * 8) * 8 + lane % 4 * 2 + e % 2] = d[e];
}
EF_LAUNCHER probe_mma(int type, const Bf16* a, const Bf16* bt, float* out, void* stream) {
  return launch(type == kBf16 ? mma<kBf16> : mma<kHalf>, dim3(1), dim3(32), 2 * 768, stream, a, bt, out);
}

// first (64, 128) = Bᵀ A for b (t ≤ 32, 64), a (t, 128) by TMA and the transposed form; second (64, 64) = first firstᵀ over 64 of its
// columns after rounding. wrong: 1 no proxy fence for the plain stores, 2 no fence of the mbarrier
__global__ void wgmma(const __grid_constant__ sm90::Maps maps, Span<float> first, Span<float> second, int wrong) {
  EF_DYNAMIC_SHARED(unsigned char, s);
  uint64_t* bar = reinterpret_cast<uint64_t*>(s + 32768);
  const int thread = threadIdx.x, lane = thread % 32, row = thread / 32 * 16 + lane / 4, column = lane % 4 * 2;
  if (thread == 0) {
    ptx::mbarrier_init(bar, 1);
    if (wrong != 2) ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect(bar, 3 * sm90::kBox);
    ptx::tma_load_3d(s, &maps.left, 0, 0, 0, bar, ptx::evict_normal());
    for (int c = 0; c < 2; ++c) ptx::tma_load_3d(s + (1 + c) * sm90::kBox, &maps.right, c * 64, 0, 0, bar, ptx::evict_normal());
  }
  __syncthreads();
  ptx::mbarrier_wait(bar, 0);
  float d[64], e[32];
  const uint32_t b = ptx::shared_address(s), a = b + sm90::kBox;
  ptx::wgmma_fence();
  for (int k = 0; k < 2; ++k)
    ptx::wgmma<128, true>(d, ptx::descriptor(b + k * 2048, 1024), ptx::descriptor(a + k * 2048, 1024, sm90::kBox), k > 0);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  unsigned char* x = s + 16384;  // rows of 64 columns of d as bfloat16, a 128-byte swizzled row each
  for (int q = 0; q < 64; ++q) first[(row + q / 2 % 2 * 8) * 128 + q / 4 * 8 + column + q % 2] = d[q];
  for (int c = 0; c < 8; ++c)
    for (int h = 0; h < 2; ++h) {
      const int r = row + 8 * h;
      const uint32_t pair = sm90::pair_of_floats(d[4 * c + 2 * h], d[4 * c + 2 * h + 1]);
      auto* to = reinterpret_cast<uint32_t*>(x + r * 128 + (c ^ r % 8) * 16 + column * 2);
      *to = pair, cuda_host::written_by_store(to, 4);
    }
  if (wrong != 1) cuda_host::fence_proxy_async();
  __syncthreads();
  ptx::wgmma_fence();
  for (int k = 0; k < 4; ++k) {
    const uint64_t rows = ptx::descriptor(ptx::shared_address(x) + k * 32, 1024);
    ptx::wgmma<64, false>(e, rows, rows, k > 0);
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  for (int q = 0; q < 32; ++q) second[(row + q / 2 % 2 * 8) * 64 + q / 4 * 8 + column + q % 2] = e[q];
}
EF_LAUNCHER probe_wgmma(const Factors* f, float* first, float* second, int wrong, void* stream) {
  sm90::Maps maps;
  EF_TRY(sm90::encode(&maps.right, f->a, 128, f->t, f->n, f->a_position, f->a_sample, sm90::kT));
  EF_TRY(sm90::encode(&maps.left, f->b, 64, f->t, f->n, f->b_position, f->b_sample, sm90::kT));
  return launch(wgmma, dim3(1), dim3(128), 33024, stream, maps, first, second, wrong);
}

// Clusters of two: each block copies its half of the first row of a (positions, 128) into both, waits for the whole, arrives at its
// peer's second mbarrier. out (blocks, 2 + 128): rank, blocks of the cluster, the row.
// wrong: 1 a block's barrier, not the cluster's, after the mbarriers are made, 2 an arrival beyond the cluster, 3 a block that leaves
// before its peer arrives, 4 a copy beyond the cluster, 5 a cluster barrier that one block skips, 6 no fence of the mbarriers
__global__ void cluster(const __grid_constant__ sm90::Maps maps, Span<float> out, int wrong) {
  EF_DYNAMIC_SHARED(unsigned char, s);
  uint64_t* bar = reinterpret_cast<uint64_t*>(s + 2 * sm90::kBox);
  const int rank = ptx::cluster_rank();
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(bar, 1), ptx::mbarrier_init(bar + 1, 1);
    if (wrong != 6) ptx::fence_mbarrier_init();
  }
  if (wrong == 1) __syncthreads();
  else ptx::cluster_sync();
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect(bar, 2 * sm90::kBox);
    ptx::tma_multicast_3d(s + rank * sm90::kBox, &maps.right, rank * 64, 0, 0, bar, wrong == 4 ? 7 : 3, ptx::evict_normal());
  }
  ptx::mbarrier_wait(bar, 0);
  const int64_t row = blockIdx.x * (int64_t)130;
  if (threadIdx.x < 2) out[row + threadIdx.x] = threadIdx.x ? ptx::cluster_blocks() : rank;
  for (int c = 0; c < 2; ++c) out[row + 2 + c * 64 + threadIdx.x] = widen(reinterpret_cast<Bf16*>(s + c * sm90::kBox)[threadIdx.x]);
  if (wrong == 3 && rank == 0) return;
  if (threadIdx.x == 0) ptx::mbarrier_arrive_at(bar + 1, wrong == 2 ? 2 : 1 - rank);
  ptx::mbarrier_wait(bar + 1, 0);
  if (wrong != 5 || rank) ptx::cluster_sync();
}
EF_LAUNCHER probe_cluster(const Factors* f, float* out, int wrong, void* stream) {
  sm90::Maps maps;
  EF_TRY(sm90::encode(&maps.right, f->a, 128, f->t, f->n, f->a_position, f->a_sample, sm90::kT));
  return launch_clusters(cluster, 2, false, dim3(6), dim3(64), 2 * sm90::kBox + 16, stream, maps, out, wrong);
}

// A kernel launched early or not: what it does comes after the wait, but for one thing. before: 1 a load, 2 a store, 3 cp.async, 4 TMA,
// 5 launch_dependents; 6 half of the threads do not wait, 7 none does, nor touches anything. out (64) = x + 1
__global__ void dependent(const __grid_constant__ sm90::Maps maps, Span<const float> x, Span<float> out, int before) {
  EF_DYNAMIC_SHARED(unsigned char, s);
  const int t = threadIdx.x;
  uint64_t* bar = reinterpret_cast<uint64_t*>(s + sm90::kBox + 1024);
  if (t == 0) {
    ptx::mbarrier_init(bar, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  ptx::prefetch_tensor_map(&maps.right);
  Span<float>(reinterpret_cast<float*>(s + sm90::kBox))[t] = 1;  // the block's own memory
  if (before == 7) return;
  float value = 0;
  for (const bool after : {false, true}) {
    if (after && (before != 6 || t < 32)) ptx::griddepcontrol_wait();
    const auto now = [&](int what) { return (before == what) != after; };
    if (now(1)) value = x[t] + 1;
    if (now(2)) out[t] = value;
    if (now(3)) {
      ptx::cp_async_16(s + sm90::kBox + t % 16 * 16, ptx::checked(x, t % 16 * 4, 4), 16);
      ptx::cp_async_commit();
      ptx::cp_async_wait<0>();
    }
    if (now(4) && t == 0) {
      ptx::mbarrier_arrive_expect(bar, sm90::kBox);
      ptx::tma_load_3d(s, &maps.right, 0, 0, 0, bar, ptx::evict_normal());
    }
    if (now(5)) ptx::griddepcontrol_launch_dependents();
  }
  ptx::mbarrier_wait(bar, 0);
}
EF_LAUNCHER probe_dependent(const Factors* f, const float* x, float* out, int before, int early, void* stream) {
  sm90::Maps maps;
  EF_TRY(sm90::encode(&maps.right, f->a, 64, f->t, f->n, f->a_position, f->a_sample, sm90::kT));
  return launch_clusters(dependent, 1, early, dim3(2), dim3(64), sm90::kBox + 1032, stream, maps, x, out, before);
}

// what: 1 a barrier that half of the block skips, 2 a write beyond the tensor, 3 a write beyond shared memory,
// 4 a ticket without a fence, 5 a shuffle that some lanes do not reach, 6 an element beyond a static array, 7 a barrier after an early return
__global__ void wrong(Span<float> out, Span<unsigned> counter, int what) {
  EF_DYNAMIC_SHARED(float, s);
  const int t = threadIdx.x;
  float value = 0;
  if (what == 1 && t < 32) __syncthreads();
  if (what == 2) out[t] = 1;
  if (what == 3) s[64 + t] = 1;
  if (what == 4 && t == 0) value = atomicAdd(&counter[0], 1u);
  if (what == 5 && t % 2) value = __shfl_sync(kAll, 1.0f, 0);
  if (what == 6) {
    float few[4] = {};
    few[t + what - 6] = 1;
    value = few[t % 4];
  }
  if (what == 7) {
    if (t == 9) return;
    __syncthreads();
  }
  if (t < 4) out[t] = value;
}
EF_LAUNCHER probe_wrong(float* out, unsigned* counter, int what, void* stream) {
  return launch(wrong, dim3(1), dim3(64), 256, stream, out, counter, what);
}

// out (blocks, threads): the order in which threads came, a block's own row
__global__ void order(Span<float> out, Span<float> count) {
  out[(int64_t)blockIdx.x * blockDim.x + threadIdx.x] = count[0];
  count[0] += 1;
}
EF_LAUNCHER probe_order(float* out, float* count, void* stream) { return launch(order, dim3(3), dim3(70), 0, stream, out, count); }
