// gram and project_random of linear layers as operations. What the kernels do not serve is refused: dispatch.py asks first.
#include "binding.h"
#include "gram.h"

namespace ef::cuda {
namespace {

// (n, d) → (n, 1, d) with unit stride inside; other strides stay
Tensor positions(const Tensor& x) {
  const Tensor y = x.dim() == 2 ? torch::stable::unsqueeze(x, 1) : x;
  return y.stride(2) == 1 || y.size(2) == 1 ? y : torch::stable::contiguous(y);
}

struct Pair {
  Tensor a, b;
  Factors factors;
  Pair(const Call& call, const Tensor& a_, const Tensor& b_) : a(positions(a_)), b(positions(b_)) {
    call.require(a.dim() == 3 && b.dim() == 3 && a.size(0) == b.size(0) && a.size(1) == b.size(1), "a, b differ in samples or positions");
    call.require(a.scalar_type() == b.scalar_type(), "a, b differ in dtype");
    factors = {data(a), data(b), a.size(0), a.size(1), a.stride(0), a.stride(1), b.stride(0), b.stride(1)};
  }
};

}  // namespace

Tensor gram(const Tensor& a, const Tensor& b, std::optional<Tensor> a2, std::optional<Tensor> b2, std::string route) {
  const Call call("gram", a);
  call.require(route == "tiles", "only the route \"tiles\"");
  const Pair left(call, a, b);
  std::optional<Pair> right;
  if (a2) right.emplace(call, *a2, *b2);
  const Pair& other = right ? *right : left;
  const Factors *x = &left.factors, *y = right ? &right->factors : nullptr;
  const int64_t n = x->n, m = other.factors.n, d_in = left.a.size(2), d_out = left.b.size(2);
  call.require(other.a.size(2) == d_in && other.b.size(2) == d_out && type_of(other.a) == type_of(left.a),
      "the two sides differ in widths or dtype");
  Tensor out = empty(left.a, {n, m}, ScalarType::Float);
  if (n == 0 || m == 0) return out;
  if (x->t == 0 || other.factors.t == 0 || d_in == 0 || d_out == 0) return torch::stable::fill_(out, 0.0);
  const int type = type_of(left.a);
  const int64_t padded = (d_out + 127) / 128 * 128 * ((d_in + 63) / 64 * 64);  // what the tiles for wgmma make of the weight
  const int form = padded <= 4 * d_in * d_out && !ef_cuda_gram_refuses(kWgmma, type, x, y, d_in, d_out) ? kWgmma : kMma;
  call.require(!ef_cuda_gram_refuses(form, type, x, y, d_in, d_out), "needs float32, bfloat16 or float16");
  const int64_t count = ef_cuda_gram_partials(form, type, x, y, d_in, d_out);
  Tensor partial = empty(left.a, {count, n, m}, ScalarType::Float);
  Tensor scratch = empty(left.a, {ef_cuda_gram_scratch(form, x, y, d_in, d_out)}, ScalarType::Byte);
  call(ef_cuda_gram(form, type, x, y, d_in, d_out, data<float>(partial), count, data(scratch), data<float>(out), call.stream));
  return out;
}

Tensor project_random(const Tensor& a, const Tensor& b, int64_t k, int64_t seed, int64_t offset, std::string kind) {
  const Call call("project_random", a);
  const Pair x(call, a, b);
  const int64_t n = x.factors.n, d_in = x.a.size(2), d_out = x.b.size(2);
  const int type = type_of(x.a);
  call.require(type >= 0 && type != kDouble, "needs float32, bfloat16 or float16");
  Tensor out = empty(x.a, {n, k}, ScalarType::Float);
  if (n == 0 || k == 0) return out;
  if (x.factors.t == 0 || d_in == 0 || d_out == 0) return torch::stable::fill_(out, 0.0);
  const int64_t count = ef_cuda_project_random_partials(type, &x.factors, d_in, d_out, k);
  Tensor partial = empty(x.a, {count, n, k}, ScalarType::Float);
  call(ef_cuda_project_random(type, &x.factors, d_in, d_out, k, (uint64_t)seed, (uint64_t)offset, kind == "gaussian",
      data<float>(partial), count,
                              data<float>(out), call.stream));
  return out;
}

}  // namespace ef::cuda
