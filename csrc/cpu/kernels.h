// The CPU kernels that library.cpp registers; each stands in cpu/<op>.cpp. Arguments as in schema.inc.
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include <torch/csrc/stable/tensor.h>

namespace ef::cpu {

using torch::stable::Tensor;

Tensor gram(const Tensor& a, const Tensor& b, std::optional<Tensor> a2, std::optional<Tensor> b2, std::string route);

std::tuple<Tensor, Tensor, Tensor> sample_loss(
    const Tensor& logits, const Tensor& target, double clip, double penalty, int64_t ignore_index,
    double label_smoothing, std::string reduction);

Tensor sample_loss_backward(
    const Tensor& grad, const Tensor& logits, const Tensor& target, const Tensor& ce, const Tensor& lse, double clip,
    double penalty, int64_t ignore_index, double label_smoothing, std::string reduction);

}  // namespace ef::cpu
