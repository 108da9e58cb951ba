// step: look-ahead and its exact undo with one byte a parameter; and the table's way to the device.
//
// Look-ahead takes two passes over theta and g: how many elements need more than a byte sizes the result, or says which of
// them have a slot; the others stay. Blocks that the first pass found without such an element skip the scan in the second.
// Bytes per parameter: theta and g twice, theta and one byte written; the undo: theta, g, one byte read, theta written.
// With a capacity 24 bytes a slot besides.
// Limit: copy bandwidth. Fraction reached: not yet run on a GPU.
#include "multi.cuh"
#include "reduce.cuh"

namespace ef::cuda {
namespace {

template <class T> struct BitsOf { using type = int16_t; };
template <> struct BitsOf<float> { using type = int32_t; };
template <> struct BitsOf<double> { using type = int64_t; };
template <class T> using Bits = typename BitsOf<T>::type;

// Floats as integers in which neighbours differ by one; -0 is one below +0.
template <class T> EF_DEVICE int64_t ordered(T x) {
  constexpr int64_t low = (int64_t)((uint64_t)~0ull >> (65 - 8 * sizeof(T)));
  const int64_t b = bits_as<Bits<T>>(x);
  return b < 0 ? -(b & low) - 1 : b;
}
template <class T> EF_DEVICE T from_ordered(int64_t i) {
  const Bits<T> b = (Bits<T>)i;
  constexpr Bits<T> low = (Bits<T>)((uint64_t)~0ull >> (65 - 8 * sizeof(T)));
  return bits_as<T>((Bits<T>)(b < 0 ? b ^ low : b));
}

EF_DEVICE float fused(float a, float b, float c) { return fmaf(a, b, c); }
EF_DEVICE double fused(double a, double b, double c) { return fma(a, b, c); }
EF_DEVICE bool finite(float x) { return fabsf(x) <= 3.402823466e38f; }
EF_DEVICE bool finite(double x) { return fabs(x) <= 1.7976931348623157e308; }

// theta + by * g, one fused multiply-add rounded once to T: look-ahead and undo must not be contracted differently
template <class T> EF_DEVICE T moved(T theta, T g, Acc<T> by) { return narrow<T>(fused(by, widen(g), widen(theta))); }

constexpr int8_t kUnmoved = -128;  // in ulps: an element that found no slot, left as it was

template <class T> struct Ahead {
  T now;
  int64_t off;  // floats from the plain undo to the old value
  bool far;
};

template <class T> EF_DEVICE Ahead<T> look(T old, T g, Acc<T> alpha) {
  const T now = moved<T>(old, g, -alpha), back = moved<T>(now, g, alpha);
  // differences of doubles of opposite sign may wrap; unsigned, so that it is defined, and told by the signs
  const int64_t a = ordered(old), b = ordered(back), off = (int64_t)((uint64_t)a - (uint64_t)b);
  const bool wrapped = ((a ^ b) & (a ^ off)) < 0;
  return {now, off, wrapped || off > 127 || off < -127 || !finite(widen(back))};
}

template <class T> constexpr int kVector = 16 / sizeof(T);

template <bool WHOLE, class T> EF_DEVICE int count_far(Span<const T> theta, Span<const T> g, int64_t e, int many, Acc<T> alpha) {
  constexpr int N = kVector<T>;
  Pack<N, T> x, d;
  read<WHOLE, N, T>(theta, e, many, x);
  read<WHOLE, N, T>(g, e, many, d);
  int far = 0;
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (WHOLE || i < many) far += look<T>(x[i], d[i], alpha).far;
  return far;
}

template <class T> __global__ void __launch_bounds__(kThreads)
lookahead_count(Table table, Acc<T> alpha, const int64_t* before_, int64_t* found_, int64_t* places_, unsigned* counter) {
  constexpr int N = kVector<T>;
  const Span<int64_t> found(found_), places(places_);
  int64_t far = 0;
  for_chunks(table, [&](Span<const int64_t> row, int64_t first, int64_t size) {
    const Span<const T> theta = pointer<const T>(row[kHead]), g = pointer<const T>(row[kHead + 1]);
    const bool vectors = aligned(row);
    const int64_t stop = first + kChunk < size ? first + kChunk : size;
    for (int64_t e = first + threadIdx.x * N; e < stop; e += kThreads * N) {
      if (vectors && e + N <= stop) far += count_far<true, T>(theta, g, e, N, alpha);
      else far += count_far<false, T>(theta, g, e, (int)(stop - e < N ? stop - e : N), alpha);
    }
  });
  far = block_sum(far);
  if (threadIdx.x == 0) found[blockIdx.x] = far;
  if (!last_block(counter, gridDim.x)) return;
  int64_t before = before_ ? Span<const int64_t>(before_)[0] : 0;  // a running sum over the blocks, kThreads at a time
  for (int64_t base = 0; base < gridDim.x; base += kThreads) {
    const int64_t at = base + threadIdx.x;
    const int64_t mine = at < gridDim.x ? found[at] : 0;
    const bool any = block_sum(mine) != 0;
    int64_t place = before;
    if (any) {
      __shared__ int64_t all[kThreads];
      all[threadIdx.x] = mine;
      __syncthreads();
      for (int i = 0; i < kThreads; ++i) {
        if (i < (int)threadIdx.x) place += all[i];
        before += all[i];
      }  // the next turn's block_sum is a barrier before `all` is written again
    }
    if (at < gridDim.x) places[at] = place;
  }
  if (threadIdx.x == 0) places[gridDim.x] = before;
}

template <bool WHOLE, class T>
EF_DEVICE void look_vector(Span<T> theta, Span<const T> g, Span<int8_t> ulps, int64_t e, int many, Acc<T> alpha, bool listed,
                           int64_t tensor, int64_t* at, int64_t slots, Span<int64_t> index, Span<double> value) {
  constexpr int N = kVector<T>;
  Pack<N, T> old{}, d{}, now;
  read<WHOLE, N, T>(theta, e, many, old);
  read<WHOLE, N, T>(g, e, many, d);
  Pack<N, int8_t> off;
  unsigned far = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const Ahead<T> a = look<T>(old[i], d[i], alpha);
    now[i] = a.now;
    if (a.far && (WHOLE || i < many)) far |= 1u << i;
    off[i] = a.far ? (int8_t)0 : (int8_t)a.off;
  }
  if (listed) {  // the same in the whole block
    int total;
    int64_t slot = *at + block_scan(__popc(far), &total);
    *at += total;
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (far >> i & 1) {
        if (slot < slots) {
          index[2 * slot] = tensor, index[2 * slot + 1] = e + i;
          value[slot] = (double)widen(old[i]);
        } else {
          now[i] = old[i], off[i] = kUnmoved;
        }
        ++slot;
      }
  }
  write<WHOLE, N, T>(theta, e, many, now);
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (WHOLE || i < many) ulps[e + i] = off[i];
}

template <class T> __global__ void __launch_bounds__(kThreads)
lookahead(Table table, Acc<T> alpha, const int64_t* found, const int64_t* places, int64_t slots, int64_t* index_, double* value_) {
  constexpr int N = kVector<T>;
  const Span<int64_t> index(index_);
  const Span<double> value(value_);
  const bool listed = Span<const int64_t>(found)[blockIdx.x] != 0;
  int64_t at = Span<const int64_t>(places)[blockIdx.x];
  for_chunks(table, [&](Span<const int64_t> row, int64_t first, int64_t size) {
    const Span<T> theta = pointer<T>(row[kHead]);
    const Span<const T> g = pointer<const T>(row[kHead + 1]);
    const Span<int8_t> ulps = pointer<int8_t>(row[kHead + 2]);
    const bool vectors = aligned(row);
    const int64_t stop = first + kChunk < size ? first + kChunk : size;
    // every thread takes every turn: look_vector holds barriers
    for (int64_t base = first; base < stop; base += kThreads * N) {
      const int64_t e = base + threadIdx.x * N;
      if (vectors && base + kThreads * N <= stop)
        look_vector<true, T>(theta, g, ulps, e, N, alpha, listed, index_of(row), &at, slots, index, value);
      else
        look_vector<false, T>(theta, g, ulps, e, stop - e < N ? (int)(stop - e > 0 ? stop - e : 0) : N, alpha, listed,
                              index_of(row), &at, slots, index, value);
    }
  });
}

template <bool WHOLE, class T>
EF_DEVICE void undo_vector(Span<T> theta, Span<const T> g, Span<const int8_t> ulps, int64_t e, int many, Acc<T> alpha) {
  constexpr int N = kVector<T>;
  Pack<N, T> x{}, d{};
  int8_t off[N] = {};
  read<WHOLE, N, T>(theta, e, many, x);
  read<WHOLE, N, T>(g, e, many, d);
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (WHOLE || i < many) off[i] = ulps[e + i];
#pragma unroll
  for (int i = 0; i < N; ++i)  // unsigned: the far elements, put right afterwards, may wrap
    if (off[i] != kUnmoved)
      x[i] = from_ordered<T>((int64_t)((uint64_t)ordered(moved<T>(x[i], d[i], alpha)) + (uint64_t)(int64_t)off[i]));
  write<WHOLE, N, T>(theta, e, many, x);
}

template <class T> __global__ void __launch_bounds__(kThreads) undo(Table table, Acc<T> alpha) {
  constexpr int N = kVector<T>;
  for_chunks(table, [&](Span<const int64_t> row, int64_t first, int64_t size) {
    const Span<T> theta = pointer<T>(row[kHead]);
    const Span<const T> g = pointer<const T>(row[kHead + 1]);
    const Span<const int8_t> ulps = pointer<const int8_t>(row[kHead + 2]);
    const bool vectors = aligned(row);
    const int64_t stop = first + kChunk < size ? first + kChunk : size;
    for (int64_t e = first + threadIdx.x * N; e < stop; e += kThreads * N) {
      if (vectors && e + N <= stop) undo_vector<true, T>(theta, g, ulps, e, N, alpha);
      else undo_vector<false, T>(theta, g, ulps, e, (int)(stop - e < N ? stop - e : N), alpha);
    }
  });
}

// theta[tensor, element] = value; an entry of another table, of none (-1), or out of range is left alone
template <class T> __global__ void __launch_bounds__(kThreads)
restore(Table table, const int64_t* where_, int64_t tensors, const int64_t* index_, const double* value_, int64_t count) {
  const Span<const int64_t> where(where_), index(index_), rows(table.rows);
  const Span<const double> value(value_);
  for (int64_t q = blockIdx.x * (int64_t)kThreads + threadIdx.x; q < count; q += gridDim.x * (int64_t)kThreads) {
    const int64_t tensor = index[2 * q], e = index[2 * q + 1];
    const int64_t row = tensor >= 0 && tensor < tensors ? where[tensor] : -1;
    if (row < 0) continue;
    const Span<const int64_t> at = rows + row * table.columns;
    if (e >= 0 && e < at[1]) pointer<T>(at[kHead])[e] = narrow<T>((Acc<T>)value[q]);
  }
}

// ---- the table's way to the device ---------------------------------------------------------------------------------

template <int COUNT> struct Values {
  int64_t v[COUNT];
};

template <int COUNT> __global__ void fill(int64_t* out_, Values<COUNT> values, int count) {
  const Span<int64_t> out(out_);
  for (int i = threadIdx.x; i < count; i += blockDim.x) out[i] = values.v[i];
}

template <int COUNT> int fill_by(int64_t* out, const int64_t* values, int64_t count, void* stream) {
  for (int64_t at = 0; at < count; at += COUNT) {
    Values<COUNT> part{};
    const int many = (int)(count - at < COUNT ? count - at : COUNT);
    memcpy(part.v, values + at, many * sizeof(int64_t));
    EF_TRY(launch(fill<COUNT>, dim3(1), dim3(128), 0, stream, out + at, part, many));
  }
  return 0;
}

}  // namespace
}  // namespace ef::cuda

