// What an instruction's name and operands say: by whole names, so that a modifier that is not known is refused.
#pragma once

#include "cluster.h"
#include "matrix.h"
#include "memory.h"
#include "parse.h"

namespace ptx {

const std::string kTypes = "b8|u8|s8|b16|u16|s16|b32|u32|s32|f32|b64|u64|s64|f64";

inline int width(const std::string& type) { return type == "pred" ? 1 : std::stoi(type.substr(1)) / 8; }

inline void nothing(Warp&, const Instruction&, Mask) {}

inline void Parser::decode(Instruction& i, const std::string& op, const Args& args) {
  const auto parts = split(op, '.');
  auto has = [&](const std::string& part) { return std::find(parts.begin(), parts.end(), part) != parts.end(); };
  auto needs = [&](size_t many) { if (args.size() != many) fail("needs " + std::to_string(many) + " operands"); };
  auto all_from = [&](size_t first) {
    for (size_t k = first; k < args.size(); ++k) i.from.push_back(operand(args[k]));
  };
  auto whole = [&](Run run, size_t many) { needs(many), i.run = run, i.together = true; };  // the whole warp at once

  if (auto found = known.find(op); found != known.end()) {
    needs(1 + found->second.operands), i.to = {destination(args[0])}, i.run = found->second.run;
    all_from(1);
  } else if (like(parts, "bra uni?")) {
    needs(1), i.kind = Instruction::kBranch;
    branches.push_back({p.code.size(), args[0], scopes});
  } else if (op == "ret" || op == "exit") {
    needs(0), i.kind = Instruction::kExit;
  } else if (like(parts, "bar|barrier sync aligned?")) {  // of all warps
    whole(nullptr, 1), i.kind = Instruction::kBarrier, i.from = {operand(args[0])};
  } else if (op == "bar.red.or.pred") {  // of all warps, which get whether any lane of theirs says so
    whole(nullptr, 3), i.kind = Instruction::kBarrier, i.to = {destination(args[0])}, i.from = {operand(args[1]), operand(args[2])};
  } else if (op == "bar.warp.sync") {
    whole(nothing, 1);
  } else if (like(parts, "mov pred|" + kTypes)) {
    needs(2), move(i, args, width(parts.back()));
  } else if (like(parts, "cvta to? global|shared|local u64")) {
    needs(2), move(i, args, 8);
  } else if (op == "cvta.param.u64") {
    needs(2), i.to = {destination(args[0])}, i.from = {operand(args[1])};
    i.run = map<uint64_t, uint64_t>([](uint64_t a) { return a + kParamBase; }).run;
  } else if (parts[0] == "ld" || parts[0] == "st") {
    needs(2), transfer(i, parts, args);
  } else if (like(parts, "atom global cta|gpu|sys? relaxed|acquire|release|acq_rel? add u32|s32|u64") ||
             like(parts, "atom relaxed|acquire|release|acq_rel? cta|gpu|sys? global add u32|s32|u64")) {
    needs(3), i.size = width(parts.back()), i.run = atomic_add;
    i.to = {destination(args[0])}, i.from = {address(args[1], i.offset), operand(args[2])};
  } else if (like(parts, "atom shared|shared::cta add u32")) {
    needs(3), i.size = 4, i.run = atomic_shared, i.to = {destination(args[0])}, i.from = {address(args[1], i.offset), operand(args[2])};
  } else if (like(parts, "cp async ca|cg shared|shared::cta global L2::64B|L2::128B|L2::256B?")) {
    needs(args.size() == 3 ? 3 : 4), i.run = copy_async, i.size = int(number(args[2]));
    if (i.size != 16 && (parts[2] == "cg" || (i.size != 4 && i.size != 8))) fail("copies " + args[2] + " bytes");
    int64_t source = 0;
    i.from = {address(args[0], i.offset), address(args[1], source)}, i.shape[1] = int(source);
    if (args.size() == 4) i.from.push_back(operand(args[3]));
    if (args.size() == 4 && predicates.count(prefix(args[3]))) fail("a predicate is not known here");  // ignore-src
  } else if (op == "cp.async.commit_group") {
    whole(copy_commit, 0);
  } else if (op == "cp.async.wait_group") {
    whole(copy_wait, 1), i.offset = number(args[0]);
  } else if (like(parts, "shfl sync bfly|idx|up|down b32")) {
    whole(shuffle, 5);
    const auto bar = args[0].find('|');
    i.to = {destination(trim(args[0].substr(0, bar)))};
    if (bar != std::string::npos) i.to.push_back(destination(trim(args[0].substr(bar + 1))));
    all_from(1), i.shape[0] = has("bfly") ? kButterfly : has("idx") ? kIndex : has("up") ? kUp : kDown;
  } else if (like(parts, "redux sync add|min|max u32|s32") || like(parts, "redux sync and|or|xor b32")) {
    whole(reduce, 3), i.to = {destination(args[0])}, all_from(1), i.shape[1] = has("s32");
    i.shape[0] = has("add") ? kAdd : has("max") ? kMax : has("min") ? kMin : has("and") ? kAnd : has("or") ? kOr : kXor;
  } else if (like(parts, "vote sync any|all pred") || op == "vote.sync.ballot.b32" || op == "vote.ballot.sync.b32") {
    whole(vote, 3), i.to = {destination(args[0])}, all_from(1), i.shape[0] = has("ballot") ? 0 : has("any") ? 1 : 2;
  } else if (like(parts, "ldmatrix|stmatrix sync aligned m8n8 x1|x2|x4 trans? shared|shared::cta b16")) {
    whole(matrices, 2);
    const int loads = parts[0] == "ldmatrix";
    i.from = {address(args[loads], i.offset)};
    for (int r : operands(args[1 - loads], loads)) (loads ? i.to : i.from).push_back(r);
    i.shape[0] = parts[4][1] - '0', i.shape[1] = has("trans"), i.shape[2] = !loads;
    if (int(loads ? i.to.size() : i.from.size() - 1) != i.shape[0]) fail("needs " + parts[4].substr(1) + " registers");
  } else if (parts[0] == "mma" || (parts[0] == "wgmma" && has("mma_async"))) {
    product(i, parts, args);
  } else if (op == "wgmma.commit_group.sync.aligned") {
    whole(wgmma_commit, 0);
  } else if (op == "wgmma.wait_group.sync.aligned") {
    whole(wgmma_wait, 1), i.offset = number(args[0]);
  } else if (op == "wgmma.fence.sync.aligned") {
    whole(wgmma_fence, 0);
  } else if (like(parts, "fence proxy async shared::cta?")) {
    needs(0), i.run = proxy_fence;
  } else if (op == "mbarrier.init.shared::cta.b64") {
    needs(2), i.run = barrier_init, i.from = {address(args[0], i.offset), operand(args[1])};
  } else if (op == "mbarrier.arrive.expect_tx.shared::cta.b64") {
    needs(3), i.run = barrier_expect, i.from = {address(args[1], i.offset), operand(args[2])};
    if (args[0] != "_") fail("not known");
  } else if (op == "mbarrier.arrive.shared::cluster.b64") {
    needs(2), i.run = barrier_arrive, i.from = {address(args[1], i.offset)};
    if (args[0] != "_") fail("not known");
  } else if (op == "mapa.shared::cluster.u32") {
    needs(3), i.to = {destination(args[0])}, all_from(1);
    i.run = map<uint32_t, uint32_t, uint32_t>([](uint32_t a, uint32_t rank) { return mapped(a, rank); }).run;
  } else if (op == "mbarrier.try_wait.parity.shared::cta.b64") {
    needs(3), i.kind = Instruction::kWait, i.run = barrier_passed;
    i.to = {destination(args[0])}, i.from = {address(args[1], i.offset), operand(args[2])};
  } else if (op == "barrier.cluster.arrive.release.aligned") {
    whole(cluster_arrive, 0);
  } else if (op == "barrier.cluster.wait.acquire.aligned") {
    whole(cluster_passed, 0), i.kind = Instruction::kWait;
  } else if (starts(op, "cp.async.bulk.tensor.")) {
    const std::string all = "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes";
    i.shape[0] = op == all + ".multicast::cluster.L2::cache_hint";
    if (!i.shape[0] && op != all + ".L2::cache_hint") fail("not known");
    needs(4 + i.shape[0]), i.run = tensor_copy, i.from = {address(args[0], i.offset)};
    const auto where = split(args[1].substr(1, args[1].size() - 2), ',');  // [map, {columns, rows, planes}]
    i.from.push_back(operand(where[0]));
    for (int r : operands(where[1])) i.from.push_back(r);
    int64_t none = 0;
    i.from.push_back(address(args[2], none));
    if (i.shape[0]) i.from.push_back(operand(args[3]));
    if (none || i.from.size() != 6 + size_t(i.shape[0])) fail("not known");
  } else if (like(parts, "createpolicy fractional L2::evict_first|L2::evict_normal b64")) {
    needs(2), i.to = {destination(args[0])}, i.from = {constant(0)}, i.run = map<uint64_t, uint64_t>([](uint64_t a) { return a; }).run;
  } else if (op == "prefetch.tensormap") {
    needs(1), i.run = nothing;
  } else if (like(parts, "griddepcontrol wait|launch_dependents") || op == "fence.mbarrier_init.release.cluster") {
    needs(0), i.run = nothing;  // launches run one after the other here
  } else if (like(parts, "fence sc|acq_rel? cta|gpu|sys") ||
             like(parts, "membar cta|gl|sys")) {
    needs(0), i.run = nothing;
  } else {
    fail("not known");
  }
}

inline void Parser::product(Instruction& i, const std::vector<std::string>& parts, const Args& args) {
  const bool async = parts[0] == "wgmma";
  const std::string& type = parts.back() == "f32" && parts.size() > 7 ? parts[7] : parts.back();
  const int depth = type == "tf32" ? 8 : 16;
  const std::string types = " f32 " + type + " " + type, other = type == "tf32" ? "4" : "16";
  if (!like(parts, async ? "wgmma mma_async sync aligned " + (parts.size() > 4 ? parts[4] : "") + types
                         : "mma sync aligned m16n8k8|m16n8k" + other + " row col" + types + " f32"))
    fail("not known");
  i.together = true, i.shape[0] = type == "bf16" ? kBf16 : type == "f16" ? kF16 : type == "tf32" ? kTf32 : (fail("not known"), 0);
  i.to = operands(args[0], true);
  auto count = [&](const std::string& list, size_t many) {
    for (int r : operands(list)) i.from.push_back(r), --many;
    if (many) fail("registers of " + list);
  };
  if (!async) {
    i.shape[1] = int(number(parts[3].substr(6), 10)), i.run = mma;
    const int registers = type == "tf32" ? i.shape[1] / 2 : i.shape[1] / 4;
    count(args[1], registers), count(args[2], registers / 2), count(args[3], 4);
    if (args.size() != 4 || i.to.size() != 4) fail("registers");
    return;
  }
  const auto n = parts[4].find('n'), k = parts[4].find('k');
  i.shape[1] = int(number(parts[4].substr(n + 1, k - n - 1), 10)), i.many = args[1][0] == '{' ? 4 : 1, i.run = wgmma, p.products = true;
  if (parts[4] != "m64n" + std::to_string(i.shape[1]) + "k" + std::to_string(depth) || i.shape[1] % 8 || i.shape[1] < 8 || i.shape[1] > 256)
    fail("not known");
  if (int(i.to.size()) != i.shape[1] / 2) fail("registers of " + args[0]);
  count(args[1], i.many), count(args[2], 1), count(args[3], 1);
  // scales, then whether A (behind a descriptor) and B are transposed, which 16-bit types alone may be
  const size_t turns = type == "tf32" ? 0 : i.many == 1 ? 2 : 1;
  if (args.size() != 6 + turns || args[4] != "1" || args[5] != "1") fail("not known");
  if (turns == 2) i.shape[2] = int(number(args[6]));
  if (turns) i.shape[3] = int(number(args.back()));
}

inline void Parser::move(Instruction& i, const Args& args, int bytes) {
  i.to = operands(args[0], true), i.from = operands(args[1]);
  const int many = int(std::max(i.to.size(), i.from.size()));
  if (bytes % many || std::min(i.to.size(), i.from.size()) != 1) fail("needs registers that fill " + std::to_string(bytes) + " bytes");
  i.size = bytes / many;
  if (many == 1) {
    i.run = map<uint64_t, uint64_t>([](uint64_t a) { return a; }).run;
  } else if (i.to.size() == 1) {
    i.run = [](Warp& w, const Instruction& i, Mask m) {
      lanes(m, [&](int l) {
        uint64_t bits = 0;
        for (size_t k = 0; k < i.from.size(); ++k) std::memcpy(reinterpret_cast<char*>(&bits) + k * i.size, w.row(i.from[k]) + l, i.size);
        w.row(i.to[0])[l] = bits;
      });
    };
  } else {
    i.run = [](Warp& w, const Instruction& i, Mask m) {
      lanes(m, [&](int l) {
        const uint64_t bits = w.row(i.from[0])[l];
        for (size_t k = 0; k < i.to.size(); ++k) {
          uint64_t part = 0;
          std::memcpy(&part, reinterpret_cast<const char*>(&bits) + k * i.size, i.size);
          w.row(i.to[k])[l] = part;
        }
      });
    };
  }
}

inline void Parser::transfer(Instruction& i, const std::vector<std::string>& parts, const Args& args) {
  const bool loads = parts[0] == "ld";
  const std::string evicted =
      "L1::evict_normal|L1::evict_first|L1::evict_last|L1::evict_unchanged|L1::no_allocate? L2::64B|L2::128B|L2::256B? ";
  const std::string order = loads ? "ld volatile|relaxed|acquire? cta|gpu|sys? " : "st volatile|relaxed|release? cta|gpu|sys? ";
  const bool generic = parts.size() > 1 && like({parts.end() - 1, parts.end()}, kTypes) &&
                       (parts.size() == 2 || (parts.size() == 3 && (parts[1] == "v2" || parts[1] == "v4")));  // here: global
  if (!generic && !like(parts, order + "global ca|cg|cs|cv|lu|wb|wt? nc? " + evicted + "v2|v4|v8? " + kTypes) &&
      !like(parts, order + "shared|shared::cta|local v2|v4? " + kTypes) && !like(parts, "ld param|const v2|v4? " + kTypes))
    fail("not known");
  std::string space;
  for (auto& x : parts) {
    if (x == "v2" || x == "v4" || x == "v8") i.many = x[1] - '0';
    if (starts(x, "shared") || x == "global" || x == "local" || x == "param" || x == "const") space = x;
  }
  i.size = width(parts.back()), i.shape[0] = parts.back()[0] == 's';
  i.from = {address(args[loads], i.offset)};
  for (int r : operands(args[!loads], loads)) (loads ? i.to : i.from).push_back(r);
  if (starts(space, "shared")) i.run = loads ? load<Space::kShared> : store<Space::kShared>;
  else if (generic || space == "global" || space == "const") i.run = loads ? load<Space::kGlobal> : store<Space::kGlobal>;
  else if (space == "local") i.run = loads ? load<Space::kLocal> : store<Space::kLocal>;
  else i.run = load<Space::kParam>;
  if (int(loads ? i.to.size() : i.from.size() - 1) != i.many) fail("needs " + std::to_string(i.many) + " registers");
}

}  // namespace ptx
