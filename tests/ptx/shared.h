// Shared memory of a block, and of each of its bytes who wrote and who read it since the block's last barrier: what two warps touch
// and one writes is a race, whatever order they ran in.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptx {

constexpr uint32_t kSharedBase = 1024;  // where global_smem begins: swizzled tiles need multiples of 1024

[[noreturn]] inline void fail(const std::string& what) { throw std::runtime_error(what); }

class Shared {
 public:
  explicit Shared(uint32_t size) : bytes(size, 0xFF), writer(size), reader(size), fences(size) {}

  void barrier() { epoch += kEpoch; }
  void fence(uint32_t warp) { fenced[warp] = ++fence_count; }  // fence.proxy.async

  // product: wgmma reads, by the asynchronous proxy
  const unsigned char* read(uint32_t warp, uint64_t address, uint32_t size, bool product = false) {
    const uint32_t first = at(address, size), mine = epoch | warp;
    for (uint32_t k = first; k < first + size; ++k) {
      const uint32_t w = writer[k], r = reader[k];
      if (!w) fail(place(k) + ", which nothing has written");
      if (w != mine && w >= epoch) fail(place(k) + ", which " + name(w) + " wrote, and no barrier since");
      if (product && fences[k] >= fenced[w & kWarp] && fences[k] >= fenced[warp])
        fail(place(k) + ", which " + name(w) + " wrote: wgmma reads it and no fence.proxy.async came between");
      reader[k] = r >= epoch && r != mine ? epoch | kMany : mine;
    }
    return bytes.data() + first;
  }

  // Warps may write the same value. fenced: wgmma may read it as it is
  void write(uint32_t warp, uint64_t address, const void* from, uint32_t size, bool fenced = false) {
    const uint32_t first = at(address, size), mine = epoch | warp;
    const unsigned char* value = static_cast<const unsigned char*>(from);
    for (uint32_t k = first; k < first + size; ++k) {
      const uint32_t w = writer[k], r = reader[k];
      if (r >= epoch && r != mine) fail(place(k) + ", which " + name(r) + " read, and no barrier since");
      if (w >= epoch && w != mine && bytes[k] != value[k - first])
        fail(place(k) + ", where " + name(w) + " wrote another value, and no barrier since");
      writer[k] = w >= epoch && w != mine ? epoch | kMany : mine, fences[k] = fenced ? 0 : fence_count;
    }
    std::memcpy(bytes.data() + first, from, size);
  }

  // TMA's, or an atomic's: those who read it have waited for that
  unsigned char* plain(uint64_t address, uint32_t size, uint32_t aligned) {
    const uint32_t first = at(address, aligned);
    at(address + size - aligned, aligned);
    std::fill_n(writer.begin() + first, size, 1u), std::fill_n(reader.begin() + first, size, 0u), std::fill_n(fences.begin() + first, size, 0u);
    return bytes.data() + first;
  }
  void known(uint64_t address, uint32_t size) const {
    for (uint32_t k = at(address, size), end = k + size; k < end; ++k)
      if (!writer[k]) fail(place(k) + ", which nothing has written");
  }

  uint32_t at(uint64_t address, uint32_t size) const {
    const uint32_t a = uint32_t(address);
    if (a % size) fail("shared memory at " + std::to_string(a) + ", not aligned to " + std::to_string(size) + " bytes");
    if (a < kSharedBase || a - kSharedBase + size > bytes.size())
      fail("shared memory at " + std::to_string(int64_t(a) - kSharedBase) + " of " + std::to_string(bytes.size()) + " bytes");
    return a - kSharedBase;
  }

 private:
  static constexpr uint32_t kWarp = 63, kMany = 32, kEpoch = 64;  // a stamp: the epoch, 32 for several warps, the warp
  static std::string place(uint32_t k) { return "shared memory at " + std::to_string(k); }
  static std::string name(uint32_t stamp) { return stamp & kMany ? "more than one warp" : "warp " + std::to_string(stamp & 31); }

  std::vector<unsigned char> bytes;
  std::vector<uint32_t> writer, reader, fences;  // stamps; fences before the last write
  uint32_t epoch = kEpoch, fence_count = 1;
  std::vector<uint32_t> fenced = std::vector<uint32_t>(64, 1);  // fence_count at a warp's last
};

}  // namespace ptx
