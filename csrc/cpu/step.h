// What the steps over many tensors share: a flat index space cut into blocks, stand-ins, conversion by stages.
#pragma once

#include <cstring>
#include <optional>
#include <vector>

#include "common.h"

namespace ef::cpu {

constexpr int64_t kBlock = 1 << 15;   // elements: few enough to balance threads, a multiple of 4 for Philox
constexpr int64_t kStage = 2048;      // elements that are converted or drawn at a time

struct Block {
  int64_t tensor, begin, count, global;  // global: position in the parameters laid end to end
};

inline std::vector<Block> blocks(const std::vector<Tensor>& tensors) {
  std::vector<Block> out;
  int64_t global = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const int64_t size = tensors[i].numel();
    for (int64_t at = 0; at < size; at += kBlock) out.push_back({(int64_t)i, at, std::min(kBlock, size - at), global + at});
    global += size;
  }
  return out;
}

// a contiguous stand-in; put back by finish() where it is a copy
struct Dense {
  Tensor original, now;
  bool copied;
  explicit Dense(const Tensor& x)
      : original(x), now(dense(x, element_type(x.scalar_type()))), copied(now.data_ptr() != x.data_ptr()) {}
  void finish() {
    if (copied) torch::stable::copy_(original, now);
  }
};

inline std::vector<Dense> dense_all(const std::vector<Tensor>& xs) { return {xs.begin(), xs.end()}; }

template <class T> const Elements<T>& elements();
template <> inline const Elements<float>& elements() { return loops().f32; }
template <> inline const Elements<double>& elements() { return loops().f64; }
template <> inline const Elements<uint16_t>& elements() { return loops().bf16; }

template <class A> const Step<A>& step();
template <> inline const Step<float>& step() { return steps().f32; }
template <> inline const Step<double>& step() { return steps().f64; }

inline void check(bool ok, const char* what) { STD_TORCH_CHECK(ok, "step: ", what); }

inline void check_sizes(const std::vector<Tensor>& params, const std::vector<Tensor>& others, const char* what) {
  check(params.empty() ? others.empty() : others.size() % params.size() == 0, what);
  for (size_t i = 0; i < others.size(); ++i) check(others[i].numel() == params[i % params.size()].numel(), what);
}

// `count` elements of x, at most kStage, from `at` as the compute type: where they stand, or converted into `stage`
template <class A> const A* staged(const Tensor& x, int64_t at, int64_t count, A* stage) {
  const A* in_place = nullptr;
  by_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    if constexpr (std::is_same_v<T, A>) {
      in_place = data<T>(x) + at;
    } else if constexpr (std::is_same_v<typename Rows<T>::A, A>) {
      elements<T>().read(data<T>(x) + at, stage, count);
    } else {  // float or bfloat16 as double, or the other way round
      typename Rows<T>::A some[kStage];
      elements<T>().read(data<T>(x) + at, some, count);
      for (int64_t e = 0; e < count; ++e) stage[e] = (A)some[e];
    }
  });
  return in_place ? in_place : stage;
}

template <class A> void unstage(const A* stage, const Tensor& x, int64_t at, int64_t count) {
  by_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    if constexpr (std::is_same_v<T, A>) {
      if (data<T>(x) + at != stage) std::memcpy(data<T>(x) + at, stage, count * sizeof(A));
    } else if constexpr (std::is_same_v<typename Rows<T>::A, A>) {
      elements<T>().write(stage, data<T>(x) + at, count);
    } else {
      typename Rows<T>::A some[kStage];
      for (int64_t e = 0; e < count; ++e) some[e] = (typename Rows<T>::A)stage[e];
      elements<T>().write(some, data<T>(x) + at, count);
    }
  });
}

struct Noise {
  double scale;
  uint64_t seed, offset;
};

inline Noise noise_of(double scale, int64_t seed, int64_t offset, const std::optional<Tensor>& counter) {
  check(!counter || (counter->numel() == 1 && counter->scalar_type() == ScalarType::Long), "counter is not one int64");
  return {scale, (uint64_t)seed, (uint64_t)offset + (counter ? (uint64_t)*data<int64_t>(*counter) : 0)};
}

template <class A> struct Stretch {
  int64_t tensor, begin, count;
  A* room;            // `rooms` stages of kStage elements
  const A** pointers; // as many, to be filled
  const float* xi;    // its noise, or null
};

// f(stretch) for all elements of all tensors, `rooms` stages at hand
template <class A, class F> void for_stretches(const std::vector<Block>& work, int64_t rooms, const Noise& noise, F&& f) {
  torch::stable::parallel_for(0, work.size(), 1, [&](int64_t first, int64_t last) {
    std::vector<A> stage(rooms * kStage);
    std::vector<const A*> pointers(rooms);
    float xi[kStage];
    for (int64_t q = first; q < last; ++q) {
      const Block& b = work[q];
      for (int64_t at = 0, count; at < b.count; at += count) {
        const int64_t lead = (b.global + at) % 4;  // noise starts at a whole Philox block
        count = std::min(kStage - lead, b.count - at);
        if (noise.scale != 0) draws().stream(xi, count + lead, b.global + at - lead, noise.seed, noise.offset);
        f(Stretch<A>{b.tensor, b.begin + at, count, stage.data(), pointers.data(), noise.scale != 0 ? xi + lead : nullptr});
      }
    }
  });
}

// the stretch of x, to be written back by unstage
template <class A> A* held(const Tensor& x, const Stretch<A>& s, int room) {
  return const_cast<A*>(staged<A>(x, s.begin, s.count, s.room + room * kStage));
}

// the k directions' stretches, in rooms from `room` on
template <class A> const A* const* directions_of(const std::vector<Tensor>& directions, int64_t p, int64_t k, const Stretch<A>& s, int room) {
  for (int64_t j = 0; j < k; ++j)
    s.pointers[j] = staged<A>(directions[j * p + s.tensor], s.begin, s.count, s.room + (room + j) * kStage);
  return s.pointers;
}

inline std::vector<Tensor> contiguous_all(const std::vector<Tensor>& xs) {
  std::vector<Tensor> out;
  for (const Tensor& x : xs) out.push_back(dense(x, element_type(x.scalar_type())));
  return out;
}

inline bool any_double(const std::vector<Tensor>& xs) {
  return std::any_of(xs.begin(), xs.end(), [](const Tensor& x) { return x.scalar_type() == ScalarType::Double; });
}

}  // namespace ef::cpu
