// What the CUDA kernels share: dtypes, 16-byte access, bounds-checked pointers, launches that return errors.
//
// The same sources are compiled by nvcc and, with EF_CUDA_HOST defined, by g++ against tests/cuda_host/cuda_host.h,
// which gives threadIdx, __shared__, barriers, shuffles and atomics to the CPU. What that header must bring beyond CUDA's
// own names: cuda_host::launch(grid, block, shared_bytes, function, blocks of a cluster, early), cuda_host::dynamic_shared()
// and cuda_host::processors(). Conventions of every extern "C" launcher: the last argument is the stream, the result
// 0 or a cudaError; offsets are int64; nothing waits for the device unless its comment says so.
#pragma once

#include <stdint.h>
#include <string.h>

#include <tuple>
#include <type_traits>
#include <utility>

#include "launchers.h"

#ifdef EF_CUDA_HOST
#include "cuda_host.h"
#include "span.h"  // Span<T>: a pointer that fails the launch when it leaves its tensor
#define EF_DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(cuda_host::dynamic_shared())
#else
#include <cuda_runtime.h>
namespace ef::cuda {
template <class T> using Span = T*;
}
#define EF_DYNAMIC_SHARED(T, name)                              \
  extern __shared__ __align__(128) unsigned char ef_shared_[]; \
  T* name = reinterpret_cast<T*>(ef_shared_)
#endif

#define EF_LAUNCHER extern "C" __attribute__((visibility("default"))) int
#define EF_DEVICE __device__ __forceinline__
#define EF_TRY(call) \
  if (const int rc_ = (call)) return rc_

namespace ef::cuda {

constexpr int kBadArgument = 1;  // cudaErrorInvalidValue

// ---- dtypes: accumulated in float, double in double ---------------------------------------------------------------

struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class T> struct AccOf { using type = float; };
template <> struct AccOf<double> { using type = double; };
template <class T> using Acc = typename AccOf<T>::type;

template <class To, class From> EF_DEVICE To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From), "one size");
  To out;
  memcpy(&out, &x, sizeof out);
  return out;
}

EF_DEVICE float widen(float x) { return x; }
EF_DEVICE double widen(double x) { return x; }
EF_DEVICE float widen(Bf16 x) { return bits_as<float>((uint32_t)x.bits << 16); }

#ifdef EF_CUDA_HOST
EF_DEVICE float widen(Half x) { return (float)bits_as<_Float16>(x.bits); }
EF_DEVICE uint16_t round_half(float x) { return bits_as<uint16_t>((_Float16)x); }
EF_DEVICE uint16_t round_bf16(float x) {  // to nearest, ties to even
  const uint32_t b = bits_as<uint32_t>(x);
  return x != x ? 0x7fff : (uint16_t)((b + 0x7fff + (b >> 16 & 1)) >> 16);
}
#else
EF_DEVICE float widen(Half x) {
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(x.bits));
  return out;
}
EF_DEVICE uint16_t round_half(float x) {
  uint16_t out;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out) : "f"(x));
  return out;
}
EF_DEVICE uint16_t round_bf16(float x) {
  uint16_t out;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out) : "f"(x));
  return out;
}
#endif

// narrow<T>(x): x rounded once to T, to nearest
template <class T> EF_DEVICE T narrow(Acc<T> x) {
  if constexpr (std::is_same_v<T, Bf16>) return Bf16{round_bf16(x)};
  else if constexpr (std::is_same_v<T, Half>) return Half{round_half(x)};
  else return x;
}

// f(T{}) for the element type that a Type names; kBadArgument for one that is none
template <class F> int by_type(int type, F&& f) {
  switch (type) {
    case kFloat: return f(float{});
    case kDouble: return f(double{});
    case kBf16: return f(Bf16{});
    case kHalf: return f(Half{});
  }
  return kBadArgument;
}

// ---- 16 bytes at a time: p + i aligned to 16 bytes, N elements a multiple of 16 bytes ------------------------------

template <int N, class T> struct alignas(16) Pack {
  T x[N];
  EF_DEVICE T& operator[](int i) { return x[i]; }
  EF_DEVICE const T& operator[](int i) const { return x[i]; }
};

template <int N, class T> EF_DEVICE void load(Span<const T> p, int64_t i, Pack<N, T>& out) {
  static_assert(N * sizeof(T) % 16 == 0, "whole vectors");
#ifdef EF_CUDA_HOST
  p.copy_out(i, N, out.x);
#else
#pragma unroll
  for (int v = 0; v < (int)(N * sizeof(T) / 16); ++v)
    reinterpret_cast<uint4*>(out.x)[v] = __ldcs(reinterpret_cast<const uint4*>(p + i) + v);  // read once: evict first
#endif
}

