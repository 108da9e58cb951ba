// Which two blocks of samples a CUDA block of the Gram kernels works on.
#pragma once

#include "common.cuh"

namespace ef::cuda {

// The q-th pair I < J of `blocks` (symmetric), or of the grid left × right. One block alone is the pair (0, 0).
EF_DEVICE void pair_of(int q, int blocks, int right, bool symmetric, int& i, int& j) {
  if (!symmetric) {
    i = q / right, j = q % right;
  } else if (blocks == 1) {
    i = j = 0;
  } else {
    for (i = 0; q >= blocks - 1 - i; ++i) q -= blocks - 1 - i;
    j = i + 1 + q;
  }
}
// The q-th pair I ≤ J of blocks (symmetric), column by column, or of the grid left × right.
EF_DEVICE void tile_of(int q, int right, bool symmetric, int& i, int& j) {
  if (!symmetric) {
    i = q / right, j = q % right;
    return;
  }
  for (j = 0; q > j; ++j) q -= j + 1;
  i = q;
}
inline int64_t pairs(int64_t blocks, int64_t right, bool symmetric) {
  return !symmetric ? blocks * right : blocks == 1 ? 1 : blocks * (blocks - 1) / 2;
}

}  // namespace ef::cuda
