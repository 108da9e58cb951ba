// Register-tile kernels: 8 x 2 vectors of accumulators, one operand broadcast, the other a panel of 2 vectors.
// Limit: one FMA (or vdpbf16ps) per cycle and 512-bit port; 10 loads go with 16 FMAs.
#include "vector.h"

#include "contract.h"

namespace {

using ef::cpu::Contract;
using ef::cpu::ContractTables;
using ef::cpu::ConvRuns;

constexpr int R = EF_ROWS;
constexpr int64_t kDepth = 256;  // units of k between two visits to the output: both panels stay in L1 and L2

template <class T> struct Tile {
  using U = typename Lane<T>::unit;
  using A = typename Lane<T>::acc;
  using reg = typename Vec<A>::reg;
  static constexpr int lanes = Vec<U>::lanes, width = 2 * lanes;

  // noinline: alone, its accumulators and operands fit the registers; inlined, GCC spills
  // out (R, width) = sum over k of x[k * ld_x + row] * y[k * width + column]
  __attribute__((noinline)) static void product(int64_t count, const U* x, int64_t ld_x, const U* y, A* out, int64_t ld_out = width) {
    reg c[R][2];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) c[i][0] = c[i][1] = (reg){};
    for (int64_t k = 0; k < count; ++k, x += ld_x, y += width) {
      const auto y0 = load<U>(y), y1 = load<U>(y + lanes);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        const auto v = splat<U>(x + i);
        multiply_add(c[i][0], v, y0);
        multiply_add(c[i][1], v, y1);
      }
    }
    save(c, out, ld_out);
  }

  // the same, rows of x at R addresses, k in runs
  __attribute__((noinline)) static void convolve(const T* const* row, const U* y, ConvRuns runs, int64_t units, A* out) {
    reg c[R][2];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) c[i][0] = c[i][1] = (reg){};
    for (int64_t r = 0; r < runs.count; ++r) {
      const int64_t at = runs.offset[r];
      for (int64_t u = 0; u < units; ++u, y += width) {
        const auto y0 = load<U>(y), y1 = load<U>(y + lanes);
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) {
          const auto v = splat<U>(row[i] + at + u * Lane<T>::per);
          multiply_add(c[i][0], v, y0);
          multiply_add(c[i][1], v, y1);
        }
      }
    }
    save(c, out, width);
  }

  static inline void save(const reg (&c)[R][2], A* out, int64_t ld) {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      store<A>(out + i * ld, c[i][0]);
      store<A>(out + i * ld + lanes, c[i][1]);
    }
  }
};

template <class T> inline void put_row(const typename Lane<T>::acc* in, T* out, int64_t count) {
  for (int64_t c = 0; c < count; ++c) narrow(in[c], out + c);
}
#if defined(__AVX512BF16__)
template <> inline void put_row<uint16_t>(const float* in, uint16_t* out, int64_t count) {
  for (int64_t c = 0; c < count; c += 16)  // rows are whole panels
    _mm256_storeu_si256((__m256i*)(out + c), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(in + c)));
}
#endif

// ---- pack: transpose `lanes` rows into a panel -----------------------------------------------------------------

#if defined(__AVX512F__)
inline void transpose16(const uint32_t* rows, int64_t ld, uint32_t* out, int64_t width) {
  __m512i r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(rows + i * ld);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  // r[4g + q]: columns q, q+4, q+8, q+12 (one per 128-bit lane) of rows 4g .. 4g+3
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    const __m512i a = _mm512_shuffle_i32x4(r[q], r[4 + q], 0x88), b = _mm512_shuffle_i32x4(r[q], r[4 + q], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(r[8 + q], r[12 + q], 0x88), d = _mm512_shuffle_i32x4(r[8 + q], r[12 + q], 0xdd);
    _mm512_storeu_si512(out + q * width, _mm512_shuffle_i32x4(a, c, 0x88));
    _mm512_storeu_si512(out + (q + 8) * width, _mm512_shuffle_i32x4(a, c, 0xdd));
    _mm512_storeu_si512(out + (q + 4) * width, _mm512_shuffle_i32x4(b, d, 0x88));
    _mm512_storeu_si512(out + (q + 12) * width, _mm512_shuffle_i32x4(b, d, 0xdd));
  }
}
#elif defined(__AVX2__)
inline void transpose8(const float* rows, int64_t ld, float* out, int64_t width) {
  __m256 r[8], t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)  // columns 0 .. 3, and 4 .. 7, of rows i and i + 4
    for (int h = 0; h < 2; ++h)
      r[i + 4 * h] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(rows + i * ld + 4 * h)), _mm_loadu_ps(rows + (i + 4) * ld + 4 * h), 1);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int h = 0; h < 8; h += 4) {
    _mm256_storeu_ps(out + h * width, _mm256_shuffle_ps(t[h], t[h + 2], 0x44));
    _mm256_storeu_ps(out + (h + 1) * width, _mm256_shuffle_ps(t[h], t[h + 2], 0xee));
    _mm256_storeu_ps(out + (h + 2) * width, _mm256_shuffle_ps(t[h + 1], t[h + 3], 0x44));
    _mm256_storeu_ps(out + (h + 3) * width, _mm256_shuffle_ps(t[h + 1], t[h + 3], 0xee));
  }
}
#endif

