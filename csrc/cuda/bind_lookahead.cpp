// Look-ahead and its undo over many tensors.
#include "bind_rows.h"

namespace ef::cuda {

std::tuple<std::vector<Tensor>, Tensor, Tensor> step_lookahead(std::vector<Tensor> params, std::vector<Tensor> grads, double alpha,
                                                               std::optional<int64_t> capacity) {
  STD_TORCH_CHECK(params.size() == grads.size() && !params.empty(), "step_lookahead: needs one grad a parameter");
  STD_TORCH_CHECK(!capacity || *capacity >= 0, "step_lookahead: capacity is below 0");
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
    int type;
    Table table;
    Tensor found, places;
  };
  std::vector<Found> counts;
  const int64_t* before = nullptr;  // on the device: the far elements of the dtypes before
  for (auto& [types, rows] : groups) {
    const Table table = rows.upload(call, params[0]);
    Tensor found = empty(params[0], {table.programs}, ScalarType::Long), places = empty(params[0], {table.programs + 1}, ScalarType::Long);
    int64_t* sums = data<int64_t>(places);
    call(ef_cuda_step_lookahead_count(table, types[0], alpha, before, data<int64_t>(found), sums, rows.counter(), call.stream));
    before = sums + table.programs;
    counts.push_back({types[0], table, found, places});
  }
  int64_t slots = capacity.value_or(0);
  if (!capacity && before) call(ef_cuda_fetch(before, &slots, call.stream));  // the one wait: index is returned in its exact size
  Tensor index = empty(params[0], {slots, 2}, ScalarType::Long), value = empty(params[0], {slots}, ScalarType::Double);
  if (capacity) {
    torch::stable::fill_(index, -1);
    torch::stable::fill_(value, 0);
  }
  for (const Found& c : counts)
    call(ef_cuda_step_lookahead(c.table, c.type, alpha, data<int64_t>(c.found), data<int64_t>(c.places), slots, data<int64_t>(index),
                                data<double>(value), call.stream));
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
