// PTX text into a Program. What it does not know is an error that names the instruction.
#pragma once

#include <algorithm>
#include <set>
#include <sstream>

#include "arithmetic.h"

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

// Whether a name has the parts of a pattern, in its order: "a b|c d?" is a.b.d, a.c.d, a.b or a.c
inline bool like(const std::vector<std::string>& parts, const std::string& pattern) {
  size_t at = 0;
  for (std::string word : split(pattern, ' ')) {
    const bool may = word.back() == '?';
    if (may) word.pop_back();
    const auto choices = split(word, '|');
    const bool here = at < parts.size() && std::find(choices.begin(), choices.end(), parts[at]) != choices.end();
    if (!here && !may) return false;
    at += here;
  }
  return at == parts.size();
}

inline int64_t number(const std::string& s, int base = 0) {  // all of it; an unsigned one may end in U
  size_t end = 0;
  const int64_t value = s[0] == '-' ? std::stoll(s, &end, base) : int64_t(std::stoull(s, &end, base));
  if (s.substr(end) != "" && s.substr(end) != "U") fail("a number: " + s);
  return value;
}

struct Args : std::vector<std::string> {
  const std::string& operator[](size_t i) const { if (i >= size()) fail("too few operands");
    return at(i); }
};

class Parser {
 public:
  // The kernel `entry`, or the first
  Program read(const std::string& text, const std::string& entry = "") {
    std::istringstream lines(text);
    std::string line, head;
    bool inside = false, ended = false;
    while (std::getline(lines, line)) {
      if (!inside) {
        module_line(trim(line), head, inside);
        if (inside && !entry.empty() && p.name != entry) {  // another kernel
          while (std::getline(lines, line) && line != "}") {}
          inside = false, head.clear(), params.clear(), p.params.clear(), p.param_bytes = 0;
        }
        continue;
      }
      const auto comment = line.find("//");
      const std::string code = trim(line.substr(0, comment));
      if (starts(code, ".loc\t")) {
        if (comment != std::string::npos) p.places.push_back(trim(line.substr(comment + 2)));
      } else if (code == "}" && pending.empty() && scopes.size() == 1) {
        ended = true;
        break;
      } else {
        statements(code);
      }
    }
    if (!ended || p.code.empty()) fail("no kernel, or one without an end");
    for (auto& b : branches) {
      auto found = labels.end();
      for (auto scope = b.scopes.rbegin(); scope != b.scopes.rend() && found == labels.end(); ++scope) found = labels.find({*scope, b.label});
      if (found == labels.end()) fail("no label " + b.label);
      p.code[b.at].offset = found->second;
    }
    p.shared = (p.shared + 127) / 128 * 128;
    for (auto& name : dynamic)  // behind what has a place of its own
      if (p.rows.count(name)) p.constants.push_back({p.rows[name], kSharedBase + uint64_t(p.shared)});
    return std::move(p);
  }

 private:
  Program p;
  std::string pending;
  struct Branch {
    size_t at;
    std::string label;
    std::vector<int> scopes;
  };
  std::vector<int> scopes{0};  // of inline assembly, whose labels are its own
  int begun = 0;
  std::map<std::pair<int, std::string>, int> labels;
  std::vector<Branch> branches;
  std::map<std::string, int64_t> depots, params, statics;
  std::set<std::string> dynamic{"global_smem"};
  std::map<std::string, int64_t> beside;  // shared variables of the module: bytes
  std::map<std::string, int64_t> declared;  // %r: how many
  std::set<std::string> named, predicates;
  const Table known = arithmetic();

  // ".shared .align 8 .b8 name[64];", ".param .u32 name,": the name, and how many bytes
  static std::pair<std::string, int64_t> variable(std::string line) {
    while (!line.empty() && (line.back() == ';' || line.back() == ',')) line.pop_back();
    const auto bracket = line.find('[');
    std::string head = trim(line.substr(0, bracket));
    int64_t each = 0;
    std::istringstream words(head);
    std::string name;
    while (words >> name)  // the type is a dot, a letter, its bits
      if (name.size() < 5 && name[0] == '.' && std::string("busf").find(name[1]) != std::string::npos && isdigit(name[2])) each = number(name.substr(2), 10) / 8;
    if (!each) fail("variable: " + line);
    const int64_t many = bracket == std::string::npos ? 1 : bracket + 2 == line.size() ? 0 : number(line.substr(bracket + 1, line.find(']') - bracket - 1));
    return {name, each * many};
  }
  int64_t shared_place(int64_t bytes) {
    const int64_t at = (p.shared + 127) / 128 * 128;
    p.shared = at + bytes;
    return at;
  }

