// What tests/ptx/gpu.py calls: read a program, launch it.
#include "machine.h"

#include <numeric>

#include "decode.h"

namespace ptx {

// Of lanes that have diverged those at the lowest counter go on, but never into what needs the whole warp: they wait there for
// the others, as where a GPU lets paths meet
void choose(Warp& w, uint32_t& pc, Mask& here) {
  pc = ~0u;
  for (Mask left = w.alive; left;) {
    const uint32_t at = w.at[__builtin_ctz(left)];
    Mask group = 0;
    lanes(left, [&](int l) { group |= Mask(w.at[l] == at) << l; });
    left &= ~group;
    if (at < pc && at < w.program.code.size() && (group == w.alive || !w.program.code[at].together)) pc = at, here = group;
  }
  if (pc == ~0u) fail("lanes wait for each other at several places");
  w.diverged = here != w.alive;
}

// Runs a warp until it waits at a barrier or has left
void advance(Warp& w) {
  const auto& code = w.program.code;
  uint32_t pc = 0;
  Mask here = 0;
  try {
    while (w.alive) {
      here = w.alive, pc = w.at[__builtin_ctz(w.alive)];
      if (w.diverged) choose(w, pc, here);
      for (bool straight = true; straight;) {
        if (pc >= code.size()) fail("ran past the end");
        const Instruction& i = code[pc];
        Mask m = here;
        if (i.guard >= 0) {
          const uint64_t* guard = w.row(i.guard);
          m = 0;
          lanes(here, [&](int l) { m |= Mask((guard[l] & 1) != uint64_t(i.unless)) << l; });
        }
        if (++w.block.launch.instructions > w.block.launch.limit) fail("it goes on and on");
        ++pc;
        if (i.kind == Instruction::kPlain || i.kind == Instruction::kWait) {
          if (w.program.products) {
            if (!w.products.empty() || !w.batches.empty()) check_held(w, i);
            if (i.run != wgmma && m) {
              for (int r : i.to) w.held[r].written = w.fences;
              for (int r : i.from) w.held[r].read = w.fences;
            }
          }
          if (m) i.run(w, i, m);
          if (w.waits) {  // and asks again when it goes on
            lanes(here, [&](int l) { w.at[l] = pc - 1; });
            return;
          }
          straight = !w.diverged;
        } else if (i.kind == Instruction::kBranch) {
          straight = m == here && !w.diverged;
          if (straight) pc = uint32_t(i.offset);
          else if (m) {
            lanes(m, [&](int l) { w.at[l] = uint32_t(i.offset); });
            here &= ~m, w.diverged = true;
          } else straight = !w.diverged;
        } else if (i.kind == Instruction::kExit) {
          w.alive &= ~m, here &= ~m;
          straight = here && !w.diverged;
        } else {
          w.all_here(here, "a barrier");
          w.barrier = int(w.row(i.from[0])[0]), w.met = &i;
          if (w.barrier < 0 || w.barrier > 15) fail("barrier " + std::to_string(w.barrier));
          lanes(here, [&](int l) { w.at[l] = pc; });
          return;
        }
      }
      lanes(here, [&](int l) { w.at[l] = pc; });
    }
  } catch (const std::exception& e) {
    const int source = pc ? code[std::min<size_t>(pc - 1, code.size() - 1)].source : 0;
    fail(w.program.name + ", " + w.program.places[source] + ", block (" + std::to_string(w.block.id[0]) + ", " + std::to_string(w.block.id[1]) + ", " +
         std::to_string(w.block.id[2]) + "), warp " + std::to_string(w.id) + ": " + e.what());
  }
}

void fill(const Program& p, Warp& w) {
  for (auto& [row, bits] : p.constants) std::fill_n(w.row(row), 32, bits);
  for (auto& [row, name] : p.specials) {
    const int axis = name.back() == 'y' ? 1 : name.back() == 'z' ? 2 : 0;
    for (int l = 0; l < 32; ++l)
      w.row(row)[l] = starts(name, "%tid") ? (axis ? 0 : w.id * 32 + l) : starts(name, "%ntid") ? (axis ? 1 : w.block.launch.threads)
                      : starts(name, "%cluster_ctarank") ? w.block.rank : starts(name, "%cluster_nctarank") ? w.block.launch.cluster
                      : starts(name, "%lanemask_le") ? (2u << l) - 1 : starts(name, "%ctaid") ? w.block.id[axis] : starts(name, "%nctaid") ? w.block.launch.grid[axis] : l;
  }
}

// All warps of the block that wait at w's barrier go on, if none is missing
void meet(std::vector<Warp*>& ready, std::vector<Warp>& all, Warp& w) {
  std::vector<Warp*> there;
  size_t of_block = 0;
  bool any = false;
  for (auto& other : all) {
    if (&other.block != &w.block) continue;
    ++of_block;
    if (other.alive && other.barrier == w.barrier) there.push_back(&other);
  }
  if (there.size() < of_block) return;
  const auto reduces = [](Warp* x) { return x->met->to.empty() ? 0 : 1; };
  for (Warp* x : there) {
    if (reduces(x) != reduces(there[0])) fail("bar.sync meets bar.red");
    for (int l = 0; reduces(x) && l < 32; ++l) any |= x->row(x->met->from[1])[l] & 1;
  }
  for (Warp* x : there) {
    for (int l = 0; reduces(x) && l < 32; ++l) x->row(x->met->to[0])[l] = any;
    x->barrier = -1, ready.push_back(x);
  }
  w.block.shared.barrier();
}

void run_cluster(const Program& p, Launch& launch, uint64_t index) {
  Cluster cluster;
  std::deque<Block> blocks;
  std::vector<Warp> warps;
  const uint32_t each = launch.threads / 32;
  warps.reserve(size_t(each) * launch.cluster);
  for (uint32_t rank = 0; rank < launch.cluster; ++rank) {
    const uint64_t b = index * launch.cluster + rank;
    blocks.push_back({launch, cluster, {uint32_t(b % launch.grid[0]), uint32_t(b / launch.grid[0] % launch.grid[1]),
                                        uint32_t(b / launch.grid[0] / launch.grid[1])}, rank, Shared(uint32_t(p.shared) + launch.shared_bytes)});
    cluster.blocks.push_back(&blocks.back());
    for (uint32_t id = 0; id < each; ++id) {
      warps.push_back({p, blocks.back(), id});
      warps.back().registers.assign(size_t(p.count) * 32, 0xFFFFFFFFFFFFFFFFull);  // NaN, until written
      warps.back().local.assign(size_t(p.local) * 32, 0xFF);
      if (p.products) warps.back().held.resize(p.count);
      fill(p, warps.back());
    }
  }
  cluster.warps = int(warps.size());
  std::vector<Warp*> ready, waiting;
  for (auto& w : warps) ready.push_back(&w);
  auto some_arrive = [&] {
    auto& all = cluster.arrivals;
    const size_t k = launch.random() % all.size();
    std::swap(all[k], all.back());
    Arrival x = std::move(all.back());
    all.pop_back();
    arrive(x);
  };
  while (!ready.empty() || !waiting.empty()) {
    if (!cluster.arrivals.empty() && (ready.empty() || launch.random() % 4 == 0)) some_arrive();
    if (cluster.moved || ready.empty()) {
      if (!cluster.moved && cluster.arrivals.empty()) break;
      ready.insert(ready.end(), waiting.begin(), waiting.end()), waiting.clear(), cluster.moved = false;
    }
    std::swap(ready[launch.random() % ready.size()], ready.back());
    Warp* w = ready.back();
    ready.pop_back();
    w->waits = false;
    advance(*w);
    if (w->waits) waiting.push_back(w);
    else if (w->alive) meet(ready, warps, *w);
  }
  if (!cluster.arrivals.empty()) fail(p.name + ": a block left before its copies came");
  for (auto& w : warps)
    if (w.alive)
      fail(p.name + ": warp " + std::to_string(w.id) + " of block " + std::to_string(w.block.rank) + " of its cluster waits " +
           (w.waits ? "at an mbarrier or for its cluster" : "at barrier " + std::to_string(w.barrier) + " for warps that do not come"));
}

}  // namespace ptx

