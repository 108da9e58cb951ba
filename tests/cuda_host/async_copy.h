// cp.async, mbarrier, the proxy fence and TMA, for cuda_host.h.
//
// Eager copies land when they are issued; lazy ones when the thread waits for them (cp.async) or when nothing else can run
// (TMA): at the latest moment that the program allows. Proxies are checked by rule: what a plain store wrote to shared
// memory and written_by_store was told of must be fenced by that thread before an asynchronous reader touches it; an mbarrier
// must be fenced by the thread that made it before a copy, or another block of the cluster, may signal it.
#pragma once

#include "schedule.h"

namespace cuda_host {

inline size_t shared_offset(const void* p, size_t bytes, const char* what) {
  auto* c = static_cast<const unsigned char*>(p);
  if (c < block->shared || c + bytes > block->shared + block->shared_bytes) fail(std::string(what) + " outside of shared memory");
  return c - block->shared;
}

// ---- cp.async

inline void cp_async(void* to, const void* from, int bytes, int valid) {
  shared_offset(to, bytes, "cp.async");
  if (valid) must_have_waited("cp.async");
  if (reinterpret_cast<uintptr_t>(to) % bytes || (valid && reinterpret_cast<uintptr_t>(from) % bytes)) fail("misaligned cp.async");
  auto copy = [=] {
    if (valid) memcpy(to, from, valid);
    memset(static_cast<char*>(to) + valid, 0, bytes - valid);
  };
  options.eager ? copy() : me().open.push_back(copy);
}
inline void cp_async_commit(const Where& w) {
  if (skipped(w)) return;
  me().groups.push_back(std::move(me().open));
  me().open.clear();
}
inline void cp_async_wait(size_t left, const Where& w) {
  if (skipped(w)) return;
  for (auto& groups = me().groups; groups.size() > left; groups.pop_front())
    for (auto& copy : groups.front()) copy();
}

// ---- proxies

inline void written_by_store(const void* p, size_t bytes) {
  size_t at = shared_offset(p, bytes, "store");
  for (size_t i = at; i < at + bytes; i++) block->unfenced[i] = 1, me().written.push_back(i);
}
inline void read_by_proxy(size_t at, size_t bytes, const char* what, const Block& b = *block) {
  for (size_t i = at; i < at + bytes; i++)
    if (b.unfenced[i]) fail(std::string(what) + " touches what a plain store wrote, without fence.proxy.async");
}
inline void fence_proxy_async() {
  for (size_t i : me().written) block->unfenced[i] = 0;
  me().written.clear();
}

// ---- mbarrier

// p of the running block, in the shared memory of block b
inline unsigned char* there(const void* p, const Block& b) { return b.shared + (static_cast<const unsigned char*>(p) - block->shared); }

inline Mbarrier& mbarrier(const void* p, Block& b = *block) {
  auto found = b.mbarriers.find(there(p, b));
  if (found == b.mbarriers.end()) fail("an mbarrier that was not initialised");
  return found->second;
}
inline void complete_if_done(Mbarrier& m) {
  if (m.pending == 0 && m.bytes == 0) m.pending = m.count, ++m.generation;
}
inline void mbarrier_init(uint64_t* p, int count) {
  shared_offset(p, 8, "mbarrier");
  Mbarrier& m = block->mbarriers[p];
  m.count = m.pending = count, m.owner = block->current;
}
inline void fence_mbarrier_init(const Where& w) {
  if (skipped(w)) return;
  for (auto& [p, m] : block->mbarriers)
    if (m.owner == block->current) m.fenced = true;
}
inline void arrive(Mbarrier& m, int64_t bytes, const Where& w) {
  if (m.pending == 0) fail("more arrivals than an mbarrier counts, at " + at(w));
  m.bytes += bytes, --m.pending;
  complete_if_done(m);
}
inline void mbarrier_arrive(uint64_t* p, int64_t bytes, const Where& w) {
  if (!skipped(w)) arrive(mbarrier(p), bytes, w);
}
inline void mbarrier_arrive_at(uint64_t* p, unsigned rank, const Where& w) {
  if (skipped(w)) return;
  Mbarrier& m = mbarrier(p, peer(rank, "an arrival"));
  if (!m.fenced) fail("an arrival from the cluster at an mbarrier whose initialisation was not fenced");
  arrive(m, 0, w);
}
inline void mbarrier_wait(uint64_t* p, unsigned parity, const Where& w) {
  if (skipped(w)) return;
  Mbarrier& m = mbarrier(p);
  if ((m.generation & 1) == parity) wait_while(&m.generation, m.generation, w);
}

// ---- TMA

struct TensorMap {
  const unsigned char* base;
  uint64_t size[5], stride[5];  // elements; bytes, stride[0] the element's
  uint32_t box[5];
  int rank, swizzle;  // bytes: 0, 32, 64, 128
};

inline int encode(TensorMap* map, const void* base, int element, int rank, const uint64_t* size, const uint64_t* stride,
                  const uint32_t* box, int swizzle) {
  *map = {static_cast<const unsigned char*>(base), {}, {}, {}, rank, swizzle};
  bool fine = reinterpret_cast<uintptr_t>(base) % 16 == 0 && rank >= 1 && rank <= 5 && box[0] * element % 16 == 0 &&
              (!swizzle || box[0] * element <= unsigned(swizzle));
  for (int d = 0; d < rank; d++) {
    map->size[d] = size[d], map->stride[d] = d ? stride[d - 1] : element, map->box[d] = box[d];
    fine = fine && size[d] >= 1 && size[d] <= 1ull << 32 && box[d] >= 1 && box[d] <= 256 && (!d || map->stride[d] % 16 == 0);
  }
  int64_t last = element;
  for (int d = 0; d < rank; d++) last += int64_t(size[d] - 1) * int64_t(map->stride[d]);
  if (fine && last > ef::cuda::Span<const unsigned char>(map->base).high()) {
    ef::cuda::span_fail("TMA map", base, 0, 0, last);
    return 700;
  }
  return fine ? cudaSuccess : cudaErrorInvalidValue;
}

// The chunk of 16 bytes within a row moves by the address's own bits (PTX ISA, "swizzling modes").
inline size_t swizzled(size_t address, int mode) {
  return mode == 128 ? address ^ (address >> 3 & 0x70) : mode == 64 ? address ^ (address >> 3 & 0x30)
         : mode == 32 ? address ^ (address >> 3 & 0x10) : address;
}

// A box's bytes into shared memory at `at` of block b, then off what its mbarrier expects
inline void land(const TensorMap& map, const std::array<int, 5>& first, size_t at, size_t bytes, Block& b, Mbarrier& m) {
  if (has_left(b) && error.empty()) error = "TMA lands in a block that has left";
  std::array<uint32_t, 5> k{};
  size_t element = map.stride[0];
  for (size_t done = 0; done < bytes; done += element) {
    const unsigned char* from = map.base;
    bool inside = true;
    for (int d = 0; d < map.rank; d++) {
      int64_t i = int64_t(first[d]) + k[d];
      inside = inside && i >= 0 && uint64_t(i) < map.size[d];
      from += i * int64_t(map.stride[d]);
    }
    unsigned char* target = b.shared + swizzled(at + SHARED_BASE + done, map.swizzle) - SHARED_BASE;
    inside ? memcpy(target, from, element) : memset(target, 0, element);
    for (int d = 0; d < map.rank && ++k[d] == map.box[d]; d++) k[d] = 0;
  }
  m.bytes -= int64_t(bytes);
  complete_if_done(m);
}

// ranks: a bit for each block of the cluster that takes the box; they need not get it at the same time
inline void tma_load(void* to, const TensorMap* map, std::array<int, 5> first, uint64_t* bar, unsigned ranks) {
  must_have_waited("a TMA copy");
  size_t bytes = map->stride[0], at = 0;
  for (int d = 0; d < map->rank; d++) bytes *= map->box[d];
  at = shared_offset(to, bytes, "TMA");
  if (at % (map->swizzle ? map->swizzle * 8 : 128)) fail("TMA destination not aligned to its swizzle's pattern");
  for (unsigned rank = 0; ranks >> rank; rank++) {
    if (!(ranks >> rank & 1)) continue;
    Block& b = peer(rank, "TMA");
    Mbarrier& m = mbarrier(bar, b);
    if (!m.fenced) fail("TMA signals an mbarrier whose initialisation was not fenced");
    read_by_proxy(at, bytes, "TMA", b);
    auto copy = [map = *map, first, at, bytes, &b, &m] { land(map, first, at, bytes, b, m); };
    options.eager ? copy() : cluster->late.push_back(copy);
  }
}

}  // namespace cuda_host
