// step_project: the Gram of k directions, momentum and gradient (step_gram), and the k x k solve with its rank rule.
//
// The rule is that of reference/solve.py; the eigenvectors come from cyclic Jacobi rotations in double.
#include <cmath>

#include "kernels.h"
#include "step.h"

namespace ef::cpu {
namespace {

constexpr double kLeast = 1e-60;  // square of a direction, and ridge: reference/solve.py

// a (k, k) symmetric, made diagonal: its eigenvalues; v (k, k): an eigenvector a column
void jacobi(double* a, double* v, int64_t k) {
  double top = 0;
  for (int64_t i = 0; i < k; ++i) {
    top = std::max(top, std::abs(a[i * k + i]));
    for (int64_t j = 0; j < k; ++j) v[i * k + j] = i == j;
  }
  const auto rotate = [k](double* x, int64_t p, int64_t q, int64_t from, double c, double s) {  // x[p], x[q], `from` apart
    for (int64_t i = 0; i < k; ++i) {
      double &y = x[p + i * from], &z = x[q + i * from];
      const double old = y;
      y = c * old - s * z, z = s * old + c * z;
    }
  };
  bool more = true;
  for (int sweep = 0; more && sweep < 30; ++sweep) {
    more = false;
    for (int64_t p = 0; p < k; ++p)
      for (int64_t q = p + 1; q < k; ++q) {
        const double off = a[p * k + q];
        if (!(std::abs(off) > 0x1p-60 * top)) continue;
        more = true;
        const double tau = (a[q * k + q] - a[p * k + p]) / (2 * off);
        const double t = std::copysign(1 / (std::abs(tau) + std::sqrt(1 + tau * tau)), tau);
        const double c = 1 / std::sqrt(1 + t * t), s = t * c;
        rotate(a, p, q, k, c, s);                          // columns
        rotate(a, p * k, q * k, 1, c, s);                  // rows
        a[p * k + q] = a[q * k + p] = 0;
        rotate(v, p, q, k, c, s);
      }
  }
}

}  // namespace

std::tuple<Tensor, Tensor> step_project(std::vector<Tensor> directions, std::vector<Tensor> momentum, std::vector<Tensor> grads,
                                        double beta, double ridge, double rcond) {
  const int64_t p = grads.size();
  check(p > 0 && directions.size() % p == 0 && (momentum.empty() || (int64_t)momentum.size() == p),
        "step_project: directions, momentum and grads differ in number");
  const int64_t k = directions.size() / p, lists = k + (momentum.empty() ? 1 : 2);
  std::vector<Tensor> all = directions;
  all.insert(all.end(), momentum.begin(), momentum.end());
  all.insert(all.end(), grads.begin(), grads.end());
  Tensor gram = step_gram(all, lists), coef = empty_like_dtype(gram, {k}, ScalarType::Double);
  const double* g = data<double>(gram);
  const bool ridged = ridge >= kLeast;
  std::vector<double> a(k * k), v(k * k), unit(k), y(k);
  for (int64_t i = 0; i < k; ++i) {
    const double square = g[i * lists + i];
    unit[i] = !(square > kLeast) ? 0.0 : ridged ? 1.0 : 1 / std::sqrt(square);
  }
  const auto inner = [&](int64_t i) { return (momentum.empty() ? 0.0 : beta * g[i * lists + k]) + g[i * lists + lists - 1]; };
  double zero = 0;  // NaN where anything is not finite
  for (int64_t i = 0; i < k; ++i) {
    zero += 0 * inner(i);
    for (int64_t j = 0; j < k; ++j) zero += 0 * (a[i * k + j] = g[i * lists + j] * unit[i] * unit[j]);
  }
  jacobi(a.data(), v.data(), k);
  double top = 0;
  for (int64_t j = 0; j < k; ++j) top = std::max(top, a[j * k + j]);
  for (int64_t j = 0; j < k; ++j) {
    double sum = 0;
    for (int64_t i = 0; i < k; ++i) sum += v[i * k + j] * (unit[i] * inner(i));
    const double value = a[j * k + j];
    y[j] = ridged ? sum / (std::max(value, 0.0) + ridge) : value > rcond * top ? sum / value : 0.0;
  }
  for (int64_t i = 0; i < k; ++i) {
    double sum = 0;
    for (int64_t j = 0; j < k; ++j) sum += v[i * k + j] * y[j];
    data<double>(coef)[i] = unit[i] * sum + zero;
  }
  return {gram, coef};
}

}  // namespace ef::cpu
