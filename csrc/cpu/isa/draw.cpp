// Philox, B blocks at a time, and Box-Muller, written so that the compiler makes vectors of it.
#include "vector.h"

#include "draw.h"

namespace {

using namespace ef::cpu;

// ---- log, sin, cos in single precision, within 2 ulp on the ranges used --------------------------------------------

inline float log_unit(float u) {  // 0 < u <= 1, cephes' logf
  const int32_t bits = __builtin_bit_cast(int32_t, u), e = ((bits >> 23) & 255) - 126;
  const float b = __builtin_bit_cast(float, (bits & 0x007fffff) | 0x3f000000);
  const bool low = b < 0.70710678f;
  const float x = low ? b + b - 1.0f : b - 1.0f, k = (float)(low ? e - 1 : e), z = x * x;
  float p = 7.0376836292e-2f;
  p = p * x - 1.1514610310e-1f;
  p = p * x + 1.1676998740e-1f;
  p = p * x - 1.2420140846e-1f;
  p = p * x + 1.4249322787e-1f;
  p = p * x - 1.6668057665e-1f;
  p = p * x + 2.0000714765e-1f;
  p = p * x - 2.4999993993e-1f;
  p = p * x + 3.3333331174e-1f;
  const float y = p * x * z + k * -2.12194440e-4f - 0.5f * z;
  return x + y + k * 0.693359375f;
}

inline void sin_cos(float angle, float* s, float* c) {  // 0 <= angle <= 2 pi
  const float q = __builtin_rintf(angle * 0.636619772367581343f);
  const int32_t k = (int32_t)q;
  const float r = ((angle - q * 1.5703125f) - q * 4.837512969970703e-4f) - q * 7.549789948768648e-8f, z = r * r;
  const float sr = ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * r + r;
  const float cr = ((2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f) * z * z - 0.5f * z + 1.0f;
  const float a = k & 1 ? cr : sr, b = k & 1 ? sr : cr;
  *s = k & 2 ? -a : a;
  *c = (k + 1) & 2 ? -b : b;
}

inline float unit(uint32_t word) { return ((float)(int32_t)(word >> 8) + 0.5f) * 0x1p-24f; }

// ---- Philox4x32-10 --------------------------------------------------------------------------------------------------

// A word stands in the low half of a lane of 64 bits; what the high half holds does not matter. So a round of one vector is two
// products, two shifts and two three-way xors: 10 x 6 / 8 operations a block with 512 bits.
using Lanes = Vec<uint64_t>::reg;
typedef uint32_t Narrow __attribute__((vector_size(EF_BYTES / 2), aligned(1), may_alias));
constexpr int L = Vec<uint64_t>::lanes, V = 4, B = V * L;  // V: chains at once, or each waits for its products

inline Lanes product(Lanes x, uint32_t y) {  // of the low halves
#if defined(__AVX512F__)
  return (Lanes)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi64(y));
#elif defined(__AVX2__)
  return (Lanes)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(y));
#elif defined(__SSE2__)
  return (Lanes)_mm_mul_epu32((__m128i)x, _mm_set1_epi64x(y));
#else
  return (x & 0xFFFFFFFFu) * y;
#endif
}

// word w of block base + index[i] at out[w * B + i]
inline void philox(const int64_t* index, int64_t base, uint64_t seed, uint64_t offset, uint32_t* out) {
  Lanes c0[V], c1[V], c2[V], c3[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    c0[v] = load<uint64_t>(index + v * L) + (uint64_t)base, c1[v] = c0[v] >> 32;
    c2[v] = (Lanes){} + offset, c3[v] = c2[v] >> 32;
  }
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const Lanes p0 = product(c0[v], 0xD2511F53u), p1 = product(c2[v], 0xCD9E8D57u);
      c0[v] = (p1 >> 32) ^ c1[v] ^ (uint64_t)k0, c1[v] = p1;
      c2[v] = (p0 >> 32) ^ c3[v] ^ (uint64_t)k1, c3[v] = p0;
    }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    *(Narrow*)(out + v * L) = __builtin_convertvector(c0[v], Narrow);
    *(Narrow*)(out + B + v * L) = __builtin_convertvector(c1[v], Narrow);
    *(Narrow*)(out + 2 * B + v * L) = __builtin_convertvector(c2[v], Narrow);
    *(Narrow*)(out + 3 * B + v * L) = __builtin_convertvector(c3[v], Narrow);
  }
}

