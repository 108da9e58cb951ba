// Loops over parameters, written so that the compiler makes vectors of them; see cpu/step.cpp and cpu/step_adamw.cpp.
#include "vector.h"

#include "step.h"

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

// ---- Philox4x32-10, Box-Muller: reference/philox.py ---------------------------------------------------------------

constexpr int B = 32;  // blocks of four words at a time

template <class F> inline void draw(float* out, int64_t count, int64_t start, uint64_t seed, uint64_t offset, F of) {
  for (int64_t at = 0; at < count; at += 4 * B) {
    uint32_t c0[B], c1[B], c2[B], c3[B];
    const uint64_t first = (uint64_t)(start + at) / 4;
    for (int i = 0; i < B; ++i) {
      c0[i] = (uint32_t)(first + i), c1[i] = (uint32_t)((first + i) >> 32);
      c2[i] = (uint32_t)offset, c3[i] = (uint32_t)(offset >> 32);
    }
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u)
      for (int i = 0; i < B; ++i) {
        const uint64_t p0 = (uint64_t)0xD2511F53u * c0[i], p1 = (uint64_t)0xCD9E8D57u * c2[i];
        c0[i] = (uint32_t)(p1 >> 32) ^ c1[i] ^ k0, c1[i] = (uint32_t)p1;
        c2[i] = (uint32_t)(p0 >> 32) ^ c3[i] ^ k1, c3[i] = (uint32_t)p0;
      }
    float z[4 * B];
#pragma omp simd
    for (int i = 0; i < B; ++i) of(c0[i], c1[i], c2[i], c3[i], z + 4 * i);
    const int64_t many = count - at < 4 * B ? count - at : 4 * B;
    memcpy(out + at, z, many * sizeof(float));
  }
}

void normal(float* out, int64_t count, int64_t start, uint64_t seed, uint64_t offset) {
  draw(out, count, start, seed, offset, [](uint32_t w0, uint32_t w1, uint32_t w2, uint32_t w3, float* z) {
    const float ra = __builtin_sqrtf(-2.0f * log_unit(unit(w0))), rb = __builtin_sqrtf(-2.0f * log_unit(unit(w2)));
    float sa, ca, sb, cb;
    sin_cos(6.283185307179586f * unit(w1), &sa, &ca);
    sin_cos(6.283185307179586f * unit(w3), &sb, &cb);
    z[0] = ra * ca, z[1] = ra * sa, z[2] = rb * cb, z[3] = rb * sb;
  });
}

void sign(float* out, int64_t count, int64_t start, uint64_t seed, uint64_t offset) {
  draw(out, count, start, seed, offset, [](uint32_t w0, uint32_t w1, uint32_t w2, uint32_t w3, float* z) {
    z[0] = w0 >> 31 ? -1.0f : 1.0f, z[1] = w1 >> 31 ? -1.0f : 1.0f, z[2] = w2 >> 31 ? -1.0f : 1.0f, z[3] = w3 >> 31 ? -1.0f : 1.0f;
  });
}

// ---- step_update -------------------------------------------------------------------------------------------------

template <class A, int K, bool Momentum, bool Noise>
void update_as(int64_t count, A* __restrict theta, A* __restrict v, const A* __restrict g, const A* const* d, const A* coef,
               int64_t k, const Update& u, const float* __restrict xi) {
  const A lr = (A)u.lr, beta = (A)u.beta, keep = (A)u.keep, noise = (A)u.noise;
  const A *__restrict d0 = K > 0 ? d[0] : nullptr, *__restrict d1 = K > 1 ? d[1] : nullptr;
  const A c0 = K > 0 ? coef[0] : A(0), c1 = K > 1 ? coef[1] : A(0);
#pragma omp simd
  for (int64_t e = 0; e < count; ++e) {
    A w = Momentum ? beta * v[e] + g[e] : g[e];
    if (K > 0) w -= c0 * d0[e];
    if (K > 1) w -= c1 * d1[e];
    if (Momentum) v[e] = w;
    A x = keep * theta[e] - lr * w;
    if (Noise) x += noise * (A)xi[e];
    theta[e] = x;
  }
}

template <class A, int K>
void update_by(int64_t count, A* theta, A* v, const A* g, const A* const* d, const A* coef, int64_t k, const Update& u,
               const float* xi) {
  if (v && xi) update_as<A, K, true, true>(count, theta, v, g, d, coef, k, u, xi);
  else if (v) update_as<A, K, true, false>(count, theta, v, g, d, coef, k, u, xi);
  else if (xi) update_as<A, K, false, true>(count, theta, v, g, d, coef, k, u, xi);
  else update_as<A, K, false, false>(count, theta, v, g, d, coef, k, u, xi);
}