template <class T>
void pack(const T* rows, int64_t ld, int64_t count, int64_t units, T* panel, int64_t column) {
  using U = typename Lane<T>::unit;
  constexpr int64_t width = Tile<T>::width, lanes = Tile<T>::lanes;
  const U* in = (const U*)rows;
  U* out = (U*)panel + column;
  int64_t k = 0;
#if defined(__AVX512F__)
  if (sizeof(U) == 4 && count == 16)
    for (; k + 16 <= units; k += 16) transpose16((const uint32_t*)in + k, ld, (uint32_t*)out + k * width, width);
#elif defined(__AVX2__)
  if (sizeof(U) == 4 && count == 8)
    for (; k + 8 <= units; k += 8) transpose8((const float*)in + k, ld, (float*)out + k * width, width);
#endif
  for (; k < units; ++k)
    for (int64_t i = 0; i < lanes; ++i) {
      U x = 0;
      if (i < count) memcpy(&x, in + i * ld + k, sizeof x);
      out[k * width + i] = x;
    }
}

// ---- form: one sample's gradient, b^T a ------------------------------------------------------------------------

// t rows of x -> k-major units of a panel, zeros beyond `columns`
template <class T> inline void gather(const T* x, int64_t ld, int64_t t, int64_t columns, T* out) {
  static_assert(Lane<T>::per == 1);
  constexpr int64_t width = Tile<T>::width;
  for (int64_t p = 0; p < t; ++p, x += ld, out += width)
    if (columns >= width) memcpy(out, x, width * sizeof(T));
    else
      for (int64_t c = 0; c < width; ++c) out[c] = c < columns ? x[c] : T(0);
}
#if defined(__AVX512BF16__)
template <> inline void gather<uint16_t>(const uint16_t* x, int64_t ld, int64_t t, int64_t columns, uint16_t* out) {
  constexpr int64_t width = Tile<uint16_t>::width;
  const uint32_t here = columns < width ? (1u << columns) - 1 : ~0u;
  for (int64_t p = 0; p < t; p += 2)
    for (int64_t c = 0; c < width; c += 16, out += 32) {
      const __mmask16 first = here >> c, second = p + 1 < t ? first : 0;
      const __m512i even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first, x + p * ld + c));
      const __m512i odd = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(second, x + (p + 1) * ld + c));
      _mm512_storeu_si512(out, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
    }
}
#endif

// strided rows come from L3 too late unless asked for in time
inline void prefetch_rows(const char* x, int64_t stride, int64_t rows, int64_t bytes) {
  for (int64_t p = 0; p < rows; ++p)
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(x + p * stride + at, 0, 2);
}

template <class T>
void form(const T* a, int64_t ld_a, const T* b, int64_t ld_b, int64_t t, int64_t o, int64_t j, T* out, int64_t ld_out,
          T* work) {
  using U = typename Lane<T>::unit;
  using A = typename Lane<T>::acc;
  constexpr int per = Lane<T>::per;
  constexpr int64_t width = Tile<T>::width;
  const int64_t units = (t + per - 1) / per, panel = units * width * per;
  T *right = work, *left = work + panel;
  for (int64_t r = 0; r < o; r += width) gather<T>(b + r, ld_b, t, o - r, left + r / width * panel);
  A tile[R * width];
  for (int64_t c = 0; c < j; c += width) {
    gather<T>(a + c, ld_a, t, j - c, right);
    if (c + width < j) {
      prefetch_rows((const char*)(a + c + width), ld_a * sizeof(T), t, width * sizeof(T));
    } else {  // the next sample's
      prefetch_rows((const char*)(a + t * ld_a), ld_a * sizeof(T), t, width * sizeof(T));
      prefetch_rows((const char*)(b + t * ld_b), ld_b * sizeof(T), t, o * sizeof(T));
    }
    for (int64_t r = 0; r < o; r += R) {
      const U* x = (const U*)(left + r / width * panel) + r % width;
      T* rows = out + r * ld_out + c;
      if (per == 1 && r + R <= o) {
        Tile<T>::product(units, x, width, (const U*)right, (A*)rows, ld_out);
        continue;
      }
      Tile<T>::product(units, x, width, (const U*)right, tile);
      for (int64_t i = 0; i < R && r + i < o; ++i) put_row<T>(tile + i * width, rows + i * ld_out, width);
    }
  }
}

