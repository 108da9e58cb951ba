// gram: K_ij = sum_ts <a_it, a'_js> <b_it, b'_js> for factors a (n,t,d_in), b (n,t,d_out).
//
// Three routes, chosen by the caller (entangle_fast/ops/cost.py); GEMMs are torch's own, on cache-sized tiles:
//   rows   two (n,m) GEMMs and one multiply                       2nm(d_in + d_out) FLOPs
//   pairs  two (n·t, m·s) GEMMs in tiles, reduced as they appear  2nm·ts(d_in + d_out)
//   tiles  per-sample gradients for a few output rows at a time, their Gram accumulated
//                                                                 2(n·t + m·s)d_in·d_out + 2nm·d_in·d_out
// The symmetric case computes the lower triangle in row blocks and mirrors it: half of the (n,m) work.
#include "common.h"
#include "kernels.h"

namespace ef::cpu {
namespace {

constexpr int64_t kRowBlock = 64;             // samples in one row block of the lower triangle
constexpr int64_t kTileBytes = 16LL << 20;    // per-sample gradient tile: stays in the last-level cache
constexpr int64_t kPairBytes = 4LL << 20;     // one tile of position products

struct Side {  // contiguous (n,t,d) factors
  Tensor a, b;
  int64_t n, t;
};

template <class T>
void hadamard_rows(const T* x, const T* y, int64_t ld, T* out, int64_t ld_out, int64_t rows, int64_t cols) {
  torch::stable::parallel_for(0, rows, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t j = 0; j < cols; ++j) out[i * ld_out + j] = x[i * ld + j] * y[i * ld + j];
  });
}

template <class T>
EF_CLONES T dot_block(const T* x, const T* y, int64_t ld, int64_t t, int64_t s) {
  T sum = 0;
  for (int64_t p = 0; p < t; ++p) {
    const T* xp = x + p * ld;
    const T* yp = y + p * ld;
    T row = 0;
#pragma omp simd reduction(+ : row)
    for (int64_t q = 0; q < s; ++q) row += xp[q] * yp[q];
    sum += row;
  }
  return sum;
}

template <class T>
void mirror(T* k, int64_t n) {
  torch::stable::parallel_for(0, n, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t j = i + 1; j < n; ++j) k[i * n + j] = k[j * n + i];
  });
}

template <class T>
void rows(const Side& x, const Side& y, bool symmetric, Tensor& out) {
  const int64_t n = x.n, m = y.n;
  Tensor xa = torch::stable::view(x.a, {n, -1}), xb = torch::stable::view(x.b, {n, -1});
  Tensor ya = torch::stable::view(y.a, {m, -1}), yb = torch::stable::view(y.b, {m, -1});
  const int64_t block = symmetric ? kRowBlock * 4 : n;
  Tensor pa = empty_like_dtype(out, {std::min(block, n), m}, out.scalar_type());
  Tensor pb = empty_like_dtype(out, {std::min(block, n), m}, out.scalar_type());
  for (int64_t lo = 0; lo < n; lo += block) {
    const int64_t hi = std::min(lo + block, n), cols = symmetric ? hi : m;
    Tensor sa = slice(slice(pa, 0, 0, hi - lo), 1, 0, cols), sb = slice(slice(pb, 0, 0, hi - lo), 1, 0, cols);
    mm_out(sa, slice(xa, 0, lo, hi), torch::stable::transpose(slice(ya, 0, 0, cols), 0, 1));
    mm_out(sb, slice(xb, 0, lo, hi), torch::stable::transpose(slice(yb, 0, 0, cols), 0, 1));
    hadamard_rows(sa.const_data_ptr<T>(), sb.const_data_ptr<T>(), m, out.mutable_data_ptr<T>() + lo * m, m, hi - lo, cols);
  }
}

template <class T>
void pairs(const Side& x, const Side& y, bool symmetric, Tensor& out) {
  const int64_t n = x.n, m = y.n, t = x.t, s = y.t;
  Tensor xa = torch::stable::view(x.a, {n * t, -1}), xb = torch::stable::view(x.b, {n * t, -1});
  Tensor ya = torch::stable::view(y.a, {m * s, -1}), yb = torch::stable::view(y.b, {m * s, -1});
  // square-ish tiles of samples: both GEMM operands are reused and the products stay in cache
  const int64_t pair = t * s * (int64_t)sizeof(T);
  int64_t block = 1;
  while ((block * 2) * (block * 2) * pair <= kPairBytes && block < std::max(n, m)) block *= 2;
  Tensor pa = empty_like_dtype(out, {block * t, block * s}, out.scalar_type());
  Tensor pb = empty_like_dtype(out, {block * t, block * s}, out.scalar_type());
  T* k = out.mutable_data_ptr<T>();
  for (int64_t i0 = 0; i0 < n; i0 += block) {
    const int64_t i1 = std::min(i0 + block, n);
    for (int64_t j0 = 0; j0 < (symmetric ? i1 : m); j0 += block) {
      const int64_t j1 = std::min(j0 + block, m);
      Tensor sa = slice(slice(pa, 0, 0, (i1 - i0) * t), 1, 0, (j1 - j0) * s);
      Tensor sb = slice(slice(pb, 0, 0, (i1 - i0) * t), 1, 0, (j1 - j0) * s);
      mm_out(sa, slice(xa, 0, i0 * t, i1 * t), torch::stable::transpose(slice(ya, 0, j0 * s, j1 * s), 0, 1));
      mm_out(sb, slice(xb, 0, i0 * t, i1 * t), torch::stable::transpose(slice(yb, 0, j0 * s, j1 * s), 0, 1));
      const T *qa = sa.const_data_ptr<T>(), *qb = sb.const_data_ptr<T>();
      const int64_t ld = block * s;
      torch::stable::parallel_for(0, i1 - i0, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          for (int64_t j = 0; j < j1 - j0; ++j) {
            if (symmetric && j0 + j > i0 + i) break;
            k[(i0 + i) * m + j0 + j] = dot_block(qa + i * t * ld + j * s, qb + i * t * ld + j * s, ld, t, s);
          }
      });
    }
  }
}

