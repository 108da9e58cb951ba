// Clusters of blocks, mbarriers and TMA. What TMA brings lands at once (eager), or at a random later time, at the latest when nothing
// else can go on.
#pragma once

#include "memory.h"
#include "tensor_map.h"

namespace ptx {

inline Mbarrier& barrier_at(Block& block, uint64_t address) {
  const auto found = block.barriers.find(block.shared.at(address, 8));
  if (found == block.barriers.end()) fail("no mbarrier was initialised at " + std::to_string(address));
  return found->second;
}
inline void turn_if_done(Cluster& cluster, Mbarrier& b) {
  if (b.pending < 0) fail("more arrive at an mbarrier than it expects");
  if (b.pending || b.bytes) return;
  b.pending = b.expected, b.phase ^= 1, cluster.moved = true;
}

inline void barrier_init(Warp& w, const Instruction& i, Mask m) {
  lanes(m, [&](int l) {
    const int64_t many = int64_t(uint32_t(w.row(i.from[1])[l]));
    if (many < 1 || many >= 1 << 20) fail("mbarrier.init for " + std::to_string(many));
    w.block.barriers[w.block.shared.at(w.row(i.from[0])[l] + i.offset, 8)] = {many, many};
  });
}

// An address of the cluster: the block's rank + 1 above 24 bits of its own address; without a rank it is this block's
inline uint32_t mapped(uint32_t address, uint32_t rank) { return (address & 0xFFFFFF) | (rank + 1) << 24; }
inline void barrier_arrive(Warp& w, const Instruction& i, Mask m) {
  lanes(m, [&](int l) {
    const uint32_t address = uint32_t(w.row(i.from[0])[l] + i.offset), rank = address >> 24 ? (address >> 24) - 1 : w.block.rank;
    auto& blocks = w.block.cluster.blocks;
    if (rank >= blocks.size()) fail("block " + std::to_string(rank) + " of a cluster of " + std::to_string(blocks.size()));
    Mbarrier& b = barrier_at(*blocks[rank], address & 0xFFFFFF);
    --b.pending, turn_if_done(w.block.cluster, b);
  });
}
inline void barrier_expect(Warp& w, const Instruction& i, Mask m) {
  lanes(m, [&](int l) {
    Mbarrier& b = barrier_at(w.block, w.row(i.from[0])[l] + i.offset);
    b.bytes += int64_t(uint32_t(w.row(i.from[1])[l])), --b.pending, turn_if_done(w.block.cluster, b);
  });
}
// of the whole group of lanes, which wait together
inline void barrier_passed(Warp& w, const Instruction& i, Mask m) {
  bool passed = true;
  lanes(m, [&](int l) { passed &= barrier_at(w.block, w.row(i.from[0])[l] + i.offset).phase != (w.row(i.from[1])[l] & 1); });
  w.waits = !passed;
  lanes(m, [&](int l) { w.row(i.to[0])[l] = 1; });
}

inline void cluster_arrive(Warp& w, const Instruction&, Mask m) {
  w.all_here(m, "barrier.cluster.arrive");
  Cluster& cluster = w.block.cluster;
  w.turn = cluster.turns;
  if (++cluster.arrived < cluster.warps) return;
  cluster.arrived = 0, ++cluster.turns, cluster.moved = true;
  for (Block* block : cluster.blocks) block->shared.barrier();
}
inline void cluster_passed(Warp& w, const Instruction&, Mask m) {
  w.all_here(m, "barrier.cluster.wait");
  w.waits = w.block.cluster.turns == w.turn;
}

inline void arrive(Arrival& x) {
  const uint32_t rows = uint32_t(x.bytes.size() / 128);
  for (uint32_t r = 0; r < rows; ++r)
    for (uint32_t c = 0; c < 8; ++c) {
      const uint32_t to = x.to + r * 128 + c * 16;
      std::memcpy(x.block->shared.plain(to ^ (to >> 3 & 0x70), 16, 16), x.bytes.data() + r * 128 + c * 16, 16);
    }
  Mbarrier& b = barrier_at(*x.block, x.barrier);
  b.bytes -= int64_t(x.bytes.size());
  turn_if_done(x.block->cluster, b);
}

// from: to, map, columns, rows, planes, mbarrier, the blocks that get it (where shape[0])
inline void tensor_copy(Warp& w, const Instruction& i, Mask m) {
  lanes(m, [&](int l) {
    const uint64_t at = w.row(i.from[1])[l] - kParamBase;
    const auto& args = w.block.launch.args;
    TensorMap map;
    if (at % 64 || at > args.size() || args.size() - at < 128) fail("a tensor map that is no parameter, or not aligned to 64 bytes");
    std::memcpy(&map, args.data() + at, sizeof map);
    if (map.kind != kTensorMap) fail("no tensor map");
    const uint32_t to = uint32_t(w.row(i.from[0])[l] + i.offset), barrier = uint32_t(w.row(i.from[5])[l]);
    if (to % 1024 && map.box[1] % 8 == 0) fail("a swizzled box that does not begin at a multiple of 1024 bytes");
    int32_t first[3];
    for (int k = 0; k < 3; ++k) first[k] = int32_t(w.row(i.from[2 + k])[l]);
    if (map.box[0] != 64 || map.box[2] != 1) fail("a box that this machine does not cover");
    std::vector<unsigned char> bytes(size_t(map.box[1]) * 128);
    auto inside = [&](int k, int64_t x) { return x >= 0 && uint64_t(x) < map.size[k]; };
    for (int64_t r = 0; r < map.box[1]; ++r)
      for (int64_t c = 0; c < 64 && inside(1, first[1] + r) && inside(2, first[2]); ++c)
        if (inside(0, first[0] + c))
          std::memcpy(&bytes[r * 128 + c * 2],
                      w.global(map.address + 2 * (first[0] + c) + map.stride[0] * uint64_t(first[1] + r) + map.stride[1] * uint64_t(first[2]), 2, 2), 2);
    const uint32_t mask = i.shape[0] ? uint32_t(w.row(i.from[6])[l]) & 0xFFFF : 1u << w.block.rank;
    auto& blocks = w.block.cluster.blocks;
    if (!mask || mask >> blocks.size()) fail("a copy to blocks that the cluster has not");
    for (size_t k = 0; k < blocks.size(); ++k)
      if (mask >> k & 1) {
        Arrival x{blocks[k], to, barrier, bytes};
        if (w.block.launch.eager) arrive(x);
        else w.block.cluster.arrivals.push_back(std::move(x));
      }
  });
}

}  // namespace ptx
