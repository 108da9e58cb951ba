// step: the Gram of k directions, with the k x k solve in its last block, and the projected momentum step.
//
// Blocks take equal stretches of the tensors' chunks; a thread loads everything its elements need, 16 bytes at a time,
// before it computes. Tensors that are not 16-byte aligned, and the ends of all, go element by element.
// Per parameter:  gram    k reads; k (k + 1) / 2 products, in double
//                 update  theta and v read and written, g and k directions read; 2 (k + 3) FLOPs, about 40 more with noise
// Limit: copy bandwidth. Fraction reached: not yet run on a GPU. Counted from SASS (sm_90a, bfloat16): gram of 3 directions and
// update with float32 momentum and 2 directions have 96 bytes a thread under way before the first use, 49 KB a multiprocessor.
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

// One direction, or none: what a thread holds of it until all its loads are under way, and that as numbers
template <class T> struct List {
  static constexpr int N = 16 / sizeof(T) < 4 ? 4 : 16 / sizeof(T);
  static constexpr int U = sizeof(T) < 8 ? 2 : 1;  // vectors at a time, where there is one group of up to three
  using Held = Pack<N, T>;
  Span<const T> p = nullptr;

  EF_DEVICE void at(int64_t address, int) { p = pointer<const T>(address); }
  template <bool WHOLE> EF_DEVICE void get(int64_t e, int many, Held& held) const {
    if (p) read<WHOLE, N, T>(p, e, many, held);
  }
  EF_DEVICE void settle(Held&) const {}
  static EF_DEVICE double number(const Held& held, int i) { return (double)widen(held[i]); }
};

// float32, bfloat16 or float16, as the list's type says, the same for all threads: 16 or 32 bytes are held, the latter as they are
struct Mixed {};
template <> struct List<Mixed> {
  static constexpr int N = 8, U = 1;
  struct Held {
    Pack<4, uint32_t> half[2];
    EF_DEVICE uint32_t& operator[](int i) { return half[i / 4][i % 4]; }
    EF_DEVICE const uint32_t& operator[](int i) const { return half[i / 4][i % 4]; }
  };
  int64_t address = 0;
  int type = kFloat;

  EF_DEVICE void at(int64_t address_, int type_) { address = address_, type = type_; }
  template <bool WHOLE> EF_DEVICE void get(int64_t e, int many, Held& held) const {
    if (!address) return;
    const auto words = pointer<const uint32_t>(address);
    if constexpr (WHOLE) {
      load<4, uint32_t>(words, type == kFloat ? e : e / 2, held.half[0]);
      if (type == kFloat) load<4, uint32_t>(words, e + 4, held.half[1]);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (i < many) {
          if (type == kFloat) held[i] = words[e + i];
          else held[i / 2] |= (uint32_t)pointer<const uint16_t>(address)[e + i] << i % 2 * 16;
        }
    }
  }
  EF_DEVICE void settle(Held& held) const {  // 16-bit elements, which fill the lower half, become float32: from the last one on
    if (type == kFloat) return;
#pragma unroll
    for (int i = N - 1; i >= 0; --i) {
      const auto bits = (uint16_t)(held[i / 2] >> i % 2 * 16);
      held[i] = bits_as<uint32_t>(type == kBf16 ? widen(Bf16{bits}) : widen(Half{bits}));
    }
  }
  static EF_DEVICE double number(const Held& held, int i) { return (double)bits_as<float>(held[i]); }
};

// sum += products of the directions x, and y where they are others, at U vectors, `stride` apart; all loads come
// before the first use of one, a value is widened to double once: conversions are the scarcest (16 a clock of a multiprocessor)
template <bool SAME, bool WHOLE, int U, int KB, class T>
EF_DEVICE void add_products(double (&sum)[KB][KB], const List<T> (&x)[KB], const List<T> (&y)[KB], int64_t e, int64_t stride, int many) {
  typename List<T>::Held u[U][KB] = {}, v[U][SAME ? 1 : KB] = {};
#pragma unroll
  for (int q = 0; q < U; ++q)
#pragma unroll
    for (int j = 0; j < KB; ++j) {
      x[j].template get<WHOLE>(e + q * stride, many, u[q][j]);
      if constexpr (!SAME) y[j].template get<WHOLE>(e + q * stride, many, v[q][j]);
    }
#pragma unroll
  for (int q = 0; q < U; ++q)
#pragma unroll
    for (int j = 0; j < KB; ++j) {
      x[j].settle(u[q][j]);
      if constexpr (!SAME) y[j].settle(v[q][j]);
    }
#pragma unroll
  for (int q = 0; q < U; ++q)
#pragma unroll
    for (int i = 0; i < List<T>::N; ++i) {
      double left[KB], right[KB];
#pragma unroll
      for (int a = 0; a < KB; ++a) {
        left[a] = List<T>::number(u[q][a], i);
        if constexpr (SAME) right[a] = left[a];
        else right[a] = List<T>::number(v[q][a], i);
      }
#pragma unroll
      for (int a = 0; a < KB; ++a)
#pragma unroll
        for (int b = SAME ? a : 0; b < KB; ++b) sum[a][b] += left[a] * right[b];
    }
}

