// The engines behind gram, sqnorm and project: which piece of which samples each thread forms, packs and multiplies.
//
// Per-sample gradients exist only as panels of a few megabytes, in buffers that are kept between calls. Sums are taken
// in a fixed order: a given number of threads always gives the same bits, another number the same up to rounding.
#include <algorithm>
#include <cstring>
#include <utility>

#include "factors.h"
#include "scratch.h"

namespace ef::cpu {
namespace {

constexpr int64_t kPanelBytes = 4LL << 20;        // half of what all threads' panels take, and keep: inside L3
constexpr int64_t kPartialCells = 8LL << 20;      // of all threads' own sums together
constexpr int64_t kRightBytes = 16LL << 20;       // packed right-hand positions
constexpr int64_t kLeftRows = 64;                 // left-hand positions that meet a right panel while it is in L2

int64_t up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// pack `count` row-major rows into panels of `width` rows
template <class T> void pack_rows(const Contract<T>& k, const T* rows, int64_t d, int64_t count, T* panels) {
  const int64_t units = d / k.per;
  for (int64_t r = 0; r < up(count, k.width); r += k.lanes)
    k.pack(rows + (r < count ? r * d : 0), units, std::clamp<int64_t>(count - r, 0, k.lanes), units,
           panels + r / k.width * k.width * d, r % k.width);
}

struct Stretch {  // pieces [first, last) of all samples, `cells` elements a row together
  size_t first, last;
  int64_t cells, widest;
};

template <class T> Stretch stretch(const Gradients<T>& x, size_t first, size_t stop, int64_t budget) {
  Stretch s{first, first, 0, 0};
  for (; s.last < stop && (s.last == first || s.cells + x.pieces[s.last].cells <= budget); ++s.last) {
    s.cells += x.pieces[s.last].cells;
    s.widest = std::max(s.widest, x.pieces[s.last].cells);
  }
  return s;
}

// form and pack tasks [begin, end) of a stretch; task q: group of samples q / pieces, piece q % pieces
template <class T> void form_panels(const Gradients<T>& x, const Stretch& s, int64_t begin, int64_t end, T* panels) {
  const auto& k = contract_of<T>();
  const int64_t count = s.last - s.first, ld = s.widest + 16 * k.per;  // off the power of two, or rows share a cache set
  T* rows = (T*)scratch(Slot::rows, k.lanes * ld * sizeof(T));
  void* work = scratch(Slot::work, x.work());
  x.prepare(work);
  std::vector<int64_t> start(count + 1, 0);
  for (int64_t p = 0; p < count; ++p) start[p + 1] = start[p] + x.pieces[s.first + p].cells;
  for (int64_t q = begin; q < end; ++q) {
    const Piece& piece = x.pieces[s.first + q % count];
    const int64_t i0 = q / count * k.lanes, many = std::clamp<int64_t>(x.n - i0, 0, k.lanes);
    for (int64_t i = 0; i < many; ++i) x.form(i0 + i, piece, rows + i * ld, work);
    k.pack(rows, ld / k.per, many, piece.cells / k.per,
           panels + (i0 / k.width * s.cells + start[q % count]) * k.width, i0 % k.width);
  }
}

template <class T> int64_t form_tasks(const Gradients<T>& x, const Stretch& s) {
  const auto& k = contract_of<T>();
  return up(x.n, k.width) / k.lanes * (s.last - s.first);
}

// where the pieces can be dealt out evenly: the first piece of each thread, and the end; empty otherwise
template <class T> std::vector<size_t> deal(const Gradients<T>& x, int64_t threads) {
  std::vector<size_t> first{0};
  int64_t total = 0, sum = 0, worst = 0, begin = 0;
  for (const Piece& p : x.pieces) total += p.cells;
  for (size_t p = 0; p < x.pieces.size(); ++p) {
    if ((int64_t)first.size() < threads && sum + x.pieces[p].cells / 2 >= total * (int64_t)first.size() / threads && p > first.back()) {
      worst = std::max(worst, sum - begin), begin = sum;
      first.push_back(p);
    }
    sum += x.pieces[p].cells;
  }
  worst = std::max(worst, sum - begin);
  first.push_back(x.pieces.size());
  return worst * threads <= total + total / 8 ? first : std::vector<size_t>();
}

}  // namespace

template <class T, class Acc> void contract_tiles(const Gradients<T>& x, const Gradients<T>* y, Acc* out) {
  const auto& k = contract_of<T>();
  const bool symmetric = y == nullptr;
  const int64_t n = x.n, m = symmetric ? n : y->n, np = up(n, k.width), mp = up(m, k.width);
  std::vector<int32_t> tiles;  // (strip of left rows, right panel), those of one left panel together
  for (int64_t i = 0; i < np; i += k.width)
    for (int64_t j = 0; j < (symmetric ? i + 1 : m); j += k.width)
      for (int64_t r = i; r < std::min(i + k.width, n); r += k.rows) tiles.push_back(r / k.rows), tiles.push_back(j / k.width);
  const int64_t count = tiles.size() / 2;
  auto budget = [&](int64_t bytes) {  // cells of a row
    return std::clamp<int64_t>(bytes / ((symmetric ? np : np + mp) * (int64_t)sizeof(T)), 2048, 16384);
  };
  auto panels = [&](const Stretch& s) {
    T* left = (T*)scratch(Slot::panels, np * s.cells * sizeof(T));
    return std::pair<T*, T*>(left, symmetric ? left : (T*)scratch(Slot::other_panels, mp * s.cells * sizeof(T)));
  };

  // each thread its own pieces and its own sum: no waiting for one another until the end
  const int64_t threads = torch::stable::get_num_threads();
  const std::vector<size_t> first = n * m * threads <= kPartialCells ? deal(x, threads) : std::vector<size_t>();
  if (!first.empty()) {
    const int64_t parts = first.size() - 1;
    Acc* partial = parts > 1 ? (Acc*)scratch(Slot::partial, (parts - 1) * n * m * sizeof(Acc)) : nullptr;
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        Acc* sum = part ? partial + (part - 1) * n * m : out;
        if (part) std::memset((void*)sum, 0, n * m * sizeof(Acc));
        for (size_t p = first[part]; p < first[part + 1];) {
          const Stretch s = stretch(x, p, first[part + 1], budget(2 * kPanelBytes / threads));
          const auto [left, right] = panels(s);
          form_panels(x, s, 0, form_tasks(x, s), left);
          if (!symmetric) form_panels(*y, s, 0, form_tasks(*y, s), right);
          k.gram(left, right, s.cells / k.per * k.width, s.cells / k.per, tiles.data(), 0, count, sum, m, n, m);
          p = s.last;
        }
      }
    });
    torch::stable::parallel_for(0, parts > 1 ? n * m : 0, 1 << 15, [&](int64_t begin, int64_t end) {
      for (int64_t part = 0; part + 1 < parts; ++part)
        for (int64_t c = begin; c < end; ++c) out[c] += partial[part * n * m + c];
    });
    return;
  }

  // few pieces, or a large Gram: all threads on the samples of one stretch, then on the cells of the Gram
  for (size_t p = 0; p < x.pieces.size();) {
    const Stretch s = stretch(x, p, x.pieces.size(), budget(kPanelBytes));
    const auto [left, right] = panels(s);
    T *into = left, *other = right;
    torch::stable::parallel_for(0, form_tasks(x, s), 1, [&](int64_t begin, int64_t end) { form_panels(x, s, begin, end, into); });
    if (!symmetric)
      torch::stable::parallel_for(0, form_tasks(*y, s), 1, [&](int64_t begin, int64_t end) { form_panels(*y, s, begin, end, other); });
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      k.gram(into, other, s.cells / k.per * k.width, s.cells / k.per, tiles.data(), begin, end, out, m, n, m);
    });
    p = s.last;
  }
}

