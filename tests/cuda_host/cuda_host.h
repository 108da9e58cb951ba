// Lets g++ run the very sources that nvcc compiles: a CUDA block's threads as fibers of one operating-system thread.
//
// Covered (intrinsics.h): thread and block indices, static and dynamic shared memory, block and warp barriers, shuffles, votes,
// atomics, the runtime calls of the launchers; async_copy.h: cp.async, mbarrier, TMA; tensor_cores.h: mma, ldmatrix, wgmma.
// Fibers run in a random order (seeded), each until it blocks, so that warps drift as far apart as the barriers let them;
// blocks run one after another in a random order. Copies and matrix products that the hardware does later are done either
// at once (eager) or at the last moment that the waits allow (lazy): a missing wait shows in one of the two.
// Not covered: the weak memory model between plain accesses (fences are checked by rules instead, see ticket() and
// async_copy.h), clusters, grid-wide barriers, timing, bank conflicts, register pressure.
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
  std::vector<std::function<void()>> late;               // TMA copies that have not landed yet
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

struct Site {
  std::string file;
  int line;
  bool operator<(const Site& o) const { return std::tie(file, line) < std::tie(o.file, o.line); }
};

inline Options options;
inline std::string error;
inline std::set<Site> visited;  // synchronisations that ran, for the mutation test's coverage
inline std::mt19937 random_bits(1);
inline Block* block = nullptr;
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

// ---- scheduler

inline void enter() {
  block->body();
  me().done = true;
  _longjmp(block->scheduler, 1);
}

inline bool runnable(const Fiber& f) { return !f.done && !(f.gate && *f.gate == f.closed); }

inline int resume(int i) {
  Fiber& f = block->fibers[i];
  block->current = i;
  f.gate = nullptr;
  int why = _setjmp(block->scheduler);
  if (!why) {
    if (f.started) _longjmp(f.resume, 1);
    f.started = true;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = stacks[i], f.context.uc_stack.ss_size = STACK, f.context.uc_link = nullptr;
    makecontext(&f.context, enter, 0);
    setcontext(&f.context);
  }
  return why;
}

inline std::string deadlock() {
  std::map<std::string, int> places;
  int done = 0;
  for (auto& f : block->fibers) f.done ? ++done : ++places[at(f.where)];
  std::string s = "deadlock: of " + std::to_string(block->fibers.size()) + " threads";
  for (auto& [place, count] : places) s += ", " + std::to_string(count) + " wait at " + place;
  return done ? s + ", " + std::to_string(done) + " have left" : s;
}

// false: an error was recorded
inline bool run_block() {
  int n = block->fibers.size(), warps = (n + 31) / 32;
  std::vector<int> order(warps);
  for (int i = 0; i < warps; i++) order[i] = i;
  for (;;) {
    std::shuffle(order.begin(), order.end(), random_bits);
    bool progress = false, live = false;
    for (int w : order) {
      int low = w * 32, count = std::min(n - low, 32);
      for (bool again = true; again;) {
        again = false;
        for (int k = 0, turn = random_bits() % count; k < count; k++) {
          int i = low + (k + turn) % count;
          if (!runnable(block->fibers[i])) continue;
          if (resume(i) == 2) return false;
          again = progress = true;
        }
        if (random_bits() % 8 == 0) break;
      }
      for (int i = low; i < low + count; i++) live |= !block->fibers[i].done;
    }
    if (!live) return true;
    if (!progress && !block->late.empty()) {  // only copies under way can free anyone: one of them lands
      size_t k = random_bits() % block->late.size();
      auto land = std::move(block->late[k]);
      block->late.erase(block->late.begin() + k);
      land();
      progress = true;
    }
    if (!progress) {
      if (error.empty()) error = deadlock();
      return false;
    }
  }
}

inline void run_grid(dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()>& body) {
  long blocks = long(grid.x) * grid.y * grid.z, threads = long(size.x) * size.y * size.z;
  auto refuse = [&](const std::string& what) { if (error.empty()) error = "launch: " + what; };
  if (threads < 1 || threads > 1024 || blocks < 1 || grid.y > 65535 || grid.z > 65535)
    return refuse(std::to_string(blocks) + " blocks of " + std::to_string(threads) + " threads");
  if (shared_bytes > SHARED_LIMIT) return refuse(std::to_string(shared_bytes) + " B of shared memory");
  while (stacks.size() < size_t(threads)) {
    stacks.push_back(mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (stacks.back() == MAP_FAILED) stacks.pop_back(), refuse("no memory for stacks");
  }
  std::vector<unsigned char> arena(shared_bytes + CANARY + 1024);
  unsigned char* shared = arena.data() + (1024 - reinterpret_cast<uintptr_t>(arena.data()) % 1024) % 1024;
  ef::cuda::span_allow(shared, shared_bytes);
  std::vector<long> order(blocks);
  for (long i = 0; i < blocks; i++) order[i] = i;
  std::shuffle(order.begin(), order.end(), random_bits);
  for (long k : order) {
    Block b;
    block = &b;
    b.size = size, b.grid = grid, b.body = body, b.shared = shared, b.shared_bytes = shared_bytes;
    b.index = dim3(k % grid.x, k / grid.x % grid.y, k / grid.x / grid.y);
    b.warps = std::vector<Gate>((threads + 31) / 32);
    b.unfenced.assign(shared_bytes, 0);
    memset(shared, 0xFF, shared_bytes);  // NaN in every float format
    memset(shared + shared_bytes, 0xC5, CANARY);
    b.fibers = std::vector<Fiber>(threads);
    for (long i = 0; i < threads; i++) b.fibers[i].thread = dim3(i % size.x, i / size.x % size.y, i / size.x / size.y);
    bool fine = false;
    std::thread([&] { fine = run_block(); }).join();  // its own thread: __shared__ variables (thread_local) begin afresh
    block = nullptr;
    if (fine && std::any_of(shared + shared_bytes, shared + shared_bytes + CANARY, [](unsigned char c) { return c != 0xC5; }))
      error = "a write beyond the " + std::to_string(shared_bytes) + " B of dynamic shared memory";
    if (!error.empty()) return;
  }
}

inline void launch(dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()>& body) {
  if (error.empty()) run_grid(grid, size, shared_bytes, body);
  if (error.empty()) return;
  int none = 0;
  if (ef::cuda::span_state().compare_exchange_strong(none, cudaErrorLaunchFailure)) fprintf(stderr, "cuda_host: %s\n", error.c_str());
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

#include "intrinsics.h"
#include "async_copy.h"
#include "tensor_cores.h"
