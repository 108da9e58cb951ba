// Philox4x32-10, and the numbers that are read off its blocks as in reference/philox.py: one table per ISA.
#pragma once

#include <stdint.h>

namespace ef::cpu {

template <class T> struct Signs {  // of random directions: a set bit is -1, else 1
  // out[i] = bit `bit` of words[i]
  void (*row)(const uint32_t* words, int64_t count, int bit, T* out);
  // panel[i * width + c] = bit `bit` + c of words[i] for the c of half a panel (isa/contract.h): bit is a multiple of that
  void (*panel)(const uint32_t* words, int64_t count, int bit, T* panel);
};

struct Draws {
  // standard normals, elements [start, start + count) of the stream; start % 4 == 0
  void (*stream)(float* out, int64_t count, int64_t start, uint64_t seed, uint64_t offset);
  // blocks base + index[i], i < count: word w of each at out[w * ld + i]
  void (*words)(const int64_t* index, int64_t count, int64_t base, uint64_t seed, uint64_t offset, uint32_t* out, int64_t ld);
  // the same blocks: normal z of each, a float's bits, at out[z * ld + i]
  void (*normals)(const int64_t* index, int64_t count, int64_t base, uint64_t seed, uint64_t offset, uint32_t* out, int64_t ld);
  Signs<float> f32;
  Signs<double> f64;
};

}  // namespace ef::cpu
