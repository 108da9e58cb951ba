// The scheduler of cuda_host.h: fibers of a cluster's blocks in random order, clusters one after another in random order.
#pragma once

#include "cuda_host.h"

namespace cuda_host {

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
    f.context.uc_stack.ss_sp = block->stacks[i], f.context.uc_stack.ss_size = STACK, f.context.uc_link = nullptr;
    makecontext(&f.context, enter, 0);
    setcontext(&f.context);
  }
  return why;
}

inline std::string deadlock() {
  std::map<std::string, int> places;
  size_t done = 0, all = 0;
  for (auto& b : cluster->blocks)
    for (auto& f : b.fibers) ++all, f.done ? ++done : ++places[at(f.where)];
  std::string s = "deadlock: of " + std::to_string(all) + " threads";
  for (auto& [place, count] : places) s += ", " + std::to_string(count) + " wait at " + place;
  return done ? s + ", " + std::to_string(done) + " have left" : s;
}

// false: an error was recorded
inline bool run_cluster() {
  struct Warp { Block* block; int low, count; };
  std::vector<Warp> order;
  for (auto& b : cluster->blocks)
    for (int n = b.fibers.size(), low = 0; low < n; low += 32) order.push_back({&b, low, std::min(n - low, 32)});
  const size_t blocks = cluster->blocks.size();
  Block* asleep = nullptr;  // for some rounds, so that blocks come apart further than warps do
  auto nod = [&] { asleep = blocks > 1 && random_bits() % 2 ? &cluster->blocks[random_bits() % blocks] : nullptr; };
  nod();
  for (;;) {
    std::shuffle(order.begin(), order.end(), random_bits);
    if (random_bits() % 4 == 0) nod();
    bool progress = false, live = false;
    for (auto& [b, low, count] : order) {
      block = b;
      for (bool again = b != asleep; again;) {
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
    if (live && !progress && asleep) {
      asleep = nullptr;
      continue;
    }
    auto& late = cluster->late;
    if (live && !progress && !late.empty()) {  // only copies under way can free anyone: one of them lands
      size_t k = random_bits() % late.size();
      auto land = std::move(late[k]);
      late.erase(late.begin() + k);
      land();
      progress = true;
    }
    if (live && !progress && error.empty()) error = deadlock();
    if (!error.empty()) return false;
    if (!live) return true;
  }
}

inline void* new_stack() {
  void* p = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return p == MAP_FAILED ? nullptr : p;
}

// ---- launches that may start early (programmatic dependent launch), by the rules of ptx.cuh: a thread has waited before it touches
// memory outside of its block, and before it lets the next kernel start; and some thread does wait, for else the end of this kernel
// would not tell the next one that the kernel before has ended

inline bool grid_waited = false;

inline void must_have_waited(const char* what) {
  if (!me().waited) fail(std::string(what) + " before griddepcontrol.wait");
}
inline void touched(const void* p) {
  auto* c = static_cast<const unsigned char*>(p);
  if (c < block->shared || c >= block->shared + block->shared_bytes) must_have_waited("an access to memory");
}
inline void griddepcontrol_wait(const Where& w) {
  if (!skipped(w)) me().waited = grid_waited = true;
}
inline void griddepcontrol_launch_dependents() { must_have_waited("launch_dependents"); }

// `many` blocks of a cluster lie side by side along x
inline void run_grid(dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()>& body, unsigned many, bool early) {
  long blocks = long(grid.x) * grid.y * grid.z, threads = long(size.x) * size.y * size.z;
  auto refuse = [&](const std::string& what) { if (error.empty()) error = "launch: " + what; };
  if (threads < 1 || threads > 1024 || blocks < 1 || grid.y > 65535 || grid.z > 65535)
    return refuse(std::to_string(blocks) + " blocks of " + std::to_string(threads) + " threads");
  if (many < 1 || many > 8 || grid.x % many)
    return refuse(std::to_string(grid.x) + " blocks along x in clusters of " + std::to_string(many));
  largest_cluster = std::max(largest_cluster, many), launches += early ? 'e' : '-';
  grid_waited = !early, ef::cuda::span_watch = early ? touched : nullptr;
  if (shared_bytes > SHARED_LIMIT) return refuse(std::to_string(shared_bytes) + " B of shared memory");
  while (stacks.size() < size_t(threads) * many)
    if (void* p = new_stack()) stacks.push_back(p);
    else return refuse("no memory for stacks");
  const size_t each = (shared_bytes + CANARY + 1023) / 1024 * 1024;
  std::vector<unsigned char> arena(each * many + 1024);
  unsigned char* base = arena.data() + (1024 - reinterpret_cast<uintptr_t>(arena.data()) % 1024) % 1024;
  std::vector<long> order(blocks / many);
  for (size_t i = 0; i < order.size(); i++) order[i] = i;
  std::shuffle(order.begin(), order.end(), random_bits);
  for (long k : order) {
    Cluster c;
    c.blocks = std::vector<Block>(many);
    for (unsigned rank = 0; rank < many; rank++) {
      Block& b = c.blocks[rank];
      const long first = k * many + rank;
      b.size = size, b.grid = grid, b.body = body, b.shared = base + rank * each, b.shared_bytes = shared_bytes;
      b.index = dim3(first % grid.x, first / grid.x % grid.y, first / grid.x / grid.y);
      b.warps = std::vector<Gate>((threads + 31) / 32);
      b.unfenced.assign(shared_bytes, 0);
      b.stacks = stacks.data() + rank * threads;
      ef::cuda::span_allow(b.shared, shared_bytes);
      memset(b.shared, 0xFF, shared_bytes);  // NaN in every float format
      memset(b.shared + shared_bytes, 0xC5, CANARY);
      b.fibers = std::vector<Fiber>(threads);
      for (long i = 0; i < threads; i++) {
        b.fibers[i].thread = dim3(i % size.x, i / size.x % size.y, i / size.x / size.y);
        b.fibers[i].waited = !early;
      }
    }
    cluster = &c;
    bool fine = false;
    std::thread([&] { fine = run_cluster(); }).join();  // its own thread: __shared__ variables (thread_local) begin afresh
    for (auto& b : c.blocks)
      if (fine && std::any_of(b.shared + shared_bytes, b.shared + shared_bytes + CANARY, [](unsigned char x) { return x != 0xC5; }))
        error = "a write beyond the " + std::to_string(shared_bytes) + " B of dynamic shared memory";
    block = nullptr, cluster = nullptr;
    if (!error.empty()) return;
  }
  if (!grid_waited) refuse("early, but no thread waits for the kernel before (griddepcontrol.wait)");
}

inline void launch(dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()>& body, unsigned many = 1, bool early = false) {
  if (error.empty()) run_grid(grid, size, shared_bytes, body, many, early);
  if (error.empty()) return;
  int none = 0;
  if (ef::cuda::span_state().compare_exchange_strong(none, cudaErrorLaunchFailure)) fprintf(stderr, "cuda_host: %s\n", error.c_str());
}

// ---- clusters

inline unsigned cluster_rank() { return block - cluster->blocks.data(); }

// A cluster's barrier waits for every thread: more than the hardware asks, which lets those that have left go
inline void cluster_sync(const Where& w) {
  if (!skipped(w)) arrive(cluster->all, cluster->blocks.size() * block->fibers.size(), w);
}

inline bool has_left(const Block& b) {
  return std::all_of(b.fibers.begin(), b.fibers.end(), [](const Fiber& f) { return f.done; });
}
inline Block& peer(unsigned rank, const char* what) {
  if (rank >= cluster->blocks.size()) fail(std::string(what) + " reaches beyond the cluster");
  if (has_left(cluster->blocks[rank])) fail(std::string(what) + " reaches a block that has left");
  return cluster->blocks[rank];
}

}  // namespace cuda_host
