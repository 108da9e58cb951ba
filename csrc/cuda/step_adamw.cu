// step_adamw: AdamW on a projected gradient, with noise, one launch for any number of tensors.
//
// Per parameter: theta, m and u read and written, g and k directions read; 2 k + 14 FLOPs with a square root and a division,
// about 40 more with noise. The bias corrections come from the count of steps on the device, once a block.
// Limit: copy bandwidth. Fraction reached: not yet run on a GPU.
#include "multi.cuh"
#include "philox.cuh"
#include "reduce.cuh"

namespace ef::cuda {
namespace {

template <class P, class X> struct Lists {
  Span<P> theta;
  Span<const X> g;
  Span<Acc<P>> m, u;
  Span<const X> d0, d1;
  Span<const int64_t> directions;
};

#ifdef EF_CUDA_HOST
EF_DEVICE float root(float x) { return sqrtf(x); }
EF_DEVICE float ratio(float x, float y) { return x / y; }
#else  // within 2 ulp of an update that is far smaller than its parameter; the exact ones have slow paths, and spill
EF_DEVICE float root(float x) {
  float out;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}
EF_DEVICE float ratio(float x, float y) { return __fdividef(x, y); }
#endif
EF_DEVICE double root(double x) { return sqrt(x); }
EF_DEVICE double ratio(double x, double y) { return x / y; }

// N elements of one thread; all loads come before the first use of one
template <bool WHOLE, int N, bool NOISE, class P, class X>
EF_DEVICE void adamw_vector(const Lists<P, X>& t, int64_t e, int64_t stop, int64_t place, Span<const Acc<P>> coef, int k,
                            const StepAdamw& s, Acc<P> size, Acc<P> scale) {
  using A = Acc<P>;
  Pack<N, P> x;
  Pack<N, X> g, d0[1], d1[1];
  Pack<N, A> m, u;
  const int many[1] = {WHOLE ? N : (int)least<int64_t>(N, stop - e)};
  read<WHOLE, N, P>(t.theta, e, many[0], x);
  read<WHOLE, N, X>(t.g, e, many[0], g);
  read<WHOLE, N, A>(t.m, e, many[0], m);
  read<WHOLE, N, A>(t.u, e, many[0], u);
  if (k > 0) read<WHOLE, N, X>(t.d0, e, many[0], d0[0]);
  if (k > 1) read<WHOLE, N, X>(t.d1, e, many[0], d1[0]);
  A w[1][N];
#pragma unroll
  for (int i = 0; i < N; ++i) w[0][i] = (A)widen(g[i]);
  subtract<WHOLE, 1, N, X, A>(w, d0, d1, t.directions, e, 0, many, coef, k);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    m[i] = (A)s.beta1 * m[i] + (A)(1 - s.beta1) * w[0][i];
    u[i] = (A)s.beta2 * u[i] + (A)(1 - s.beta2) * w[0][i] * w[0][i];
    w[0][i] = (A)s.keep * (A)widen(x[i]) - size * ratio(m[i], root(u[i]) * scale + (A)s.eps);
  }
  write<WHOLE, N, A>(t.m, e, many[0], m);
  write<WHOLE, N, A>(t.u, e, many[0], u);
  if constexpr (NOISE) {  // drawn last: Philox finds the registers of m and u free again
    float z[N];
    normals<N>(place + e, s.seed, s.offset, z);
#pragma unroll
    for (int i = 0; i < N; ++i) w[0][i] += (A)s.noise * (A)z[i];
  }
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = narrow<P>(w[0][i]);
  write<WHOLE, N, P>(t.theta, e, many[0], x);
}

template <class P, class X, bool NOISE> __global__ void __launch_bounds__(kThreads, sizeof(P) == 8 ? 1 : 2)
adamw(Table table, int k, const Acc<P>* coef_, StepAdamw s) {
  using A = Acc<P>;
  constexpr int N = sizeof(P) == 2 ? 8 : 4;
  const Span<const A> coef(coef_);
  if constexpr (NOISE) s.offset = moved_on(s.offset, s.counter);
  __shared__ A correction[2];
  if (threadIdx.x == 0) {  // 1 - beta^t = -expm1(t log beta), in double
    const double t = Span<const double>(s.step)[0];
    correction[0] = (A)(s.lr / -expm1(t * s.log1)), correction[1] = (A)(1 / sqrt(-expm1(t * s.log2)));
  }
  __syncthreads();
  const A size = correction[0], scale = correction[1];
  for_chunks(table, [&](Span<const int64_t> row, int64_t first, int64_t elements) {
    const Lists<P, X> t{pointer<P>(row[kHead]), pointer<const X>(row[kHead + 1]), pointer<A>(row[kHead + 2]), pointer<A>(row[kHead + 3]),
                        k > 0 ? pointer<const X>(row[kHead + 4]) : Span<const X>(nullptr),
                        k > 1 ? pointer<const X>(row[kHead + 5]) : Span<const X>(nullptr), row + (kHead + 4)};
    const bool vectors = aligned(row);
    const int64_t place = row[2], stop = least(first + kChunk, elements);
    for (int64_t e = first + threadIdx.x * N; e < stop; e += kThreads * N) {
      if (vectors && e + N <= stop) adamw_vector<true, N, NOISE>(t, e, stop, place, coef, k, s, size, scale);
      else adamw_vector<false, N, NOISE>(t, e, stop, place, coef, k, s, size, scale);
    }
  });
}

template <class P, class X> int launch_adamw(Table table, int k, const void* coef, const StepAdamw& s, void* stream) {
  const auto kernel = s.noise != 0 ? adamw<P, X, true> : adamw<P, X, false>;
  EF_TRY(resident(kernel, kThreads, &table.programs));
  return launch(kernel, dim3(table.programs), dim3(kThreads), 0, stream, table, k, (const Acc<P>*)coef, s);
}

}  // namespace
}  // namespace ef::cuda

using namespace ef::cuda;

EF_LAUNCHER ef_cuda_step_adamw(Table table, int param, int read, int k, const void* coef, StepAdamw s, void* stream) {
  if (param == kDouble && read == kDouble) return launch_adamw<double, double>(table, k, coef, s, stream);
  if (param == kFloat && read == kFloat) return launch_adamw<float, float>(table, k, coef, s, stream);
  if (param == kBf16 && read == kBf16) return launch_adamw<Bf16, Bf16>(table, k, coef, s, stream);
  if (param == kBf16 && read == kFloat) return launch_adamw<Bf16, float>(table, k, coef, s, stream);
  if (param == kHalf && read == kHalf) return launch_adamw<Half, Half>(table, k, coef, s, stream);
  if (param == kHalf && read == kFloat) return launch_adamw<Half, float>(table, k, coef, s, stream);
  return kBadArgument;
}
