// Elementwise loops, written so that the compiler makes vectors of them; see the header of each operation's file.
#include "vector.h"

#include "loops.h"

namespace {

using namespace ef::cpu;

template <class T> using Acc = typename Rows<T>::A;

inline float exp_below(float x) {  // x <= 0, within 2 ulp
  x = x < -87.0f ? -87.0f : x;
  const float k = __builtin_rintf(x * 1.44269504088896341f);
  const float r = (x - k * 0.693145751953125f) - k * 1.42860677e-6f;
  float p = 1.3981999e-3f;
  p = p * r + 8.3334519e-3f;
  p = p * r + 4.1665795e-2f;
  p = p * r + 1.6666665e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * __builtin_bit_cast(float, ((int32_t)k + 127) << 23);
}
inline double exp_below(double x) { return __builtin_exp(x); }

// ---- step: Gram, look-ahead -------------------------------------------------------------------------------------

using Doubles = Vec<double>::reg;
constexpr int D = Vec<double>::lanes;

inline Doubles doubles(const double* x) { return load<double>(x); }
// GCC's convertvector converts halves and joins them
#if defined(__AVX512F__)
inline Doubles doubles(const float* x) { return (Doubles)_mm512_cvtps_pd(_mm256_loadu_ps(x)); }
inline Doubles doubles(const uint16_t* x) {
  const __m256i bits = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)x)), 16);
  return (Doubles)_mm512_cvtps_pd(_mm256_castsi256_ps(bits));
}
#elif defined(__AVX2__)
inline Doubles doubles(const float* x) { return (Doubles)_mm256_cvtps_pd(_mm_loadu_ps(x)); }
inline Doubles doubles(const uint16_t* x) {
  const __m128i bits = _mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i*)x)), 16);
  return (Doubles)_mm256_cvtps_pd(_mm_castsi128_ps(bits));
}
#else
inline Doubles doubles(const float* x) {
  typedef float part __attribute__((vector_size(D * 4), aligned(4), may_alias));
  return __builtin_convertvector(*(const part*)x, Doubles);
}
inline Doubles doubles(const uint16_t* x) {
  typedef uint16_t part __attribute__((vector_size(D * 2), aligned(2), may_alias));
  typedef uint32_t bits __attribute__((vector_size(D * 4)));
  typedef float floats __attribute__((vector_size(D * 4)));
  return __builtin_convertvector((floats)(__builtin_convertvector(*(const part*)x, bits) << 16), Doubles);
}
#endif

// out[i * ld + j] += <x_i, y_j>; Same: y is x, j <= i.
// Limit: in cache, a conversion for each element and an FMA for each pair.
template <class T, int I, int J, bool Same> void dots_of(const T* const* x, const T* const* y, int64_t count, double* out, int64_t ld) {
  constexpr int sums = Same ? I * (I + 1) / 2 : I * J, U = sums < 3 ? 4 : sums < 6 ? 2 : 1;  // enough sums that none waits
  Doubles s[I][J][U] = {};
  int64_t e = 0;
  for (; e + D * U <= count; e += D * U) {
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) {
      Doubles right[J];
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) right[j] = doubles(y[j] + e + u * D);
#pragma GCC unroll 4
      for (int i = 0; i < I; ++i) {
        const Doubles left = Same ? right[i] : doubles(x[i] + e + u * D);
#pragma GCC unroll 4
        for (int j = 0; j < (Same ? i + 1 : J); ++j) s[i][j][u] += left * right[j];
      }
    }
  }
  for (int i = 0; i < I; ++i)
    for (int j = 0; j < (Same ? i + 1 : J); ++j) {
      double sum = 0;
      for (int64_t r = e; r < count; ++r) sum += (double)widen(x[i][r]) * (double)widen(y[j][r]);
      for (int u = 0; u < U; ++u)
        for (int l = 0; l < D; ++l) sum += s[i][j][u][l];
      out[i * ld + j] += sum;
    }
}

