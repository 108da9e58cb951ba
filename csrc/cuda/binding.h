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

#include "../operations.inc"

}  // namespace ef::cuda
