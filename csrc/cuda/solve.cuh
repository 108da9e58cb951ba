// The k x k solve of step_project in one block, in double, with the rank rule of reference/solve.py.
//
// Cyclic Jacobi, half as many rotations at once as there are rows: round m takes the pairs (i, i xor m), and the rounds of
// all m are a sweep. The number of sweeps is fixed, 2, 5, 8, 11, 14 for 2 to 32 rows: enough in simulation (random, singular,
// near-singular).
#pragma once

#include <math.h>

#include "reduce.cuh"

namespace ef::cuda {

__host__ __device__ constexpr int solve_size(int k) {  // rows: a power of two
  int size = 2;
  while (size < k) size *= 2;
  return size;
}

constexpr double kLeast = 1e-60;  // square of a direction, and ridge: reference/solve.py

// a and v, rows one longer than they are; cosines, sines, projections; zeros
constexpr size_t solve_bytes(int k) {
  const size_t size = solve_size(k);
  return (2 * size * (size + 1) + 3 * size) * sizeof(double);
}
static_assert(solve_bytes(kMostDirections) <= 48 << 10, "what a block may have without asking");

// gram (lists, lists) of k directions, momentum where there is one, gradient -> project.coef; the whole block, which has
// solve_bytes(k) of dynamic shared memory
EF_DEVICE void solve(Span<const double> gram, int lists, const StepProject& project) {
  EF_DYNAMIC_SHARED(double, a);
  const Span<double> coef(project.coef);
  const int k = project.k, size = solve_size(k), half = size / 2, pitch = size + 1, thread = threadIdx.x;
  double *v = a + size * pitch, *cosine = v + size * pitch, *sine = cosine + half, *y = sine + half, *zero = y + size;
  const bool ridged = project.ridge >= kLeast;
  const auto unit = [&](int i) {  // gradients of unit length, where no ridge says how long they are
    const double square = gram[i * lists + i];
    return !(square > kLeast) ? 0.0 : ridged ? 1.0 : 1 / sqrt(square);
  };
  const auto inner = [&](int i) { return (project.momentum ? project.beta * gram[i * lists + k] : 0.0) + gram[i * lists + lists - 1]; };
  for (int e = thread; e < size * size; e += kThreads) {
    const int i = e / size, j = e % size;
    a[i * pitch + j] = i < k && j < k ? gram[i * lists + j] * unit(i) * unit(j) : 0.0;
    v[i * pitch + j] = i == j;
  }
  __syncthreads();
  if (thread < k) {  // a row's is NaN where anything of it is not finite
    double sum = 0 * inner(thread);
    for (int j = 0; j < k; ++j) sum += 0 * a[thread * pitch + j];
    zero[thread] = sum;
  }
  int bits = 0;
  while (1 << bits < size) ++bits;
  for (int sweep = 0; sweep < 3 * bits - 1; ++sweep)
    for (int m = 1, high = 0; m < size; ++m) {  // high: the highest bit of m, so that p of a pair has it not and p < q
      if (m >= 2 << high) ++high;
      const auto first = [high](int pair) { return pair >> high << (high + 1) | (pair & ((1 << high) - 1)); };
      if (thread < half) {
        const int p = first(thread), q = p ^ m;
        const double off = a[p * pitch + q], tau = (a[q * pitch + q] - a[p * pitch + p]) / (2 * off);
        const double t = off == 0 ? 0.0 : copysign(1 / (fabs(tau) + sqrt(1 + tau * tau)), tau);
        const double c = 1 / sqrt(1 + t * t);
        cosine[thread] = c, sine[thread] = t * c;
      }
      __syncthreads();
      for (int e = thread; e < half * half; e += kThreads) {  // where two pairs cross: four elements that no other thread touches
        const int i = e / half, j = e % half, p = first(i), q = first(j);
        double *x = a + p * pitch, *z = a + (p ^ m) * pitch;
        const double ci = cosine[i], si = sine[i], cj = cosine[j], sj = sine[j];
        const double xp = ci * x[q] - si * z[q], xq = ci * x[q ^ m] - si * z[q ^ m];
        const double zp = si * x[q] + ci * z[q], zq = si * x[q ^ m] + ci * z[q ^ m];
        x[q] = cj * xp - sj * xq, z[q ^ m] = sj * zp + cj * zq;
        x[q ^ m] = i == j ? 0.0 : sj * xp + cj * xq;
        z[q] = i == j ? 0.0 : cj * zp - sj * zq;
      }
      for (int e = thread; e < size * half; e += kThreads) {
        const int j = e % half, q = first(j);
        double* row = v + e / half * pitch;
        const double x = row[q], z = row[q ^ m];
        row[q] = cosine[j] * x - sine[j] * z, row[q ^ m] = sine[j] * x + cosine[j] * z;
      }
      __syncthreads();
    }
  if (thread < size) {
    double top = 0, sum = 0;
    for (int j = 0; j < size; ++j) top = fmax(top, a[j * pitch + j]);
    for (int i = 0; i < k; ++i) sum += v[i * pitch + thread] * (unit(i) * inner(i));
    const double value = a[thread * pitch + thread];
    y[thread] = ridged ? sum / (fmax(value, 0.0) + project.ridge) : value > project.rcond * top ? sum / value : 0.0;
  }
  __syncthreads();
  if (thread < k) {
    double sum = 0, none = 0;
    for (int j = 0; j < size; ++j) sum += v[thread * pitch + j] * y[j];
    for (int j = 0; j < k; ++j) none += zero[j];
    coef[thread] = unit(thread) * sum + none;
  }
}

}  // namespace ef::cuda
