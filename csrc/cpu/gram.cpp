// gram: K_ij = <G_i, G'_j> of per-sample weight gradients, from the layer factors.
//
//   rows, pairs  products of positions, reduced in registers          2nm·ts(d_in + d_out) FLOPs
//   tiles        gradients formed piece by piece, packed, multiplied  2(n·t + m·s)d_in·d_out + 2nm·d_in·d_out
// gram_layers adds the rows of many layers into one result: zeroed once, mirrored once.
// The symmetric case does half of the (n,m) work. Bytes: each factor once or a few times; panels stay in cache.
// Limit: the FMA rate. bfloat16: vdpbf16ps, accumulated in float; a tile's gradients are rounded to bfloat16 as
// a layer's weight gradient would be. Reached, of the measured GEMM rate: bench/results.
#include "factors.h"
#include "kernels.h"

namespace ef::cpu {
namespace {

template <class T, class Acc> void mirror(Acc* k, int64_t n) {
  constexpr int64_t B = 16;
  torch::stable::parallel_for(0, (n + B - 1) / B, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i0 = begin * B; i0 < std::min(end * B, n); i0 += B)
      for (int64_t j0 = i0; j0 < n; j0 += B)
        for (int64_t i = i0; i < std::min(i0 + B, n); ++i)
          for (int64_t j = std::max(j0, i + 1); j < std::min(j0 + B, n); ++j) k[i * n + j] = k[j * n + i];
  });
}

Layer factors(const Tensor& a, const Tensor& b, ScalarType dtype, bool pairs) {
  Layer x = layer("gram", a, b, dtype);
  if (!pairs || dtype != ScalarType::BFloat16) return x;
  x.a = whole_pairs(x.a), x.b = whole_pairs(x.b);
  x.d_in = x.a.size(x.a.dim() - 1), x.d_out = x.b.size(x.b.dim() - 1);
  return x;
}

template <class T, class Acc> void run(const Layer& x, const Layer* y, const std::string& route, Acc* out) {
  const T *xa = data<T>(x.a), *xb = data<T>(x.b), *ya = y ? data<T>(y->a) : nullptr, *yb = y ? data<T>(y->b) : nullptr;
  if (route == "tiles") {
    const LinearGradients<T> left(xa, xb, x.n, x.t, x.d_in, x.d_out);
    if (!y) return contract_tiles<T, Acc>(left, nullptr, out);
    const LinearGradients<T> right(ya, yb, y->n, y->t, y->d_in, y->d_out);
    contract_tiles<T, Acc>(left, &right, out);
  } else {
    const LinearPositions<T> left(xa, xb, x.n, x.t, x.d_in, x.d_out);
    if (!y) return contract_pairs<T, Acc>(left, nullptr, out);
    const LinearPositions<T> right(ya, yb, y->n, y->t, y->d_in, y->d_out);
    contract_pairs<T, Acc>(left, &right, out);
  }
}

template <class T, class Acc>
void run_conv(const Tensor& x, const Tensor& g, const ConvShape& shape, const Tensor* x2, const Tensor* g2,
              const ConvShape& shape2, const std::string& route, Acc* out) {
  if (route == "tiles") {
    const ConvGradients<T> left(data<T>(x), data<T>(g), shape);
    if (!x2) return contract_tiles<T, Acc>(left, nullptr, out);
    const ConvGradients<T> right(data<T>(*x2), data<T>(*g2), shape2);
    return contract_tiles<T, Acc>(left, &right, out);
  }
  for (int64_t group = 0; group < shape.groups; ++group) {
    const ConvPositions<T> left(data<T>(x), data<T>(g), shape, group);
    if (x2) {
      const ConvPositions<T> right(data<T>(*x2), data<T>(*g2), shape2, group);
      contract_pairs<T, Acc>(left, &right, out);
    } else {
      contract_pairs<T, Acc>(left, nullptr, out);
    }
  }
}

}  // namespace

