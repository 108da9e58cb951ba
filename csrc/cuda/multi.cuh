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

}  // namespace ef::cuda
