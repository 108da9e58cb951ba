// Which of the per-ISA kernel tables (isa/*.cpp) this machine runs; ENTANGLE_FAST_ISA=plain|avx2|avx512 lowers it.
#pragma once

#include "isa/contract.h"
#include "isa/draw.h"
#include "isa/loops.h"
#include "isa/step.h"

namespace ef::cpu {

const char* isa();  // the one in use
const ContractTables& contract();
const Draws& draws();
const Loops& loops();
const Steps& steps();

template <class T> const Contract<T>& contract_of();
template <> inline const Contract<float>& contract_of<float>() { return contract().f32; }
template <> inline const Contract<double>& contract_of<double>() { return contract().f64; }
template <> inline const Contract<uint16_t>& contract_of<uint16_t>() { return contract().bf16; }

template <class T> const Signs<T>& signs_of();
template <> inline const Signs<float>& signs_of<float>() { return draws().f32; }
template <> inline const Signs<double>& signs_of<double>() { return draws().f64; }

}  // namespace ef::cpu
