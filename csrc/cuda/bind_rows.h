// What the step operations hand to their kernels: one table on the device, and one launch, for each combination of dtypes.
#pragma once

#include <map>

#include "binding.h"

namespace ef::cuda {

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

inline Rows& group(Groups& groups, const std::vector<int>& types, int pointers) {
  return groups.try_emplace(types, pointers).first->second;
}

inline int checked_type(const Call& call, const Tensor& x) {
  call.require(type_of(x) >= 0, "a tensor is not float32, float64, bfloat16 or float16");
  return type_of(x);
}

}  // namespace ef::cuda
