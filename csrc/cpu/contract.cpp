// The engines behind gram, sqnorm and project: which piece of which samples each thread forms, packs and multiplies.
//
// Per-sample gradients exist only as panels of a few megabytes, in buffers that are kept between calls. Sums are taken
// in a fixed order: a given number of threads always gives the same bits, another number the same up to rounding.
#include <algorithm>
#include <cstring>
#include <utility>

#include "directions.h"
#include "scratch.h"

namespace ef::cpu {
namespace {

constexpr int64_t kPanelBytes = 4LL << 20;        // half of what all threads' panels take, and keep: inside L3
constexpr int64_t kPartialCells = 8LL << 20;      // of all threads' own sums together
constexpr int64_t kDrawn = 256;                   // cells of a panel of signs: it stays in L1 and L2
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

template <class T> Stretch stretch(const Gradients<T>& x, size_t first, size_t stop, int64_t budget) {
  Stretch s{first, first, 0, 0};
  for (; s.last < stop && (s.last == first || s.cells + x.pieces[s.last].cells <= budget); ++s.last) {
    s.cells += x.pieces[s.last].cells;
    s.widest = std::max(s.widest, x.pieces[s.last].cells);
  }
  return s;
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

// out (n, m) += what multiply(stretch, left, sum) adds to sum, left being the panels of x's stretch; rows: of all panels, for their budget
template <class T, class Acc, class F> void by_stretches(const Gradients<T>& x, int64_t rows, int64_t m, Acc* out, F multiply) {
  const auto& k = contract_of<T>();
  const int64_t n = x.n, threads = torch::stable::get_num_threads();
  auto each = [&](size_t from, size_t stop, int64_t bytes, Acc* sum) {
    const int64_t budget = std::clamp<int64_t>(bytes / (rows * (int64_t)sizeof(T)), 2048, 16384);  // cells of a row
    for (size_t p = from; p < stop;) {
      const Stretch s = stretch(x, p, stop, budget);
      T* left = (T*)scratch(Slot::panels, up(n, k.width) * s.cells * sizeof(T));
      torch::stable::parallel_for(0, form_tasks(x, s), 1, [&](int64_t begin, int64_t end) { x.panels(s, begin, end, left); });
      multiply(s, left, sum);
      p = s.last;
    }
  };

  // few pieces, or a large result: all threads on the samples of one stretch, then on the cells of the result
  const std::vector<size_t> first = n * m * threads <= kPartialCells ? deal(x, threads) : std::vector<size_t>();
  if (first.empty()) return each(0, x.pieces.size(), kPanelBytes, out);

  // else each thread its own pieces and its own sum: no waiting for one another until the end
  const int64_t parts = first.size() - 1;
  Acc* partial = parts > 1 ? (Acc*)scratch(Slot::partial, (parts - 1) * n * m * sizeof(Acc)) : nullptr;
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      Acc* sum = part ? partial + (part - 1) * n * m : out;
      if (part) std::memset((void*)sum, 0, n * m * sizeof(Acc));
      each(first[part], first[part + 1], 2 * kPanelBytes / threads, sum);
    }
  });
  torch::stable::parallel_for(0, parts > 1 ? n * m : 0, 1 << 15, [&](int64_t begin, int64_t end) {
    for (int64_t part = 0; part + 1 < parts; ++part)
      for (int64_t c = begin; c < end; ++c) out[c] += partial[part * n * m + c];
  });
}

}  // namespace

// task q: group of rows q / pieces, piece q % pieces
template <class T> void Gradients<T>::panels(const Stretch& s, int64_t begin, int64_t end, T* out) const {
  const auto& k = contract_of<T>();
  const int64_t count = s.last - s.first, ld = s.widest + 16 * k.per;  // off the power of two, or rows share a cache set
  T* rows = (T*)scratch(Slot::rows, k.lanes * ld * sizeof(T));
  void* buffer = scratch(Slot::work, work());
  prepare(buffer);
  std::vector<int64_t> start(count + 1, 0);
  for (int64_t p = 0; p < count; ++p) start[p + 1] = start[p] + pieces[s.first + p].cells;
  for (int64_t q = begin; q < end; ++q) {
    const Piece& piece = pieces[s.first + q % count];
    const int64_t i0 = q / count * k.lanes, many = std::clamp<int64_t>(n - i0, 0, k.lanes);
    form_rows(i0, many, piece, rows, ld, buffer);
    k.pack(rows, ld / k.per, many, piece.cells / k.per,
           out + (i0 / k.width * s.cells + start[q % count]) * k.width, i0 % k.width);
  }
}

