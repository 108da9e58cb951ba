// PTX text into a Program. What it does not know is an error that names the instruction.
#pragma once

#include <algorithm>
#include <set>
#include <sstream>

#include "arithmetic.h"
#include "matrix.h"
#include "memory.h"

namespace ptx {

inline std::string trim(const std::string& s) {
  const auto first = s.find_first_not_of(" \t\r\n");
  return first == std::string::npos ? "" : s.substr(first, s.find_last_not_of(" \t\r\n") - first + 1);
}
inline bool starts(const std::string& s, const std::string& with) { return s.rfind(with, 0) == 0; }
inline std::vector<std::string> split(const std::string& s, char at) {  // not inside of brackets
  std::vector<std::string> out{""};
  int depth = 0;
  for (char c : s) {
    depth += (c == '{' || c == '[') - (c == '}' || c == ']');
    if (c == at && !depth) out.emplace_back();
    else out.back() += c;
  }
  for (auto& x : out) x = trim(x);
  return out;
}

struct Args : std::vector<std::string> {
  const std::string& operator[](size_t i) const { if (i >= size()) fail("too few operands");
    return at(i); }
};

class Parser {
 public:
  Program read(const std::string& text) {
    std::istringstream lines(text);
    std::string line, head;
    bool inside = false;
    while (std::getline(lines, line)) {
      if (!inside) {
        module_line(trim(line), head, inside);
        continue;
      }
      const auto comment = line.find("//");
      const std::string code = trim(line.substr(0, comment));
      if (starts(code, ".loc\t")) {
        if (comment != std::string::npos) p.places.push_back(trim(line.substr(comment + 2)));
      } else if (code == "}" && pending.empty() && !scopes) {
        break;
      } else {
        statements(code);
      }
    }
    for (auto& [at, label] : branches) {
      if (!labels.count(label)) fail("no label " + label);
      p.code[at].offset = labels[label];
    }
    return std::move(p);
  }

 private:
  Program p;
  std::string pending;
  int scopes = 0;
  std::map<std::string, int> labels;
  std::vector<std::pair<size_t, std::string>> branches;
  std::map<std::string, int64_t> depots, params;
  std::set<std::string> named;
  const Table known = arithmetic();

  void module_line(const std::string& line, std::string& head, bool& inside) {
    if (starts(line, ".global") || starts(line, ".const") || starts(line, ".visible .global")) {
      const auto bracket = line.find('['), open = line.find('{');
      if (bracket == std::string::npos || open == std::string::npos || line.find(".b8") == std::string::npos) fail("module variable: " + line);
      auto& bytes = p.globals[trim(line.substr(line.rfind(' ', bracket) + 1, bracket - line.rfind(' ', bracket) - 1))];
      for (auto& x : split(line.substr(open + 1, line.find('}') - open - 1), ',')) bytes.push_back((unsigned char)std::stoi(x));
    } else if (starts(line, ".visible .entry")) {
      head = line, p.name = trim(line.substr(15, line.find('(') - 15));
    } else if (!head.empty()) {
      if (starts(line, ".param")) {
        std::string name = line.substr(line.rfind(' ') + 1);
        name.erase(std::remove(name.begin(), name.end(), ','), name.end());
        params[name] = int64_t(p.params.size()) * 8;
        p.params.push_back(name);
      }
      inside = line == "{";
    }
  }

  // A line may hold several statements, and a statement several lines
  void statements(const std::string& code) {
    for (char c : code + "\n") {
      const std::string so_far = trim(pending);
      if (c == ';') {
        statement(so_far), pending.clear();
      } else if (c == ':' && starts(so_far, "$") && so_far.find_first_of(" [") == std::string::npos) {
        labels[so_far] = int(p.code.size()), pending.clear();
      } else if ((c == '{' && so_far.empty()) || (c == '}' && so_far.empty())) {  // a scope of inline assembly
        scopes += c == '{' ? 1 : -1;
      } else {
        pending += c == '\n' ? ' ' : c;
      }
    }
    if (trim(pending).empty() || starts(trim(pending), ".pragma")) pending = trim(pending);
  }

  int row(const std::string& name) {
    auto [found, added] = p.rows.try_emplace(name, p.count);
    if (added) ++p.count;
    return found->second;
  }
  int constant(uint64_t bits) {
    const int r = row("#" + std::to_string(bits));
    if (p.constants.empty() || std::none_of(p.constants.begin(), p.constants.end(), [&](auto& c) { return c.first == r; }))
      p.constants.push_back({r, bits});
    return r;
  }