template <class T>
void pack_runs(const T* g, int64_t ld, int64_t o, int64_t count, int64_t length, T* out) {
  constexpr int per = Lane<T>::per;
  constexpr int64_t width = Tile<T>::width, lanes = Tile<T>::lanes;
  if (length % per == 0 && ld % per == 0) {  // whole units: the quick transpose
    for (int64_t c = 0; c < width; c += lanes) {
      const int64_t rows = o - c < 0 ? 0 : o - c < lanes ? o - c : lanes;
      pack<T>(g + (rows ? c * ld : 0), ld / per, rows, count * length / per, out, c);
    }
    return;
  }
  const int64_t units = (length + per - 1) / per;
  for (int64_t r = 0; r < count; ++r)
    for (int64_t u = 0; u < units; ++u) {
      T* row = out + (r * units + u) * width * per;
      for (int64_t c = 0; c < width; ++c)
        for (int e = 0; e < per; ++e)
          row[c * per + e] = c < o && u * per + e < length ? g[c * ld + r * length + u * per + e] : T(0);
    }
}

template <class T>
void form_conv(const T* x, const int64_t* base, int64_t j, const T* g, ConvRuns runs, T* out) {
  using U = typename Lane<T>::unit;
  using A = typename Lane<T>::acc;
  constexpr int64_t width = Tile<T>::width;
  const int64_t units = (runs.length + Lane<T>::per - 1) / Lane<T>::per;
  A tile[R * width];
  for (int64_t s = 0; s < j; s += R) {
    const T* row[R];
    for (int i = 0; i < R; ++i) row[i] = x + base[s + i < j ? s + i : j - 1];
    Tile<T>::convolve(row, (const U*)g, runs, units, tile);
    for (int64_t i = 0; i < R && s + i < j; ++i) put_row<T>(tile + i * width, out + (s + i) * width, width);
  }
}

// ---- gram of packed rows ---------------------------------------------------------------------------------------

template <class T>
void gram(const T* left, const T* right, int64_t panel, int64_t units, const int32_t* tiles, int64_t begin, int64_t end,
          void* out_, int64_t ld, int64_t n, int64_t m) {
  using U = typename Lane<T>::unit;
  using A = typename Lane<T>::acc;
  constexpr int64_t width = Tile<T>::width;
  A* out = (A*)out_;
  A tile[R * width];
  for (int64_t k = 0; k < units; k += kDepth) {
    const int64_t depth = units - k < kDepth ? units - k : kDepth;
    for (int64_t q = begin; q < end; ++q) {
      const int64_t i0 = (int64_t)tiles[2 * q] * R, column = tiles[2 * q + 1], j0 = column * width;
      const U* x = (const U*)left + (i0 / width) * panel + k * width + i0 % width;
      Tile<T>::product(depth, x, width, (const U*)right + column * panel + k * width, tile);
      const int64_t rows = n - i0 < R ? n - i0 : R, cols = m - j0 < width ? m - j0 : width;
      for (int64_t i = 0; i < rows; ++i) {
        A* o = out + (i0 + i) * ld + j0;
        for (int64_t c = 0; c < cols; ++c) o[c] += tile[i * width + c];
      }
    }
  }
}

// ---- pairs: products of positions, reduced as they appear ------------------------------------------------------

// out[j] += the sum of each right sample's columns
template <class A>
inline void flush(const A* sums, int64_t first, int64_t end, int64_t s, A* out, int64_t width) {
  const int64_t stop = end - first < width ? end - first : width;
  if (s == 1) {
    for (int64_t c = 0; c < stop; ++c) out[first + c] += sums[c];
    return;
  }
  int64_t j = first / s, left = (j + 1) * s - first;
  for (int64_t c = 0; c < stop; left = s) {
    const int64_t to = c + left < stop ? c + left : stop;
    A sum = 0;
    for (; c < to; ++c) sum += sums[c];
    out[j++] += sum;
  }
}