Tensor gram(const Tensor& a, const Tensor& b, std::optional<Tensor> a2, std::optional<Tensor> b2, std::string route) {
  STD_TORCH_CHECK(route == "rows" || route == "pairs" || route == "tiles", "gram: route is rows, pairs or tiles");
  STD_TORCH_CHECK(a2.has_value() == b2.has_value(), "gram: a2 and b2 are both given, or none");
  const bool symmetric = !a2.has_value(), pairs = route != "tiles";
  const ScalarType type = compute_type(a.scalar_type()), acc = accumulate_type(type);
  const Layer x = factors(a, b, type, pairs);
  std::optional<Layer> y;
  if (!symmetric) y = factors(*a2, *b2, type, pairs);
  STD_TORCH_CHECK(symmetric || (x.d_in == y->d_in && x.d_out == y->d_out), "gram: the two sides differ in d_in or d_out");
  STD_TORCH_CHECK(route != "rows" || (x.t == 1 && (symmetric || y->t == 1)), "gram: route rows needs t = 1");
  const int64_t m = symmetric ? x.n : y->n;
  Tensor out = empty_like_dtype(x.a, {x.n, m}, acc);
  torch::stable::zero_(out);
  if (x.n == 0 || m == 0 || x.t == 0 || (y && y->t == 0) || x.d_in == 0 || x.d_out == 0) return out;
  by_type(type, [&](auto zero) {
    using T = decltype(zero);
    using Acc = typename Rows<T>::A;
    run<T, Acc>(x, y ? &*y : nullptr, route, data<Acc>(out));
    if (symmetric) mirror<T, Acc>(data<Acc>(out), x.n);
  });
  return out;
}

Tensor gram_layers(std::vector<Tensor> a, std::vector<Tensor> b, std::vector<Tensor> a2, std::vector<Tensor> b2) {
  const size_t layers = a.size();
  const bool symmetric = a2.empty();
  STD_TORCH_CHECK(layers > 0 && b.size() == layers, "gram_layers: needs one a and one b a layer, and a layer");
  STD_TORCH_CHECK(a2.size() == b2.size() && (symmetric || a2.size() == layers), "gram_layers: a2 and b2 hold every layer, or none");
  const ScalarType type = compute_type(a[0].scalar_type()), acc = accumulate_type(type);
  const int64_t n = a[0].size(0), m = symmetric ? n : a2[0].size(0);
  Tensor out = empty_like_dtype(a[0], {n, m}, acc);
  torch::stable::zero_(out);
  by_type(type, [&](auto zero) {
    using T = decltype(zero);
    using Acc = typename Rows<T>::A;
    for (size_t l = 0; l < layers; ++l) {
      const Layer x = factors(a[l], b[l], type, true);
      std::optional<Layer> y;
      if (!symmetric) y = factors(a2[l], b2[l], type, true);
      STD_TORCH_CHECK(x.a.dim() == 2 && x.n == n && (symmetric || (y->a.dim() == 2 && y->n == m)),
                      "gram_layers: layer ", l, " is not (n,d) with the n of the first");
      STD_TORCH_CHECK(symmetric || (x.d_in == y->d_in && x.d_out == y->d_out), "gram_layers: the two sides of layer ", l, " differ");
      if (n && m && x.d_in && x.d_out) run<T, Acc>(x, y ? &*y : nullptr, "rows", data<Acc>(out));
    }
    if (symmetric) mirror<T, Acc>(data<Acc>(out), n);
  });
  return out;
}

Tensor gram_conv(const Tensor& x_, const Tensor& g_, std::vector<int64_t> kernel, std::vector<int64_t> stride,
                 std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups, std::optional<Tensor> x2_,
                 std::optional<Tensor> g2_, std::string route) {
  STD_TORCH_CHECK(route == "pairs" || route == "tiles", "gram_conv: route is pairs or tiles");
  STD_TORCH_CHECK(x2_.has_value() == g2_.has_value(), "gram_conv: x2 and g2 are both given, or none");
  const bool symmetric = !x2_.has_value();
  const ScalarType type = compute_type(x_.scalar_type()), acc = accumulate_type(type);
  const Tensor x = dense(x_, type), g = dense(g_, type);
  const ConvShape shape = conv_shape(x, g, kernel, stride, padding, dilation, groups);
  std::optional<Tensor> x2, g2;
  ConvShape shape2 = shape;
  if (!symmetric) {
    x2 = dense(*x2_, type), g2 = dense(*g2_, type);
    shape2 = conv_shape(*x2, *g2, kernel, stride, padding, dilation, groups);
    STD_TORCH_CHECK(shape.c_in == shape2.c_in && shape.c_out == shape2.c_out, "gram_conv: the two sides differ in channels");
  }
  Tensor out = empty_like_dtype(x, {shape.n, shape2.n}, acc);
  torch::stable::zero_(out);
  if (shape.n == 0 || shape2.n == 0 || shape.positions() == 0 || shape2.positions() == 0 || shape.c_in == 0 || shape.c_out == 0)
    return out;
  by_type(type, [&](auto zero) {
    using T = decltype(zero);
    using Acc = typename Rows<T>::A;
    run_conv<T, Acc>(x, g, shape, x2 ? &*x2 : nullptr, g2 ? &*g2 : nullptr, shape2, route, data<Acc>(out));
    if (symmetric) mirror<T, Acc>(data<Acc>(out), shape.n);
  });
  return out;
}

}  // namespace ef::cpu
