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
        if (i.kind == Instruction::kPlain) {
          if (w.program.products) {
            if (!w.products.empty() || !w.batches.empty()) check_held(w, i);
            if (i.run != wgmma && m)
              for (int r : i.to) w.held[r].written = w.fences;
          }
          if (m) i.run(w, i, m);
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
          w.barrier = int(w.row(i.from[0])[0]);
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
                      : starts(name, "%ctaid") ? w.block.id[axis] : starts(name, "%nctaid") ? w.block.launch.grid[axis] : l;
  }
}

void run_block(const Program& p, Launch& launch, uint64_t index) {
  Block block{launch, {uint32_t(index % launch.grid[0]), uint32_t(index / launch.grid[0] % launch.grid[1]),
                       uint32_t(index / launch.grid[0] / launch.grid[1])}, Shared(launch.shared_bytes)};
  std::vector<Warp> warps;
  warps.reserve(launch.threads / 32);
  for (uint32_t id = 0; id < launch.threads / 32; ++id) {
    warps.push_back({p, block, id});
    warps.back().registers.assign(size_t(p.count) * 32, 0xFFFFFFFFFFFFFFFFull);  // NaN, until written
    warps.back().local.assign(size_t(p.local) * 32, 0xFF);
    if (p.products) warps.back().held.resize(p.count);
    fill(p, warps.back());
  }
  std::vector<Warp*> ready;
  for (auto& w : warps) ready.push_back(&w);
  while (!ready.empty()) {
    std::swap(ready[launch.random() % ready.size()], ready.back());
    Warp* w = ready.back();
    ready.pop_back();
    advance(*w);
    if (!w->alive) continue;
    std::vector<Warp*> there;
    for (auto& other : warps)
      if (other.alive && other.barrier == w->barrier) there.push_back(&other);
    if (there.size() < warps.size()) continue;
    for (Warp* other : there) other->barrier = -1, ready.push_back(other);
    block.shared.barrier();
  }
  for (auto& w : warps)
    if (w.alive) fail(p.name + ": warp " + std::to_string(w.id) + " waits at barrier " + std::to_string(w.barrier) + " for warps that do not come");
}

}  // namespace ptx

using namespace ptx;

namespace {
thread_local std::string message;
}

extern "C" {

const char* ptx_error() { return message.c_str(); }

void* ptx_read(const char* text) {
  try {
    return new Program(Parser().read(text));
  } catch (const std::exception& e) {
    message = e.what();
    return nullptr;
  }
}
int ptx_params(void* program) { return int(static_cast<Program*>(program)->params.size()); }
void ptx_free(void* program) { delete static_cast<Program*>(program); }

// allowed: pairs from, to, sorted. counted: instructions of warps, global requests, their sectors of 32 bytes, bytes asked for; passes over shared
// memory's banks without and with conflicts
int ptx_launch(void* program, const uint32_t* grid, uint32_t threads, uint32_t shared_bytes, const uint64_t* args, int64_t many,
               const uint64_t* allowed, int64_t ranges, uint32_t seed, int eager, int copies_fenced, uint64_t* counted) {
  try {
    Launch launch{{grid[0], grid[1], grid[2]}, threads, shared_bytes, {args, args + many}, {}, eager != 0, copies_fenced != 0, std::mt19937(seed)};
    for (int64_t r = 0; r < ranges; ++r) launch.allowed.push_back({allowed[2 * r], allowed[2 * r + 1]});
    for (auto& [name, bytes] : static_cast<Program*>(program)->globals) {
      const uint64_t first = reinterpret_cast<uint64_t>(bytes.data());
      launch.allowed.push_back({first, first + bytes.size()});
    }
    std::sort(launch.allowed.begin(), launch.allowed.end());
    std::vector<uint64_t> order(uint64_t(grid[0]) * grid[1] * grid[2]);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), launch.random);
    for (uint64_t index : order) run_block(*static_cast<Program*>(program), launch, index);
    counted[0] = launch.instructions, counted[1] = launch.requests, counted[2] = launch.sectors, counted[3] = launch.bytes;
    counted[4] = launch.shared, counted[5] = launch.wavefronts;
    return 0;
  } catch (const std::exception& e) {
    message = e.what();
    return 1;
  }
}
}
