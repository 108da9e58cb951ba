// The CUDA kernels as operations: library entangle_fast_cuda, with the schemas of entangle_fast, for the CUDA dispatch key.
//
// A library of its own, because entangle_fast::<op> on CUDA belongs to dispatch.py, which chooses between this, Triton and
// the reference. Needs no CUDA headers; beside a CPU-only torch it registers operations that nothing calls.
#include "binding.h"

namespace ef::cuda {

std::tuple<Tensor, Tensor> w2_sorted(const Tensor& losses, const Tensor& reference) {
  const Call call("w2_sorted", losses);
  const int64_t n = losses.numel(), m = reference.numel();
  call.require(losses.dim() == 1 && reference.dim() == 1 && n > 0 && m > 0, "needs losses (n,) and reference (m,), n, m >= 1");
  call.require(n < (int64_t)1 << 31 && m < (int64_t)1 << 31, "more than 2^31 losses");
  call.require(type_of(losses) >= 0 && type_of(losses) != kDouble, "losses are not float32, bfloat16 or float16");
  const Tensor x = torch::stable::contiguous(losses), y = dense(reference, losses.scalar_type());
  int64_t bytes = 0;
  call(ef_cuda_w2_temporary(std::max(n, m), &bytes));
  Tensor keys = empty(x, {2, n}, ScalarType::Long), other = empty(x, {2, m}, ScalarType::Long);
  Tensor temporary = empty(x, {bytes}, ScalarType::Byte), counter = empty(x, {1}, ScalarType::Int);
  Tensor partial = empty(x, {ef_cuda_w2_blocks(n)}, ScalarType::Double);
  Tensor value = empty(x, {}, ScalarType::Float), weights = empty(x, {n}, ScalarType::Float);
  call(ef_cuda_w2_sorted(type_of(x), data(x), n, data(y), m, data<uint64_t>(keys), data<uint64_t>(other), data(temporary), bytes,
                         data<double>(partial), data<unsigned>(counter), data<float>(value), data<float>(weights), call.stream));
  return {value, weights};
}

namespace {

struct Rows {
  Tensor logits, target;
  LossOptions options;
};

// logits (n, C) or (n, t, C) as rows with unit stride inside
Rows rows_of(const Call& call, const Tensor& logits, const Tensor& target, double clip, double penalty, int64_t ignore_index,
             double label_smoothing, const std::string& reduction) {
  const int64_t dim = logits.dim();
  call.require(dim == target.dim() + 1 && (dim == 2 || dim == 3), "needs logits (n,C) with target (n,), or (n,t,C) with (n,t)");
  for (int64_t d = 0; d + 1 < dim; ++d) call.require(logits.size(d) == target.size(d), "logits and target differ in shape");
  call.require(target.scalar_type() == ScalarType::Long, "target must be int64");
  call.require(type_of(logits) >= 0, "logits are not float32, float64, bfloat16 or float16");
  const int64_t classes = logits.size(dim - 1), n = logits.size(0), t = dim == 3 ? logits.size(1) : 1;
  call.require(classes > 0, "no classes");
  const bool strided = dim == 2 && logits.stride(1) == 1 && logits.stride(0) >= classes;
  const Tensor x = strided ? logits : torch::stable::contiguous(logits);
  const LossOptions options{n, t, classes, strided ? logits.stride(0) : classes, ignore_index, clip, penalty, label_smoothing,
                            dim == 3 && reduction == "mean"};
  return {x, torch::stable::contiguous(target), options};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> sample_loss(const Tensor& logits, const Tensor& target, double clip, double penalty,
                                               int64_t ignore_index, double label_smoothing, std::string reduction) {
  const Call call("sample_loss", logits);
  const Rows r = rows_of(call, logits, target, clip, penalty, ignore_index, label_smoothing, reduction);
  const ScalarType acc = accumulate_type(logits.scalar_type());
  const int64_t n = r.options.n, t = r.options.t;
  Tensor lse = target.dim() == 2 ? empty(r.logits, {2, n, t}, acc) : empty(r.logits, {2, n}, acc), loss = empty(lse, {n}, acc);
  Tensor ce = torch::stable::empty_like(loss), position = empty(lse, {n * t}, acc);
  call(ef_cuda_sample_loss(type_of(logits), r.options, data(r.logits), data<int64_t>(r.target), data(lse), data(position), data(loss),
                           data(ce), call.stream));
  return {loss, ce, lse};
}

Tensor sample_loss_backward(const Tensor& grad, const Tensor& logits, const Tensor& target, const Tensor& ce, const Tensor& lse,
                            double clip, double penalty, int64_t ignore_index, double label_smoothing, std::string reduction) {
  const Call call("sample_loss_backward", logits);
  const Rows r = rows_of(call, logits, target, clip, penalty, ignore_index, label_smoothing, reduction);
  const ScalarType acc = accumulate_type(logits.scalar_type());
  call.require(grad.numel() == r.options.n && ce.numel() == r.options.n && lse.numel() == 2 * r.options.n * r.options.t,
               "grad, ce and lse do not fit the logits");
  const Tensor w = dense(grad, acc), e = dense(ce, acc), z = dense(lse, acc);
  Tensor out = torch::stable::new_empty(r.logits, logits.sizes(), logits.scalar_type()), scale = empty(e, {r.options.n}, acc);
  call(ef_cuda_sample_loss_backward(type_of(logits), r.options, data(w), data(r.logits), data<int64_t>(r.target), data(e), data(z),
                                    data(scale), data(out), call.stream));
  return out;
}

}  // namespace ef::cuda

#ifdef EF_CUDA_HOST
#define EF_LIBRARY entangle_fast_cuda_host
#define EF_KEY CPU
#else
#define EF_LIBRARY entangle_fast_cuda
#define EF_KEY CUDA
#endif
#define EF_DEFINE(library, m) STABLE_TORCH_LIBRARY(library, m)
#define EF_IMPLEMENT(library, key, m) STABLE_TORCH_LIBRARY_IMPL(library, key, m)

EF_DEFINE(EF_LIBRARY, m) {
#define EF_OP(schema) m.def(schema);
#include "../schema.inc"
#undef EF_OP
}

EF_IMPLEMENT(EF_LIBRARY, EF_KEY, m) {
  m.impl("gram", TORCH_BOX(&ef::cuda::gram));
  m.impl("project_random", TORCH_BOX(&ef::cuda::project_random));
  m.impl("step_gram", TORCH_BOX(&ef::cuda::step_gram));
  m.impl("step_project", TORCH_BOX(&ef::cuda::step_project));
  m.impl("step_update", TORCH_BOX(&ef::cuda::step_update));
  m.impl("step_adamw", TORCH_BOX(&ef::cuda::step_adamw));
  m.impl("step_lookahead", TORCH_BOX(&ef::cuda::step_lookahead));
  m.impl("step_lookahead_undo", TORCH_BOX(&ef::cuda::step_lookahead_undo));
  m.impl("w2_sorted", TORCH_BOX(&ef::cuda::w2_sorted));
  m.impl("sample_loss", TORCH_BOX(&ef::cuda::sample_loss));
  m.impl("sample_loss_backward", TORCH_BOX(&ef::cuda::sample_loss_backward));
}
