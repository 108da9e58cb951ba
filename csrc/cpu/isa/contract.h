// The register-tile kernels of gram, sqnorm and project: one table per ISA and element type.
// A panel holds `width` rows side by side, k-major: (row r, unit k) at panel[k * width + r].
#pragma once

#include <stdint.h>

namespace ef::cpu {

struct ConvRuns {             // the output positions of a convolution: `count` runs of `length` neighbours
  int64_t count, length;      // in the last dimension
  const int64_t* offset;      // where each run starts in the padded, phase-split input
};

template <class T>  // float, double, uint16_t (bfloat16)
struct Contract {
  int width;  // rows of a panel; 0: this ISA has no such kernel
  int rows;   // rows of a register tile
  int lanes;  // rows that one pack() takes
  int per;    // elements in a unit of k

  // row-major rows, ld units apart -> columns [column, column + lanes) of a panel, zeros beyond `count`
  void (*pack)(const T* rows, int64_t ld, int64_t count, int64_t units, T* panel, int64_t column);
  // one sample's gradient: out (o, j) = b[:, :o]^T a[:, :j], zeros up to the panel's width; work: gather buffers
  void (*form)(const T* a, int64_t ld_a, const T* b, int64_t ld_b, int64_t t, int64_t o, int64_t j, T* out,
               int64_t ld_out, T* work);
  // the same for a convolution: out (j, width); row r of j starts at x + base[r]; g from pack_runs
  void (*form_conv)(const T* x, const int64_t* base, int64_t j, const T* g, ConvRuns runs, T* out);
  // k-major copy of g (o rows of count * length positions), zeros beyond o
  void (*pack_runs)(const T* g, int64_t ld, int64_t o, int64_t count, int64_t length, T* out);
  // out[r][c] += <left r, right c> over `units`, for the register tiles [begin, end) of a list of (strip, panel)
  void (*gram)(const T* left, const T* right, int64_t panel, int64_t units, const int32_t* tiles, int64_t begin,
               int64_t end, void* out, int64_t ld, int64_t n, int64_t m);
  // out[i][j] += sum over positions of both products, for one group of left rows and one right panel
  void (*pairs)(const T* left_a, const T* left_b, int64_t rows, int64_t first_left, int64_t t, const T* right_a,
                const T* right_b, int64_t first_right, int64_t end_right, int64_t s, int64_t units_a, int64_t units_b,
                void* out, int64_t ld);
  double (*square)(const T* x, int64_t count);  // sum of squares
  // out[j] += <x, y_j>, in double across calls
  void (*dots)(const T* x, const T* const* y, int64_t k, int64_t count, double* out);
};

struct ContractTables {
  Contract<float> f32;
  Contract<double> f64;
  Contract<uint16_t> bf16;
};

}  // namespace ef::cpu
