// Loads, stores, copies, and what lanes tell each other.
#pragma once

#include <algorithm>

#include "machine.h"

namespace ptx {

// ---- what accesses cost: sectors of 32 bytes that a global request touches; passes over the 32 banks that a shared one takes,
// beside those it would take if no two of its words shared a bank

inline void count_request(Warp& w, Mask m, const uint64_t* address, int bytes) {  // aligned: a lane asks for one sector
  uint64_t sectors[32];
  int many = 0;
  lanes(m, [&](int l) { sectors[many++] = address[l] / 32; });
  if (!std::is_sorted(sectors, sectors + many)) std::sort(sectors, sectors + many);
  w.block.launch.sectors += std::unique(sectors, sectors + many) - sectors;
  w.block.launch.bytes += uint64_t(many) * bytes;
  ++w.block.launch.requests;
}

inline void count_shared(Warp& w, const uint32_t* starts, int many, int bytes) {  // of lanes, or of matrices' rows
  const int together = std::min(32, 128 / bytes);
  for (int first = 0; first < many; first += together) {
    uint32_t words[32][32];  // of each bank, that differ
    uint8_t depth[32] = {};
    uint8_t deepest = 1;
    for (int l = first; l < std::min(many, first + together); ++l)
      for (uint32_t word = starts[l] / 4; word <= (starts[l] + bytes - 1) / 4; ++word) {
        uint32_t* bank = words[word % 32];
        uint8_t& size = depth[word % 32];
        if (std::find(bank, bank + size, word) == bank + size) bank[size++] = word;
        deepest = std::max(deepest, size);
      }
    ++w.block.launch.shared, w.block.launch.wavefronts += deepest;
  }
}

inline uint64_t value(const unsigned char* from, int size, bool sign) {
  uint64_t bits = 0;
  std::memcpy(&bits, from, size);
  if (sign && size < 8) bits = uint64_t(int64_t(bits << (64 - 8 * size)) >> (64 - 8 * size));
  return bits;
}

enum class Space { kGlobal, kShared, kLocal, kParam };

template <Space S> unsigned char* place(Warp& w, uint64_t address, int bytes, int lane) {
  if constexpr (S == Space::kGlobal) return w.global(address, bytes, bytes);
  uint64_t size = w.program.local, first = size * lane;
  unsigned char* all = w.local.data();
  if constexpr (S == Space::kParam) {
    auto& args = w.block.launch.args;
    size = args.size(), first = 0, all = args.data();
  }
  if (address > size || uint64_t(bytes) > size - address || address % bytes)
    fail((S == Space::kLocal ? "local memory at " : "parameters at ") + std::to_string(address) + " of " + std::to_string(size) + " bytes");
  return all + first + address;
}

template <Space S> void count(Warp& w, Mask m, const uint64_t* address, int bytes) {
  if (S == Space::kGlobal) count_request(w, m, address, bytes);
  if (S != Space::kShared) return;
  uint32_t starts[32];
  int many = 0;
  lanes(m, [&](int l) { starts[many++] = uint32_t(address[l]); });
  count_shared(w, starts, many, bytes);
}

// shape[0]: sign extension
template <Space S> void load(Warp& w, const Instruction& i, Mask m) {
  uint64_t address[32];
  const int bytes = i.size * i.many;
  lanes(m, [&](int l) { address[l] = w.row(i.from[0])[l] + i.offset; });
  lanes(m, [&](int l) {
    const unsigned char* from;
    if constexpr (S == Space::kShared) from = w.block.shared.read(w.id, address[l], bytes);
    else from = place<S>(w, address[l], bytes, l);
    for (int k = 0; k < i.many; ++k) w.row(i.to[k])[l] = value(from + k * i.size, i.size, i.shape[0]);
  });
  count<S>(w, m, address, bytes);
}

template <Space S> void store(Warp& w, const Instruction& i, Mask m) {
  uint64_t address[32];
  const int bytes = i.size * i.many;
  lanes(m, [&](int l) { address[l] = w.row(i.from[0])[l] + i.offset; });
  lanes(m, [&](int l) {
    unsigned char value[64];
    for (int k = 0; k < i.many; ++k) std::memcpy(value + k * i.size, w.row(i.from[1 + k]) + l, i.size);
    if constexpr (S == Space::kShared) w.block.shared.write(w.id, address[l], value, bytes);
    else std::memcpy(place<S>(w, address[l], bytes, l), value, bytes);
  });
  count<S>(w, m, address, bytes);
}

inline void atomic_add(Warp& w, const Instruction& i, Mask m) {
  lanes(m, [&](int l) {
    unsigned char* at = w.global(w.row(i.from[0])[l] + i.offset, i.size, i.size);
    const uint64_t old = value(at, i.size, false), sum = old + w.row(i.from[1])[l];
    std::memcpy(at, &sum, i.size);
    w.row(i.to[0])[l] = old;
  });
}

inline void atomic_shared(Warp& w, const Instruction& i, Mask m) {
  lanes(m, [&](int l) {
    const uint64_t address = w.row(i.from[0])[l] + i.offset;
    w.block.shared.known(address, 4);
    unsigned char* at = w.block.shared.plain(address, 4, 4);
    const uint32_t old = uint32_t(value(at, 4, false)), sum = old + uint32_t(w.row(i.from[1])[l]);
    std::memcpy(at, &sum, 4);
    w.row(i.to[0])[l] = old;
  });
}

// ---- cp.async: from[0] to, from[1] from, from[2] (if there) how many bytes; the rest becomes zero

inline void land(Warp& w, const std::vector<Copy>& all) {
  for (const Copy& c : all) {
    unsigned char value[16] = {};
    if (c.valid) std::memcpy(value, c.from, c.valid);
    w.block.shared.write(w.id, c.to, value, c.size, w.block.launch.copies_fenced);
  }
}
inline void copy_async(Warp& w, const Instruction& i, Mask m) {
  std::vector<Copy> all;
  uint64_t address[32];
  Mask read = 0;
  lanes(m, [&](int l) {
    const int valid = i.from.size() > 2 ? int(uint32_t(w.row(i.from[2])[l])) : i.size;
    if (valid < 0 || valid > i.size) fail("cp.async of " + std::to_string(valid) + " bytes");
    address[l] = w.row(i.from[1])[l] + i.shape[1];
    if (valid) w.global(address[l], valid, i.size), read |= 1u << l;
    const uint32_t to = uint32_t(w.row(i.from[0])[l] + i.offset);
    w.block.shared.at(to, i.size);
    all.push_back({to, reinterpret_cast<unsigned char*>(address[l]), i.size, valid});
  });
  if (read) count_request(w, read, address, i.size);
  if (w.block.launch.eager) return land(w, all);
  w.open.insert(w.open.end(), all.begin(), all.end());
}
inline void copy_commit(Warp& w, const Instruction&, Mask m) {
  w.all_here(m, "cp.async.commit_group");
  w.groups.push_back(std::move(w.open));
  w.open.clear();
}
inline void copy_wait(Warp& w, const Instruction& i, Mask m) {
  w.all_here(m, "cp.async.wait_group");
  for (; w.groups.size() > size_t(i.offset); w.groups.pop_front()) land(w, w.groups.front());
}

// ---- between lanes: shape[0] is what a lane looks at

// The lanes that an instruction names must be those that are here
inline void named(Warp& w, int row, Mask m, int lane, const char* what) {
  if (Mask(w.row(row)[lane]) != m) fail(std::string(what) + " names other lanes than those that are here");
}

enum Look { kButterfly, kIndex, kUp, kDown };

inline void shuffle(Warp& w, const Instruction& i, Mask m) {
  uint64_t old[32];
  std::memcpy(old, w.row(i.from[0]), sizeof old);
  lanes(m, [&](int l) {
    named(w, i.from[3], m, l, "shfl.sync");
    const uint32_t by = uint32_t(w.row(i.from[1])[l]) & 31, c = uint32_t(w.row(i.from[2])[l]), clamp = c & 31, segment = c >> 8 & 31;
    const int last = int((l & segment) | (clamp & ~segment)), first = int(l & segment);
    int from = i.shape[0] == kButterfly ? l ^ int(by) : i.shape[0] == kUp ? l - int(by) : i.shape[0] == kDown ? l + int(by)
                                                                                        : int(first | (by & ~segment));
    const bool inside = i.shape[0] == kUp ? from >= last : from <= last;
    if (!inside) from = l;
    if (!(m >> from & 1)) fail("shfl reads lane " + std::to_string(from) + ", which is not there");
    w.row(i.to[0])[l] = old[from];
    if (i.to.size() > 1) w.row(i.to[1])[l] = inside;
  });
}

enum Fold { kAdd, kMax, kMin, kAnd, kOr, kXor };

// shape[0]: the fold; shape[1]: signed
inline void reduce(Warp& w, const Instruction& i, Mask m) {
  lanes(m, [&](int l) { named(w, i.from[1], m, l, "redux.sync"); });
  int64_t sum = 0;
  bool first = true;
  lanes(m, [&](int l) {
    const uint32_t bits = uint32_t(w.row(i.from[0])[l]);
    const int64_t x = i.shape[1] ? int64_t(int32_t(bits)) : int64_t(bits);
    if (first) sum = x, first = false;
    else sum = i.shape[0] == kAdd ? sum + x : i.shape[0] == kMax ? std::max(sum, x) : i.shape[0] == kMin ? std::min(sum, x)
               : i.shape[0] == kAnd ? sum & x : i.shape[0] == kOr ? sum | x : sum ^ x;
  });
  lanes(m, [&](int l) { w.row(i.to[0])[l] = uint32_t(sum); });
}

// shape[0]: ballot, any, all
inline void vote(Warp& w, const Instruction& i, Mask m) {
  Mask yes = 0;
  lanes(m, [&](int l) { named(w, i.from[1], m, l, "vote.sync"); });
  lanes(m, [&](int l) { yes |= Mask(w.row(i.from[0])[l] & 1) << l; });
  lanes(m, [&](int l) { w.row(i.to[0])[l] = i.shape[0] == 0 ? yes : i.shape[0] == 1 ? yes != 0 : yes == m; });
}

}  // namespace ptx
