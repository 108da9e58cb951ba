// Lets g++ run the very sources that nvcc compiles: the threads of a cluster's blocks as fibers of one operating-system thread.
//
// Covered (intrinsics.h): thread and block indices, static and dynamic shared memory, block and warp barriers, shuffles, votes,
// atomics, the runtime calls of the launchers; async_copy.h: cp.async, mbarrier, TMA; tensor_cores.h: mma, ldmatrix, wgmma;
// schedule.h: clusters along x, launches that may start early.
// Fibers run in a random order (seeded), each until it blocks, so that warps drift as far apart as the barriers let them;
// clusters run one after another in a random order. Copies and matrix products that the hardware does later are done either
// at once (eager) or at the last moment that the waits allow (lazy): a missing wait shows in one of the two.
// Kernels run one after another, early launches too; what would go wrong if they did not is checked by rules.
// Not covered: the weak memory model between plain accesses (fences are checked by rules instead, see ticket() and
// async_copy.h), static __shared__ in clusters of several blocks, grid-wide barriers, timing, bank conflicts, register pressure.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <random>
#include <source_location>
#include <set>
#include <string>
#include <thread>
#include <tuple>
#include <type_traits>
#include <unordered_set>
#include <vector>

#include "builtins.h"
#include "runtime.h"
#include "span.h"

