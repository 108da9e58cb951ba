// sqnorm: ||G_i||^2 of per-sample weight gradients, the diagonal of the Gram at its own cost.
//
//   t = 1       ||a_i||^2 ||b_i||^2, one read of the factors                    n(d_in + d_out) elements
//   t small     sum of (A A^T) o (B B^T), t x t tiles reduced in registers      2n t^2 (d_in + d_out) FLOPs
//   otherwise   the gradient, a piece at a time, squared while in L1/L2         2n t d_in d_out FLOPs
//   a table     each row that occurs, its positions added up                    one read of b; nt d FLOPs instead of 2n t^2 d
// Limit: bandwidth for t = 1, else the FMA rate.
#include "kernels.h"
#include "lookup.h"
#include "scratch.h"

namespace ef::cpu {
namespace {

template <class T, class Acc> void rows(const T* a, const T* b, int64_t n, int64_t d_in, int64_t d_out, Acc* out) {
  const auto& k = contract_of<T>();
  torch::stable::parallel_for(0, n, std::max<int64_t>(1, 32768 / (d_in + d_out)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) out[i] = (Acc)(k.square(a + i * d_in, d_in) * k.square(b + i * d_out, d_out));
  });
}

template <class T, class Acc> void positions(const T* a, const T* b, int64_t n, int64_t t, int64_t da, int64_t db, Acc* out) {
  const auto& k = contract_of<T>();
  const int64_t padded = (t + k.width - 1) / k.width * k.width;
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    T* pa = (T*)scratch(Slot::rows, padded * (da + db) * sizeof(T));
    T* pb = pa + padded * da;
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t r = 0; r < padded; r += k.lanes) {
        const int64_t count = std::clamp<int64_t>(t - r, 0, k.lanes), panel = r / k.width * k.width, from = count ? r : 0;
        k.pack(a + (i * t + from) * da, da / k.per, count, da / k.per, pa + panel * da, r % k.width);
        k.pack(b + (i * t + from) * db, db / k.per, count, db / k.per, pb + panel * db, r % k.width);
      }
      Acc sum = 0;
      for (int64_t p = 0; p < t; p += k.width)
        k.pairs(pa, pb, t, 0, t, pa + p * da, pb + p * db, p, t, t, da / k.per, db / k.per, &sum, 1);
      out[i] = sum;
    }
  });
}

}  // namespace

Tensor sqnorm(const Tensor& a_, const Tensor& b_) {
  const ScalarType type = compute_type(a_.scalar_type()), acc = accumulate_type(type);
  auto [a, b, n_, t_, d_in, d_out] = layer("sqnorm", a_, b_, type);
  const int64_t n = n_, t = t_;
  Tensor out = empty_like_dtype(a, {n}, acc);
  if (n == 0 || t == 0 || d_in == 0 || d_out == 0) return torch::stable::zero_(out);
  const bool by_position = t > 1 && t * (d_in + d_out) <= d_in * d_out;
  if (by_position && type == ScalarType::BFloat16) {
    a = whole_pairs(a), b = whole_pairs(b);
    d_in = a.size(a.dim() - 1), d_out = b.size(b.dim() - 1);
  }
  by_type(type, [&](auto zero) {
    using T = decltype(zero);
    using Acc = typename Rows<T>::A;
    if (t == 1) rows<T, Acc>(data<T>(a), data<T>(b), n, d_in, d_out, data<Acc>(out));
    else if (by_position) positions<T, Acc>(data<T>(a), data<T>(b), n, t, d_in, d_out, data<Acc>(out));
    else contract_square<T, Acc>(LinearGradients<T>(data<T>(a), data<T>(b), n, t, d_in, d_out), data<Acc>(out));
  });
  return out;
}

Tensor sqnorm_conv(const Tensor& x_, const Tensor& g_, std::vector<int64_t> kernel, std::vector<int64_t> stride,
                   std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups) {
  const ScalarType type = compute_type(x_.scalar_type()), acc = accumulate_type(type);
  const Tensor x = dense(x_, type), g = dense(g_, type);
  const ConvShape shape = conv_shape(x, g, kernel, stride, padding, dilation, groups);
  Tensor out = empty_like_dtype(x, {shape.n}, acc);
  if (shape.n == 0 || shape.positions() == 0 || shape.c_in == 0 || shape.c_out == 0) return torch::stable::zero_(out);
  by_type(type, [&](auto zero) {
    using T = decltype(zero);
    using Acc = typename Rows<T>::A;
    contract_square<T, Acc>(ConvGradients<T>(data<T>(x), data<T>(g), shape), data<Acc>(out));
  });
  return out;
}

Tensor sqnorm_embedding(const Tensor& ids_, const Tensor& b_, int64_t padding_idx) {
  const ScalarType type = accumulate_type(b_.scalar_type());
  const Tensor ids = dense(ids_, ScalarType::Long), b = dense(b_, type);
  STD_TORCH_CHECK(ids.dim() == 2 && b.dim() == 3 && b.size(0) == ids.size(0) && b.size(1) == ids.size(1),
                  "sqnorm_embedding: ids (n,t), b (n,t,d)");
  const int64_t n = b.size(0), t = b.size(1), d = b.size(2);
  Tensor out = empty_like_dtype(b, {n}, type);
  by_wide_type(type, [&](auto zero) {
    using T = decltype(zero);
    const auto& k = contract_of<T>();
    T* to = data<T>(out);
    torch::stable::parallel_for(0, n, std::max<int64_t>(1, 32768 / (t * d + 1)), [&](int64_t begin, int64_t end) {
      std::vector<T> rows;
      std::vector<int64_t> sample;
      for (int64_t i = begin; i < end; ++i) {
        const std::vector<Entry> all = sorted(data<int64_t>(ids) + i * t, 1, t, padding_idx);
        double sum = 0;
        for (size_t e = 0, stop; e < all.size(); e = stop) {
          stop = end_of_id(all, e);
          const T* row = data<T>(b) + i * t * d;
          if (stop == e + 1) row += all[e].position * d;
          else gather(all, e, stop, row, d, rows, sample), row = rows.data();
          sum += k.square(row, d);
        }
        to[i] = (T)sum;
      }
    });
  });
  return out;
}

}  // namespace ef::cpu