using namespace ef::cuda;

EF_LAUNCHER ef_cuda_step_lookahead_count(Table table, int type, double alpha, const int64_t* before, int64_t* found, int64_t* places,
                                         unsigned* counter, void* stream) {
  return by_type(type, [&](auto zero) {
    return launch(lookahead_count<decltype(zero)>, dim3(table.programs), dim3(kThreads), 0, stream, table, alpha, before, found, places,
                  counter);
  });
}

EF_LAUNCHER ef_cuda_step_lookahead(Table table, int type, double alpha, const int64_t* found, const int64_t* places, int64_t slots,
                                   int64_t* index, double* value, void* stream) {
  return by_type(type, [&](auto zero) {
    return launch(lookahead<decltype(zero)>, dim3(table.programs), dim3(kThreads), 0, stream, table, alpha, found, places, slots, index,
                  value);
  });
}

EF_LAUNCHER ef_cuda_step_undo(Table table, int type, double alpha, void* stream) {
  return by_type(type, [&](auto zero) {
    using T = decltype(zero);
    EF_TRY(resident(undo<T>, kThreads, &table.programs));
    return launch(undo<T>, dim3(table.programs), dim3(kThreads), 0, stream, table, alpha);
  });
}

EF_LAUNCHER ef_cuda_step_restore(Table table, int type, const int64_t* where, int64_t tensors, const int64_t* index,
                                 const double* value, int64_t count, void* stream) {
  const int64_t blocks = cdiv(count, (int64_t)kThreads);
  return by_type(type, [&](auto zero) {
    return launch(restore<decltype(zero)>, dim3((unsigned)(blocks < 1024 ? blocks : 1024)), dim3(kThreads), 0, stream, table, where,
                  tensors, index, value, count);
  });
}

// 30 KiB of arguments where the table is long (CUDA 12.1 and later), half a KiB where it is short
EF_LAUNCHER ef_cuda_fill(int64_t* out, const int64_t* values, int64_t count, void* stream) {
  return count <= 64 ? fill_by<64>(out, values, count, stream) : fill_by<3840>(out, values, count, stream);
}
