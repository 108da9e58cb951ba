// PTX that CUDA C++ has no words for: one wrapper an instruction, the only inline assembly of the tensor-core kernels.
// Under EF_CUDA_HOST the same names call tests/cuda_host. Instructions and layouts: PTX ISA 8.x.
#pragma once

#include "common.cuh"

#ifdef EF_CUDA_HOST
#define EF_SITE , cuda_host::Where w = cuda_host::Where::current()  // who called: the mutation test switches single calls off
#define EF_ONLY_SITE cuda_host::Where w = cuda_host::Where::current()
#define EF_PTX(device, host) host
#else
#define EF_SITE
#define EF_ONLY_SITE
#define EF_PTX(device, host) device
#endif
#if defined(EF_CUDA_HOST) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define EF_SM90A 1  // TMA and wgmma exist
#endif

namespace ef::cuda::ptx {

EF_DEVICE uint32_t shared_address(const void* p) {
  return EF_PTX(static_cast<uint32_t>(__cvta_generic_to_shared(p)),
                uint32_t(static_cast<const unsigned char*>(p) - cuda_host::block->shared + cuda_host::SHARED_BASE));
}

// p + i, where n elements are read: checked on the host, where nowhere is a place to read NaN from
template <class T> EF_DEVICE const T* checked(Span<const T> p, int64_t i, int64_t n) {
#ifdef EF_CUDA_HOST
  alignas(16) static const uint64_t nowhere[2] = {~0ull, ~0ull};
  if (n && (i < p.low() || i + n > p.high())) return span_fail("copy", p.get(), i, p.low(), p.high()), (const T*)nowhere;
  return p.get() + i;
#else
  return p + i;
#endif
}

// ---- cp.async: 16 bytes, of which `valid` are read and the others zero

EF_DEVICE void cp_async_16(void* to, const void* from, int valid) {
  EF_PTX(asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid) : "memory"),
         cuda_host::cp_async(to, from, 16, valid));
}
EF_DEVICE void cp_async_commit(EF_ONLY_SITE) {
  EF_PTX(asm volatile("cp.async.commit_group;" ::: "memory"), cuda_host::cp_async_commit(w));
}
template <int LEFT> EF_DEVICE void cp_async_wait(EF_ONLY_SITE) {
  EF_PTX(asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"), cuda_host::cp_async_wait(LEFT, w));
}

// ---- mma.sync: D (16, 8) += A (16, k) B (k, 8), float32 sums

EF_DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b EF_SITE) {
  EF_PTX(asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1])),
         cuda_host::mma_16816<cuda_host::from_bf16>(d, a, b, w));
}
EF_DEVICE void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b EF_SITE) {
  EF_PTX(asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1])),
         cuda_host::mma_16816<cuda_host::from_f16>(d, a, b, w));
}
EF_DEVICE void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b EF_SITE) {
  EF_PTX(asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1])),
         cuda_host::mma_1688_tf32(d, a, b, w));
}
// x rounded to tf32's 10 bits of mantissa, to nearest, ties away from zero
EF_DEVICE uint32_t to_tf32(float x) {
#ifdef EF_CUDA_HOST
  const uint32_t u = bits_as<uint32_t>(x);
  return x - x != 0 ? u : (u + 0x1000) & 0xFFFFE000u;
#else
  uint32_t out;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(out) : "f"(x));
  return out;
#endif
}

EF_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row EF_SITE) {
  EF_PTX(asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                      : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                      : "r"(shared_address(row))
                      : "memory"),
         cuda_host::ldmatrix_x4(r, row, false, w));
}
EF_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row EF_SITE) {
  EF_PTX(asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                      : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                      : "r"(shared_address(row))
                      : "memory"),
         cuda_host::ldmatrix_x4(r, row, true, w));
}

// ---- a chain of kernels, each but the first launched early (common.cuh). Every thread waits before it touches any memory outside of
// its block; then the kernel before has ended: its stores are there, its loads done. That kernel could not end before its own wait, so
// all before it have ended too, down to the first, which the stream's own order starts. A kernel lets the next one start after its
// wait only: two of a chain run at a time, never three

// does nothing in a launch that is not early

