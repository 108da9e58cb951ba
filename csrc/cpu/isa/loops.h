// Elementwise loops of sample_loss, and of step's Gram and look-ahead: one table per ISA. Types: float, double, uint16_t (bfloat16).
#pragma once

#include <stdint.h>

namespace ef::cpu {

enum class Type : int { f32, f64, bf16 };

template <class T> struct Rows {
  using A = T;
};
template <> struct Rows<uint16_t> {
  using A = float;
};

template <class T> struct Elements {
  using A = typename Rows<T>::A;
  // out[i*k + j] += <x_i, x_j>, j <= i, in double
  void (*dots)(const T* const* x, int64_t k, int64_t count, double* out);
  // theta -= alpha g;  ulps = how far the plain undo lands off.  Returns how many are off by more than 127: -128
  int64_t (*lookahead)(T* theta, const T* g, int8_t* ulps, int64_t count, A alpha);
  // where ulps is -128 theta stays
  void (*undo)(T* theta, const T* g, const int8_t* ulps, int64_t count, A alpha);
  // max, sum of exp(x - max), sum of x - max
  void (*row_sums)(const T* x, int64_t count, A* top, A* total, A* below);
  // out = scale exp(x - top - log_sum) - shift
  void (*row_softmax)(const T* x, T* out, int64_t count, A top, A log_sum, A scale, A shift);
  // between the compute type and memory
  void (*read)(const T* x, A* out, int64_t count);
  void (*write)(const A* x, T* out, int64_t count);
};

struct Loops {
  Elements<float> f32;
  Elements<double> f64;
  Elements<uint16_t> bf16;
};

}  // namespace ef::cpu
