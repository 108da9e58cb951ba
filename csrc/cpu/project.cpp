// project: c_ik = <G_i, D_k>, per-sample gradients of a linear layer or a convolution onto k directions, given or drawn.
//
//   factors  D_k against the factors, (b D_k) o a, some samples at a time: through torch's GEMM    2 n t k d_in d_out FLOPs
//   tiles    gradients formed, packed, multiplied by the same piece of every direction             2 n (t + k) d_in d_out FLOPs
//   few      the same, products one by one: nothing packed, nothing padded to a panel's width
// A random basis is drawn piece by piece, once for all samples, and never stored: a Philox block an element for 128 directions of
// signs, or 4 of normals. Limit: the FMA rate.
#include "directions.h"
#include "kernels.h"

namespace ef::cpu {
namespace {

constexpr int64_t kDirections = 1024;      // at a time: their panels stay in cache, the gradients are formed again for the next
constexpr int64_t kRowBytes = 8LL << 20;   // of (b D_k), in L3
constexpr int64_t kLeastRows = 64;
constexpr int64_t kFew = 16;               // directions that meet each gradient where it is formed, unpacked
constexpr int64_t kDot = 2;                // a product alone costs that many of a register tile's
constexpr double kTiles = 0.75;            // of torch's GEMM rate

template <class T> double dot(const T* x, const T* y, int64_t count) {
  double sum = 0;
  for (int64_t at = 0; at < count; at += 256) {
    const int64_t stop = std::min(count, at + 256);
    T part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t e = at; e < stop; ++e) part += x[e] * y[e];
    sum += part;
  }
  return sum;
}

// a (n,t,d_in), b (n,t,d_out), basis (k,d_out,d_in), out (n,k); the GEMM sums over the narrower side, which rounds less
template <class T> void by_factors(const Tensor& a, const Tensor& b, const Tensor& basis, Tensor& out) {
  const int64_t n = a.size(0), t = a.size(1), d_in = a.size(2), d_out = b.size(2), k = basis.size(0);
  const bool inner = d_in <= d_out;
  const Tensor &near = inner ? a : b, &far = inner ? b : a;
  const int64_t wide = std::max(d_in, d_out), each = t * wide;
  const int64_t many = std::clamp<int64_t>(kRowBytes / (each * (int64_t)sizeof(T)), std::min(n, (kLeastRows + t - 1) / t), n);
  const Tensor rows = torch::stable::view(near, {n * t, std::min(d_in, d_out)}), directions = torch::stable::view(basis, {k * d_out, d_in});
  Tensor room = empty_like_dtype(a, {many * t, wide}, a.scalar_type());
  const T* x = data<T>(far);
  T *moved = data<T>(room), *c = data<T>(out);
  for (int64_t i0 = 0; i0 < n; i0 += many) {
    const int64_t i1 = std::min(n, i0 + many);
    const Tensor some = slice(rows, 0, i0 * t, i1 * t);
    Tensor part = slice(room, 0, 0, (i1 - i0) * t);
    for (int64_t j = 0; j < k; ++j) {
      const Tensor d = slice(directions, 0, j * d_out, (j + 1) * d_out);
      mm_out(part, some, inner ? torch::stable::transpose(d, 0, 1) : d);
      torch::stable::parallel_for(i0, i1, std::max<int64_t>(1, 32768 / each), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) c[i * k + j] = (T)dot(x + i * each, moved + (i - i0) * each, each);
      });
    }
  }
}

// `make(first, count)`: some of the directions, as gradients
template <class T, class F> void by_tiles(const Gradients<T>& left, int64_t k, Tensor& out, F make) {
  auto contract = [&](const auto& right, T* to) {
    if constexpr (std::is_same_v<std::decay_t<decltype(right)>, RandomGradients<T>>) contract_drawn<T>(left, right, to);
    else contract_tiles<T, T>(left, &right, to);
  };
  for (int64_t first = 0; first < k; first += kDirections) {
    const int64_t count = std::min(kDirections, k - first);
    const auto right = make(first, count);
    if (k <= kFew) return contract_few<T>(left, right, data<T>(out));
    if (count == k) return contract(right, data<T>(out));
    Tensor part = empty_like_dtype(out, {left.n, count}, out.scalar_type());
    contract(right, data<T>(torch::stable::zero_(part)));
    Tensor into = slice(out, 1, first, first + count);
    torch::stable::copy_(into, part);
  }
}

// the layer in (n,t,d), and zeros (n,k)
std::pair<Layer, Tensor> onto(const Tensor& a, const Tensor& b, int64_t k) {
  const ScalarType type = accumulate_type(a.scalar_type());
  Layer x = layer("project", a, b, type);
  x.a = torch::stable::view(x.a, {x.n, x.t, x.d_in}), x.b = torch::stable::view(x.b, {x.n, x.t, x.d_out});
  Tensor out = empty_like_dtype(x.a, {x.n, k}, type);
  return {x, torch::stable::zero_(out)};
}

bool nothing(const Layer& x, const Tensor& out) { return out.numel() == 0 || x.t * x.d_in * x.d_out == 0; }

}  // namespace