  void module_line(const std::string& line, std::string& head, bool& inside) {
    if (starts(line, ".extern .shared")) {
      dynamic.insert(variable(line).first);
    } else if (starts(line, ".shared")) {
      beside.insert(variable(line));
    } else if (starts(line, ".global") || starts(line, ".const") || starts(line, ".visible .global")) {
      const auto bracket = line.find('['), open = line.find('{');
      if (bracket == std::string::npos || line.find(".b8") == std::string::npos) fail("module variable: " + line);
      auto& bytes = p.globals[trim(line.substr(line.rfind(' ', bracket) + 1, bracket - line.rfind(' ', bracket) - 1))];
      if (open != std::string::npos)
        for (auto& x : split(line.substr(open + 1, line.find('}') - open - 1), ',')) bytes.push_back((unsigned char)number(x));
      const int64_t size = number(line.substr(bracket + 1, line.find(']', bracket) - bracket - 1));
      if (size < int64_t(bytes.size()) || size > 1 << 20) fail("module variable: " + line);
      bytes.resize(size);  // the rest is zero
    } else if (starts(line, ".visible .entry") || starts(line, ".entry") || starts(line, ".weak .entry")) {
      const auto from = line.find(".entry") + 6;
      head = line, p.name = trim(line.substr(from, line.find('(') - from));
    } else if (!head.empty()) {
      if (starts(line, ".param")) {
        const auto [name, bytes] = variable(line);
        const auto align = line.find('[') == std::string::npos ? std::string::npos : line.find(".align");
        const int64_t whole = align == std::string::npos ? bytes : number(trim(line.substr(align + 7, line.find(' ', align + 7) - align - 7)), 10);
        p.param_bytes = (p.param_bytes + whole - 1) / whole * whole;
        params[name] = p.param_bytes;
        p.params.push_back({p.param_bytes, bytes}), p.param_bytes += bytes;
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
      } else if (c == ':' && !so_far.empty() && so_far.find_first_of(" \t[.@") == std::string::npos) {
        if (!labels.insert({{scopes.back(), so_far}, int(p.code.size())}).second) fail("two labels " + so_far);
        pending.clear();
      } else if (c == '{' && so_far.empty()) {  // a scope of inline assembly
        scopes.push_back(++begun);
      } else if (c == '}' && so_far.empty()) {
        scopes.pop_back();
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

  static std::string prefix(const std::string& s) { return s.substr(0, s.find_last_not_of("0123456789") + 1); }
  bool is_register(const std::string& s) const {  // %r7 of .reg .b32 %r<8>, or a name as it was declared
    const auto found = declared.find(prefix(s));
    const size_t digits = s.size() - prefix(s).size();
    return named.count(s) || (found != declared.end() && digits && digits < 10 && number(s.substr(s.size() - digits), 10) < found->second);
  }
  static bool is_special(const std::string& s) {
    for (const char* of : {"%tid", "%ntid", "%ctaid", "%nctaid"})
      for (const char* axis : {".x", ".y", ".z"})
        if (s == std::string(of) + axis) return true;
    return s == "%laneid" || s == "%lanemask_le" || s == "%cluster_ctarank" || s == "%cluster_nctarank";
  }

  int operand(const std::string& s) {
    if (s.empty()) fail("an operand is missing");
    if (s == "_" || is_register(s)) return row(s);
    if (is_special(s)) {
      if (!p.rows.count(s)) p.specials.push_back({row(s), s});
      return row(s);
    }
    if (starts(s, "0f") || starts(s, "0d")) {
      if (s.size() != (s[1] == 'f' ? 10 : 18)) fail("operand " + s);
      return constant(uint64_t(number(s.substr(2), 16)));
    }
    if (isdigit(s[0]) || s[0] == '-') return constant(uint64_t(number(s)));
    if (dynamic.count(s)) return row(s);
    if (auto of = beside.find(s); of != beside.end() && !statics.count(s)) statics[s] = shared_place(of->second);
    if (statics.count(s)) return constant(kSharedBase + uint64_t(statics[s]));
    if (depots.count(s)) return constant(uint64_t(depots[s]));
    if (params.count(s)) return constant(uint64_t(params[s]));
    if (auto g = p.globals.find(s); g != p.globals.end()) return constant(reinterpret_cast<uint64_t>(g->second.data()));
    fail("operand " + s);
  }
  int destination(const std::string& s) {
    if (s != "_" && !is_register(s)) fail("no register: " + s);
    return row(s);
  }

  std::vector<int> operands(const std::string& s, bool written = false) {  // one, or those of {a, b}
    std::vector<int> out;
    const bool many = s[0] == '{' && s.back() == '}';
    for (auto& x : many ? split(s.substr(1, s.size() - 2), ',') : std::vector<std::string>{s})
      out.push_back(written ? destination(x) : operand(x));
    return out;
  }

  // [x + offset] → the row of x; offset is added to `offset`
  int address(const std::string& s, int64_t& offset) {
    if (s.size() < 2 || s[0] != '[' || s.back() != ']') fail("an address is missing");
    const auto plus = s.find('+');
    const std::string base = trim(s.substr(1, std::min(plus, s.size() - 1) - 1));
    if (plus != std::string::npos) offset += number(trim(s.substr(plus + 1, s.size() - plus - 2)));
    if (params.count(base)) return offset += params[base], constant(0);
    return operand(base);
  }

  void declare(const std::string& s) {  // .reg .b32 %r<42>, or names; .local .align 4 .b8 __local_depot0[28]
    const auto space = s.find_last_of(" \t"), bracket = s.find('['), angle = s.find('<');
    if (space == std::string::npos) fail("declaration: " + s);
    if (starts(s, ".shared")) {
      const auto [name, bytes] = variable(s);
      statics[name] = shared_place(bytes);
    } else if (starts(s, ".local")) {
      const int64_t bytes = bracket == std::string::npos ? -1 : number(s.substr(bracket + 1, s.size() - bracket - 2));
      if (bytes < 0 || bytes > 512 * 1024) fail("declaration: " + s);  // what a thread may have
      p.local = (p.local + 15) / 16 * 16;
      depots[s.substr(space + 1, bracket - space - 1)] = p.local, p.local += int(bytes);
    } else if (angle != std::string::npos) {
      if (s.find(".pred") != std::string::npos) predicates.insert(s.substr(space + 1, angle - space - 1));
      declared[s.substr(space + 1, angle - space - 1)] = number(s.substr(angle + 1, s.size() - angle - 2));
    } else {
      for (auto& name : split(s.substr(space + 1), ',')) named.insert(name);
    }
  }

  void statement(std::string s) {
    if (starts(s, ".reg") || starts(s, ".local") || starts(s, ".shared")) return declare(s);
    if (s.empty() || starts(s, ".pragma")) return;
    Instruction i;
    if (s[0] == '@') {
      i.unless = s[1] == '!';
      const auto space = std::min(s.find_first_of(" \t"), s.size());
      i.guard = destination(s.substr(i.unless ? 2 : 1, space - (i.unless ? 2 : 1)));
      s = trim(s.substr(space));
    }
    const auto space = s.find_first_of(" \t");
    const std::string op = s.substr(0, space);
    const Args args{space == std::string::npos ? std::vector<std::string>{} : split(s.substr(space), ',')};
    if (p.places.empty()) p.places.push_back(p.name);
    i.source = int(p.places.size()) - 1;
    try {
      decode(i, op, args);
      if (i.guard >= 0 && i.together) fail("not known with a predicate");
    } catch (const std::exception& e) {
      fail(p.places.back() + ": " + s + ": " + e.what());
    }
    p.code.push_back(std::move(i));
  }

  // decode.h
  void decode(Instruction& i, const std::string& op, const Args& args);
  void move(Instruction& i, const Args& args, int bytes);
  void transfer(Instruction& i, const std::vector<std::string>& parts, const Args& args);
  void product(Instruction& i, const std::vector<std::string>& parts, const Args& args);
};

}  // namespace ptx