Tensor form_tile(const Side& x, Tensor& scratch, int64_t lo, int64_t hi) {
  Tensor tile = slice(scratch, 1, 0, (hi - lo) * x.a.size(2));
  // rows [lo, hi) of every G_i: (n, hi-lo, t) @ (n, t, d_in), written straight into the tile
  Tensor view = torch::stable::from_blob(
      tile.mutable_data_ptr(), {x.n, hi - lo, x.a.size(2)}, {scratch.stride(0), x.a.size(2), 1}, tile.device(),
      tile.scalar_type());
  bmm_out(view, torch::stable::transpose(slice(x.b, 2, lo, hi), 1, 2), x.a);
  return tile;
}

void tiles(const Side& x, const Side& y, bool symmetric, Tensor& out) {
  const int64_t d_in = x.a.size(2), d_out = x.b.size(2), bytes = out.element_size();
  const int64_t step = std::clamp<int64_t>(kTileBytes / std::max<int64_t>(1, (x.n + y.n) / 2 * d_in * bytes), 1, d_out);
  Tensor left = empty_like_dtype(out, {x.n, step * d_in}, out.scalar_type());
  Tensor right = symmetric ? left : empty_like_dtype(out, {y.n, step * d_in}, out.scalar_type());
  for (int64_t lo = 0; lo < d_out; lo += step) {
    const int64_t hi = std::min(lo + step, d_out);
    const double beta = lo == 0 ? 0.0 : 1.0;
    Tensor gx = form_tile(x, left, lo, hi);
    Tensor gy = symmetric ? gx : form_tile(y, right, lo, hi);
    for (int64_t i0 = 0; i0 < x.n; i0 += symmetric ? kRowBlock : x.n) {
      const int64_t i1 = symmetric ? std::min(i0 + kRowBlock, x.n) : x.n, cols = symmetric ? i1 : y.n;
      Tensor k = slice(slice(out, 0, i0, i1), 1, 0, cols);
      addmm_(k, slice(gx, 0, i0, i1), torch::stable::transpose(slice(gy, 0, 0, cols), 0, 1), beta);
    }
  }
}

Side side(const Tensor& a, const Tensor& b, ScalarType dtype) {
  STD_TORCH_CHECK(a.dim() == b.dim() && (a.dim() == 2 || a.dim() == 3), "gram: a and b are (n,d) or (n,t,d)");
  STD_TORCH_CHECK(a.size(0) == b.size(0) && (a.dim() == 2 || a.size(1) == b.size(1)), "gram: a and b differ in n or t");
  Tensor x = dense(a, dtype), y = dense(b, dtype);
  if (a.dim() == 2) return {torch::stable::unsqueeze(x, 1), torch::stable::unsqueeze(y, 1), a.size(0), 1};
  return {x, y, a.size(0), a.size(1)};
}

template <class T>
void run(const Side& x, const Side& y, bool symmetric, const std::string& route, Tensor& out) {
  if (route == "rows") {
    STD_TORCH_CHECK(x.t == 1 && y.t == 1, "gram: route rows needs t = 1");
    rows<T>(x, y, symmetric, out);
  } else if (route == "pairs") {
    pairs<T>(x, y, symmetric, out);
  } else {
    STD_TORCH_CHECK(route == "tiles", "gram: route is rows, pairs or tiles");
    tiles(x, y, symmetric, out);
  }
  if (symmetric) mirror(out.mutable_data_ptr<T>(), x.n);
}

}  // namespace

Tensor gram(const Tensor& a, const Tensor& b, std::optional<Tensor> a2, std::optional<Tensor> b2, std::string route) {
  const ScalarType dtype = accumulate_type(a.scalar_type());
  const bool symmetric = !a2.has_value();
  const Side x = side(a, b, dtype), y = symmetric ? x : side(*a2, *b2, dtype);
  STD_TORCH_CHECK(x.a.size(2) == y.a.size(2) && x.b.size(2) == y.b.size(2), "gram: the two sides differ in d_in or d_out");
  Tensor out = empty_like_dtype(x.a, {x.n, y.n}, dtype);
  if (x.n == 0 || y.n == 0) return out;
  if (x.t == 0 || y.t == 0 || x.a.size(2) == 0 || x.b.size(2) == 0) return torch::stable::zero_(out);
  if (dtype == ScalarType::Double) run<double>(x, y, symmetric, route, out);
  else run<float>(x, y, symmetric, route, out);
  return out;
}

}  // namespace ef::cpu
