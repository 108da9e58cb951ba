// sample_loss: per-sample cross-entropy, never reduced over samples, and its backward with per-sample weights.
//
// Forward: one read of the logits for the maximum, one (from cache) for the sum of exponentials.
// Backward: one read of the logits, one write of their gradient: softmax, target, smoothing, clip and penalty fused.
// lse (2, n[, t]) keeps each row's maximum and the log of its sum of exp(x - maximum) apart: their sum in float32 would round a
// softmax by 2^-24 of the maximum.
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "common.h"
#include "kernels.h"

namespace ef::cpu {
namespace {

constexpr double kPenaltyEps = 1e-3;

struct Shape {
  int64_t n, t, classes;
};

Shape check(const Tensor& logits, const Tensor& target) {
  STD_TORCH_CHECK(logits.dim() == target.dim() + 1 && (target.dim() == 1 || target.dim() == 2),
                  "sample_loss: logits (n,C) with target (n,), or (n,t,C) with (n,t)");
  for (int64_t d = 0; d < target.dim(); ++d)
    STD_TORCH_CHECK(logits.size(d) == target.size(d), "sample_loss: logits and target differ in dimension ", d);
  STD_TORCH_CHECK(target.scalar_type() == ScalarType::Long, "sample_loss: target must be int64");
  return {logits.size(0), target.dim() == 2 ? target.size(1) : 1, logits.size(logits.dim() - 1)};
}

template <class T> const Elements<T>& elements();
template <> const Elements<float>& elements() { return loops().f32; }
template <> const Elements<double>& elements() { return loops().f64; }
template <> const Elements<uint16_t>& elements() { return loops().bf16; }

inline float widen(uint16_t x) {
  const uint32_t bits = (uint32_t)x << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline float widen(float x) { return x; }
inline double widen(double x) { return x; }

void check_labels(bool bad, int64_t classes, int64_t ignore) {
  if (bad)  // the caller's mistake: without the place in our source that STD_TORCH_CHECK would name
    throw std::runtime_error("sample_loss: target holds a label outside [0, " + std::to_string(classes) +
                             ") that is not ignore_index " + std::to_string(ignore));
}

template <class T>
void forward(const Tensor& logits, const Tensor& target, const Shape& s, int64_t ignore, double smoothing, bool mean,
             double penalty, Tensor& loss, Tensor& ce, Tensor& lse) {
  using A = typename Rows<T>::A;
  const Elements<T>& loop = elements<T>();
  const T* x = data<T>(logits);
  const int64_t* y = target.const_data_ptr<int64_t>();
  A *l = loss.mutable_data_ptr<A>(), *e = ce.mutable_data_ptr<A>(), *top = lse.mutable_data_ptr<A>(), *rest = top + s.n * s.t;
  std::atomic<bool> bad{false};
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, s.t * s.classes));
  torch::stable::parallel_for(0, s.n, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      double total = 0;  // of many positions: float would add up their roundings
      int64_t kept = 0;
      for (int64_t p = i * s.t; p < (i + 1) * s.t; ++p) {
        const T* row = x + p * s.classes;
        A hi, sum, below;
        loop.row_sums(row, s.classes, &hi, &sum, &below);
        const A mass = std::log(sum);
        top[p] = hi, rest[p] = mass;
        if (y[p] == ignore) continue;
        if (y[p] < 0 || y[p] >= s.classes) { bad = true; continue; }
        ++kept;
        // differences with the maximum, not with the log-sum-exp: exact where logits are large and the loss is small
        total += mass + (A)(1 - smoothing) * (hi - (A)widen(row[y[p]])) - (smoothing ? (A)smoothing * below / (A)s.classes : (A)0);
      }
      e[i] = (A)(mean && kept ? total / (double)kept : total);
      l[i] = penalty ? e[i] - (A)penalty / (e[i] + (A)kPenaltyEps) : e[i];
    }
  });
  check_labels(bad, s.classes, ignore);
}