template <int N, class T> EF_DEVICE void store(Span<T> p, int64_t i, const Pack<N, T>& in) {
  static_assert(N * sizeof(T) % 16 == 0, "whole vectors");
#ifdef EF_CUDA_HOST
  p.copy_in(i, N, in.x);
#else
#pragma unroll
  for (int v = 0; v < (int)(N * sizeof(T) / 16); ++v)
    __stcs(reinterpret_cast<uint4*>(p + i) + v, reinterpret_cast<const uint4*>(in.x)[v]);
#endif
}

// the first `many` of N elements, by one vector or one by one; the others keep what they hold
template <bool WHOLE, int N, class T> EF_DEVICE void read(Span<const T> p, int64_t i, int many, Pack<N, T>& out) {
  if constexpr (WHOLE) {
    load<N, T>(p, i, out);
  } else {
#pragma unroll
    for (int e = 0; e < N; ++e)
      if (e < many) out[e] = p[i + e];
  }
}

template <bool WHOLE, int N, class T> EF_DEVICE void write(Span<T> p, int64_t i, int many, const Pack<N, T>& in) {
  if constexpr (WHOLE) {
    store<N, T>(p, i, in);
  } else {
#pragma unroll
    for (int e = 0; e < N; ++e)
      if (e < many) p[i + e] = in[e];
  }
}

// ---- launches ----------------------------------------------------------------------------------------------------

#ifdef EF_CUDA_HOST
template <class... P, class... A>
int launch_clusters(void (*kernel)(P...), int blocks, bool early, dim3 grid, dim3 block, size_t shared, void*, A&&... args) {
  std::tuple<std::decay_t<P>...> held(std::forward<A>(args)...);
  cuda_host::launch(grid, block, shared, [&] { std::apply(kernel, held); }, blocks, early);
  return span_error();
}
template <class... P> int allow_shared(void (*)(P...), int) { return 0; }
inline int processors(int* count) { return *count = cuda_host::processors(), 0; }
template <class... P> int resident(void (*)(P...), int, int*) { return 0; }
template <class... P> int resident_clusters(void (*)(P...), int, int, int, int* count) { return *count = 2, 0; }
#else
struct Config : cudaLaunchConfig_t {  // a cluster's blocks lie side by side along x
  cudaLaunchAttribute held[2];

  Config(int blocks, bool early, dim3 grid, dim3 block, size_t shared, void* stream)
      : cudaLaunchConfig_t{grid, block, shared, (cudaStream_t)stream, held, 0} {
    if (blocks > 1) {
      held[numAttrs].id = cudaLaunchAttributeClusterDimension;
      held[numAttrs++].val.clusterDim = {(unsigned)blocks, 1, 1};
    }
    if (early) {
      held[numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      held[numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
  }
  Config(const Config&) = delete;
};
// kernel<<<grid, block, shared, stream>>>(args...) as a function, in clusters of `blocks`: arguments converted, the error returned.
// early: may start before the kernel ahead of it in the stream has ended, and waits for that itself (a chain of kernels, ptx.cuh);
// compute capability 9.0 and later. Captured into a graph it becomes a programmatic edge (CUDA 12.3)
template <class... P, class... A>
int launch_clusters(void (*kernel)(P...), int blocks, bool early, dim3 grid, dim3 block, size_t shared, void* stream, A&&... args) {
  std::tuple<std::decay_t<P>...> held(std::forward<A>(args)...);
  const Config config(blocks, early, grid, block, shared, stream);
  return std::apply(
      [&](auto&... each) {
        void* list[] = {(void*)&each...};
        return (int)cudaLaunchKernelExC(&config, (const void*)kernel, list);
      },
      held);
}
// a kernel that asks for more than 48 KiB of dynamic shared memory says so once before its launch
template <class... P> int allow_shared(void (*kernel)(P...), int bytes) {
  return (int)cudaFuncSetAttribute((const void*)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}
// blocks = min(blocks, how many of `threads` threads the device runs at once)
template <class... P> int resident(void (*kernel)(P...), int threads, int* blocks) {
  int each = 0, count = 0, device = 0;
  EF_TRY((int)cudaGetDevice(&device));
  EF_TRY((int)cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  EF_TRY((int)cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, 0));
  if (each > 0 && *blocks > each * count) *blocks = each * count;
  return 0;
}
inline int processors(int* count) {
  int device = 0;
  EF_TRY((int)cudaGetDevice(&device));
  return (int)cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
}
// count: clusters of `blocks` > 1 that the device runs at once
template <class... P> int resident_clusters(void (*kernel)(P...), int blocks, int threads, int shared, int* count) {
  const Config config(blocks, false, dim3((unsigned)blocks), dim3((unsigned)threads), shared, nullptr);
  return (int)cudaOccupancyMaxActiveClusters(count, (const void*)kernel, &config);
}
#endif

template <class... P, class... A> int launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, void* stream, A&&... args) {
  return launch_clusters(kernel, 1, false, grid, block, shared, stream, std::forward<A>(args)...);
}

template <class I> __host__ __device__ constexpr I cdiv(I a, I b) { return (a + b - 1) / b; }

}  // namespace ef::cuda
