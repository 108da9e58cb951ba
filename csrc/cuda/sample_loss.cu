// sample_loss: cross-entropy per sample in one read of the logits (online softmax), and its backward with per-sample weights.
//
// A warp takes a row of up to kWarpRow classes, a block a longer one; rows are read 16 bytes at a time from wherever their
// first aligned element is. A label outside [0, classes) that is not ignore gives NaN.
// lse (2, rows): the maximum of each row, and the log of its sum of exp(x - maximum).
// Bytes: forward the logits once, backward read and written once. FLOPs: about 6 an element. Limit: bandwidth.
// Fraction reached: not yet run on a GPU.
#include <math.h>

#include "reduce.cuh"

namespace ef::cuda {
namespace {

constexpr int64_t kWarpRow = 1024;
constexpr int kRowThreads = 512;
constexpr double kPenaltyEps = 1e-3;

#ifdef EF_CUDA_HOST
EF_DEVICE float power_of_2(float x) { return exp2f(x); }
#else
EF_DEVICE float power_of_2(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}
#endif
// x <= 0 mostly; the difference inside is exact, so the error is that of the product, 2^-24 |x|
EF_DEVICE float exponential(float x) { return power_of_2(x * 1.4426950408889634f); }
EF_DEVICE double exponential(double x) { return exp(x); }
EF_DEVICE float logarithm(float x) { return logf(x); }
EF_DEVICE double logarithm(double x) { return log(x); }

template <class A> EF_DEVICE A infinite() { return (A)INFINITY; }

// Running maximum, sums of exp(x - maximum) and of x - maximum, and how many.
template <class A> struct Online {
  A top = -infinite<A>(), mass = 0, below = 0, seen = 0;

  EF_DEVICE A base() const { return top == -infinite<A>() ? A(0) : top; }
  template <int N, class T> EF_DEVICE void add(const Pack<N, T>& x) {
    const A low = top, was = base();
#pragma unroll
    for (int i = 0; i < N; ++i) top = (A)widen(x[i]) > top ? (A)widen(x[i]) : top;
    const A now = base();
    A more = 0;
    below += seen * (was - now), seen += A(N);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const A apart = (A)widen(x[i]) - now;
      more += exponential(apart);
      below += apart;
    }
    mass = mass * exponential(low - now) + more;
  }
  EF_DEVICE void join(const Online& x) {
    const A low = top, was = base();
    top = top > x.top ? top : x.top;
    const A now = base();
    mass = mass * exponential(low - now) + x.mass * exponential(x.top - now);
    below += seen * (was - now) + x.below + x.seen * (x.base() - now), seen += x.seen;
  }
  EF_DEVICE Online of_lane(int mask) const {
    Online x;
    x.top = __shfl_xor_sync(kAll, top, mask), x.mass = __shfl_xor_sync(kAll, mass, mask);
    x.below = __shfl_xor_sync(kAll, below, mask), x.seen = __shfl_xor_sync(kAll, seen, mask);
    return x;
  }
};

// All of a row by `threads` threads: f(first class, Pack) for whole vectors, f(class, Pack of one) for the ends.
template <class T, class F> EF_DEVICE void over_row(Span<const T> row, const T* address, int64_t classes, int me, int threads, F&& f) {
  constexpr int N = 16 / sizeof(T);
  const int64_t off = (int64_t)((uintptr_t)address / sizeof(T) % N);
  const int64_t head = off == 0 ? 0 : N - off < classes ? N - off : classes, vectors = (classes - head) / N;
  Pack<1, T> one;
  for (int64_t c = me; c < head; c += threads) one[0] = row[c], f(c, one);
#pragma unroll 2
  for (int64_t v = me; v < vectors; v += threads) {
    Pack<N, T> x;
    load<N, T>(row, head + v * N, x);
    f(head + v * N, x);
  }
  for (int64_t c = head + vectors * N + me; c < classes; c += threads) one[0] = row[c], f(c, one);
}

template <class A> EF_DEVICE A penalised(A ce, double penalty) { return ce - (A)penalty / (ce + (A)kPenaltyEps); }

template <class T, int THREADS>
__global__ void __launch_bounds__(THREADS == 32 ? kThreads : THREADS, sizeof(Acc<T>) == 8 ? 1 : 2)
forward(LossOptions o, const T* logits_, const int64_t* target_, Acc<T>* lse_, Acc<T>* position_, Acc<T>* loss_, Acc<T>* ce_) {
  using A = Acc<T>;
  const Span<const T> logits(logits_);
  const Span<const int64_t> target(target_);
  const Span<A> lse(lse_), position(position_), loss(loss_), ce(ce_);
  constexpr int ROWS = THREADS == 32 ? kThreads / 32 : 1;  // rows of a block at a time
  const int me = THREADS == 32 ? lane() : threadIdx.x;
  const int64_t rows = o.n * o.t;
  for (int64_t base = (int64_t)blockIdx.x * ROWS; base < rows; base += (int64_t)gridDim.x * ROWS) {
    const int64_t r = base + (THREADS == 32 ? warp() : 0);
    if (THREADS == 32 && r >= rows) break;  // a whole warp, which meets no block barrier
    Online<A> sum;
    over_row<T>(logits + r * o.stride, logits_ + r * o.stride, o.classes, me, THREADS,
                [&](int64_t, const auto& x) { sum.add(x); });
#pragma unroll
    for (int d = 16; d; d >>= 1) sum.join(sum.of_lane(d));
    if constexpr (THREADS > 32) {
      __shared__ A part[4][THREADS / 32];
      if (lane() == 0) part[0][warp()] = sum.top, part[1][warp()] = sum.mass, part[2][warp()] = sum.below, part[3][warp()] = sum.seen;
      __syncthreads();
      sum = Online<A>();
      for (int w = 0; w < THREADS / 32; ++w) sum.join({part[0][w], part[1][w], part[2][w], part[3][w]});
      __syncthreads();
    }
    if (me != 0) continue;
    const A log_mass = logarithm(sum.mass), base_value = sum.base();
    lse[r] = sum.top, lse[rows + r] = log_mass;
    const int64_t label = target[r];
    A value = 0;
    if (label != o.ignore) {
      const bool inside = label >= 0 && label < o.classes;
      const A picked = inside ? (A)widen(logits[r * o.stride + label]) : (A)NAN, s = (A)o.smoothing;
      // differences with the maximum first: they are exact where the loss is small
      value = log_mass + (1 - s) * (base_value - picked);
      if (o.smoothing > 0) value -= s * sum.below / (A)o.classes;
    }
    if (o.t == 1) ce[r] = value, loss[r] = penalised(value, o.penalty);
    else position[r] = value;
  }
}

// kept positions of sample i, counted by a warp
EF_DEVICE int64_t kept(Span<const int64_t> target, const LossOptions& o, int64_t i) {
  int64_t count = 0;
  for (int64_t p = lane(); p < o.t; p += 32) count += target[i * o.t + p] != o.ignore;
  return warp_sum(count);
}

// ce[i] = the sum or mean over its kept positions, a warp a sample
template <class A> __global__ void __launch_bounds__(kThreads)
samples(LossOptions o, const A* position_, const int64_t* target_, A* loss_, A* ce_) {
  const Span<const A> position(position_);
  const Span<const int64_t> target(target_);
  const Span<A> loss(loss_), ce(ce_);
  for (int64_t i = blockIdx.x * (int64_t)(kThreads / 32) + warp(); i < o.n; i += gridDim.x * (int64_t)(kThreads / 32)) {
    A total = 0;
    for (int64_t p = lane(); p < o.t; p += 32) total += position[i * o.t + p];
    total = warp_sum(total);
    if (o.mean) {
      const int64_t count = kept(target, o, i);
      total /= (A)(count > 1 ? count : 1);
    }
    if (lane() == 0) ce[i] = total, loss[i] = penalised(total, o.penalty);
  }
}

// scale[i]: clip, penalty and the mean over positions in one factor, a warp a sample
template <class A> __global__ void __launch_bounds__(kThreads)
scales(LossOptions o, const A* grad_, const A* ce_, const int64_t* target_, A* scale_) {
  const Span<const A> grad(grad_), ce(ce_);
  const Span<const int64_t> target(target_);
  const Span<A> scale(scale_);
  for (int64_t i = blockIdx.x * (int64_t)(kThreads / 32) + warp(); i < o.n; i += gridDim.x * (int64_t)(kThreads / 32)) {
    const A c = ce[i], apart = c + (A)kPenaltyEps;
    A value = o.clip == infinite<double>() || c < (A)o.clip ? grad[i] : A(0);
    value *= 1 + (A)o.penalty / (apart * apart);
    if (o.mean && o.t > 1) {
      const int64_t count = kept(target, o, i);
      value /= (A)(count > 1 ? count : 1);
    }
    if (lane() == 0) scale[i] = value;
  }
}

// out = scale (softmax - smoothing / C - (1 - smoothing) [c = target]), a block a row or a warp a row
template <class T, int THREADS> __global__ void __launch_bounds__(THREADS == 32 ? kThreads : THREADS, 1)
backward(LossOptions o, const T* logits_, const int64_t* target_, const Acc<T>* lse_, const Acc<T>* scale_, T* out_) {
  using A = Acc<T>;
  const Span<const T> logits(logits_);
  const Span<const int64_t> target(target_);
  const Span<const A> lse(lse_), scale(scale_);
  const Span<T> out(out_);
  constexpr int ROWS = THREADS == 32 ? kThreads / 32 : 1;
  const int me = THREADS == 32 ? lane() : threadIdx.x;
  const int64_t rows = o.n * o.t;
  const A even = (A)(o.smoothing / (double)o.classes), peak = (A)(1 - o.smoothing);
  for (int64_t r = (int64_t)blockIdx.x * ROWS + (THREADS == 32 ? warp() : 0); r < rows; r += (int64_t)gridDim.x * ROWS) {
    const int64_t label = target[r];
    const A top = lse[r], log_mass = lse[rows + r], s = label != o.ignore ? scale[r / o.t] : A(0);
    const bool kept = label != o.ignore && (s != A(0) || !isfinite(top + log_mass));  // a loss that is not finite keeps its NaN
    T* const address = out_ + r * o.classes;
    const Span<T> mine = out + r * o.classes;
    over_row<T>(logits + r * o.stride, logits_ + r * o.stride, o.classes, me, THREADS, [&](int64_t c, const auto& x) {
      std::decay_t<decltype(x)> y;
      constexpr int M = sizeof(x.x) / sizeof(T);
#pragma unroll
      for (int i = 0; i < M; ++i) {
        const A p = exponential((A)widen(x[i]) - top - log_mass) - even - (c + i == label ? peak : A(0));
        y[i] = narrow<T>(kept ? s * p : A(0));
      }
      if constexpr (M > 1) {
        if ((uintptr_t)(address + c) % 16 == 0) {
          store<M, T>(mine, c, y);
          return;
        }
      }
#pragma unroll
      for (int i = 0; i < M; ++i) mine[c + i] = y[i];
    });
  }
}

#ifdef EF_CUDA_HOST
constexpr int64_t kGrid = 4;  // so that a block takes a second row in a small test
#else
constexpr int64_t kGrid = 1 << 16;
#endif
unsigned grid(int64_t want) { return (unsigned)(want < kGrid ? want : kGrid); }

}  // namespace
}  // namespace ef::cuda

