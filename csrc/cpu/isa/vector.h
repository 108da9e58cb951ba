// Vectors as wide as the ISA that this translation unit is compiled for; setup.py compiles isa/*.cpp once per ISA.
// These files hold loops only: no torch, no std headers, so that no inline function of a wide ISA leaks into the rest.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

#if defined(__AVX512F__)
#define EF_BYTES 64
#define EF_ROWS 8  // rows of a register tile: 8 x 2 accumulators of 32 registers
#elif defined(__AVX2__)
#define EF_BYTES 32
#define EF_ROWS 4
#else
#define EF_BYTES 16
#define EF_ROWS 4
#endif

#define EF_JOIN_(a, b) a##b
#define EF_JOIN(a, b) EF_JOIN_(a, b)
#define EF_NAME(name) EF_JOIN(name##_, EF_ISA)

namespace {

// unit: what one lane of a product takes; per: elements in it; acc: what it accumulates in
template <class T> struct Lane;

template <> struct Lane<float> {
  using acc = float;
  using unit = float;
  static constexpr int per = 1;
};
template <> struct Lane<double> {
  using acc = double;
  using unit = double;
  static constexpr int per = 1;
};
template <> struct Lane<uint16_t> {  // bfloat16: a lane multiplies a pair of neighbours along k, accumulated in float
  using acc = float;
  using unit = uint32_t;
  static constexpr int per = 2;
};

template <class U> struct Vec {
  typedef U reg __attribute__((vector_size(EF_BYTES)));
  typedef U mem __attribute__((vector_size(EF_BYTES), aligned(1), may_alias));
  static constexpr int lanes = EF_BYTES / sizeof(U);
};

template <class U> inline typename Vec<U>::reg load(const void* p) { return *(const typename Vec<U>::mem*)p; }
template <class U> inline void store(void* p, typename Vec<U>::reg x) { *(typename Vec<U>::mem*)p = x; }
template <class U> inline typename Vec<U>::reg splat(const void* p) {
  U x;
  memcpy(&x, p, sizeof x);
  return x - (typename Vec<U>::reg){};
}

inline void multiply_add(Vec<float>::reg& c, Vec<float>::reg x, Vec<float>::reg y) { c += x * y; }
inline void multiply_add(Vec<double>::reg& c, Vec<double>::reg x, Vec<double>::reg y) { c += x * y; }
#if defined(__AVX512BF16__)
inline void multiply_add(Vec<float>::reg& c, Vec<uint32_t>::reg x, Vec<uint32_t>::reg y) {
  c = (Vec<float>::reg)_mm512_dpbf16_ps((__m512)c, (__m512bh)x, (__m512bh)y);
}
#endif

inline float widen(uint16_t x) {
  uint32_t bits = (uint32_t)x << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
inline float widen(float x) { return x; }
inline double widen(double x) { return x; }

inline void narrow(float x, float* out) { *out = x; }
inline void narrow(double x, double* out) { *out = x; }
inline void narrow(float x, uint16_t* out) {  // round to nearest, ties to even
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  *out = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (uint16_t)rounded;
}

}  // namespace
