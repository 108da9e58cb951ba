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
  Program read(const std::string& text) {
    std::istringstream lines(text);
    std::string line, head;
    bool inside = false, ended = false;
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
        ended = true;
        break;
      } else {
        statements(code);
      }
    }
    if (!ended || p.code.empty()) fail("no kernel, or one without an end");
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
  std::map<std::string, int64_t> declared;  // %r: how many
  std::set<std::string> named, predicates;
  const Table known = arithmetic();

  void module_line(const std::string& line, std::string& head, bool& inside) {
    if (starts(line, ".global") || starts(line, ".const") || starts(line, ".visible .global")) {
      const auto bracket = line.find('['), open = line.find('{');
      if (bracket == std::string::npos || open == std::string::npos || line.find(".b8") == std::string::npos) fail("module variable: " + line);
      auto& bytes = p.globals[trim(line.substr(line.rfind(' ', bracket) + 1, bracket - line.rfind(' ', bracket) - 1))];
      for (auto& x : split(line.substr(open + 1, line.find('}') - open - 1), ',')) bytes.push_back((unsigned char)number(x));
      const int64_t size = number(line.substr(bracket + 1, line.find(']', bracket) - bracket - 1));
      if (size < int64_t(bytes.size()) || size > 1 << 20) fail("module variable: " + line);
      bytes.resize(size);  // the rest is zero
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
    return s == "%laneid";
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
    if (s == "global_smem") return constant(kSharedBase);
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
  std::vector<int> destinations(const std::string& s) { return operands(s, true); }

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
    if (starts(s, ".local")) {
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
    if (starts(s, ".reg") || starts(s, ".local")) return declare(s);
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