template <class T> using Dots = void (*)(const T* const*, const T* const*, int64_t, double*, int64_t);

template <class T> void dots(const T* const* x, int64_t k, int64_t count, double* out) {
  constexpr Dots<T> same[] = {dots_of<T, 1, 1, true>, dots_of<T, 2, 2, true>, dots_of<T, 3, 3, true>, dots_of<T, 4, 4, true>};
  constexpr Dots<T> others[] = {dots_of<T, 1, 4, false>, dots_of<T, 2, 4, false>, dots_of<T, 3, 4, false>, dots_of<T, 4, 4, false>};
  const int64_t stretch = k > 4 ? 2048 : count;  // of every vector, in L2
  const T *left[4], *right[4];
  for (int64_t at = 0; at < count; at += stretch) {
    const int64_t length = count - at < stretch ? count - at : stretch;
    for (int64_t i = 0; i < k; i += 4) {  // vectors in fours, the last may be fewer
      const int64_t many = k - i < 4 ? k - i : 4;
      for (int64_t g = 0; g < many; ++g) left[g] = x[i + g] + at;
      for (int64_t j = 0; j < i; j += 4) {
        for (int64_t g = 0; g < 4; ++g) right[g] = x[j + g] + at;
        others[many - 1](left, right, length, out + i * k + j, k);
      }
      same[many - 1](left, left, length, out + i * k + i, k);
    }
  }
}

template <class T> struct Bits;
template <> struct Bits<float> { using type = int32_t; };
template <> struct Bits<double> { using type = int64_t; };
template <> struct Bits<uint16_t> { using type = int16_t; };

// floats as integers in which neighbouring floats differ by one
template <class T> inline int64_t ordered(T x) {
  typename Bits<T>::type b;
  memcpy(&b, &x, sizeof b);
  constexpr int64_t mask = (int64_t)(((uint64_t)1 << (8 * sizeof(T) - 1)) - 1);
  return (int64_t)b ^ (((int64_t)b >> 63) & mask);
}
inline int32_t ordered(float x) {
  int32_t b;
  memcpy(&b, &x, 4);
  return b ^ ((b >> 31) & 0x7fffffff);
}
inline float from_ordered(int32_t i, float) {
  const int32_t b = i ^ ((i >> 31) & 0x7fffffff);
  float x;
  memcpy(&x, &b, 4);
  return x;
}
inline double from_ordered(int64_t i, double) {
  const int64_t b = i ^ ((i >> 63) & 0x7fffffffffffffff);
  double x;
  memcpy(&x, &b, 8);
  return x;
}
inline uint16_t from_ordered(int64_t i, uint16_t) { return (uint16_t)((int16_t)i ^ (((int16_t)i >> 15) & 0x7fff)); }
// i, so many floats on; unsigned, since the -128 of a NaN may wrap
inline int32_t moved_on(int32_t i, int8_t floats) { return (int32_t)((uint32_t)i + (uint32_t)floats); }
inline int64_t moved_on(int64_t i, int8_t floats) { return (int64_t)((uint64_t)i + (uint64_t)floats); }

// x + by * g in one fixed rounding: left to the compiler, look-ahead and undo could contract differently
inline float axpy(float x, float by, float g) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(by, g, x);
#else
  return x + by * g;
#endif
}
inline double axpy(double x, double by, double g) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fma(by, g, x);
#else
  return x + by * g;
#endif
}

template <class T> inline T moved(T theta, T g, Acc<T> by) {
  T out;
  narrow(axpy(widen(theta), by, widen(g)), &out);
  return out;
}

inline bool finite(float x) { return __builtin_fabsf(x) <= 3.402823466e38f; }
inline bool finite(double x) { return __builtin_fabs(x) <= 1.7976931348623157e308; }

