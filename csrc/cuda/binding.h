// What the bindings of the CUDA kernels share: tensors to pointers, the current stream, errors as exceptions.
//
// Compiled with EF_CUDA_HOST (tests/cuda_host) the same bindings serve CPU tensors through the kernels on the host, and
// every tensor handed over is registered for the bounds checks of span.h.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "launchers.h"

#ifdef EF_CUDA_HOST
#include "span.h"
#else
#include <dlfcn.h>
#endif

namespace ef::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#ifndef EF_CUDA_HOST
// Of libtorch_cuda, or null. Asked of the library itself: linked weakly it stays null on every torch, since libtorch_cuda is
// in no scope of this library's (linkers drop libtorch.so, of which nothing is used) nor in the global one.
inline auto current_stream() {
  using Function = AOTITorchError(int32_t device_index, void** stream);
  static Function* const function = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);  // by its name in the file that torch has loaded
    return torch_cuda ? (Function*)dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream") : nullptr;
  }();
  return function;
}
#endif

// The device of `x` made current, and its stream, for the life of one call.
class Call {
 public:
#ifdef EF_CUDA_HOST
  Call(const char* op, const Tensor&) : op_(op) { span_clear(); }
#else
  Call(const char* op, const Tensor& x) : op_(op), guard_(x.get_device_index()) {
    STD_TORCH_CHECK(current_stream(), op, ": this torch was built without CUDA");
    TORCH_ERROR_CODE_CHECK(current_stream()(x.get_device_index(), &stream));
  }
#endif
  // of a launcher's result
  void operator()(int code) const {
    STD_TORCH_CHECK(code == 0, op_, ": CUDA error ", code, ", ", ef_cuda_error(code));
  }
  void require(bool ok, const char* what) const { STD_TORCH_CHECK(ok, op_, ": ", what); }

  void* stream = nullptr;

 private:
  const char* op_;
#ifndef EF_CUDA_HOST
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

inline int type_of(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return kFloat;
    case ScalarType::Double: return kDouble;
    case ScalarType::BFloat16: return kBf16;
    case ScalarType::Half: return kHalf;
    default: return -1;
  }
}
inline int type_of(const Tensor& x) { return type_of(x.scalar_type()); }

inline ScalarType accumulate_type(ScalarType t) { return t == ScalarType::Double ? t : ScalarType::Float; }

template <class T = void> T* data(const Tensor& x) {
#ifdef EF_CUDA_HOST
  int64_t last = 0;
  for (int64_t d = 0; d < x.dim(); ++d) last += (x.size(d) - 1) * x.stride(d);
  if (x.numel()) span_allow(x.data_ptr(), (last + 1) * x.element_size());
#endif
  return (T*)x.data_ptr();
}

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

inline Tensor dense(const Tensor& x, ScalarType dtype) {
  return torch::stable::contiguous(x.scalar_type() == dtype ? x : torch::stable::to(x, dtype));
}

// ---- bind_gram.cpp -------------------------------------------------------------------------------------------------

Tensor gram(const Tensor& a, const Tensor& b, std::optional<Tensor> a2, std::optional<Tensor> b2, std::string route);
Tensor project_random(const Tensor& a, const Tensor& b, int64_t k, int64_t seed, int64_t offset, std::string kind);

// ---- bind_step.cpp -------------------------------------------------------------------------------------------------

Tensor step_gram(std::vector<Tensor> tensors, int64_t k);
void step_update(std::vector<Tensor> params, std::vector<Tensor> momentum, std::vector<Tensor> grads,
                 std::vector<Tensor> directions, const Tensor& coef, double lr, double beta, double weight_decay, double noise,
                 int64_t seed, int64_t offset, std::optional<Tensor> counter);
std::tuple<Tensor, Tensor> step_project(std::vector<Tensor> directions, std::vector<Tensor> momentum, std::vector<Tensor> grads,
                                        double beta, double ridge, double rcond);
void step_adamw(std::vector<Tensor> params, std::vector<Tensor> exp_avg, std::vector<Tensor> exp_avg_sq, std::vector<Tensor> grads,
                std::vector<Tensor> directions, const Tensor& coef, const Tensor& step, double lr, double beta1, double beta2,
                double eps, double weight_decay, double noise, int64_t seed, int64_t offset, std::optional<Tensor> counter);

// ---- bind_lookahead.cpp --------------------------------------------------------------------------------------------

std::tuple<std::vector<Tensor>, Tensor, Tensor> step_lookahead(std::vector<Tensor> params, std::vector<Tensor> grads, double alpha,
                                                               std::optional<int64_t> capacity);
void step_lookahead_undo(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> ulps, const Tensor& index,
                         const Tensor& value, double alpha);

}  // namespace ef::cuda
