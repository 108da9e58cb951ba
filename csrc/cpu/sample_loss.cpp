// sample_loss: per-sample cross-entropy, never reduced over samples, and its backward with per-sample weights.
//
// Forward: one read of the logits for the maximum, one (from cache) for the sum of exponentials.
// Backward: one read of the logits, one write of their gradient: softmax, target, smoothing, clip and penalty fused.
#include <atomic>
#include <cmath>
#include <limits>

#include "common.h"
#include "kernels.h"

namespace ef::cpu {
namespace {

using torch::headeronly::BFloat16;

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

// exp in single precision, |relative error| < 2e-7: 2^k times a degree-6 polynomial on [-ln2/2, ln2/2]
inline float fast_exp(float x) {
  x = x < -87.0f ? -87.0f : x;
  const float k = std::nearbyint(x * 1.44269504088896341f);
  const float r = std::fma(k, 1.42860677e-6f, std::fma(k, -0.693145751953125f, x));
  float p = 1.3981999e-3f;
  p = std::fma(p, r, 8.3334519e-3f);
  p = std::fma(p, r, 4.1665795e-2f);
  p = std::fma(p, r, 1.6666665e-1f);
  p = std::fma(p, r, 0.5f);
  p = std::fma(p, r, 1.0f);
  p = std::fma(p, r, 1.0f);
  union { int32_t i; float f; } two_k{((int32_t)k + 127) << 23};
  return p * two_k.f;
}
inline double fast_exp(double x) { return std::exp(x); }

template <class T> struct Acc { using type = float; };
template <> struct Acc<double> { using type = double; };

// max, sum of exp(x - max), and plain sum of one row
template <class T, class A>
EF_CLONES void row_sums(const T* x, int64_t classes, A* top, A* total, A* plain) {
  A hi = -std::numeric_limits<A>::infinity();
#pragma omp simd reduction(max : hi)
  for (int64_t c = 0; c < classes; ++c) hi = std::max(hi, (A)x[c]);
  A sum = 0, all = 0;
#pragma omp simd reduction(+ : sum, all)
  for (int64_t c = 0; c < classes; ++c) {
    sum += fast_exp((A)x[c] - hi);
    all += (A)x[c];
  }
  *top = hi, *total = sum, *plain = all;
}

template <class T, class A>
EF_CLONES void row_softmax(const T* x, T* out, int64_t classes, A lse, A scale, A shift) {
#pragma omp simd
  for (int64_t c = 0; c < classes; ++c) out[c] = (T)(scale * fast_exp((A)x[c] - lse) - shift);
}

template <class T>
void forward(const Tensor& logits, const Tensor& target, const Shape& s, int64_t ignore, double smoothing, bool mean,
             double penalty, Tensor& loss, Tensor& ce, Tensor& lse) {
  using A = typename Acc<T>::type;
  const T* x = logits.const_data_ptr<T>();
  const int64_t* y = target.const_data_ptr<int64_t>();
  A *l = loss.mutable_data_ptr<A>(), *e = ce.mutable_data_ptr<A>(), *z = lse.mutable_data_ptr<A>();
  std::atomic<bool> bad{false};
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, s.t * s.classes));
  torch::stable::parallel_for(0, s.n, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      A total = 0;
      int64_t kept = 0;
      for (int64_t p = i * s.t; p < (i + 1) * s.t; ++p) {
        const T* row = x + p * s.classes;
        A hi, sum, all;
        row_sums(row, s.classes, &hi, &sum, &all);
        z[p] = hi + std::log(sum);
        if (y[p] == ignore) continue;
        if (y[p] < 0 || y[p] >= s.classes) { bad = true; continue; }
        ++kept;
        total += z[p] - (A)(1 - smoothing) * (A)row[y[p]] - (smoothing ? (A)smoothing * all / (A)s.classes : (A)0);
      }
      e[i] = mean && kept ? total / (A)kept : total;
      l[i] = penalty ? e[i] - (A)penalty / (e[i] + (A)kPenaltyEps) : e[i];
    }
  });
  STD_TORCH_CHECK(!bad, "sample_loss: target holds a label outside [0, ", s.classes, ") that is not ignore_index ", ignore);
}