template <class T> int64_t lookahead(T* __restrict theta, const T* __restrict g, int8_t* __restrict ulps, int64_t count, Acc<T> alpha) {
  int32_t far = 0;
  for (int64_t e = 0; e < count; ++e) {
    const T old = theta[e], now = moved<T>(old, g[e], -alpha), back = moved<T>(now, g[e], alpha);
    theta[e] = now;
    const int64_t off = (int64_t)((uint64_t)ordered(old) - (uint64_t)ordered(back));  // where it wraps it is far all the same
    const bool near = off >= -127 && off <= 127 && finite(widen(back));
    ulps[e] = near ? (int8_t)off : (int8_t)-128;
    far += !near;
  }
  return far;
}
template <> int64_t lookahead<float>(float* __restrict theta, const float* __restrict g, int8_t* __restrict ulps, int64_t count, float alpha) {
  int32_t far = 0;
#pragma omp simd reduction(+ : far)
  for (int64_t e = 0; e < count; ++e) {
    const float old = theta[e], now = axpy(old, -alpha, g[e]), back = axpy(now, alpha, g[e]);
    theta[e] = now;
    const int32_t a = ordered(old), b = ordered(back);
    const int32_t off = (int32_t)((uint32_t)a - (uint32_t)b);
    // opposite signs far apart may wrap into a small number: both must be of one half or small
    const bool wrapped = ((a ^ b) & (a ^ off)) < 0;
    const int32_t near = (off >= -127) & (off <= 127) & !wrapped & (__builtin_fabsf(back) <= 3.402823466e38f);
    ulps[e] = (int8_t)(near ? off : -128);
    far += 1 - near;
  }
  return far;
}

template <class T> void undo(T* __restrict theta, const T* __restrict g, const int8_t* __restrict ulps, int64_t count, Acc<T> alpha) {
  for (int64_t e = 0; e < count; ++e) {
    const T now = theta[e], old = from_ordered(moved_on(ordered(moved<T>(now, g[e], alpha)), ulps[e]), T(0));
    theta[e] = ulps[e] == -128 ? now : old;
  }
}

// ---- sample_loss -------------------------------------------------------------------------------------------------

template <class T> void row_sums(const T* x, int64_t count, Acc<T>* top, Acc<T>* total, Acc<T>* below) {
  using A = Acc<T>;
  A hi = widen(x[0]);
#pragma omp simd reduction(max : hi)
  for (int64_t c = 0; c < count; ++c) {
    const A v = widen(x[c]);
    hi = v > hi ? v : hi;
  }
  A sum = 0, all = 0;
#pragma omp simd reduction(+ : sum, all)
  for (int64_t c = 0; c < count; ++c) {
    const A v = widen(x[c]) - hi;
    sum += exp_below(v);
    all += v;
  }
  *top = hi, *total = sum, *below = all;
}

template <class T>
void row_softmax(const T* __restrict x, T* __restrict out, int64_t count, Acc<T> top, Acc<T> log_sum, Acc<T> scale, Acc<T> shift) {
#pragma omp simd
  for (int64_t c = 0; c < count; ++c) narrow(scale * exp_below(widen(x[c]) - top - log_sum) - shift, out + c);
}

template <class T> void read(const T* __restrict x, Acc<T>* __restrict out, int64_t count) {
  for (int64_t e = 0; e < count; ++e) out[e] = widen(x[e]);
}
template <class T> void write(const Acc<T>* __restrict x, T* __restrict out, int64_t count) {
  for (int64_t e = 0; e < count; ++e) narrow(x[e], out + e);
}

template <class T> constexpr Elements<T> elements() {
  return {dots<T>, lookahead<T>, undo<T>, row_sums<T>, row_softmax<T>, read<T>, write<T>};
}

}  // namespace

namespace ef::cpu {
extern const Loops EF_NAME(loops);
const Loops EF_NAME(loops) = {elements<float>(), elements<double>(), elements<uint16_t>()};
}  // namespace ef::cpu