// four normals of each of B blocks: z at out[z * B + i]
inline void box_muller(const uint32_t* words, float* out) {
  for (int pair = 0; pair < 4 * B; pair += 2 * B)
#pragma omp simd
    for (int i = pair; i < pair + B; ++i) {
      const float radius = __builtin_sqrtf(-2.0f * log_unit(unit(words[i])));
      float s, c;
      sin_cos(6.283185307179586f * unit(words[i + B]), &s, &c);
      out[i] = radius * c, out[i + B] = radius * s;
    }
}

// f(at, words, many) for B blocks base + index[at ...] at a time, of which `many` are wanted
template <class F>
inline void for_blocks(const int64_t* index, int64_t count, int64_t base, uint64_t seed, uint64_t offset, F&& f) {
  uint32_t words[4 * B];
  int64_t at = 0;
  for (; at + B <= count; at += B) {
    philox(index + at, base, seed, offset, words);
    f(at, words, B);
  }
  if (at == count) return;
  int64_t last[B] = {};
  memcpy(last, index + at, (count - at) * sizeof(int64_t));
  philox(last, base, seed, offset, words);
  f(at, words, (int)(count - at));
}

template <class U> inline void put(const U* values, int many, uint32_t* out, int64_t ld) {
  for (int w = 0; w < 4; ++w) memcpy(out + w * ld, values + w * B, many * sizeof(U));
}

void words(const int64_t* index, int64_t count, int64_t base, uint64_t seed, uint64_t offset, uint32_t* out, int64_t ld) {
  for_blocks(index, count, base, seed, offset, [&](int64_t at, const uint32_t* w, int many) { put(w, many, out + at, ld); });
}

void normals(const int64_t* index, int64_t count, int64_t base, uint64_t seed, uint64_t offset, uint32_t* out, int64_t ld) {
  for_blocks(index, count, base, seed, offset, [&](int64_t at, const uint32_t* w, int many) {
    float z[4 * B];
    box_muller(w, z);
    put(z, many, out + at, ld);
  });
}

void stream(float* out, int64_t count, int64_t start, uint64_t seed, uint64_t offset) {
  int64_t index[B];
  for (int i = 0; i < B; ++i) index[i] = i;
  for (int64_t at = 0; at < count; at += 4 * B) {
    uint32_t words[4 * B];
    float z[4 * B], ordered[4 * B];
    philox(index, (start + at) / 4, seed, offset, words);
    box_muller(words, z);
    for (int i = 0; i < B; ++i)
      for (int w = 0; w < 4; ++w) ordered[4 * i + w] = z[w * B + i];
    memcpy(out + at, ordered, (count - at < 4 * B ? count - at : 4 * B) * sizeof(float));
  }
}

// ---- signs ----------------------------------------------------------------------------------------------------------

template <class T> void row(const uint32_t* words, int64_t count, int bit, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = words[i] >> bit & 1 ? T(-1) : T(1);
}

template <class T, class U> void panel(const uint32_t* words, int64_t count, int bit, T* panel) {  // U: as wide as T
  constexpr int lanes = Vec<T>::lanes;
  typename Vec<U>::reg bits;
  typename Vec<T>::reg plus, minus;
  for (int c = 0; c < lanes; ++c) bits[c] = U(1) << (bit + c), plus[c] = T(1), minus[c] = T(-1);
  for (int64_t i = 0; i < count; ++i, panel += 2 * lanes) {
    const auto word = (typename Vec<U>::reg){} + (U)words[i];
    store<T>(panel, (word & bits) != 0 ? minus : plus);
  }
}

}  // namespace

namespace ef::cpu {
extern const Draws EF_NAME(draws);
const Draws EF_NAME(draws) = {stream, words, normals, {row<float>, panel<float, uint32_t>}, {row<double>, panel<double, uint64_t>}};
}  // namespace ef::cpu