  int operand(const std::string& s) {
    if (s.empty()) fail("an operand is missing");
    if (s[0] == '%' || s == "_" || named.count(s)) {
      for (const char* special : {"%tid.", "%ntid.", "%ctaid.", "%nctaid.", "%laneid", "%warpid"})
        if (starts(s, special)) {
          if (!p.rows.count(s)) p.specials.push_back({row(s), s});
          return row(s);
        }
      return row(s);
    }
    if (starts(s, "0f") || starts(s, "0d")) return constant(std::stoull(s.substr(2), nullptr, 16));
    if (isdigit(s[0]) || s[0] == '-') return constant(s[0] == '-' ? uint64_t(std::stoll(s, nullptr, 0)) : std::stoull(s, nullptr, 0));
    if (s == "global_smem") return constant(kSharedBase);
    if (depots.count(s)) return constant(uint64_t(depots[s]));
    if (params.count(s)) return constant(uint64_t(params[s]));
    if (auto g = p.globals.find(s); g != p.globals.end()) return constant(reinterpret_cast<uint64_t>(g->second.data()));
    fail("operand " + s);
  }

  std::vector<int> operands(const std::string& s) {  // one, or those of {a, b}
    std::vector<int> out;
    if (s[0] != '{') return {operand(s)};
    for (auto& x : split(s.substr(1, s.rfind('}') - 1), ',')) out.push_back(operand(x));
    return out;
  }

  // [x + offset] → the row of x; offset is added to `offset`
  int address(std::string s, int64_t& offset) {
    s = trim(s.substr(1, s.rfind(']') - 1));
    auto plus = s.find('+');
    const std::string base = trim(s.substr(0, plus));
    if (plus != std::string::npos) offset += std::stoll(trim(s.substr(plus + 1)), nullptr, 0);
    if (params.count(base)) return offset += params[base], constant(0);
    return operand(base);
  }

  static int width(const std::string& type) { return type == "pred" ? 1 : std::stoi(type.substr(1)) / 8; }

  void statement(std::string s) {
    if (starts(s, ".local")) {  // .local .align 4 .b8 __local_depot0[28]
      const auto bracket = s.find('['), space = s.find_last_of(" \t", bracket);
      depots[s.substr(space + 1, bracket - space - 1)] = p.local;
      p.local += std::stoi(s.substr(bracket + 1));
      return;
    }
    if (starts(s, ".reg"))  // inline assembly has names of its own
      for (auto& name : split(s.substr(s.find_last_of(" \t") + 1), ',')) named.insert(name);
    if (s.empty() || s[0] == '.') return;
    Instruction i;
    if (s[0] == '@') {
      i.unless = s[1] == '!';
      const auto space = s.find_first_of(" \t");
      i.guard = row(s.substr(i.unless ? 2 : 1, space - (i.unless ? 2 : 1)));
      s = trim(s.substr(space));
    }
    const auto space = s.find_first_of(" \t");
    const std::string op = s.substr(0, space);
    const Args args{space == std::string::npos ? std::vector<std::string>{} : split(s.substr(space), ',')};
    if (p.places.empty()) p.places.push_back(p.name);
    i.source = int(p.places.size()) - 1;
    try {
      decode(i, op, args);
    } catch (const std::exception& e) {
      fail(p.places.back() + ": " + s + ": " + e.what());
    }
    i.together = i.kind == Instruction::kBarrier || i.run == shuffle || i.run == reduce || i.run == vote || i.run == matrices || i.run == mma ||
                 i.run == wgmma;
    p.code.push_back(std::move(i));
  }

