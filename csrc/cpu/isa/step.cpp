// Loops over parameters, written so that the compiler makes vectors of them; see cpu/step.cpp and cpu/step_adamw.cpp.
#include "vector.h"

#include "step.h"

namespace {

using namespace ef::cpu;

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
const Steps EF_NAME(steps) = {{update<float>, adamw<float>}, {update<double>, adamw<double>}};
}  // namespace ef::cpu
