// The step operations on many tensors: one table on the device, and one launch, for each combination of dtypes.
#include <cmath>
#include <map>

#include "binding.h"

namespace ef::cuda {
namespace {

// A tensor as the kernels need it, contiguous and of `dtype`; put back by finish() where it is a copy.
struct StandIn {
  Tensor original, now;
  StandIn(const Tensor& x, ScalarType dtype) : original(x), now(dense(x, dtype)) {}
  void finish() {
    if (now.data_ptr() != original.data_ptr()) torch::stable::copy_(original, now);
  }
};

// Rows of a table (launchers.h) on their way to the device, with one zeroed cell behind them.
class Rows {
 public:
  explicit Rows(int pointers) : columns_(kHead + pointers) {}

  // aligned: `pointers` that a kernel reads or writes 16 bytes at a time
  void add(int64_t index, int64_t size, int64_t place, const std::vector<const void*>& pointers, size_t aligned) {
    bool all = true;
    for (size_t i = 0; i < aligned; ++i) all &= (uintptr_t)pointers[i] % 16 == 0;
    values_.insert(values_.end(), {chunks_, size, place, 2 * index + all});
    for (const void* p : pointers) values_.push_back((int64_t)(uintptr_t)p);
    chunks_ += (size + kChunk - 1) / kChunk;
    members_.push_back(index);
  }

  Table upload(const Call& call, const Tensor& like, int blocks_each = 8) {
    const int64_t count = members_.size();
    values_.push_back(chunks_);
    values_.resize((count + 1) * columns_ + 1, 0);
    device_ = empty(like, {(int64_t)values_.size()}, ScalarType::Long);
    int64_t* rows = data<int64_t>(*device_);
    call(ef_cuda_fill(rows, values_.data(), values_.size(), call.stream));
    int processors = 0;
    call(ef_cuda_processors(&processors));
    const int programs = (int)std::min<int64_t>(chunks_, (int64_t)processors * blocks_each);
    return {rows, count, chunks_, columns_, programs};
  }

  unsigned* counter() const { return (unsigned*)(data<int64_t>(*device_) + device_->numel() - 1); }
  const std::vector<int64_t>& members() const { return members_; }

