// The step operations on many tensors, but for look-ahead (bind_lookahead.cpp).
#include <cmath>

#include "bind_rows.h"

namespace ef::cuda {
namespace {

// what is read of one tensor: its parameter's dtype where all have it, else the wide one
ScalarType read_type(ScalarType param, const Tensor& grad, const std::vector<Tensor>& directions, size_t i, size_t p) {
  bool same = grad.scalar_type() == param;
  for (; i < directions.size(); i += p) same &= directions[i].scalar_type() == param;
  return same ? param : accumulate_type(param);
}

// one number on the device as `dtype`, or null
template <class T> const T* scalar(const std::optional<Tensor>& x, ScalarType dtype, std::vector<Tensor>& held) {
  if (!x) return nullptr;
  held.push_back(dense(*x, dtype));
  return data<T>(held.back());
}

// the Gram of k lists, and project's solve after it
Tensor gram_of(const Call& call, const std::vector<Tensor>& tensors, int64_t k, const StepProject& project) {
  const size_t p = tensors.size() / k;
  std::vector<Tensor> held;
  Groups groups;
  for (size_t i = 0; i < p; ++i) {
    bool mixed = false, wide = false;
    for (int64_t j = 0; j < k; ++j) {
      const Tensor& x = tensors[j * p + i];
      call.require(x.numel() == tensors[i].numel(), "directions differ in size");
      wide |= checked_type(call, x) == kDouble, mixed |= x.scalar_type() != tensors[i].scalar_type();
    }
    if (tensors[i].numel() == 0) continue;
    const bool one = mixed && (wide || k > kMostMixed);  // type for all, in copies
    std::vector<const void*> pointers;
    std::vector<int> types;
    for (int64_t j = 0; j < k; ++j) {
      const Tensor& x = tensors[j * p + i];
      held.push_back(dense(x, !one ? x.scalar_type() : wide ? ScalarType::Double : ScalarType::Float));
      pointers.push_back(data(held.back()));
      types.push_back(type_of(held.back()));
    }
    group(groups, types, (int)k).add(i, tensors[i].numel(), 0, pointers, k);
  }
  if (groups.empty()) return torch::stable::new_zeros(tensors[0], {k, k}, ScalarType::Double);
  Tensor out = empty(tensors[0], {k, k}, ScalarType::Double);
  size_t at = 0;
  for (auto& [types, rows] : groups) {
    const Table table = rows.upload(call, tensors[0]);
    Tensor partial = empty(tensors[0], {table.programs, k, k}, ScalarType::Double);
    const bool last = ++at == groups.size();
    call(ef_cuda_step_gram(table, types.data(), (int)k, data<double>(partial), rows.counter(), data<double>(out), at > 1,
                           last ? project : StepProject{}, call.stream));
  }
  return out;
}

}  // namespace

Tensor step_gram(std::vector<Tensor> tensors, int64_t k) {
  STD_TORCH_CHECK(k > 0 && !tensors.empty() && tensors.size() % k == 0, "step_gram: needs k lists of the same tensors");
  return gram_of(Call("step_gram", tensors[0]), tensors, k, StepProject{});
}

std::tuple<Tensor, Tensor> step_project(std::vector<Tensor> directions, std::vector<Tensor> momentum, std::vector<Tensor> grads,
                                        double beta, double ridge, double rcond) {
  const size_t p = grads.size();
  STD_TORCH_CHECK(p && directions.size() % p == 0 && (momentum.empty() || momentum.size() == p),
                  "step_project: directions, momentum and grads differ in number");
  const Call call("step_project", grads[0]);
  const int64_t k = directions.size() / p;
  call.require(k <= kMostDirections, "more than 32 directions");
  std::vector<Tensor> all = directions;
  all.insert(all.end(), momentum.begin(), momentum.end());
  all.insert(all.end(), grads.begin(), grads.end());
  Tensor coef = torch::stable::new_zeros(grads[0], {k}, ScalarType::Double);  // stays zero where the tensors are empty
  const StepProject project{k ? data<double>(coef) : nullptr, (int)k, !momentum.empty(), beta, ridge, rcond};
  return {gram_of(call, all, all.size() / p, project), coef};
}

void step_update(std::vector<Tensor> params, std::vector<Tensor> momentum, std::vector<Tensor> grads,
                 std::vector<Tensor> directions, const Tensor& coef, double lr, double beta, double weight_decay, double noise,
                 int64_t seed, int64_t offset, std::optional<Tensor> counter) {
  const size_t p = params.size();
  const int64_t k = coef.numel();
  STD_TORCH_CHECK(grads.size() == p && (momentum.empty() || momentum.size() == p) && directions.size() == k * p,
                  "step_update: params, momentum, grads and directions differ in number");
  if (p == 0) return;
  const Call call("step_update", params[0]);
  std::vector<StandIn> theta, v;
  std::vector<Tensor> held;
  Groups groups;
  int64_t place = 0;
  for (size_t i = 0; i < p; ++i) {
    const int64_t size = params[i].numel();
    const ScalarType type = params[i].scalar_type(), wide = accumulate_type(type);
    checked_type(call, params[i]);
    call.require(grads[i].numel() == size && (momentum.empty() || momentum[i].numel() == size),
                 "params, momentum and grads differ in size");
    for (int64_t j = 0; j < k; ++j) call.require(directions[j * p + i].numel() == size, "a direction differs in size");
    const ScalarType read = read_type(type, grads[i], directions, i, p);
    ScalarType keep = wide;
    if (!momentum.empty() && momentum[i].scalar_type() == type && read == type) keep = type;
    if (size) {
      std::vector<const void*> pointers;
      theta.emplace_back(params[i], type);
      pointers.push_back(data(theta.back().now));
      held.push_back(dense(grads[i], read));
      pointers.push_back(data(held.back()));
      if (momentum.empty()) {
        pointers.push_back(nullptr);
      } else {
        v.emplace_back(momentum[i], keep);
        pointers.push_back(data(v.back().now));
      }
      for (int64_t j = 0; j < k; ++j) {
        held.push_back(dense(directions[j * p + i], read));
        pointers.push_back(data(held.back()));
      }
      group(groups, {type_of(type), type_of(keep), type_of(read)}, 3 + (int)k).add(i, size, place, pointers, 3 + k);
    }
    place += size;
  }
  const StepUpdate update{lr, beta, 1 - lr * weight_decay, noise, (uint64_t)seed, (uint64_t)offset,
                          scalar<int64_t>(counter, ScalarType::Long, held)};
  for (auto& [types, rows] : groups) {
    Tensor c = dense(coef, types[0] == kDouble ? ScalarType::Double : ScalarType::Float);
    call(ef_cuda_step_update(rows.upload(call, params[0]), types[0], types[1], types[2], (int)k, data(c), update, call.stream));
  }
  for (StandIn& x : theta) x.finish();
  for (StandIn& x : v) x.finish();
}

void step_adamw(std::vector<Tensor> params, std::vector<Tensor> exp_avg, std::vector<Tensor> exp_avg_sq, std::vector<Tensor> grads,
                std::vector<Tensor> directions, const Tensor& coef, const Tensor& step, double lr, double beta1, double beta2,
                double eps, double weight_decay, double noise, int64_t seed, int64_t offset, std::optional<Tensor> counter) {
  const size_t p = params.size();
  const int64_t k = coef.numel();
  STD_TORCH_CHECK(grads.size() == p && exp_avg.size() == p && exp_avg_sq.size() == p && directions.size() == k * p && step.numel() == 1,
                  "step_adamw: params, moments, grads and directions differ in number, or step is not one number");
  if (p == 0) return;
  const Call call("step_adamw", params[0]);
  std::vector<StandIn> written;
  std::vector<Tensor> held;
  Groups groups;
  int64_t place = 0;
  for (size_t i = 0; i < p; ++i) {
    const int64_t size = params[i].numel();
    const ScalarType type = params[i].scalar_type();
    checked_type(call, params[i]);
    call.require(grads[i].numel() == size && exp_avg[i].numel() == size && exp_avg_sq[i].numel() == size,
                 "params, moments and grads differ in size");
    for (int64_t j = 0; j < k; ++j) call.require(directions[j * p + i].numel() == size, "a direction differs in size");
    const ScalarType read = read_type(type, grads[i], directions, i, p);
    if (size) {
      std::vector<const void*> pointers;
      const auto write = [&](const Tensor& x, ScalarType dtype) { return written.emplace_back(x, dtype), data(written.back().now); };
      pointers.push_back(write(params[i], type));
      held.push_back(dense(grads[i], read));
      pointers.push_back(data(held.back()));
      pointers.push_back(write(exp_avg[i], accumulate_type(type)));
      pointers.push_back(write(exp_avg_sq[i], accumulate_type(type)));
      for (int64_t j = 0; j < k; ++j) {
        held.push_back(dense(directions[j * p + i], read));
        pointers.push_back(data(held.back()));
      }
      group(groups, {type_of(type), type_of(read)}, 4 + (int)k).add(i, size, place, pointers, 4 + k);
    }
    place += size;
  }
  const StepAdamw adamw{lr, beta1, beta2, std::log(beta1), std::log(beta2), eps, 1 - lr * weight_decay, noise, (uint64_t)seed,
                        (uint64_t)offset, scalar<int64_t>(counter, ScalarType::Long, held), scalar<double>(step, ScalarType::Double, held)};
  for (auto& [types, rows] : groups) {
    Tensor c = dense(coef, types[0] == kDouble ? ScalarType::Double : ScalarType::Float);
    call(ef_cuda_step_adamw(rows.upload(call, params[0]), types[0], types[1], (int)k, data(c), adamw, call.stream));
  }
  for (StandIn& x : written) x.finish();
}

}  // namespace ef::cuda
