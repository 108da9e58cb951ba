// Span<T>: the kernels' pointer type on the CPU. Every access is checked against the tensor it came from.
//
// The binding (compiled with EF_CUDA_HOST) registers each tensor it hands over: span_allow(address, bytes). A pointer
// belongs to the registered range that holds it; access outside, misaligned 16-byte access, or a pointer into none
// makes the launch return 700 (cudaErrorIllegalAddress) and says which on stderr; nothing outside is touched.
#pragma once

#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <atomic>
#include <map>
#include <type_traits>

namespace ef::cuda {

inline std::map<uintptr_t, uintptr_t>& span_ranges() {  // begin → end
  static std::map<uintptr_t, uintptr_t> ranges;
  return ranges;
}
inline std::atomic<int>& span_state() {
  static std::atomic<int> state{0};
  return state;
}
inline void span_allow(const void* p, int64_t bytes) {
  uintptr_t& end = span_ranges()[(uintptr_t)p];
  end = std::max(end, (uintptr_t)p + bytes);
}
inline void span_clear() { span_ranges().clear(), span_state() = 0; }
inline int span_error() { return span_state().exchange(0); }
inline void span_fail(const char* what, const void* p, int64_t i, int64_t low, int64_t high) {
  if (span_state().exchange(700) == 0)
    fprintf(stderr, "cuda_host: %s at element %lld of %p, which has [%lld, %lld)\n", what, (long long)i, p, (long long)low,
            (long long)high);
}

// Told of every address that a kernel is about to touch, where there is one (schedule.h)
inline void (*span_watch)(const void*) = nullptr;

template <class T> class Span {
 public:
  using Value = std::remove_const_t<T>;

  Span(T* p = nullptr) : p_(p) {
    if (!p) return;
    auto next = span_ranges().upper_bound((uintptr_t)p);
    if (next == span_ranges().begin()) return;
    const auto& [begin, end] = *--next;
    if ((uintptr_t)p > end) return;
    low_ = -(int64_t)(((uintptr_t)p - begin) / sizeof(T)), high_ = (end - (uintptr_t)p) / sizeof(T);
  }
  Span(T* p, int64_t low, int64_t high) : p_(p), low_(low), high_(high) {}
  template <class U, class = std::enable_if_t<std::is_same_v<const U, T>>> Span(const Span<U>& other)
      : p_(other.get()), low_(other.low()), high_(other.high()) {}

  T& operator[](int64_t i) const {
    static thread_local Value nowhere;
    touch(i);
    if (i < low_ || i >= high_) {
      span_fail("access", p_, i, low_, high_);
      memset(&nowhere, 0xff, sizeof nowhere);  // NaN
      return nowhere;
    }
    return p_[i];
  }
  T& operator*() const { return (*this)[0]; }
  Span operator+(int64_t i) const { return {p_ + i, low_ - i, high_ - i}; }
  explicit operator bool() const { return p_ != nullptr; }
  T* get() const { return p_; }
  int64_t low() const { return low_; }
  int64_t high() const { return high_; }

  // n elements from i on, as 16-byte vectors
  void copy_out(int64_t i, int64_t n, Value* out) const {
    if (vector(i, n)) memcpy(out, p_ + i, n * sizeof(T));
    else memset((void*)out, 0xff, n * sizeof(T));
  }
  void copy_in(int64_t i, int64_t n, const Value* in) const {
    if (vector(i, n)) memcpy((void*)(p_ + i), in, n * sizeof(T));
  }

 private:
  void touch(int64_t i) const {
    if (span_watch) span_watch(p_ + i);
  }
  bool vector(int64_t i, int64_t n) const {
    touch(i);
    if (i < low_ || i + n > high_) return span_fail("16-byte access", p_, i, low_, high_), false;
    if ((uintptr_t)(p_ + i) % 16) return span_fail("misaligned 16-byte access", p_, i, low_, high_), false;
    return true;
  }

  T* p_ = nullptr;
  int64_t low_ = 0, high_ = 0;
};

}  // namespace ef::cuda