namespace cuda_host {

using Where = std::source_location;
constexpr size_t STACK = 256 << 10, CANARY = 4096, SHARED_LIMIT = 232448, SHARED_BASE = 1024;

// A counter that opens when as many threads as expected have come; blocked fibers wait for its generation to move.
struct Gate {
  uint64_t generation = 0;
  unsigned arrived = 0, expected = 0, fenced = 0, tally = 0, total = 0;
  alignas(8) unsigned char exchange[2][32][64];
};

struct Fiber {
  ucontext_t context;
  jmp_buf resume;
  bool started, done, fenced, ticket;
  bool waited;  // griddepcontrol.wait; true from the start in a launch that is not early
  const uint64_t* gate;  // blocked while *gate == closed
  uint64_t closed;
  Where where;
  dim3 thread;
  std::vector<std::function<void()>> open;                 // cp.async of the group not committed yet
  std::deque<std::vector<std::function<void()>>> groups;   // committed, not waited for
  std::vector<std::function<void()>> products;             // the same for wgmma
  std::deque<std::vector<std::function<void()>>> batches;
  bool registers_fenced;                                   // wgmma.fence since the last wait
  std::vector<size_t> written;                             // shared bytes written by plain stores, not yet fenced
};

struct Options {
  unsigned seed = 1;
  bool eager = false;
  int off_line = 0;  // the synchronisation at this place is skipped (mutation test)
  std::string off_file;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Gate> warps;
  std::map<std::pair<unsigned, uint32_t>, Gate> parts;  // (warp, mask)
  Gate all;
  bool block_fenced = false;
  dim3 size, grid, index;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  std::vector<unsigned char> unfenced;                   // per shared byte: written by a plain store, no proxy fence yet
  void** stacks;                                         // of its fibers
  std::map<const void*, struct Mbarrier> mbarriers;
  std::function<void()> body;
  jmp_buf scheduler;
  int current = 0;
};

// One phase counter of an mbarrier; the phase completes when the arrivals and the announced bytes are all in.
struct Mbarrier {
  uint64_t generation = 0;
  int count = 0, pending = 0;
  int64_t bytes = 0;
  int owner = 0;
  bool fenced = false;
};

struct Cluster {
  std::vector<Block> blocks;                // by rank
  std::vector<std::function<void()>> late;  // TMA copies that have not landed yet
  Gate all;
};

struct Site {
  std::string file;
  int line;
  bool operator<(const Site& o) const { return std::tie(file, line) < std::tie(o.file, o.line); }
};

inline Options options;
inline std::string error;
inline std::set<Site> visited;  // synchronisations that ran, for the mutation test's coverage
inline unsigned largest_cluster = 0;
inline std::string launches;  // a letter each: e early, - not
inline std::mt19937 random_bits(1);
inline Cluster* cluster = nullptr;
inline Block* block = nullptr;  // the running fiber's
inline std::vector<void*> stacks;

inline Fiber& me() { return block->fibers[block->current]; }
inline unsigned rank() { return block->current; }
inline unsigned lane() { return block->current & 31; }
inline unsigned warp() { return block->current >> 5; }

inline std::string at(const Where& w) {
  std::string f = w.file_name();
  return f.substr(f.rfind('/') + 1) + ":" + std::to_string(w.line());
}

[[noreturn]] inline void fail(const std::string& what) {
  if (error.empty()) {
    error = what;
    if (block) {
      auto& b = block->index;
      auto& t = me().thread;
      error += " [block " + std::to_string(b.x) + "," + std::to_string(b.y) + "," + std::to_string(b.z) + " thread " +
               std::to_string(t.x) + "," + std::to_string(t.y) + "]";
    }
  }
  if (block) _longjmp(block->scheduler, 2);
  throw 1;
}

inline bool skipped(const Where& w) {
  const char* slash = strrchr(w.file_name(), '/');
  const char* file = slash ? slash + 1 : w.file_name();
  static std::unordered_set<uint64_t> seen;
  if (seen.insert(reinterpret_cast<uintptr_t>(w.file_name()) * 4096 + w.line()).second) visited.insert(Site{file, int(w.line())});
  return options.off_line == int(w.line()) && options.off_file == file;
}

inline void wait_while(const uint64_t* gate, uint64_t closed, const Where& w) {
  Fiber& f = me();
  f.gate = gate, f.closed = closed, f.where = w;
  if (!_setjmp(f.resume)) _longjmp(block->scheduler, 1);
}

inline void arrive(Gate& g, unsigned expected, const Where& w, bool wait = true) {
  if (g.arrived && g.expected != expected)
    fail("barrier at " + at(w) + " expects " + std::to_string(expected) + " threads, others expect " + std::to_string(g.expected));
  g.expected = expected;
  uint64_t generation = g.generation;
  if (++g.arrived == expected) {
    g.arrived = 0, ++g.generation;
  } else if (wait) {
    wait_while(&g.generation, generation, w);
  }
}

inline void* dynamic_shared() { return block->shared; }
inline int processors() { return 3; }  // few, so that blocks share the work

// ---- warps

inline unsigned lanes_of(unsigned w) {  // lanes that exist
  unsigned left = block->fibers.size() - w * 32;
  return left >= 32 ? ~0u : (1u << left) - 1;
}

inline Gate& warp_gate(uint32_t mask, const Where& w) {
  if (!(mask >> lane() & 1)) fail("a lane outside of the mask calls the warp operation at " + at(w));
  return mask == ~0u ? block->warps[warp()] : block->parts[{warp(), mask}];
}

inline unsigned warp_expected(uint32_t mask) { return std::popcount(mask & lanes_of(warp())); }

// Every lane of the mask brings a value; returns all of them, by lane. Double-buffered: one barrier is enough.
template <class T>
auto exchange(uint32_t mask, const T& value, const Where& w) {
  static_assert(sizeof(T) <= 64 && std::is_trivially_copyable_v<T>);
  Gate& g = warp_gate(mask, w);
  auto* slots = g.exchange[g.generation & 1];
  memcpy(slots[lane()], &value, sizeof(T));
  arrive(g, warp_expected(mask), w);
  return [slots](unsigned lane) { T v; memcpy(&v, slots[lane & 31], sizeof(T)); return v; };
}

template <class T>
T shuffle(uint32_t mask, T value, unsigned source, const Where& w) {
  auto values = exchange(mask, value, w);
  if (!(mask & lanes_of(warp()) & 1u << (source & 31))) fail("shuffle at " + at(w) + " reads a lane outside of the mask");
  return values(source);
}

inline uint32_t ballot(uint32_t mask, bool yes, const Where& w) {
  auto values = exchange(mask, yes, w);
  uint32_t r = 0;
  for (unsigned i = 0; i < 32; i++)
    if (mask & lanes_of(warp()) & 1u << i) r |= uint32_t(values(i)) << i;
  return r;
}

// ---- blocks

inline void block_barrier(const Where& w) {
  if (me().ticket) fail("a ticket was taken and no __threadfence() came after it, before the barrier at " + at(w));
  Gate& g = block->all;
  g.fenced += me().fenced;
  me().fenced = false;
  if (g.arrived + 1 == block->fibers.size()) block->block_fenced = g.fenced == block->fibers.size(), g.fenced = 0;
  arrive(g, block->fibers.size(), w);
}

inline unsigned block_sum(unsigned value, const Where& w) {
  Gate& g = block->all;
  g.tally += value;
  if (g.arrived + 1 == block->fibers.size()) g.total = g.tally, g.tally = 0;
  block_barrier(w);
  unsigned total = g.total;
  return total;
}

// An unsigned atomic hands out tickets ("the last block adds up"): what was written before needs a fence of this thread
// (or of every thread, then a barrier), what is read after needs another.
inline void ticket(const char* what) {
  if (!me().fenced && !block->block_fenced) fail(std::string(what) + " on unsigned: a ticket without __threadfence() before it");
  me().ticket = true;
}

}  // namespace cuda_host

#include "schedule.h"
#include "intrinsics.h"
#include "async_copy.h"
#include "tensor_cores.h"