template <class T, class Acc> void contract_pairs(const Positions<T>& x, const Positions<T>* y_, Acc* out) {
  const auto& k = contract_of<T>();
  const bool symmetric = y_ == nullptr;
  const Positions<T>& y = symmetric ? x : *y_;
  const int64_t n = x.n, m = y.n, t = x.t, s = y.t, da = x.d_a, db = x.d_b, all = m * s;
  const int64_t block = std::max<int64_t>(1, kRightBytes / ((da + db) * (int64_t)sizeof(T)) / k.width) * k.width;
  const int64_t many = std::max<int64_t>(1, kLeftRows / 2 / t), groups = (n + many - 1) / many;  // samples of a left task
  const int64_t chunk = std::min<int64_t>(kLeftRows, up(many * t, k.width));
  for (int64_t p0 = 0; p0 < all; p0 += block) {
    const int64_t p1 = std::min(p0 + block, all), panels = (p1 - p0 + k.width - 1) / k.width;
    T* right_a = (T*)scratch(Slot::panels, panels * k.width * da * sizeof(T));
    T* right_b = (T*)scratch(Slot::other_panels, panels * k.width * db * sizeof(T));
    torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
      void* work = scratch(Slot::work, y.work(k.width));
      for (int64_t q = begin; q < end; ++q) {
        const T *a, *b;
        const int64_t first = p0 + q * k.width, count = std::min<int64_t>(k.width, p1 - first);
        y.rows(first, count, &a, &b, work);
        pack_rows(k, a, da, count, right_a + q * k.width * da);
        pack_rows(k, b, db, count, right_b + q * k.width * db);
      }
    });
    torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
      void* work = scratch(Slot::work, x.work(chunk));
      T* left_a = (T*)scratch(Slot::rows, chunk * (da + db) * sizeof(T));
      T* left_b = left_a + chunk * da;
      for (int64_t q = begin; q < end; ++q) {
        // first and last in turn: in the symmetric case the later ones have more to do
        const int64_t group = symmetric ? (q % 2 ? groups - 1 - q / 2 : q / 2) : q;
        const int64_t i0 = group * many, i1 = std::min(i0 + many, n), end_right = symmetric ? std::min(p1, i1 * s) : p1;
        for (int64_t r = i0 * t; p0 < end_right && r < i1 * t; r += chunk) {
          const T *a, *b;
          const int64_t count = std::min(chunk, i1 * t - r);
          x.rows(r, count, &a, &b, work);
          pack_rows(k, a, da, count, left_a);
          pack_rows(k, b, db, count, left_b);
          for (int64_t p = p0; p < end_right; p += k.width) {
            const int64_t panel = (p - p0) / k.width * k.width;
            k.pairs(left_a, left_b, count, r, t, right_a + panel * da, right_b + panel * db, p, p1, s, da / k.per,
                    db / k.per, out, m);
          }
        }
      }
    });
  }
}