Tensor project(const Tensor& a, const Tensor& b, const Tensor& basis_) {
  const int64_t k = basis_.dim() == 3 ? basis_.size(0) : 0;
  auto [x, out] = onto(a, b, k);
  STD_TORCH_CHECK(basis_.dim() == 3 && basis_.size(1) == x.d_out && basis_.size(2) == x.d_in, "project: basis is (k, d_out, d_in)");
  if (nothing(x, out)) return out;
  Tensor basis = dense(basis_, out.scalar_type());
  by_wide_type(out.scalar_type(), [&, &x = x, &out = out](auto zero) {
    using T = decltype(zero);
    const int64_t width = contract_of<T>().width, met = k <= kFew ? kDot * k : (k + width - 1) / width * width;
    if (kTiles * (double)(x.t * k) <= (double)(x.t + met)) return by_factors<T>(x.a, x.b, basis, out);
    const LinearGradients<T> left(data<T>(x.a), data<T>(x.b), x.n, x.t, x.d_in, x.d_out);
    const bool swapped = left.a != data<T>(x.a);
    if (swapped) basis = torch::stable::contiguous(torch::stable::transpose(basis, 1, 2));
    const T* rows = data<T>(basis);
    by_tiles<T>(left, k, out, [&](int64_t first, int64_t count) {
      return GivenGradients<T>(rows + first * x.d_in * x.d_out, count, left.d_in, left.d_out, 1, false, left.pieces);
    });
  });
  return out;
}

Tensor project_random(const Tensor& a, const Tensor& b, int64_t k, int64_t seed, int64_t offset, std::string kind) {
  Directions directions = directions_of("project_random", k, seed, offset, kind);
  auto [x, out] = onto(a, b, k);
  directions.numel = x.d_in * x.d_out;
  if (nothing(x, out)) return out;
  by_wide_type(out.scalar_type(), [&, &x = x, &out = out](auto zero) {
    using T = decltype(zero);
    const LinearGradients<T> left(data<T>(x.a), data<T>(x.b), x.n, x.t, x.d_in, x.d_out);
    const bool swapped = left.a != data<T>(x.a);
    const Places places = swapped ? Places{0, 1, x.d_in} : Places{0, x.d_in, 1};
    by_tiles<T>(left, k, out, [&](int64_t first, int64_t count) {
      return RandomGradients<T>(first, count, places, false, left.pieces, directions);
    });
  });
  return out;
}

namespace {

// `make(first, count, left)`: some of the directions, cut as the convolution's gradients `left` are
template <class F> Tensor onto_conv(const Tensor& x_, const Tensor& g_, int64_t k, const std::vector<int64_t>& kernel,
                                    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                    const std::vector<int64_t>& dilation, int64_t groups, F make) {
  const ScalarType type = accumulate_type(x_.scalar_type());
  const Tensor x = dense(x_, type), g = dense(g_, type);
  const ConvShape s = conv_shape(x, g, kernel, stride, padding, dilation, groups);
  Tensor out = empty_like_dtype(x, {s.n, k}, type);
  torch::stable::zero_(out);
  if (out.numel() == 0 || s.positions() == 0 || s.c_in == 0 || s.c_out == 0) return out;
  by_wide_type(type, [&](auto zero) {
    using T = decltype(zero);
    const ConvGradients<T> left(data<T>(x), data<T>(g), s);
    by_tiles<T>(left, k, out, [&](int64_t first, int64_t count) { return make(first, count, left); });
  });
  return out;
}

}  // namespace

Tensor project_conv(const Tensor& x, const Tensor& g, const Tensor& basis_, std::vector<int64_t> stride, std::vector<int64_t> padding,
                    std::vector<int64_t> dilation, int64_t groups) {
  STD_TORCH_CHECK(basis_.dim() == x.dim() + 1 && groups > 0 && basis_.size(1) == g.size(1) && basis_.size(2) == x.size(1) / groups,
                  "project_conv: basis is (k, C_out, C_in/groups, *kernel)");
  std::vector<int64_t> kernel;
  for (int64_t d = 3; d < basis_.dim(); ++d) kernel.push_back(basis_.size(d));
  const Tensor basis = dense(basis_, accumulate_type(x.scalar_type()));
  return onto_conv(x, g, basis.size(0), kernel, stride, padding, dilation, groups, [&]<class T>(int64_t first, int64_t count,
                                                                                               const ConvGradients<T>& left) {
    const int64_t d_in = left.s.c_in / groups * left.s.volume();
    return GivenGradients<T>(data<T>(basis) + first * left.s.c_out * d_in, count, d_in, left.s.c_out, groups, true, left.pieces);
  });
}

Tensor project_random_conv(const Tensor& x, const Tensor& g, int64_t k, std::vector<int64_t> kernel, std::vector<int64_t> stride,
                           std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups, int64_t seed, int64_t offset,
                           std::string kind) {
  Directions directions = directions_of("project_random_conv", k, seed, offset, kind);
  return onto_conv(x, g, k, kernel, stride, padding, dilation, groups, [&]<class T>(int64_t first, int64_t count,
                                                                                   const ConvGradients<T>& left) {
    const int64_t d_in = left.s.c_in / groups * left.s.volume();
    directions.numel = left.s.c_out * d_in;
    return RandomGradients<T>(first, count, {directions.numel / groups, d_in, 1}, true, left.pieces, directions);
  });
}

}  // namespace ef::cpu