template <class T>
void backward(const Tensor& grad, const Tensor& logits, const Tensor& target, const Tensor& ce, const Tensor& lse,
              const Shape& s, double clip, double penalty, int64_t ignore, double smoothing, bool mean, Tensor& out) {
  using A = typename Rows<T>::A;
  const Elements<T>& loop = elements<T>();
  const T* x = data<T>(logits);
  const int64_t* y = target.const_data_ptr<int64_t>();
  const A *w = grad.const_data_ptr<A>(), *e = ce.const_data_ptr<A>();
  const A *top = lse.const_data_ptr<A>(), *rest = top + s.n * s.t;
  const bool clips = clip < std::numeric_limits<double>::infinity();
  T* d = data<T>(out);
  std::atomic<bool> bad{false};
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, s.t * s.classes));
  torch::stable::parallel_for(0, s.n, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t lo = i * s.t, hi = lo + s.t;
      A scale = !clips || e[i] < (A)clip ? w[i] : (A)0;
      if (penalty) scale *= 1 + (A)penalty / ((e[i] + (A)kPenaltyEps) * (e[i] + (A)kPenaltyEps));
      if (mean && s.t > 1) {
        int64_t kept = 0;
        for (int64_t p = lo; p < hi; ++p) kept += y[p] != ignore;
        scale /= (A)std::max<int64_t>(1, kept);
      }
      for (int64_t p = lo; p < hi; ++p) {
        T* row = d + p * s.classes;
        if (y[p] == ignore || (scale == (A)0 && std::isfinite(top[p] + rest[p]))) {  // a loss that is not finite keeps its NaN
          std::fill(row, row + s.classes, T(0));  // all-zero bits are zero in every type
          continue;
        }
        if (y[p] < 0 || y[p] >= s.classes) { bad = true; continue; }
        const A f = scale;
        const A shift = (A)(smoothing * f / s.classes);
        loop.row_softmax(x + p * s.classes, row, s.classes, top[p], rest[p], f, shift);
        // the target's entry is recomputed, not read back, so that it is rounded once
        loop.row_softmax(x + p * s.classes + y[p], row + y[p], 1, top[p], rest[p], f, shift + (A)(1 - smoothing) * f);
      }
    }
  });
  check_labels(bad, s.classes, ignore);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> sample_loss(
    const Tensor& logits, const Tensor& target, double, double penalty, int64_t ignore_index, double label_smoothing,
    std::string reduction) {
  const Shape s = check(logits, target);
  const ScalarType type = element_type(logits.scalar_type()), acc = accumulate_type(type);
  Tensor x = dense(logits, type), y = torch::stable::contiguous(target);
  Tensor loss = empty_like_dtype(x, {s.n}, acc), ce = empty_like_dtype(x, {s.n}, acc);
  Tensor lse = target.dim() == 2 ? empty_like_dtype(x, {2, s.n, s.t}, acc) : empty_like_dtype(x, {2, s.n}, acc);
  const bool mean = reduction == "mean";
  STD_TORCH_CHECK(s.n == 0 || s.t == 0 || s.classes > 0, "sample_loss: no classes");
  by_type(type, [&](auto zero) {
    forward<decltype(zero)>(x, y, s, ignore_index, label_smoothing, mean, penalty, loss, ce, lse);
  });
  return {loss, ce, lse};
}

Tensor sample_loss_backward(
    const Tensor& grad, const Tensor& logits, const Tensor& target, const Tensor& ce, const Tensor& lse, double clip,
    double penalty, int64_t ignore_index, double label_smoothing, std::string reduction) {
  const Shape s = check(logits, target);
  const ScalarType type = element_type(logits.scalar_type()), acc = accumulate_type(type);
  Tensor x = dense(logits, type), y = torch::stable::contiguous(target);
  Tensor w = dense(grad, acc), e = dense(ce, acc), z = dense(lse, acc);
  Tensor out = torch::stable::empty_like(x);
  const bool mean = reduction == "mean";
  STD_TORCH_CHECK(w.numel() == s.n && e.numel() == s.n && z.numel() == 2 * s.n * s.t,
                  "sample_loss: grad, ce or lse does not go with target");
  by_type(type, [&](auto zero) {
    backward<decltype(zero)>(w, x, y, e, z, s, clip, penalty, ignore_index, label_smoothing, mean, out);
  });
  return dense(out, logits.scalar_type());
}

}  // namespace ef::cpu
