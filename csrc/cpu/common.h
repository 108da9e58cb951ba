// What the CPU kernels share: torch's own GEMM through the dispatcher, and the per-ISA clones of inner loops.
#pragma once

#include <algorithm>
#include <cstdint>

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>

// one .so for every x86-64: the loader picks the clone for the chip it runs on
#if defined(__x86_64__) && defined(__GNUC__) && !defined(EF_NO_CLONES)
#define EF_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EF_CLONES
#endif

namespace ef::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Tensor empty_like_dtype(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

// low precision is accumulated, and returned, in float32
inline ScalarType accumulate_type(ScalarType t) { return t == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

inline Tensor dense(const Tensor& x, ScalarType dtype) {
  Tensor y = x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
  return torch::stable::contiguous(y);
}

// out = beta * out + x @ y
inline void addmm_(Tensor& out, const Tensor& x, const Tensor& y, double beta) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), x.get(), y.get(), beta, 1.0));
}

// out = x @ y
inline void mm_out(Tensor& out, const Tensor& x, const Tensor& y) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), x.get(), y.get()));
}

// out = x @ y, batched
inline void bmm_out(Tensor& out, const Tensor& x, const Tensor& y) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_bmm_out(out.get(), x.get(), y.get()));
}

inline Tensor slice(Tensor x, int64_t dim, int64_t start, int64_t stop) {
  return torch::stable::narrow(x, dim, start, stop - start);
}

}  // namespace ef::cpu
