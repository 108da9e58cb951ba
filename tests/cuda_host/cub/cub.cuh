// cub::DeviceRadixSort as far as the kernels use it: a stable sort by the chosen bits, on the host.
#pragma once
#include <numeric>

#include "cuda_host.h"

namespace cub {
struct DeviceRadixSort {
  template <class K, class V, class N>
  static cudaError_t SortPairs(void* scratch, size_t& bytes, const K* keys, K* keys_out, const V* values, V* values_out, N n,
                               int begin = 0, int end = sizeof(K) * 8, cudaStream_t = nullptr) {
    if (!scratch) return bytes = 256, cudaSuccess;
    using U = std::conditional_t<sizeof(K) == 8, uint64_t, uint32_t>;
    auto key = [&](N i) {  // the order that CUB sorts by: floats and signed integers become unsigned
      U u = cuda_host_bits<U>(keys[i]), top = U(1) << (sizeof(U) * 8 - 1);
      if constexpr (std::is_floating_point_v<K>) u = u & top ? ~u : u | top;
      else if constexpr (std::is_signed_v<K>) u ^= top;
      u >>= begin;
      return end - begin < int(sizeof(U) * 8) ? u & ((U(1) << (end - begin)) - 1) : u;
    };
    std::vector<N> order(n);
    std::iota(order.begin(), order.end(), N(0));
    std::stable_sort(order.begin(), order.end(), [&](N i, N j) { return key(i) < key(j); });
    for (N i = 0; i < n; i++) {
      keys_out[i] = keys[order[i]];
      if (values) values_out[i] = values[order[i]];
    }
    return cudaSuccess;
  }
  template <class K, class N>
  static cudaError_t SortKeys(void* scratch, size_t& bytes, const K* keys, K* keys_out, N n, int begin = 0,
                              int end = sizeof(K) * 8, cudaStream_t stream = nullptr) {
    return SortPairs(scratch, bytes, keys, keys_out, static_cast<const int*>(nullptr), static_cast<int*>(nullptr), n, begin, end, stream);
  }
};
}  // namespace cub
