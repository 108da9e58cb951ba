// step: the Gram of k directions, with the k x k solve in its last block, and the projected momentum step.
//
// Blocks take equal stretches of the tensors' chunks; a thread loads everything its elements need, 16 bytes at a time,
// before it computes. Tensors that are not 16-byte aligned, and the ends of all, go element by element.
// Per parameter:  gram    k reads; k (k + 1) / 2 products, in double
//                 update  theta and v read and written, g and k directions read; 2 (k + 3) FLOPs, about 40 more with noise
// Limit: copy bandwidth. Fraction reached: not yet run on a GPU.
#include "multi.cuh"
#include "philox.cuh"
#include "reduce.cuh"
#include "solve.cuh"

namespace ef::cuda {
namespace {

// ---- gram --------------------------------------------------------------------------------------------------------

// Grid axis 1: pairs of groups of KB directions, the upper half only (group q >= group p).
EF_DEVICE void group_pair(int groups, int at, int* p, int* q) {
  for (*p = 0; at >= groups - *p; ++*p) at -= groups - *p;
  *q = *p + at;
}

template <class T, int KB> __global__ void __launch_bounds__(kThreads, 2)
gram(Table table, int k, double* partial_, unsigned* counter, double* out_, bool add, StepProject project) {
  constexpr int N = 16 / sizeof(T) < 4 ? 4 : 16 / sizeof(T);
  const Span<double> partial(partial_), out(out_);
  int p0, q0;
  group_pair(cdiv(k, KB), blockIdx.y, &p0, &q0);
  p0 *= KB, q0 *= KB;
  const bool same = p0 == q0;
  double sum[KB][KB] = {};
  for_chunks(table, [&](Span<const int64_t> row, int64_t first, int64_t size) {
    Span<const T> x[KB], y[KB];
#pragma unroll
    for (int j = 0; j < KB; ++j) {
      x[j] = p0 + j < k ? pointer<const T>(row[kHead + p0 + j]) : Span<const T>(nullptr);
      y[j] = !same && q0 + j < k ? pointer<const T>(row[kHead + q0 + j]) : Span<const T>(nullptr);
    }
    const bool vectors = aligned(row);
    const int64_t stop = least(first + kChunk, size);
    for (int64_t e = first + threadIdx.x * N; e < stop; e += kThreads * N) {
      Pack<N, T> u[KB] = {}, v[KB] = {};
      const bool whole = vectors && e + N <= stop;
      const int many = (int)least<int64_t>(N, stop - e);
#pragma unroll
      for (int j = 0; j < KB; ++j) {
        if (x[j]) whole ? read<true, N, T>(x[j], e, N, u[j]) : read<false, N, T>(x[j], e, many, u[j]);
        if (y[j]) whole ? read<true, N, T>(y[j], e, N, v[j]) : read<false, N, T>(y[j], e, many, v[j]);
      }
#pragma unroll
      for (int i = 0; i < N; ++i)
#pragma unroll
        for (int a = 0; a < KB; ++a)
#pragma unroll
          for (int b = 0; b < KB; ++b) sum[a][b] += (double)widen(u[a][i]) * (double)widen(same ? u[b][i] : v[b][i]);
    }
  });
#pragma unroll
  for (int a = 0; a < KB; ++a)
#pragma unroll
    for (int b = 0; b < KB; ++b) {
      const double total = block_sum(sum[a][b]);
      if (threadIdx.x == 0 && p0 + a < k && q0 + b < k && p0 + a <= q0 + b)
        partial[((int64_t)blockIdx.x * k + p0 + a) * k + q0 + b] = total;
    }
  if (!last_block(counter, gridDim.x * gridDim.y)) return;
  for (int pair = warp(); pair < k * k; pair += kThreads / 32) {  // a warp a pair: the blocks' sums in a fixed order
    const int a = pair / k, b = pair % k;
    if (b < a) continue;
    double total = 0;
    for (int64_t program = lane(); program < gridDim.x; program += 32) total += partial[(program * k + a) * k + b];
    total = warp_sum(total);
    if (lane() == 0) {
      if (add) total += out[a * k + b];
      out[a * k + b] = total, out[b * k + a] = total;
    }
  }
  if (!project.coef) return;
  __syncthreads();
  solve(Span<const double>(out_), k, project);
}

template <class T, int KB>
int launch_gram(Table table, int k, double* partial, unsigned* counter, double* out, bool add, const StepProject& project, void* stream) {
  const int groups = cdiv(k, KB), pairs = groups * (groups + 1) / 2;
  if (pairs == 1) EF_TRY(resident(gram<T, KB>, kThreads, &table.programs));
  return launch(gram<T, KB>, dim3(table.programs, pairs), dim3(kThreads), project.coef ? solve_bytes(project.k) : 0, stream, table, k,
                partial, counter, out, add, project);
}

// ---- update ------------------------------------------------------------------------------------------------------

template <class P, class M, class X> struct Lists {
  Span<P> theta;
  Span<const X> g;
  Span<M> v;  // null: no momentum is held
  Span<const X> d0, d1;
  Span<const int64_t> directions;
};

// U vectors of N elements of one thread, `stride` apart; all loads come before the first use of one
template <bool WHOLE, int U, int N, bool NOISE, class P, class M, class X>
EF_DEVICE void update_vectors(const Lists<P, M, X>& t, int64_t e, int64_t stride, int64_t stop, int64_t place,
                              Span<const Acc<P>> coef, int k, const StepUpdate& u) {
  using A = Acc<P>;
  Pack<N, P> x[U];
  Pack<N, X> g[U], d0[U], d1[U];
  Pack<N, M> v[U];
  int many[U];
  float z[U][N];  // drawn first: Philox's registers are free again when the loads need theirs
  if constexpr (NOISE) {
#pragma unroll
    for (int q = 0; q < U; ++q) normals<N>(place + e + q * stride, u.seed, u.offset, z[q]);
  }
#pragma unroll
  for (int q = 0; q < U; ++q) {
    const int64_t at = e + q * stride;
    many[q] = WHOLE ? N : (int)least<int64_t>(N, stop - at);
    read<WHOLE, N, P>(t.theta, at, many[q], x[q]);
    read<WHOLE, N, X>(t.g, at, many[q], g[q]);
    if (t.v) read<WHOLE, N, M>(t.v, at, many[q], v[q]);
    if (k > 0) read<WHOLE, N, X>(t.d0, at, many[q], d0[q]);
    if (k > 1) read<WHOLE, N, X>(t.d1, at, many[q], d1[q]);
  }
  A w[U][N];
#pragma unroll
  for (int q = 0; q < U; ++q)
#pragma unroll
    for (int i = 0; i < N; ++i) w[q][i] = (t.v ? (A)u.beta * (A)widen(v[q][i]) : A(0)) + (A)widen(g[q][i]);
  subtract<WHOLE, U, N, X, A>(w, d0, d1, t.directions, e, stride, many, coef, k);
#pragma unroll
  for (int q = 0; q < U; ++q) {
    const int64_t at = e + q * stride;
    if (t.v) {
#pragma unroll
      for (int i = 0; i < N; ++i) v[q][i] = narrow<M>((Acc<M>)w[q][i]);
      write<WHOLE, N, M>(t.v, at, many[q], v[q]);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      A next = (A)u.keep * (A)widen(x[q][i]) - (A)u.lr * w[q][i];
      if constexpr (NOISE) next += (A)u.noise * (A)z[q][i];
      x[q][i] = narrow<P>(next);
    }
    write<WHOLE, N, P>(t.theta, at, many[q], x[q]);
  }
}

template <class P, class M, class X, bool NOISE> __global__ void __launch_bounds__(kThreads, sizeof(P) == 8 ? 1 : 2)
update(Table table, int k, const Acc<P>* coef_, StepUpdate u) {
  constexpr int N = sizeof(P) == 2 ? 8 : 4, U = sizeof(P) == 4 ? 2 : 1;
  const Span<const Acc<P>> coef(coef_);
  if constexpr (NOISE) u.offset = moved_on(u.offset, u.counter);
  for_chunks(table, [&](Span<const int64_t> row, int64_t first, int64_t size) {
    const Lists<P, M, X> t{pointer<P>(row[kHead]), pointer<const X>(row[kHead + 1]), pointer<M>(row[kHead + 2]),
                           k > 0 ? pointer<const X>(row[kHead + 3]) : Span<const X>(nullptr),
                           k > 1 ? pointer<const X>(row[kHead + 4]) : Span<const X>(nullptr), row + (kHead + 3)};
    const bool vectors = aligned(row);
    const int64_t place = row[2], stop = least(first + kChunk, size);
    for (int64_t e = first + threadIdx.x * N; e < stop; e += kThreads * N * U) {
      if (vectors && e + (U - 1) * kThreads * N + N <= stop) {
        update_vectors<true, U, N, NOISE>(t, e, kThreads * N, stop, place, coef, k, u);
      } else {
        for (int64_t at = e; at < stop && at < e + kThreads * N * U; at += kThreads * N)
          update_vectors<false, 1, N, NOISE>(t, at, 0, stop, place, coef, k, u);
      }
    }
  });
}

template <class P, class M, class X>
int launch_update(Table table, int k, const void* coef, const StepUpdate& u, void* stream) {
  const auto kernel = u.noise != 0 ? update<P, M, X, true> : update<P, M, X, false>;
  EF_TRY(resident(kernel, kThreads, &table.programs));
  return launch(kernel, dim3(table.programs), dim3(kThreads), 0, stream, table, k, (const Acc<P>*)coef, u);
}

template <class T> int low_update(Table table, int momentum, int read, int k, const void* coef, const StepUpdate& u, void* stream) {
  constexpr int own = std::is_same_v<T, Bf16> ? kBf16 : kHalf;
  if (momentum == own && read == own) return launch_update<T, T, T>(table, k, coef, u, stream);
  if (momentum == kFloat && read == own) return launch_update<T, float, T>(table, k, coef, u, stream);
  if (momentum == kFloat && read == kFloat) return launch_update<T, float, float>(table, k, coef, u, stream);
  return kBadArgument;
}

}  // namespace
}  // namespace ef::cuda

using namespace ef::cuda;

EF_LAUNCHER ef_cuda_step_gram(Table table, int type, int k, double* partial, unsigned* counter, double* out, int add,
                              StepProject project, void* stream) {
  if (project.coef && project.k > kMostDirections) return kBadArgument;
  return by_type(type, [&](auto zero) {
    using T = decltype(zero);
    const auto run = k <= 2 ? launch_gram<T, 2> : launch_gram<T, 3>;
    return run(table, k, partial, counter, out, add != 0, project, stream);
  });
}

EF_LAUNCHER ef_cuda_step_update(Table table, int param, int momentum, int read, int k, const void* coef, StepUpdate u, void* stream) {
  if (param == kBf16) return low_update<Bf16>(table, momentum, read, k, coef, u, stream);
  if (param == kHalf) return low_update<Half>(table, momentum, read, k, coef, u, stream);
  if (param != momentum || param != read) return kBadArgument;
  if (param == kFloat) return launch_update<float, float, float>(table, k, coef, u, stream);
  return launch_update<double, double, double>(table, k, coef, u, stream);
}
