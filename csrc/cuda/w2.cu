// w2_sorted: exact W2 between two sets of losses: a radix sort of (loss, index), then ranks to weights and value in one pass.
//
// A loss becomes the upper half of a 64-bit key in which unsigned order is the losses' order (NaN last, -0 as 0) and its
// index the lower half, so one stable sort over the upper 32 bits carries the index along.
// Bytes: 8 a key, written once, read and written once more by each of 4 digit passes; then key, weight once. Limit: bandwidth.
// Fraction reached: not yet run on a GPU.
#include <cub/device/device_radix_sort.cuh>

#include "reduce.cuh"

namespace ef::cuda {
namespace {

EF_DEVICE uint32_t key_of(float x) {
  if (x != x) return 0xffffffffu;
  const uint32_t b = bits_as<uint32_t>(x == 0.0f ? 0.0f : x);
  return b >> 31 ? ~b : b | 0x80000000u;
}
EF_DEVICE float loss_of(uint32_t key) {
  if (key == 0xffffffffu) return bits_as<float>(0x7fc00000u);
  return bits_as<float>(key >> 31 ? key & 0x7fffffffu : ~key);
}

// keys of both sets in one launch: the first n of the grid's threads take the losses
template <class T> __global__ void __launch_bounds__(kThreads)
pack(const T* losses_, int64_t n, const T* reference_, int64_t m, uint64_t* keys_, uint64_t* other_, unsigned* counter) {
  const Span<const T> losses(losses_), reference(reference_);
  const Span<uint64_t> keys(keys_), other(other_);
  const int64_t at = blockIdx.x * (int64_t)kThreads + threadIdx.x;
  if (at == 0) *Span<unsigned>(counter) = 0;
  for (int64_t i = at; i < n + m; i += gridDim.x * (int64_t)kThreads) {
    if (i < n) keys[i] = (uint64_t)key_of(widen(losses[i])) << 32 | (uint64_t)i;
    else other[i - n] = (uint64_t)key_of(widen(reference[i - n])) << 32;
  }
}

// weights[index_i] = 2 sum_j mass_ij (x_i - y_j), value = sum mass_ij (x_i - y_j)^2; mass_ij: what [i, i+1)/n and [j, j+1)/m
// share, in integers over n m.
__global__ void __launch_bounds__(kThreads, 1)
ranks(const uint64_t* keys_, int64_t n, const uint64_t* other_, int64_t m, double* partial_, unsigned* counter, float* value_,
      float* weights_) {
  const Span<const uint64_t> keys(keys_), other(other_);
  const Span<float> weights(weights_), value(value_);
  const Span<double> partial(partial_);
  const double whole = (double)n * (double)m;
  double sum = 0;
  for (int64_t i = blockIdx.x * (int64_t)kThreads + threadIdx.x; i < n; i += gridDim.x * (int64_t)kThreads) {
    const uint64_t key = keys[i];
    const double x = loss_of((uint32_t)(key >> 32));
    double slope = 0;
    if (n == m) {
      const double gap = x - loss_of((uint32_t)(other[i] >> 32));
      slope = 2 * gap / n, sum += gap * gap / n;
    } else {
      const int64_t low = i * m, high = low + m;
      for (int64_t j = low / n; j * n < high; ++j) {
        const int64_t begin = j * n > low ? j * n : low, end = (j + 1) * n < high ? (j + 1) * n : high;
        const double share = (double)(end - begin) / whole, gap = x - loss_of((uint32_t)(other[j] >> 32));
        slope += 2 * share * gap, sum += share * gap * gap;
      }
    }
    weights[(int64_t)(key & 0xffffffffu)] = (float)slope;
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
  if (!last_block(counter, gridDim.x)) return;
  double total = 0;
  for (int64_t b = threadIdx.x; b < gridDim.x; b += kThreads) total += partial[b];
  total = block_sum(total);
  if (threadIdx.x == 0) value[0] = (float)total;
}

unsigned blocks(int64_t count) {
  const int64_t want = cdiv(count, (int64_t)kThreads);
  return (unsigned)(want < 1024 ? want : 1024);
}

// keys (2, count): unsorted in the first half, sorted into the second
int sort(uint64_t* keys, int64_t count, void* temporary, int64_t bytes, void* stream) {
  size_t room = (size_t)bytes;
  return (int)cub::DeviceRadixSort::SortKeys(temporary, room, (const uint64_t*)keys, keys + count, count, 32, 64, (cudaStream_t)stream);
}

}  // namespace
}  // namespace ef::cuda

using namespace ef::cuda;

EF_LAUNCHER ef_cuda_w2_temporary(int64_t count, int64_t* bytes) {
  size_t room = 0;
  EF_TRY((int)cub::DeviceRadixSort::SortKeys(nullptr, room, (const uint64_t*)nullptr, (uint64_t*)nullptr, count, 32, 64));
  return *bytes = (int64_t)room, 0;
}

extern "C" __attribute__((visibility("default"))) int64_t ef_cuda_w2_blocks(int64_t n) { return blocks(n); }

EF_LAUNCHER ef_cuda_w2_sorted(int type, const void* losses, int64_t n, const void* reference, int64_t m, uint64_t* keys,
                              uint64_t* other_keys, void* temporary, int64_t bytes, double* partial, unsigned* counter, float* value,
                              float* weights, void* stream) {
  if (type == kDouble) return kBadArgument;  // a double does not fit the upper half of a key
  EF_TRY(by_type(type, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (std::is_same_v<T, double>) return kBadArgument;
    else
      return launch(pack<T>, dim3(blocks(n + m)), dim3(kThreads), 0, stream, (const T*)losses, n, (const T*)reference, m, keys,
                    other_keys, counter);
  }));
  EF_TRY(sort(keys, n, temporary, bytes, stream));
  EF_TRY(sort(other_keys, m, temporary, bytes, stream));
  return launch(ranks, dim3(blocks(n)), dim3(kThreads), 0, stream, keys + n, n, other_keys + m, m, partial, counter, value, weights);
}