 private:
  int columns_;
  int64_t chunks_ = 0;
  std::vector<int64_t> values_, members_;
  std::optional<Tensor> device_;
};

using Groups = std::map<std::vector<int>, Rows>;

Rows& group(Groups& groups, const std::vector<int>& types, int pointers) {
  return groups.try_emplace(types, pointers).first->second;
}

int checked_type(const Call& call, const Tensor& x) {
  call.require(type_of(x) >= 0, "a tensor is not float32, float64, bfloat16 or float16");
  return type_of(x);
}

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
    ScalarType type = tensors[i].scalar_type();
    for (int64_t j = 0; j < k; ++j) {
      const Tensor& x = tensors[j * p + i];
      call.require(x.numel() == tensors[i].numel(), "directions differ in size");
      checked_type(call, x);
      if (x.scalar_type() != type) type = type == ScalarType::Double || x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    }
    if (tensors[i].numel() == 0) continue;
    std::vector<const void*> pointers;
    for (int64_t j = 0; j < k; ++j) {
      held.push_back(dense(tensors[j * p + i], type));
      pointers.push_back(data(held.back()));
    }
    group(groups, {type_of(type)}, (int)k).add(i, tensors[i].numel(), 0, pointers, k);
  }
  if (groups.empty()) return torch::stable::new_zeros(tensors[0], {k, k}, ScalarType::Double);
  Tensor out = empty(tensors[0], {k, k}, ScalarType::Double);
  size_t at = 0;
  for (auto& [types, rows] : groups) {
    const Table table = rows.upload(call, tensors[0]);
    Tensor partial = empty(tensors[0], {table.programs, k, k}, ScalarType::Double);
    const bool last = ++at == groups.size();
    call(ef_cuda_step_gram(table, types[0], (int)k, data<double>(partial), rows.counter(), data<double>(out), at > 1,
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

std::tuple<std::vector<Tensor>, Tensor, Tensor> step_lookahead(std::vector<Tensor> params, std::vector<Tensor> grads, double alpha) {
  STD_TORCH_CHECK(params.size() == grads.size() && !params.empty(), "step_lookahead: needs one grad a parameter");
  const Call call("step_lookahead", params[0]);
  std::vector<StandIn> theta;
  std::vector<Tensor> ulps, held;
  Groups groups;
  for (size_t i = 0; i < params.size(); ++i) {
    call.require(grads[i].numel() == params[i].numel(), "a grad differs in size");
    const int type = checked_type(call, params[i]);
    theta.emplace_back(params[i], params[i].scalar_type());
    held.push_back(dense(grads[i], params[i].scalar_type()));
    ulps.push_back(torch::stable::new_empty(theta[i].now, params[i].sizes(), ScalarType::Char));
    if (params[i].numel())
      group(groups, {type}, 3).add(i, params[i].numel(), 0, {data(theta[i].now), data(held[i]), data(ulps[i])}, 2);
  }
  struct Found {
    Table table;
    Tensor found, places;
    int64_t total;
  };
  std::vector<Found> counts;
  int64_t total = 0;
  for (auto& [types, rows] : groups) {
    const Table table = rows.upload(call, params[0]);
    Tensor found = empty(params[0], {table.programs}, ScalarType::Long), places = empty(params[0], {table.programs + 1}, ScalarType::Long);
    call(ef_cuda_step_lookahead_count(table, types[0], alpha, data<int64_t>(found), data<int64_t>(places), rows.counter(), call.stream));
    counts.push_back({table, found, places, 0});
  }
  for (Found& c : counts) {  // the one wait: index is returned in its exact size
    call(ef_cuda_fetch(data<int64_t>(c.places) + c.table.programs, &c.total, call.stream));
    total += c.total;
  }
  Tensor index = empty(params[0], {total, 2}, ScalarType::Long), value = empty(params[0], {total}, ScalarType::Double);
  int64_t* i = data<int64_t>(index);
  double* v = data<double>(value);
  size_t at = 0;
  for (auto& [types, rows] : groups) {
    const Found& c = counts[at++];
    call(ef_cuda_step_lookahead(c.table, types[0], alpha, data<int64_t>(c.found), data<int64_t>(c.places), i, v, call.stream));
    i += 2 * c.total, v += c.total;
  }
  for (StandIn& x : theta) x.finish();
  return {ulps, index, value};
}

void step_lookahead_undo(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> ulps, const Tensor& index,
                         const Tensor& value, double alpha) {
  STD_TORCH_CHECK(params.size() == grads.size() && ulps.size() == params.size() && !params.empty(),
                  "step_lookahead_undo: needs what step_lookahead was given and gave");
  const Call call("step_lookahead_undo", params[0]);
  std::vector<StandIn> theta;
  std::vector<Tensor> held;
  Groups groups;
  for (size_t i = 0; i < params.size(); ++i) {
    const int64_t size = params[i].numel();
    call.require(grads[i].numel() == size && ulps[i].numel() == size && ulps[i].scalar_type() == ScalarType::Char,
                 "grads or ulps do not fit the parameters");
    const int type = checked_type(call, params[i]);
    theta.emplace_back(params[i], params[i].scalar_type());
    held.push_back(dense(grads[i], params[i].scalar_type()));
    const void* g = data(held.back());
    held.push_back(torch::stable::contiguous(ulps[i]));
    if (size) group(groups, {type}, 3).add(i, size, 0, {data(theta[i].now), g, data(held.back())}, 2);
  }
  const Tensor where = torch::stable::contiguous(index), what = torch::stable::contiguous(value);
  for (auto& [types, rows] : groups) {
    const Table table = rows.upload(call, params[0]);
    call(ef_cuda_step_undo(table, types[0], alpha, call.stream));
    if (what.numel() == 0) continue;
    std::vector<int64_t> row_of(params.size(), -1);
    for (size_t r = 0; r < rows.members().size(); ++r) row_of[rows.members()[r]] = r;
    Tensor places = empty(params[0], {(int64_t)row_of.size()}, ScalarType::Long);
    call(ef_cuda_fill(data<int64_t>(places), row_of.data(), row_of.size(), call.stream));
    call(ef_cuda_step_restore(table, types[0], data<int64_t>(places), row_of.size(), data<int64_t>(where), data<double>(what),
                              what.numel(), call.stream));
  }
  for (StandIn& x : theta) x.finish();
}

}  // namespace ef::cuda
