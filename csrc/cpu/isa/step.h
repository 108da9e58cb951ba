// The inner loops of step_update and step_adamw: one table per ISA. All arrays of the compute type A.
#pragma once

#include <stdint.h>

namespace ef::cpu {

struct Update {
  double lr, beta, keep, noise;  // keep = 1 - lr * weight_decay
};

struct Adamw {
  double size, root, beta1, beta2, eps, keep, noise;  // size = lr / (1 - beta1^t), root = 1 / sqrt(1 - beta2^t)
};

template <class A> struct Step {
  // v = beta v + g - sum_j coef_j d_j;  theta = keep theta - lr v + noise xi;  v and xi may be null
  void (*update)(int64_t count, A* theta, A* v, const A* g, const A* const* d, const A* coef, int64_t k, const Update&,
                 const float* xi);
  // w = g - sum_j coef_j d_j;  m, u: their running means and squares;  theta = keep theta - size m / (sqrt(u) root + eps) + noise xi
  void (*adamw)(int64_t count, A* theta, A* m, A* u, const A* g, const A* const* d, const A* coef, int64_t k, const Adamw&,
                const float* xi);
};

struct Steps {
  Step<float> f32;
  Step<double> f64;
};

}  // namespace ef::cpu