using namespace ptx;

namespace {
thread_local std::string message;
}

extern "C" {

const char* ptx_error() { return message.c_str(); }

// entry: a kernel's name, or "" for the first
void* ptx_read(const char* text, const char* entry) {
  try {
    return new Program(Parser().read(text, entry));
  } catch (const std::exception& e) {
    message = e.what();
    return nullptr;
  }
}
int ptx_params(void* program) { return int(static_cast<Program*>(program)->params.size()); }
void ptx_free(void* program) { delete static_cast<Program*>(program); }

// args: where each parameter's bytes are. allowed: pairs from, to. counted: instructions of warps, global requests, their sectors of 32 bytes, bytes asked for; passes over shared
// memory's banks without and with conflicts
int ptx_launch(void* program, const uint32_t* grid, uint32_t cluster, uint32_t threads, uint32_t shared_bytes, const void* const* args,
               const uint64_t* allowed, int64_t ranges, uint32_t seed, int eager, int copies_fenced, uint64_t* counted) {
  try {
    const Program& p = *static_cast<Program*>(program);
    Launch launch{{grid[0], grid[1], grid[2]}, cluster, threads, shared_bytes, {}, {}, eager != 0, copies_fenced != 0, std::mt19937(seed)};
    if (threads % 32 || !threads || !cluster || grid[0] % cluster) fail(p.name + ": whole warps and whole clusters");
    launch.args.resize(p.param_bytes);
    for (size_t k = 0; k < p.params.size(); ++k) std::memcpy(&launch.args[p.params[k].first], args[k], p.params[k].second);
    for (int64_t r = 0; r < ranges; ++r) launch.allowed.push_back({allowed[2 * r], allowed[2 * r + 1]});
    for (auto& [name, bytes] : p.globals) {
      const uint64_t first = reinterpret_cast<uint64_t>(bytes.data());
      launch.allowed.push_back({first, first + bytes.size()});
    }
    std::sort(launch.allowed.begin(), launch.allowed.end());
    std::vector<uint64_t> order(uint64_t(grid[0]) * grid[1] * grid[2] / cluster);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), launch.random);
    for (uint64_t index : order) run_cluster(p, launch, index);
    counted[0] = launch.instructions, counted[1] = launch.requests, counted[2] = launch.sectors, counted[3] = launch.bytes;
    counted[4] = launch.shared, counted[5] = launch.wavefronts;
    return 0;
  } catch (const std::exception& e) {
    message = e.what();
    return 1;
  }
}
}