// sum: of directions p0.. with directions q0.., over this block's chunks
template <bool SAME, int KB, class T>
EF_DEVICE void products(double (&sum)[KB][KB], const Table& table, unsigned types, int k, int p0, int q0) {
  constexpr int N = List<T>::N, U = SAME && KB < 4 ? List<T>::U : 1;
  for_chunks(table, [&](Span<const int64_t> row, int64_t first, int64_t size) {
    List<T> x[KB], y[KB];
#pragma unroll
    for (int j = 0; j < KB; ++j) {
      if (p0 + j < k) x[j].at(row[kHead + p0 + j], types >> 2 * j & 3);
      if (!SAME && q0 + j < k) y[j].at(row[kHead + q0 + j], 0);
    }
    const bool vectors = aligned(row);
    const int64_t stop = least(first + kChunk, size);
    for (int64_t e = first + threadIdx.x * N; e < stop; e += kThreads * N * U) {
      if (vectors && e + (U - 1) * kThreads * N + N <= stop) {
        add_products<SAME, true, U>(sum, x, y, e, kThreads * N, N);
      } else {
        for (int64_t at = e; at < stop && at < e + kThreads * N * U; at += kThreads * N)
          add_products<SAME, false, 1>(sum, x, y, at, 0, (int)least<int64_t>(N, stop - at));
      }
    }
  });
}

// MANY: more directions than a group has. types: of Mixed directions, two bits each
template <class T, int KB, bool MANY> __global__ void __launch_bounds__(kThreads, 2)
gram(Table table, unsigned types, int k, double* partial_, unsigned* counter, double* out_, bool add, StepProject project) {
  const Span<double> partial(partial_), out(out_);
  int p0, q0;
  group_pair(cdiv(k, KB), blockIdx.y, &p0, &q0);
  p0 *= KB, q0 *= KB;
  double sum[KB][KB] = {};
  if constexpr (MANY) {
    if (p0 != q0) products<false, KB, T>(sum, table, types, k, p0, q0);
    else products<true, KB, T>(sum, table, types, k, p0, p0);
  } else {
    products<true, KB, T>(sum, table, types, k, p0, p0);
  }
#pragma unroll
  for (int a = 0; a < KB; ++a)
#pragma unroll
    for (int b = 0; b < KB; ++b) {
      if (p0 + a > q0 + b || p0 + a >= k || q0 + b >= k) continue;  // the same for the whole block
      const double total = block_sum(sum[a][b]);
      if (threadIdx.x == 0)
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

template <class T, int KB, bool MANY>
int launch_gram(Table table, unsigned types, int k, double* partial, unsigned* counter, double* out, bool add, const StepProject& project,
                void* stream) {
  const int groups = cdiv(k, KB), pairs = groups * (groups + 1) / 2;
  if (!MANY) EF_TRY(resident(gram<T, KB, MANY>, kThreads, &table.programs));
  return launch(gram<T, KB, MANY>, dim3(table.programs, pairs), dim3(kThreads), project.coef ? solve_bytes(project.k) : 0, stream, table,
                types, k, partial, counter, out, add, project);
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

EF_LAUNCHER ef_cuda_step_gram(Table table, const int* types, int k, double* partial, unsigned* counter, double* out, int add,
                              StepProject project, void* stream) {
  if (project.coef && project.k > kMostDirections) return kBadArgument;
  bool mixed = false, wide = false;
  unsigned packed = 0;
  for (int j = 0; j < k; ++j) mixed |= types[j] != types[0], wide |= types[j] == kDouble;
  if (mixed && (wide || k > kMostMixed)) return kBadArgument;
  for (int j = 0; mixed && j < k; ++j) packed |= types[j] << 2 * j;
  const auto go = [&](auto run) { return run(table, packed, k, partial, counter, out, add != 0, project, stream); };
  if (mixed) return go(k == 2 ? launch_gram<Mixed, 2, false> : k == 3 ? launch_gram<Mixed, 3, false> : launch_gram<Mixed, 4, false>);
  return by_type(types[0], [&](auto zero) {
    using T = decltype(zero);
    return go(k <= 2   ? launch_gram<T, 2, false>
              : k == 3 ? launch_gram<T, 3, false>
              : k == 4 ? launch_gram<T, 4, false>
                       : launch_gram<T, 3, true>);
  });
}

EF_LAUNCHER ef_cuda_step_update(Table table, int param, int momentum, int read, int k, const void* coef, StepUpdate u, void* stream) {
  if (param == kBf16) return low_update<Bf16>(table, momentum, read, k, coef, u, stream);
  if (param == kHalf) return low_update<Half>(table, momentum, read, k, coef, u, stream);
  if (param != momentum || param != read) return kBadArgument;
  if (param == kFloat) return launch_update<float, float, float>(table, k, coef, u, stream);
  return launch_update<double, double, double>(table, k, coef, u, stream);
}
