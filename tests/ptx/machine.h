// A GPU's instruction set on the CPU: what Triton or nvcc compiled, PTX for sm_80 or sm_90a, runs here warp by warp on host memory.
//
// A warp's registers are rows of 32 lanes; an instruction is a function over the lanes of a mask. Lanes that diverge go on at
// the lowest program counter first. Warps run in random order up to their next barrier, blocks in random order; those of a cluster,
// which meet at mbarriers too, side by side (cluster.h). Everything that is asynchronous (cp.async, wgmma, TMA) happens when it is
// issued (eager) or when it is waited for (lazy). An access outside of what the launch may touch, one that is not aligned to its
// width, a barrier in a diverged warp, an operation on lanes that are not there, shared memory that nothing has written or that two
// warps touch without a barrier (shared.h), wgmma without its fences and waits (matrix.h): errors that name the line of the kernel.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "shared.h"

namespace ptx {

using Mask = uint32_t;
constexpr Mask kAll = ~0u;
constexpr uint64_t kParamBase = 1ull << 56;  // where generic addresses of parameters begin

struct Warp;
struct Instruction;
using Run = void (*)(Warp&, const Instruction&, Mask);

struct Instruction {
  enum Kind { kPlain, kBranch, kExit, kBarrier, kWait } kind = kPlain;
  Run run = nullptr;
  std::vector<int> to, from;  // rows; of a memory access from[0] is the address
  int64_t offset = 0;         // added to the address; a branch's target
  int guard = -1;             // row of the predicate
  bool unless = false;        // @!
  int size = 0, many = 1;     // bytes of an element, elements of a vector
  int shape[4] = {};          // a matrix instruction's
  bool together = false;      // the whole warp at once
  int source = 0;             // index of Program::places
};

struct Program {
  std::string name;
  std::vector<Instruction> code;
  std::vector<std::string> places;  // the kernel's lines
  std::vector<std::pair<int64_t, int64_t>> params;  // where each begins, its bytes
  std::map<std::string, int> rows;
  std::vector<std::pair<int, uint64_t>> constants;  // row, bits
  std::vector<std::pair<int, std::string>> specials;
  std::map<std::string, std::vector<unsigned char>> globals;
  bool products = false;  // wgmma
  int count = 0, local = 0;  // rows; bytes of local memory a lane
  int64_t shared = 0, param_bytes = 0;  // bytes of shared memory that have a place beside what a launch asks for
};

struct Launch {
  uint32_t grid[3], cluster, threads, shared_bytes;
  std::vector<unsigned char> args;
  std::vector<std::pair<uint64_t, uint64_t>> allowed;  // [from, to), sorted
  bool eager, copies_fenced;
  std::mt19937 random;
  uint64_t limit = 1ull << 36;  // of instructions: a kernel that goes round and round ends
  uint64_t instructions = 0, requests = 0, sectors = 0, bytes = 0, shared = 0, wavefronts = 0;  // of warps; see memory.h
};

// Bytes that TMA is to bring: into one block, announced to its mbarrier
struct Arrival {
  struct Block* block;
  uint32_t to, barrier;
  std::vector<unsigned char> bytes;
};

struct Cluster {
  std::vector<struct Block*> blocks;
  std::vector<Arrival> arrivals;
  int warps = 0, arrived = 0, turns = 0;  // of its barrier
  bool moved = false;                     // since somebody last waited
};

struct Mbarrier {
  int64_t expected, pending, bytes = 0;
  uint32_t phase = 0;
};

struct Block {
  Launch& launch;
  Cluster& cluster;
  uint32_t id[3], rank;
  Shared shared;
  std::map<uint32_t, Mbarrier> barriers{};
};

struct Copy {
  uint32_t to;
  const unsigned char* from;
  int size, valid;
};

struct Product {
  const Instruction* of;
  uint64_t left, right;  // descriptors
  bool more;
};

struct Held {
  int accumulating = 0, multiplied = 0;  // products under way that hold this row
  int written = -1, read = -1;           // wgmma.fences before it was last written, read
};

struct Warp {
  const Program& program;
  Block& block;
  uint32_t id;
  std::vector<uint64_t> registers{};
  std::vector<unsigned char> local{};
  uint32_t carry[32] = {};
  uint32_t at[32] = {};  // program counters
  Mask alive = kAll;
  bool diverged = false;
  int barrier = -1;
  const Instruction* met = nullptr;  // there
  bool waits = false;  // at an mbarrier, or for its cluster
  int turn = 0;        // of the cluster's barrier, that it arrived at
  std::vector<Copy> open{};
  std::deque<std::vector<Copy>> groups{};
  std::vector<Product> products{};
  std::deque<std::vector<Product>> batches{};
  std::vector<Held> held{};  // of each row, where there are products
  int fences = 0;

  uint64_t* row(int r) { return registers.data() + size_t(r) * 32; }

  unsigned char* global(uint64_t address, int bytes, int aligned) {
    if (address % aligned) fail("an address that is not a multiple of " + std::to_string(aligned) + ", its access's width");
    const auto& all = block.launch.allowed;
    auto next = std::upper_bound(all.begin(), all.end(), std::pair<uint64_t, uint64_t>{address, ~0ull});
    if (next == all.begin() || address >= std::prev(next)->second || uint64_t(bytes) > std::prev(next)->second - address) {
      const auto before = next == all.begin() ? "" : std::to_string(address + bytes - std::prev(next)->second) + " bytes behind the tensor before it";
      fail("global memory outside of every tensor: " + before);
    }
    return reinterpret_cast<unsigned char*>(address);
  }

  // together: lanes that an .aligned instruction needs
  void all_here(Mask m, const char* what) const {
    if (m != kAll) fail(std::string(what) + " in a warp that has diverged");
  }
};

template <class T> T get(uint64_t bits) {
  T x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
template <> inline bool get<bool>(uint64_t bits) { return bits & 1; }
template <class T> uint64_t put(T x) {
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof x);
  return bits;
}

template <class F> void lanes(Mask m, F f) {
  if (m == kAll)
    for (int l = 0; l < 32; ++l) f(l);
  else
    for (; m; m &= m - 1) f(__builtin_ctz(m));
}

}  // namespace ptx