EF_DEVICE void griddepcontrol_wait(EF_ONLY_SITE) {
#if defined(EF_CUDA_HOST)
  cuda_host::griddepcontrol_wait(w);
#elif __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// the next kernel, where it is launched early, may start once every block has said so or left. Where it is not: nothing
EF_DEVICE void griddepcontrol_launch_dependents() {
#if defined(EF_CUDA_HOST)
  cuda_host::griddepcontrol_launch_dependents();
#elif __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#ifdef EF_SM90A
// ---- clusters: blocks that run at the same time and reach each other's shared memory; a launch without them has clusters of one

EF_DEVICE uint32_t cluster_rank() {
#ifdef EF_CUDA_HOST
  return cuda_host::cluster_rank();
#else
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#endif
}
EF_DEVICE uint32_t cluster_blocks() {
#ifdef EF_CUDA_HOST
  return cuda_host::cluster->blocks.size();
#else
  uint32_t blocks;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  return blocks;
#endif
}
// every thread of the cluster, whole warps
EF_DEVICE void cluster_sync(EF_ONLY_SITE) {
  EF_PTX(asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory"),
         cuda_host::cluster_sync(w));
}

// ---- mbarrier

EF_DEVICE void mbarrier_init(uint64_t* bar, int arrivals) {
  EF_PTX(asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(arrivals) : "memory"),
         cuda_host::mbarrier_init(bar, arrivals));
}
// initialised mbarriers become visible to the asynchronous proxy and, behind a barrier, to the cluster
EF_DEVICE void fence_mbarrier_init(EF_ONLY_SITE) {
  EF_PTX(asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::: "memory"),
      cuda_host::fence_mbarrier_init(w));
}
// at the mbarrier that lies where `bar` does in the shared memory of this block of the cluster. It says that asynchronous reads have
// ended, which were waited for, and orders no plain accesses between blocks (.cluster would cost a MEMBAR.GPU)
EF_DEVICE void mbarrier_arrive_at(uint64_t* bar, uint32_t block EF_SITE) {
  EF_PTX(asm volatile("{\n\t.reg .b32 there;\n\tmapa.shared::cluster.u32 there, %0, %1;\n\t"
                      "mbarrier.arrive.shared::cluster.b64 _, [there];\n\t}" ::"r"(shared_address(bar)),
                      "r"(block)
                      : "memory"),
         cuda_host::mbarrier_arrive_at(bar, block, w));
}
EF_DEVICE void mbarrier_arrive_expect(uint64_t* bar, int bytes EF_SITE) {
  EF_PTX(asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)), "r"(bytes) : "memory"),
         cuda_host::mbarrier_arrive(bar, bytes, w));
}
// until the phase of this parity has completed
EF_DEVICE void mbarrier_wait(uint64_t* bar, uint32_t parity EF_SITE) {
#ifdef EF_CUDA_HOST
  cuda_host::mbarrier_wait(bar, parity, w);
#else
  asm volatile(
      "{\n\t.reg .pred done;\n"
      "again:\n\tmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
      "@!done bra again;\n\t}" ::"r"(shared_address(bar)),
      "r"(parity)
      : "memory");
#endif
}

// ---- TMA: a box of a tensor into shared memory, its bytes announced to an mbarrier there

// What the L2 gives up first where it must: data that are read once, beside data that are to stay
EF_DEVICE uint64_t evict_first() {
  uint64_t policy = 0;
  EF_PTX(asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy)), );
  return policy;
}
EF_DEVICE uint64_t evict_normal() {
  uint64_t policy = 0;
  EF_PTX(asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy)), );
  return policy;
}
// a tensor map, which is a kernel's parameter, on its way to where TMA reads it; not the tensor
EF_DEVICE void prefetch_tensor_map([[maybe_unused]] const void* map) {
  EF_PTX(asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"), );
}
EF_DEVICE void tma_load_3d(void* to, const void* map, int c0, int c1, int c2, uint64_t* bar, uint64_t policy) {
  EF_PTX(asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
                      " [%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(shared_address(to)),
                      "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(shared_address(bar)), "l"(policy)
                      : "memory"),
         cuda_host::tma_load(to, static_cast<const cuda_host::TensorMap*>(map), {c0, c1, c2}, bar, 1u << cuda_host::cluster_rank()));
}
// into the same place of every block of the cluster whose bit is set, announced to its own mbarrier
EF_DEVICE void tma_multicast_3d(void* to, const void* map, int c0, int c1, int c2, uint64_t* bar, uint32_t blocks, uint64_t policy) {
  EF_PTX(asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint"
                      " [%0], [%1, {%2, %3, %4}], [%5], %6, %7;" ::"r"(shared_address(to)),
                      "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(shared_address(bar)), "h"((uint16_t)blocks), "l"(policy)
                      : "memory"),
         cuda_host::tma_load(to, static_cast<const cuda_host::TensorMap*>(map), {c0, c1, c2}, bar, blocks));
}

