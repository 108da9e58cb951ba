// The CPU kernels that library.cpp registers; each stands in cpu/<op>.cpp. Arguments as in schema.inc.
#pragma once

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/tensor.h>

namespace ef::cpu {

using torch::stable::Tensor;

Tensor gram(const Tensor& a, const Tensor& b, std::optional<Tensor> a2, std::optional<Tensor> b2, std::string route);

Tensor gram_layers(std::vector<Tensor> a, std::vector<Tensor> b, std::vector<Tensor> a2, std::vector<Tensor> b2);

Tensor gram_conv(const Tensor& x, const Tensor& g, std::vector<int64_t> kernel, std::vector<int64_t> stride,
                 std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups, std::optional<Tensor> x2,
                 std::optional<Tensor> g2, std::string route);

Tensor gram_embedding(const Tensor& ids, const Tensor& b, std::optional<Tensor> ids2, std::optional<Tensor> b2,
                      int64_t padding_idx);

Tensor sqnorm(const Tensor& a, const Tensor& b);
Tensor sqnorm_conv(const Tensor& x, const Tensor& g, std::vector<int64_t> kernel, std::vector<int64_t> stride,
                   std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups);

Tensor project(const Tensor& a, const Tensor& b, const Tensor& basis);
Tensor project_random(const Tensor& a, const Tensor& b, int64_t k, int64_t seed, int64_t offset, std::string kind);

Tensor step_gram(std::vector<Tensor> tensors, int64_t k);
void step_update(std::vector<Tensor> params, std::vector<Tensor> momentum, std::vector<Tensor> grads,
                 std::vector<Tensor> directions, const Tensor& coef, double lr, double beta, double weight_decay, double noise,
                 int64_t seed, int64_t offset, std::optional<Tensor> counter);
std::tuple<Tensor, Tensor> step_project(std::vector<Tensor> directions, std::vector<Tensor> momentum, std::vector<Tensor> grads,
                                        double beta, double ridge, double rcond);
void step_adamw(std::vector<Tensor> params, std::vector<Tensor> exp_avg, std::vector<Tensor> exp_avg_sq, std::vector<Tensor> grads,
                std::vector<Tensor> directions, const Tensor& coef, const Tensor& step, double lr, double beta1, double beta2,
                double eps, double weight_decay, double noise, int64_t seed, int64_t offset, std::optional<Tensor> counter);
std::tuple<std::vector<Tensor>, Tensor, Tensor> step_lookahead(std::vector<Tensor> params, std::vector<Tensor> grads, double alpha,
                                                               std::optional<int64_t> capacity);
void step_lookahead_undo(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> ulps, const Tensor& index,
                         const Tensor& value, double alpha);

std::tuple<Tensor, Tensor, Tensor> sample_loss(
    const Tensor& logits, const Tensor& target, double clip, double penalty, int64_t ignore_index,
    double label_smoothing, std::string reduction);

Tensor sample_loss_backward(
    const Tensor& grad, const Tensor& logits, const Tensor& target, const Tensor& ce, const Tensor& lse, double clip,
    double penalty, int64_t ignore_index, double label_smoothing, std::string reduction);

std::tuple<Tensor, Tensor> w2_sorted(const Tensor& losses, const Tensor& reference);
std::tuple<Tensor, Tensor> w2_moments(const Tensor& losses, const Tensor& reference);

}  // namespace ef::cpu
