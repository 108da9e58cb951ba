#include "isa.h"

#include <cstdlib>
#include <cstring>

namespace ef::cpu {

#if defined(__x86_64__)
#define EF_DECLARE(type, name) extern const type name##_plain, name##_avx2, name##_avx512, name##_avx512bf16;
#else
#define EF_DECLARE(type, name) extern const type name##_plain;
#endif
EF_DECLARE(ContractTables, contract)
EF_DECLARE(Draws, draws)
EF_DECLARE(Loops, loops)
EF_DECLARE(Steps, steps)

namespace {

const char* const names[] = {"plain", "avx2", "avx512", "avx512bf16"};

int level() {
  static const int found = [] {
#if defined(__x86_64__)
    int best = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("x86-64-v4") ? 3
               : __builtin_cpu_supports("x86-64-v4") ? 2
               : __builtin_cpu_supports("x86-64-v3") ? 1
                                                     : 0;
    const char* wish = std::getenv("ENTANGLE_FAST_ISA");  // backends.py refuses what is none of the first three
    for (int i = 0; i < 3; ++i)
      if (wish && !std::strcmp(wish, names[i]) && i < best) best = i;
    return best;
#else
    return 0;
#endif
  }();
  return found;
}

}  // namespace

#if defined(__x86_64__)
#define EF_CHOOSE(name) (level() == 3 ? name##_avx512bf16 : level() == 2 ? name##_avx512 : level() == 1 ? name##_avx2 : name##_plain)
#else
#define EF_CHOOSE(name) name##_plain
#endif

const char* isa() { return names[level()]; }
const ContractTables& contract() { return EF_CHOOSE(contract); }
const Draws& draws() { return EF_CHOOSE(draws); }
const Loops& loops() { return EF_CHOOSE(loops); }
const Steps& steps() { return EF_CHOOSE(steps); }

}  // namespace ef::cpu
