// w2: Wasserstein-2 distances between two sets of losses, with their gradients as per-sample weights.
//
//   sorted   a radix sort of (value, index) and one of values, 8 bits a pass; then one merged pass   ~10 passes over 12 (n + m) bytes
//   moments  sums of both sets, of their squares, then the weights                                   12 n + 8 m bytes
// Limit: bandwidth, of L1 and L2 where the sets fit there. Sums are taken in double, in fixed chunks: no thread count changes them.
#include <cmath>
#include <limits>
#include <type_traits>

#include "common.h"
#include "kernels.h"
#include "scratch.h"

namespace ef::cpu {
namespace {

constexpr int64_t kChunk = 1 << 15;  // elements summed as one
constexpr int64_t kAlone = 1 << 13;  // below, one thread sorts both sets

// floats as integers of the same order; NaN last and 0 before nothing but larger values, as torch.sort has them
uint32_t key_of(float x) {
  const int32_t b = __builtin_bit_cast(int32_t, x + 0.0f);  // -0 is 0
  return x != x ? ~0u : (uint32_t)(b ^ ((b >> 31) | INT32_MIN));
}
uint64_t key_of(double x) {
  const int64_t b = __builtin_bit_cast(int64_t, x + 0.0);
  return x != x ? ~0ull : (uint64_t)(b ^ ((b >> 63) | INT64_MIN));
}
float value_of(uint32_t k) { return __builtin_bit_cast(float, k >> 31 ? k ^ 0x80000000u : ~k); }
double value_of(uint64_t k) { return __builtin_bit_cast(double, k >> 63 ? k ^ 0x8000000000000000ull : ~k); }

template <class T> struct Ranked {  // a value and where it came from
  decltype(key_of(T{})) key;
  uint32_t index;
};
template <class K> K key(K x) requires std::is_integral_v<K> { return x; }
template <class T> auto key(const Ranked<T>& x) { return x.key; }

// stable; of the two buffers the one that holds the result
template <class E> E* radix_sort(E* x, E* other, int64_t n) {
  constexpr int digits = sizeof(key(E{}));
  int64_t counts[digits][256] = {};
  for (int64_t i = 0; i < n; ++i)
    for (int d = 0; d < digits; ++d) ++counts[d][(key(x[i]) >> (8 * d)) & 255];
  for (int d = 0; d < digits; ++d) {
    int64_t* count = counts[d];
    if (count[(key(x[0]) >> (8 * d)) & 255] == n) continue;  // all alike
    for (int64_t b = 0, sum = 0; b < 256; ++b) {
      const int64_t here = count[b];
      count[b] = sum, sum += here;
    }
    for (int64_t i = 0; i < n; ++i) other[count[(key(x[i]) >> (8 * d)) & 255]++] = x[i];
    std::swap(x, other);
  }
  return x;
}

template <class T> Ranked<T>* rank(const T* x, int64_t n) {
  auto* buffer = (Ranked<T>*)scratch(Slot::panels, 2 * n * sizeof(Ranked<T>));
  for (int64_t i = 0; i < n; ++i) buffer[i] = {key_of(x[i]), (uint32_t)i};
  return radix_sort(buffer, buffer + n, n);
}

template <class T> auto* sorted(const T* y, int64_t m) {
  using K = decltype(key_of(T{}));
  K* buffer = (K*)scratch(Slot::other_panels, 2 * m * sizeof(K));
  for (int64_t j = 0; j < m; ++j) buffer[j] = key_of(y[j]);
  return radix_sort(buffer, buffer + m, m);
}

template <class T> double couple(const Ranked<T>* x, int64_t n, const decltype(key_of(T{}))* y, int64_t m, T* weights) {
  double value = 0;
  if (n == m) {
    for (int64_t i = 0; i < n; ++i) {
      const double gap = (double)value_of(x[i].key) - (double)value_of(y[i]);
      value += gap * gap;
      weights[x[i].index] = (T)(2 / (double)n * gap);
    }
    return value / n;
  }
  // both quantile functions are steps; in units of 1/(n m) they jump at integers
  const double unit = 1 / ((double)n * (double)m);
  int64_t at = 0, i = 0, j = 0;
  for (double slope = 0; i < n;) {
    const int64_t next = std::min((i + 1) * m, (j + 1) * n);
    const double mass = (double)(next - at) * unit, gap = (double)value_of(x[i].key) - (double)value_of(y[j]);
    value += mass * gap * gap;
    slope += 2 * mass * gap;
    at = next;
    j += next == (j + 1) * n;
    if (next == (i + 1) * m) weights[x[i++].index] = (T)slope, slope = 0;
  }
  return value;
}

// sum of f(element) over a set
template <class T, class F> double total(const T* x, int64_t n, F f) {
  std::vector<double> part((n + kChunk - 1) / kChunk);
  torch::stable::parallel_for(0, (int64_t)part.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const int64_t stop = std::min(n, (c + 1) * kChunk);
      double sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = c * kChunk; i < stop; ++i) sum += f((double)x[i]);
      part[c] = sum;
    }
  });
  double sum = 0;
  for (double p : part) sum += p;
  return sum;
}