template <class T> void contract_few(const Gradients<T>& x, const Gradients<T>& y, T* out) {
  const auto& k = contract_of<T>();
  int64_t widest = 0;
  for (const Piece& p : x.pieces) widest = std::max(widest, p.cells);
  torch::stable::parallel_for(0, x.n, 1, [&](int64_t begin, int64_t end) {
    T* cells = (T*)scratch(Slot::rows, widest * sizeof(T));
    T* others = (T*)scratch(Slot::panels, y.n * widest * sizeof(T));
    void* work = scratch(Slot::work, std::max(x.work(), y.work()));
    std::vector<double> sums((end - begin) * y.n);
    std::vector<const T*> at(y.n);
    for (int64_t j = 0; j < y.n; ++j) at[j] = others + j * widest;
    for (const Piece& p : x.pieces) {
      for (int64_t j = 0; j < y.n; ++j) y.form(j, p, others + j * widest, work);
      x.prepare(work);
      for (int64_t i = begin; i < end; ++i) {
        x.form(i, p, cells, work);
        k.dots(cells, at.data(), y.n, p.cells, sums.data() + (i - begin) * y.n);
      }
    }
    for (size_t s = 0; s < sums.size(); ++s) out[begin * y.n + s] = (T)sums[s];
  });
}

template <class T, class Acc> void contract_square(const Gradients<T>& x, Acc* out) {
  const auto& k = contract_of<T>();
  int64_t widest = 0;
  for (const Piece& p : x.pieces) widest = std::max(widest, p.cells);
  torch::stable::parallel_for(0, x.n, 1, [&](int64_t begin, int64_t end) {
    T* cells = (T*)scratch(Slot::rows, widest * sizeof(T));
    void* work = scratch(Slot::work, x.work());
    x.prepare(work);
    for (int64_t i = begin; i < end; ++i) {
      double sum = 0;
      for (const Piece& p : x.pieces) {
        x.form(i, p, cells, work);
        sum += k.square(cells, p.cells);
      }
      out[i] = (Acc)sum;
    }
  });
}

#define EF_INSTANTIATE(T, Acc)                                                       \
  template void contract_tiles<T, Acc>(const Gradients<T>&, const Gradients<T>*, Acc*);   \
  template void contract_pairs<T, Acc>(const Positions<T>&, const Positions<T>*, Acc*);   \
  template void contract_square<T, Acc>(const Gradients<T>&, Acc*);
EF_INSTANTIATE(float, float)
EF_INSTANTIATE(double, double)
EF_INSTANTIATE(uint16_t, float)
template void contract_few<float>(const Gradients<float>&, const Gradients<float>&, float*);
template void contract_few<double>(const Gradients<double>&, const Gradients<double>&, double*);

}  // namespace ef::cpu