template <class T, class Acc> void contract_tiles(const Gradients<T>& x, const Gradients<T>* y, Acc* out) {
  const auto& k = contract_of<T>();
  const bool symmetric = y == nullptr;
  const int64_t n = x.n, m = symmetric ? n : y->n, np = up(n, k.width), mp = symmetric ? 0 : up(m, k.width);
  std::vector<int32_t> tiles;  // (strip of left rows, right panel), those of one left panel together
  for (int64_t i = 0; i < np; i += k.width)
    for (int64_t j = 0; j < (symmetric ? i + 1 : m); j += k.width)
      for (int64_t r = i; r < std::min(i + k.width, n); r += k.rows) tiles.push_back(r / k.rows), tiles.push_back(j / k.width);
  by_stretches<T, Acc>(x, np + mp, m, out, [&](const Stretch& s, const T* left, Acc* sum) {
    const T* right = left;
    if (!symmetric) {
      T* into = (T*)scratch(Slot::other_panels, mp * s.cells * sizeof(T));
      torch::stable::parallel_for(0, form_tasks(*y, s), 1, [&](int64_t begin, int64_t end) { y->panels(s, begin, end, into); });
      right = into;
    }
    torch::stable::parallel_for(0, tiles.size() / 2, 1, [&](int64_t begin, int64_t end) {
      k.gram(left, right, s.cells / k.per * k.width, s.cells / k.per, tiles.data(), begin, end, sum, m, n, m);
    });
  });
}

// Signs: the words of all cells are kept, 16 bytes for 128 directions, and a panel of kDrawn cells is made of them where it is multiplied
template <class T> void contract_drawn(const Gradients<T>& x, const RandomGradients<T>& y, T* out) {
  if (!y.directions.sign) return contract_tiles<T, T>(x, &y, out);
  const auto& k = contract_of<T>();
  const int64_t n = x.n, m = y.n, blocks = (m + 127) / 128;
  std::vector<int32_t> tiles;  // all strips of left rows, the one panel
  for (int64_t r = 0; r < n; r += k.rows) tiles.push_back(r / k.rows), tiles.push_back(0);
  by_stretches<T, T>(x, up(n, k.width), m, out, [&](const Stretch& s, const T* left, T* sum) {
    std::vector<int64_t> start{0};
    for (size_t p = s.first; p < s.last; ++p) start.push_back(start.back() + y.pieces[p].cells);
    uint32_t* words = (uint32_t*)scratch(Slot::other_panels, blocks * 4 * s.cells * sizeof(uint32_t));
    torch::stable::parallel_for(0, (s.last - s.first) * blocks, 1, [&](int64_t begin, int64_t end) {
      void* work = scratch(Slot::work, y.work());
      for (int64_t q = begin; q < end; ++q) {
        const int64_t piece = q / blocks, block = q % blocks;
        y.draw(y.first / 128 + block, y.pieces[s.first + piece], words + block * 4 * s.cells + start[piece], s.cells, work);
      }
    });
    torch::stable::parallel_for(0, (m + k.width - 1) / k.width, 1, [&](int64_t begin, int64_t end) {
      T* right = (T*)scratch(Slot::rows, kDrawn * k.width * sizeof(T));
      for (int64_t c = 0; c < s.cells; c += kDrawn)
        for (int64_t j = begin * k.width; j < std::min(end * k.width, m); j += k.width) {
          const int64_t depth = std::min(kDrawn, s.cells - c);
          for (int64_t half = 0; half < k.width; half += k.lanes)
            y.directions.panel(j + half, words + j / 128 * 4 * s.cells + c, s.cells, depth, right + half);
          k.gram(left + c * k.width, right, s.cells * k.width, depth, tiles.data(), 0, tiles.size() / 2, sum + j, m, n,
                 std::min<int64_t>(k.width, m - j));
        }
    });
  });
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
    void *work = scratch(Slot::work, x.work()), *other_work = scratch(Slot::other_panels, y.work());
    x.prepare(work);
    std::vector<double> sums((end - begin) * y.n);
    std::vector<const T*> at(y.n);
    for (int64_t j = 0; j < y.n; ++j) at[j] = others + j * widest;
    for (const Piece& p : x.pieces) {
      y.form_rows(0, y.n, p, others, widest, other_work);
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
  template void Gradients<T>::panels(const Stretch&, int64_t, int64_t, T*) const;        \
  template void contract_tiles<T, Acc>(const Gradients<T>&, const Gradients<T>*, Acc*);   \
  template void contract_pairs<T, Acc>(const Positions<T>&, const Positions<T>*, Acc*);   \
  template void contract_square<T, Acc>(const Gradients<T>&, Acc*);
EF_INSTANTIATE(float, float)
EF_INSTANTIATE(double, double)
EF_INSTANTIATE(uint16_t, float)
template void contract_drawn<float>(const Gradients<float>&, const RandomGradients<float>&, float*);
template void contract_drawn<double>(const Gradients<double>&, const RandomGradients<double>&, double*);
template void contract_few<float>(const Gradients<float>&, const Gradients<float>&, float*);
template void contract_few<double>(const Gradients<double>&, const Gradients<double>&, double*);

}  // namespace ef::cpu
