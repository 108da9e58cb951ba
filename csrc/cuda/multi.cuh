// A block's share of many tensors: a table of pointers on the device, its chunks shared out in equal stretches.
#pragma once

#include "common.cuh"

namespace ef::cuda {

template <class T> EF_DEVICE Span<T> pointer(int64_t address) { return Span<T>(reinterpret_cast<T*>(address)); }

// f(row, first element of the chunk, elements of the tensor) for every chunk of this block's stretch, in order.
template <class F> EF_DEVICE void for_chunks(const Table& table, F&& f) {
  const Span<const int64_t> rows(table.rows);
  const int64_t per = cdiv(table.chunks, (int64_t)table.programs), start = blockIdx.x * per;
  const int64_t stop = start + per < table.chunks ? start + per : table.chunks;
  if (start >= stop) return;
  int64_t i = 0;
  for (int64_t beyond = table.count; beyond - i > 1;) {  // the last row that begins at or before `start`
    const int64_t middle = (i + beyond) / 2;
    if (rows[middle * table.columns] <= start) i = middle;
    else beyond = middle;
  }
  for (int64_t chunk = start; chunk < stop; ++chunk) {
    while (rows[(i + 1) * table.columns] <= chunk) ++i;
    const Span<const int64_t> row = rows + i * table.columns;
    f(row, (chunk - row[0]) * kChunk, row[1]);
  }
}

EF_DEVICE bool aligned(Span<const int64_t> row) { return row[3] & 1; }

// the index that row [3] holds: the tensor's place in the call
EF_DEVICE int64_t index_of(Span<const int64_t> row) { return row[3] >> 1; }

template <class T> EF_DEVICE T least(T a, T b) { return a < b ? a : b; }

// w -= sum_j coef_j d_j for U vectors of N elements, `stride` apart; d0 and d1 hold the first two directions
template <bool WHOLE, int U, int N, class X, class A>
EF_DEVICE void subtract(A (&w)[U][N], Pack<N, X> (&d0)[U], Pack<N, X> (&d1)[U], Span<const int64_t> directions, int64_t e, int64_t stride,
                        const int (&many)[U], Span<const A> coef, int k) {
  for (int j = 0; j < k; j += 2) {
    const A c0 = coef[j], c1 = j + 1 < k ? coef[j + 1] : A(0);
    if (j > 0) {
      const Span<const X> next = pointer<const X>(directions[j]);
#pragma unroll
      for (int q = 0; q < U; ++q) {
        read<WHOLE, N, X>(next, e + q * stride, many[q], d0[q]);
        if (j + 1 < k) read<WHOLE, N, X>(pointer<const X>(directions[j + 1]), e + q * stride, many[q], d1[q]);
      }
    }
#pragma unroll
    for (int q = 0; q < U; ++q)
#pragma unroll
      for (int i = 0; i < N; ++i) {
        w[q][i] -= c0 * (A)widen(d0[q][i]);
        if (j + 1 < k) w[q][i] -= c1 * (A)widen(d1[q][i]);
      }
  }
}

// offset plus what stands on the device: a counter moves the noise on when a graph is replayed
EF_DEVICE uint64_t moved_on(uint64_t offset, const int64_t* counter) {
  return counter ? offset + (uint64_t)Span<const int64_t>(counter)[0] : offset;
}

}  // namespace ef::cuda
