// step_adamw: AdamW on a projected gradient, with noise, in one pass over all parameters.
//
// Per parameter of float32: theta, m and u read and written, g and k directions read: 4(7 + k) bytes, 2k + 14 FLOPs with a
// square root and a division. Limit: copy bandwidth (with noise as step_update).
#include <cmath>

#include "kernels.h"
#include "step.h"

namespace ef::cpu {
namespace {

template <class A>
void adamw(const std::vector<Block>& work, std::vector<Dense>& params, std::vector<Dense>& first, std::vector<Dense>& second,
           const std::vector<Tensor>& grads, const std::vector<Tensor>& directions, const A* coef, int64_t k, const Adamw& c,
           const Noise& noise) {
  for_stretches<A>(work, 4 + k, noise, [&](const Stretch<A>& s) {
    const int64_t i = s.tensor;
    A *theta = held(params[i].now, s, 0), *m = held(first[i].now, s, 1), *u = held(second[i].now, s, 2);
    const A* g = staged<A>(grads[i], s.begin, s.count, s.room + 3 * kStage);
    step<A>().adamw(s.count, theta, m, u, g, directions_of(directions, params.size(), k, s, 4), coef, k, c, s.xi);
    unstage<A>(theta, params[i].now, s.begin, s.count);
    unstage<A>(m, first[i].now, s.begin, s.count);
    unstage<A>(u, second[i].now, s.begin, s.count);
  });
}

}  // namespace

void step_adamw(std::vector<Tensor> params, std::vector<Tensor> exp_avg, std::vector<Tensor> exp_avg_sq, std::vector<Tensor> grads,
                std::vector<Tensor> directions, const Tensor& coef, const Tensor& step, double lr, double beta1, double beta2,
                double eps, double weight_decay, double noise, int64_t seed, int64_t offset, std::optional<Tensor> counter) {
  const size_t p = params.size();
  const int64_t k = coef.numel();
  check(grads.size() == p && exp_avg.size() == p && exp_avg_sq.size() == p && directions.size() == k * p && step.numel() == 1,
        "step_adamw: params, moments, grads and directions differ in number, or step is not one number");
  check_sizes(params, exp_avg, "params and exp_avg differ in size");
  check_sizes(params, exp_avg_sq, "params and exp_avg_sq differ in size");
  check_sizes(params, grads, "params and grads differ in size");
  check_sizes(params, directions, "a direction differs in size");
  if (p == 0) return;
  std::vector<Dense> theta = dense_all(params), m = dense_all(exp_avg), u = dense_all(exp_avg_sq);
  const std::vector<Tensor> g = contiguous_all(grads), d = contiguous_all(directions);
  const std::vector<Block> work = blocks(params);
  const double t = *data<double>(dense(step, ScalarType::Double));
  const auto left = [t](double beta) { return -std::expm1(t * std::log(beta)); };  // 1 - beta^t
  const Adamw c{lr / left(beta1), 1 / std::sqrt(left(beta2)), beta1, beta2, eps, 1 - lr * weight_decay, noise};
  const Noise draw = noise_of(noise, seed, offset, counter);
  if (any_double(params)) adamw<double>(work, theta, m, u, g, d, data<double>(dense(coef, ScalarType::Double)), k, c, draw);
  else adamw<float>(work, theta, m, u, g, d, data<float>(dense(coef, ScalarType::Float)), k, c, draw);
  for (Dense& x : theta) x.finish();
  for (Dense& x : m) x.finish();
  for (Dense& x : u) x.finish();
}

}  // namespace ef::cpu