template <class T>
void pairs(const T* left_a, const T* left_b, int64_t rows, int64_t first_left, int64_t t, const T* right_a,
           const T* right_b, int64_t first_right, int64_t end_right, int64_t s, int64_t units_a, int64_t units_b,
           void* out_, int64_t ld) {
  using U = typename Lane<T>::unit;
  using A = typename Lane<T>::acc;
  constexpr int64_t width = Tile<T>::width;
  A* out = (A*)out_;
  A pa[R * width], pb[R * width], sums[width];
  int64_t i = first_left / t, remaining = (i + 1) * t - first_left;
  for (int64_t c = 0; c < width; ++c) sums[c] = 0;
  for (int64_t r0 = 0; r0 < rows; r0 += R) {
    const int64_t panel = r0 / width * width, in_panel = r0 % width;
    Tile<T>::product(units_a, (const U*)left_a + panel * units_a + in_panel, width, (const U*)right_a, pa);
    Tile<T>::product(units_b, (const U*)left_b + panel * units_b + in_panel, width, (const U*)right_b, pb);
    for (int64_t r = 0; r < R && r0 + r < rows; ++r) {
      for (int64_t c = 0; c < width; ++c) sums[c] += pa[r * width + c] * pb[r * width + c];
      if (--remaining == 0) {
        flush<A>(sums, first_right, end_right, s, out + i * ld, width);
        for (int64_t c = 0; c < width; ++c) sums[c] = 0;
        ++i, remaining = t;
      }
    }
  }
  if (remaining != t) flush<A>(sums, first_right, end_right, s, out + i * ld, width);  // a sample cut by the chunk
}

template <class T> double square(const T* x, int64_t count) {
  using A = typename Lane<T>::acc;
  constexpr int lanes = 4 * Vec<A>::lanes;
  constexpr int64_t stretch = 256 * lanes;  // summed in A
  double sum = 0;
  int64_t k = 0;
  while (k + lanes <= count) {
    A part[lanes] = {};
    for (const int64_t stop = count - k < stretch ? count : k + stretch; k + lanes <= stop; k += lanes)
      for (int c = 0; c < lanes; ++c) part[c] += widen(x[k + c]) * widen(x[k + c]);
    for (int half = lanes / 2; half; half /= 2)
      for (int c = 0; c < half; ++c) part[c] += part[half + c];
    sum += part[0];
  }
  for (; k < count; ++k) sum += (double)widen(x[k]) * widen(x[k]);
  return sum;
}

template <class T, int J> void dots_of(const T* x, const T* const* y, int64_t count, double* out) {
  using A = typename Lane<T>::acc;
  constexpr int lanes = Vec<A>::lanes, U = J == 1 ? 4 : 2;  // enough sums that none waits
  A s[J][U * lanes] = {};
  int64_t e = 0;
  for (; e + U * lanes <= count; e += U * lanes)
    for (int j = 0; j < J; ++j)
      for (int c = 0; c < U * lanes; ++c) s[j][c] += widen(x[e + c]) * widen(y[j][e + c]);
  for (int j = 0; j < J; ++j) {
    double sum = 0;
    for (int64_t r = e; r < count; ++r) sum += (double)widen(x[r]) * widen(y[j][r]);
    for (int half = U * lanes / 2; half; half /= 2)
      for (int c = 0; c < half; ++c) s[j][c] += s[j][half + c];
    out[j] += sum + s[j][0];
  }
}

template <class T> void dots(const T* x, const T* const* y, int64_t k, int64_t count, double* out) {
  int64_t j = 0;
  for (; j + 4 <= k; j += 4) dots_of<T, 4>(x, y + j, count, out + j);
  for (; j < k; ++j) dots_of<T, 1>(x, y + j, count, out + j);
}

template <class T> constexpr Contract<T> table() {
  return {Tile<T>::width, R, Tile<T>::lanes, Lane<T>::per, pack<T>, form<T>, form_conv<T>, pack_runs<T>, gram<T>, pairs<T>,
          square<T>, dots<T>};
}

}  // namespace

namespace ef::cpu {
extern const ContractTables EF_NAME(contract);
const ContractTables EF_NAME(contract) = {
    table<float>(), table<double>(),
#if defined(__AVX512BF16__)
    table<uint16_t>(),
#else
    {},
#endif
};
}  // namespace ef::cpu