using namespace ef::cuda;

EF_LAUNCHER ef_cuda_sample_loss(int type, LossOptions o, const void* logits, const int64_t* target, void* lse, void* position,
                                void* loss, void* ce, void* stream) {
  return by_type(type, [&](auto zero) {
    using T = decltype(zero);
    using A = Acc<T>;
    const int64_t rows = o.n * o.t;
    if (rows > 0) {
      const bool warps = o.classes <= kWarpRow;
      EF_TRY(launch(warps ? forward<T, 32> : forward<T, kRowThreads>, dim3(grid(warps ? cdiv<int64_t>(rows, kThreads / 32) : rows)),
                    dim3(warps ? kThreads : kRowThreads), 0, stream, o, (const T*)logits, target, (A*)lse, (A*)position, (A*)loss,
                    (A*)ce));
    }
    if (o.t == 1 || o.n == 0) return 0;
    return launch(samples<A>, dim3(grid(cdiv<int64_t>(o.n, kThreads / 32))), dim3(kThreads), 0, stream, o, (const A*)position, target,
                  (A*)loss, (A*)ce);
  });
}

EF_LAUNCHER ef_cuda_sample_loss_backward(int type, LossOptions o, const void* grad, const void* logits, const int64_t* target,
                                         const void* ce, const void* lse, void* scale, void* out, void* stream) {
  if (o.n == 0 || o.t == 0) return 0;
  return by_type(type, [&](auto zero) {
    using T = decltype(zero);
    using A = Acc<T>;
    EF_TRY(launch(scales<A>, dim3(grid(cdiv<int64_t>(o.n, kThreads / 32))), dim3(kThreads), 0, stream, o, (const A*)grad,
                  (const A*)ce, target, (A*)scale));
    const bool warps = o.classes <= kWarpRow;
    const int64_t rows = o.n * o.t;
    return launch(warps ? backward<T, 32> : backward<T, kRowThreads>, dim3(grid(warps ? cdiv<int64_t>(rows, kThreads / 32) : rows)),
                  dim3(warps ? kThreads : kRowThreads), 0, stream, o, (const T*)logits, target, (const A*)lse, (const A*)scale,
                  (T*)out);
  });
}