  void decode(Instruction& i, const std::string& op, const Args& args) {
    const auto parts = split(op, '.');
    const std::string& name = parts[0];
    auto has = [&](const std::string& part) { return std::find(parts.begin(), parts.end(), part) != parts.end(); };
    auto all_from = [&](size_t first) {
      for (size_t k = first; k < args.size(); ++k)
        for (int r : operands(args[k])) i.from.push_back(r);
    };
    auto nothing = [](Warp&, const Instruction&, Mask) {};

    if (auto found = known.find(op); found != known.end()) {
      i.to = operands(args[0]), i.run = found->second;
      all_from(1);
    } else if (name == "bra") {
      i.kind = Instruction::kBranch;
      branches.push_back({p.code.size(), args[0]});
    } else if (name == "ret" || name == "exit") {
      i.kind = Instruction::kExit;
    } else if (name == "bar" || name == "barrier") {
      if (!has("sync")) fail("not known");
      if (has("warp")) { i.run = nothing; return; }
      i.kind = Instruction::kBarrier;
      all_from(0);
    } else if (name == "mov") {
      move(i, args, width(parts.back()));
    } else if (name == "cvta") {
      move(i, args, 8);
    } else if (name == "ld" || name == "st") {
      transfer(i, parts, args);
    } else if (name == "atom" && has("add") && has("global")) {
      i.size = width(parts.back()), i.to = operands(args[0]), i.from = {address(args[1], i.offset), operand(args[2])}, i.run = atomic_add;
    } else if (starts(op, "cp.async.ca") || starts(op, "cp.async.cg")) {
      int64_t source = 0;
      i.from = {address(args[0], i.offset), address(args[1], source)};
      i.shape[1] = int(source), i.size = std::stoi(args[2], nullptr, 0), i.run = copy_async;
      if (args.size() > 3) i.from.push_back(operand(args[3]));
    } else if (starts(op, "cp.async.commit_group")) {
      i.run = copy_commit;
    } else if (starts(op, "cp.async.wait")) {
      i.offset = args.empty() ? 0 : std::stoi(args[0]), i.run = copy_wait;
    } else if (starts(op, "shfl.sync")) {
      const auto bar = args[0].find('|');
      i.to = {operand(trim(args[0].substr(0, bar)))};
      if (bar != std::string::npos) i.to.push_back(operand(trim(args[0].substr(bar + 1))));
      all_from(1), i.shape[0] = has("bfly") ? kButterfly : has("idx") ? kIndex : has("up") ? kUp : kDown, i.run = shuffle;
    } else if (starts(op, "redux.sync")) {
      i.to = operands(args[0]), all_from(1), i.run = reduce, i.shape[1] = parts.back() == "s32";
      const std::map<std::string, int> folds{{"add", kAdd}, {"max", kMax}, {"min", kMin}, {"and", kAnd}, {"or", kOr}, {"xor", kXor}};
      i.shape[0] = folds.at(parts[2]);
    } else if (starts(op, "vote.sync")) {
      i.to = operands(args[0]), all_from(1), i.run = vote, i.shape[0] = has("ballot") ? 0 : has("any") ? 1 : 2;
    } else if (name == "ldmatrix" || name == "stmatrix") {
      const int at = name == "ldmatrix";
      i.from = {address(args[at], i.offset)}, i.run = matrices;
      for (int r : operands(args[1 - at])) (at ? i.to : i.from).push_back(r);
      i.shape[0] = has("x4") ? 4 : has("x2") ? 2 : 1, i.shape[1] = has("trans"), i.shape[2] = !at;
    } else if (starts(op, "mma.sync")) {
      const std::string& type = parts[7];  // mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
      if (parts.size() != 10 || !starts(parts[3], "m16n8k") || parts[6] != "f32") fail("not known");
      i.to = operands(args[0]), all_from(1), i.shape[0] = matrix_type(type), i.shape[1] = std::stoi(parts[3].substr(6)), i.run = mma;
    } else if (starts(op, "wgmma.mma_async")) {
      i.to = operands(args[0]), i.many = args[1][0] == '{' ? 4 : 1;
      for (int k = 1; k < 4; ++k)
        for (int r : operands(args[k])) i.from.push_back(r);
      if (args[4] != "1" || args[5] != "1" || parts[5] != "f32") fail("not known");
      const auto n = parts[4].find('n');
      i.shape[0] = matrix_type(parts[6]), i.shape[1] = std::stoi(parts[4].substr(n + 1));
      if (i.many == 1 && args.size() > 7) i.shape[2] = args[6] == "1", i.shape[3] = args[7] == "1";
      if (i.many == 4 && args.size() > 6) i.shape[3] = args[6] == "1";
      i.run = wgmma;
    } else if (starts(op, "wgmma.commit_group")) {
      i.run = wgmma_commit;
    } else if (starts(op, "wgmma.wait_group")) {
      i.offset = std::stoi(args[0]), i.run = wgmma_wait;
    } else if (starts(op, "wgmma.fence") || name == "fence" || name == "membar" || name == "griddepcontrol" || name == "nanosleep") {
      i.run = nothing;
    } else {
      fail("not known");
    }
  }

  static int matrix_type(const std::string& s) { return s == "bf16" ? kBf16 : s == "f16" ? kF16 : s == "tf32" ? kTf32 : (fail("type " + s), 0); }

  void move(Instruction& i, const Args& args, int bytes) {
    i.to = operands(args[0]), i.from = operands(args[1]);
    const int many = int(std::max(i.to.size(), i.from.size()));
    i.size = bytes / many;
    if (many == 1) {
      i.run = map<uint64_t, uint64_t>([](uint64_t a) { return a; });
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

  void transfer(Instruction& i, const std::vector<std::string>& parts, const Args& args) {
    const bool loads = parts[0] == "ld";
    std::string space;
    for (auto& x : parts) {
      if (x == "v2" || x == "v4" || x == "v8") i.many = x[1] - '0';
      if (starts(x, "shared") || x == "global" || x == "local" || x == "param" || x == "const") space = x;
    }
    i.size = width(parts.back()), i.shape[0] = parts.back()[0] == 's';
    i.from = {address(args[loads], i.offset)};
    for (int r : operands(args[!loads])) (loads ? i.to : i.from).push_back(r);
    if (starts(space, "shared")) i.run = loads ? load<Space::kShared> : store<Space::kShared>;
    else if (space == "global" && !is_module(args[loads])) i.run = loads ? load<Space::kGlobal> : store<Space::kGlobal>;
    else if (space == "local") i.run = loads ? load<Space::kLocal> : store<Space::kLocal>;
    else if (loads && space == "param") i.run = load<Space::kParam>;
    else if (loads && (space == "global" || space == "const")) i.run = load<Space::kConstant>;
    else fail("not known");
    if (int((loads ? i.to.size() : i.from.size() - 1)) != i.many) fail("needs " + std::to_string(i.many) + " registers");
  }
  bool is_module(const std::string& s) const {
    return std::any_of(p.globals.begin(), p.globals.end(), [&](auto& g) { return s.find(g.first) != std::string::npos; });
  }
};

}  // namespace ptx
