// What the CPU kernels share: torch's own GEMM through the dispatcher, dtypes and shapes.
#pragma once

#include <algorithm>
#include <cstdint>

#include "isa.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>

namespace ef::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Tensor empty_like_dtype(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

// low precision is accumulated, and returned, in float32
inline ScalarType accumulate_type(ScalarType t) { return t == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

// what a kernel reads: bfloat16 as it is where the chip multiplies it, float otherwise
inline ScalarType compute_type(ScalarType t) {
  return t == ScalarType::BFloat16 && contract().bf16.width ? t : accumulate_type(t);
}

// what a loop over elements reads; everything else is converted to float
inline ScalarType element_type(ScalarType t) { return t == ScalarType::BFloat16 ? t : accumulate_type(t); }

template <class F> void by_type(ScalarType t, F&& f) {
  STD_TORCH_CHECK(t == element_type(t), "this kernel takes float32, float64 and bfloat16; convert with .float()");
  if (t == ScalarType::Double) f(double{});
  else if (t == ScalarType::BFloat16) f(uint16_t{});
  else f(float{});
}

// what an accumulate_type holds
template <class F> void by_wide_type(ScalarType t, F&& f) { t == ScalarType::Double ? f(double{}) : f(float{}); }

template <class T> T* data(const Tensor& x) { return (T*)x.data_ptr(); }

inline Tensor dense(const Tensor& x, ScalarType dtype) {
  Tensor y = x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
  return torch::stable::contiguous(y);
}

// bfloat16 is multiplied in pairs: an odd width gets a zero column
inline Tensor whole_pairs(const Tensor& x) { return x.size(x.dim() - 1) % 2 ? torch::stable::pad(x, {0, 1}) : x; }

// out = beta * out + x @ y
inline void addmm_(Tensor& out, const Tensor& x, const Tensor& y, double beta) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), x.get(), y.get(), beta, 1.0));
}

// out = x @ y
inline void mm_out(Tensor& out, const Tensor& x, const Tensor& y) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), x.get(), y.get()));
}

// out = x @ y, batched
inline void bmm_out(Tensor& out, const Tensor& x, const Tensor& y) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_bmm_out(out.get(), x.get(), y.get()));
}

inline Tensor slice(Tensor x, int64_t dim, int64_t start, int64_t stop) {
  return torch::stable::narrow(x, dim, start, stop - start);
}

}  // namespace ef::cpu