// ---- wgmma

EF_DEVICE void wgmma_fence(EF_ONLY_SITE) { EF_PTX(asm volatile("wgmma.fence.sync.aligned;" ::: "memory"), cuda_host::wgmma_fence(w)); }
EF_DEVICE void wgmma_commit(EF_ONLY_SITE) {
  EF_PTX(asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"), cuda_host::wgmma_commit(w));
}
template <int LEFT> EF_DEVICE void wgmma_wait(EF_ONLY_SITE) {
  EF_PTX(asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory"), cuda_host::wgmma_wait(LEFT, w));
}

// Matrix descriptor of an operand behind a 128-byte swizzle. stride: bytes between groups of eight rows of the swizzle pattern;
// leading: between patterns side by side, where an operand that is read transposed is wider than one (64 elements)
EF_DEVICE uint64_t descriptor(uint32_t address, uint32_t stride, uint32_t leading = 16) {
  return (uint64_t)((address & 0x3FFFF) >> 4) | (uint64_t)(leading >> 4) << 16 | (uint64_t)(stride >> 4) << 32 | (uint64_t)1 << 62;
}

#define EF_D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define EF_D32(i) EF_D8(i), EF_D8(i + 8), EF_D8(i + 16), EF_D8(i + 24)
#define EF_TEN(t) "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9,"
#define EF_32 EF_TEN() EF_TEN(1) EF_TEN(2) "%30,%31"
#define EF_64 EF_TEN() EF_TEN(1) EF_TEN(2) EF_TEN(3) EF_TEN(4) EF_TEN(5) "%60,%61,%62,%63"
#define EF_128                                                                                                            \
  EF_TEN() EF_TEN(1) EF_TEN(2) EF_TEN(3) EF_TEN(4) EF_TEN(5) EF_TEN(6) EF_TEN(7) EF_TEN(8) EF_TEN(9) EF_TEN(10) EF_TEN(11) \
  "%120,%121,%122,%123,%124,%125,%126,%127"
// numbers of the operands behind the accumulators: the two descriptors, whether to add, whether transposed
#define EF_WGMMA(n, list, a, b, add, t, ...)                                                                                      \
  asm volatile("{\n\t.reg .pred more;\n\tsetp.ne.b32 more, %" #add ", 0;\n\t"                                                   \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" list "}, %" #a ", %" #b ", more, 1, 1, %" #t ", %" #t \
               ";\n\t}"                                                                                                          \
               : __VA_ARGS__                                                                                                      \
               : "l"(left), "l"(right), "r"((int)more), "n"(TRANSPOSED ? 1 : 0))

// D (64, N) = A (64, 16) B (16, N), added to D where `more`. TRANSPOSED: A and B contiguous along rows and columns, else along k
template <int N, bool TRANSPOSED> EF_DEVICE void wgmma(float (&d)[N / 2], uint64_t left, uint64_t right, bool more EF_SITE) {
#ifdef EF_CUDA_HOST
  cuda_host::wgmma(d, N, left, right, !TRANSPOSED, more, w);
#else
  if constexpr (N == 64) EF_WGMMA(64, EF_32, 32, 33, 34, 35, EF_D32(0));
  else if constexpr (N == 128) EF_WGMMA(128, EF_64, 64, 65, 66, 67, EF_D32(0), EF_D32(32));
  else EF_WGMMA(256, EF_128, 128, 129, 130, 131, EF_D32(0), EF_D32(32), EF_D32(64), EF_D32(96));
#endif
}
#endif

}  // namespace ef::cuda::ptx