template <class T>
void backward(const Tensor& grad, const Tensor& logits, const Tensor& target, const Tensor& ce, const Tensor& lse,
              const Shape& s, double clip, double penalty, int64_t ignore, double smoothing, bool mean, Tensor& out) {
  using A = typename Acc<T>::type;
  const T* x = logits.const_data_ptr<T>();
  const int64_t* y = target.const_data_ptr<int64_t>();
  const A *w = grad.const_data_ptr<A>(), *e = ce.const_data_ptr<A>(), *z = lse.const_data_ptr<A>();
  T* d = out.mutable_data_ptr<T>();
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, s.t * s.classes));
  torch::stable::parallel_for(0, s.n, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t lo = i * s.t, hi = lo + s.t;
      A scale = e[i] < (A)clip ? w[i] : (A)0;
      if (penalty) scale *= 1 + (A)penalty / ((e[i] + (A)kPenaltyEps) * (e[i] + (A)kPenaltyEps));
      if (mean && s.t > 1) {
        int64_t kept = 0;
        for (int64_t p = lo; p < hi; ++p) kept += y[p] != ignore;
        scale /= (A)std::max<int64_t>(1, kept);
      }
      for (int64_t p = lo; p < hi; ++p) {
        const A f = y[p] == ignore ? (A)0 : scale;
        T* row = d + p * s.classes;
        if (f == (A)0) {
          std::fill(row, row + s.classes, (T)0);
          continue;
        }
        row_softmax(x + p * s.classes, row, s.classes, z[p], f, (A)(smoothing * f / s.classes));
        // the target's entry is recomputed, not read back, so that it is rounded once
        const A soft = f * fast_exp((A)x[p * s.classes + y[p]] - z[p]);
        row[y[p]] = (T)(soft - (A)(smoothing / s.classes) * f - (A)(1 - smoothing) * f);
      }
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> sample_loss(
    const Tensor& logits, const Tensor& target, double, double penalty, int64_t ignore_index, double label_smoothing,
    std::string reduction) {
  const Shape s = check(logits, target);
  const ScalarType acc = accumulate_type(logits.scalar_type());
  Tensor x = torch::stable::contiguous(logits), y = torch::stable::contiguous(target);
  Tensor loss = empty_like_dtype(x, {s.n}, acc), ce = empty_like_dtype(x, {s.n}, acc);
  Tensor lse = target.dim() == 2 ? empty_like_dtype(x, {s.n, s.t}, acc) : empty_like_dtype(x, {s.n}, acc);
  const bool mean = reduction == "mean";
  auto run = [&](auto zero) {
    forward<decltype(zero)>(x, y, s, ignore_index, label_smoothing, mean, penalty, loss, ce, lse);
  };
  if (logits.scalar_type() == ScalarType::Double) run(double{});
  else if (logits.scalar_type() == ScalarType::BFloat16) run(BFloat16{});
  else run(float{});
  return {loss, ce, lse};
}

Tensor sample_loss_backward(
    const Tensor& grad, const Tensor& logits, const Tensor& target, const Tensor& ce, const Tensor& lse, double clip,
    double penalty, int64_t ignore_index, double label_smoothing, std::string reduction) {
  const Shape s = check(logits, target);
  const ScalarType acc = accumulate_type(logits.scalar_type());
  Tensor x = torch::stable::contiguous(logits), y = torch::stable::contiguous(target);
  Tensor w = dense(grad, acc), e = dense(ce, acc), z = dense(lse, acc);
  Tensor out = torch::stable::empty_like(x);
  const bool mean = reduction == "mean";
  auto run = [&](auto zero) {
    backward<decltype(zero)>(w, x, y, e, z, s, clip, penalty, ignore_index, label_smoothing, mean, out);
  };
  if (logits.scalar_type() == ScalarType::Double) run(double{});
  else if (logits.scalar_type() == ScalarType::BFloat16) run(BFloat16{});
  else run(float{});
  return out;
}

}  // namespace ef::cpu