template <class A>
void update(int64_t count, A* theta, A* v, const A* g, const A* const* d, const A* coef, int64_t k, const Update& u,
            const float* xi) {
  if (k == 0) return update_by<A, 0>(count, theta, v, g, d, coef, k, u, xi);
  if (k == 1) return update_by<A, 1>(count, theta, v, g, d, coef, k, u, xi);
  if (k == 2) return update_by<A, 2>(count, theta, v, g, d, coef, k, u, xi);
  constexpr int64_t B = 1024;  // many directions: the sum stands in L1 for a stretch
  A w[B];
  for (int64_t at = 0; at < count; at += B) {
    const int64_t many = count - at < B ? count - at : B;
    for (int64_t e = 0; e < many; ++e) w[e] = v ? (A)u.beta * v[at + e] + g[at + e] : g[at + e];
    for (int64_t j = 0; j < k; ++j) {
      const A c = coef[j], *__restrict dj = d[j] + at;
      for (int64_t e = 0; e < many; ++e) w[e] -= c * dj[e];
    }
    if (v) memcpy(v + at, w, many * sizeof(A));
    for (int64_t e = 0; e < many; ++e) {
      const A x = (A)u.keep * theta[at + e] - (A)u.lr * w[e];
      theta[at + e] = xi ? x + (A)u.noise * (A)xi[at + e] : x;
    }
  }
}

// ---- step_adamw --------------------------------------------------------------------------------------------------

inline float root_of(float x) { return __builtin_sqrtf(x); }
inline double root_of(double x) { return __builtin_sqrt(x); }

template <class A, int K, bool Noise>
void adamw_as(int64_t count, A* __restrict theta, A* __restrict m, A* __restrict u, const A* __restrict g, const A* const* d,
              const A* coef, const Adamw& c, const float* __restrict xi) {
  const A size = (A)c.size, root = (A)c.root, b1 = (A)c.beta1, r1 = (A)(1 - c.beta1), b2 = (A)c.beta2, r2 = (A)(1 - c.beta2);
  const A eps = (A)c.eps, keep = (A)c.keep, noise = (A)c.noise;
  const A *__restrict d0 = K > 0 ? d[0] : nullptr, *__restrict d1 = K > 1 ? d[1] : nullptr;
  const A c0 = K > 0 ? coef[0] : A(0), c1 = K > 1 ? coef[1] : A(0);
#pragma omp simd
  for (int64_t e = 0; e < count; ++e) {
    A w = g[e];
    if (K > 0) w -= c0 * d0[e];
    if (K > 1) w -= c1 * d1[e];
    const A first = b1 * m[e] + r1 * w, second = b2 * u[e] + r2 * w * w;
    m[e] = first, u[e] = second;
    A x = keep * theta[e] - size * first / (root_of(second) * root + eps);
    if (Noise) x += noise * (A)xi[e];
    theta[e] = x;
  }
}

template <class A, int K>
void adamw_by(int64_t count, A* theta, A* m, A* u, const A* g, const A* const* d, const A* coef, const Adamw& c, const float* xi) {
  if (xi) adamw_as<A, K, true>(count, theta, m, u, g, d, coef, c, xi);
  else adamw_as<A, K, false>(count, theta, m, u, g, d, coef, c, xi);
}

template <class A>
void adamw(int64_t count, A* theta, A* m, A* u, const A* g, const A* const* d, const A* coef, int64_t k, const Adamw& c,
           const float* xi) {
  if (k == 0) return adamw_by<A, 0>(count, theta, m, u, g, d, coef, c, xi);
  if (k == 1) return adamw_by<A, 1>(count, theta, m, u, g, d, coef, c, xi);
  if (k == 2) return adamw_by<A, 2>(count, theta, m, u, g, d, coef, c, xi);
  constexpr int64_t B = 1024;  // many directions: the projected gradient stands in L1 for a stretch
  A w[B];
  for (int64_t at = 0; at < count; at += B) {
    const int64_t many = count - at < B ? count - at : B;
    memcpy(w, g + at, many * sizeof(A));
    for (int64_t j = 0; j < k; ++j) {
      const A by = coef[j], *__restrict dj = d[j] + at;
      for (int64_t e = 0; e < many; ++e) w[e] -= by * dj[e];
    }
    adamw_by<A, 0>(many, theta + at, m + at, u + at, w, nullptr, nullptr, c, xi ? xi + at : nullptr);
  }
}

}  // namespace

namespace ef::cpu {
extern const Steps EF_NAME(steps);
const Steps EF_NAME(steps) = {{update<float>, adamw<float>}, {update<double>, adamw<double>}, normal, sign};
}  // namespace ef::cpu
