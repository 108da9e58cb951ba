// The CPU kernels that library.cpp registers; each stands in cpu/<op>.cpp.
#pragma once

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/tensor.h>

namespace ef::cpu {

using torch::stable::Tensor;

#include "../operations.inc"

}  // namespace ef::cpu
