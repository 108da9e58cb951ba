// Positions of a lookup table sorted by id, so that only those of one row meet; and rows packed into panels.
#pragma once

#include "factors.h"

namespace ef::cpu {

struct Entry {
  int64_t id, sample, position;
};

// a negative `padding` is none, also where an id has that value
inline bool is_padding(int64_t id, int64_t padding) { return padding >= 0 && id == padding; }

// each of `count` ids names a row of a table, or is `padding`
inline void rows_exist(const char* op, const int64_t* id, int64_t count, int64_t table, int64_t padding) {
  for (int64_t p = 0; p < count; ++p)
    STD_TORCH_CHECK(is_padding(id[p], padding) || (id[p] >= 0 && id[p] < table), op, ": id ", id[p], " in a table of ", table);
}

// ids `at` (n,t), positions of `padding` left out
inline std::vector<Entry> sorted(const int64_t* at, int64_t n, int64_t t, int64_t padding) {
  std::vector<Entry> out;
  out.reserve(n * t);
  for (int64_t p = 0; p < n * t; ++p)
    if (!is_padding(at[p], padding)) out.push_back({at[p], p / t, p});
  std::sort(out.begin(), out.end(), [](const Entry& x, const Entry& y) { return x.id != y.id ? x.id < y.id : x.position < y.position; });
  return out;
}

// the end of the entries that have the id of entry `begin`
inline size_t end_of_id(const std::vector<Entry>& all, size_t begin) {
  size_t end = begin;
  while (end < all.size() && all[end].id == all[begin].id) ++end;
  return end;
}

// rows of one id, one a sample: S. Returns the samples.
template <class T>
void gather(const std::vector<Entry>& all, size_t begin, size_t end, const T* b, int64_t d, std::vector<T>& rows,
            std::vector<int64_t>& samples) {
  samples.clear();
  rows.clear();
  for (size_t e = begin; e < end; ++e) {
    const T* from = b + all[e].position * d;
    if (samples.empty() || samples.back() != all[e].sample) {
      samples.push_back(all[e].sample);
      rows.insert(rows.end(), from, from + d);
    } else {
      T* to = rows.data() + rows.size() - d;
      for (int64_t c = 0; c < d; ++c) to[c] += from[c];
    }
  }
}

// `count` row-major rows of d elements, ld apart -> panels
template <class T> void pack_all(const T* rows, int64_t ld, int64_t d, int64_t count, T* panels) {
  const auto& k = contract_of<T>();
  for (int64_t r = 0; r < (count + k.width - 1) / k.width * k.width; r += k.lanes)
    k.pack(rows + (r < count ? r * ld : 0), ld, std::clamp<int64_t>(count - r, 0, k.lanes), d, panels + r / k.width * k.width * d, r % k.width);
}

}  // namespace ef::cpu