template <class T> double moments(const T* x, int64_t n, const T* y, int64_t m, T* weights) {
  const auto centre = [](const T* z, int64_t count) {  // from the first on: exact where all are equal
    const double first = z[0];
    return first + total(z, count, [first](double v) { return v - first; }) / count;
  };
  const auto deviation = [](const T* z, int64_t count, double mean) {
    return std::sqrt(total(z, count, [mean](double v) { return (v - mean) * (v - mean); }) / count);
  };
  const double mean = centre(x, n), other = centre(y, m), sigma = deviation(x, n, mean), shift = mean - other;
  const double stretch = sigma - deviation(y, m, other);
  const double by = sigma > 0 ? stretch / sigma : sigma * 0;  // NaN stays
  torch::stable::parallel_for(0, n, kChunk, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) weights[i] = (T)(2 / (double)n * (shift + by * ((double)x[i] - mean)));
  });
  return shift * shift + stretch * stretch;
}

template <class F> std::tuple<Tensor, Tensor> distance(const Tensor& losses, const Tensor& reference, F of) {
  STD_TORCH_CHECK(losses.dim() == 1 && reference.dim() == 1 && losses.size(0) > 0 && reference.size(0) > 0,
                  "w2: losses and reference are (n,) and (m,), n and m at least 1");
  const ScalarType type = accumulate_type(losses.scalar_type());
  const Tensor x = dense(losses, type), y = dense(reference, type);
  Tensor value = empty_like_dtype(x, {}, type), weights = empty_like_dtype(x, {x.size(0)}, type);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    *data<T>(value) = (T)of(data<T>(x), x.size(0), data<T>(y), y.size(0), data<T>(weights));
  };
  by_wide_type(type, run);
  return {value, weights};
}

}  // namespace

std::tuple<Tensor, Tensor> w2_sorted(const Tensor& losses, const Tensor& reference) {
  STD_TORCH_CHECK(losses.dim() != 1 || losses.size(0) <= std::numeric_limits<uint32_t>::max(), "w2_sorted: at most 2^32 - 1 losses");
  return distance(losses, reference, [](auto* x, int64_t n, auto* y, int64_t m, auto* weights) {
    decltype(rank(x, n)) left = nullptr;
    decltype(sorted(y, m)) right = nullptr;
    torch::stable::parallel_for(0, 2, n + m < kAlone ? 2 : 1, [&](int64_t begin, int64_t end) {
      if (begin == 0) left = rank(x, n);
      if (end == 2) right = sorted(y, m);
    });
    return couple(left, n, right, m, weights);
  });
}

std::tuple<Tensor, Tensor> w2_moments(const Tensor& losses, const Tensor& reference) {
  return distance(losses, reference, [](auto* x, int64_t n, auto* y, int64_t m, auto* weights) { return moments(x, n, y, m, weights); });
}

}  // namespace ef::cpu
