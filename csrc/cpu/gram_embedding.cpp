// gram_embedding: K_ij = sum over ids of <S_i,id , S_j,id>, S_i,id the sum of b_it over the positions with that id.
//
// Positions are sorted by id, so that only equal ids ever meet: with c samples that hold an id, c^2 d FLOPs (half of
// 2c^2 d) instead of the n^2 t^2 d of all pairs. Bytes: b once. Limit: the FMA rate for common ids, else reading b.
#include <numeric>

#include "kernels.h"
#include "lookup.h"
#include "scratch.h"

namespace ef::cpu {
namespace {

struct Span {
  size_t begin, end, begin2, end2;
};

template <class T>
void run(const std::vector<Entry>& left, const T* b, const std::vector<Entry>& right, const T* b2, bool symmetric, int64_t d,
         int64_t n, int64_t m, T* out) {
  const auto& k = contract_of<T>();
  std::vector<Span> spans;  // ids that both sides hold
  for (size_t i = 0, j = 0; i < left.size() && j < right.size();) {
    if (left[i].id < right[j].id) { ++i; continue; }
    if (left[i].id > right[j].id) { ++j; continue; }
    const size_t i1 = end_of_id(left, i), j1 = end_of_id(right, j);
    spans.push_back({i, i1, j, j1});
    i = i1, j = j1;
  }
  // each part of the ids sums into its own (n, m); parts are added in order
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(), spans.size() / 16));
  std::vector<double> cost(spans.size() + 1, 0.0);
  for (size_t q = 0; q < spans.size(); ++q)
    cost[q + 1] = cost[q] + 64.0 * (spans[q].end - spans[q].begin) + (double)(spans[q].end - spans[q].begin) * (spans[q].end2 - spans[q].begin2);
  std::vector<T> partial((parts - 1) * n * m, T(0));
  torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    std::vector<T> rows, rows2;
    std::vector<int64_t> samples, samples2;
    std::vector<int32_t> tiles;
    for (int64_t part = first; part < last; ++part) {
      T* sum = part ? partial.data() + (part - 1) * n * m : out;
      const size_t q0 = std::lower_bound(cost.begin(), cost.end(), cost.back() * part / parts) - cost.begin();
      const size_t q1 = part + 1 == parts ? spans.size() : std::lower_bound(cost.begin(), cost.end(), cost.back() * (part + 1) / parts) - cost.begin();
      for (size_t q = q0; q < q1; ++q) {
        gather(left, spans[q].begin, spans[q].end, b, d, rows, samples);
        if (!symmetric) gather(right, spans[q].begin2, spans[q].end2, b2, d, rows2, samples2);
        const std::vector<int64_t>& other = symmetric ? samples : samples2;
        const int64_t c = samples.size(), e = other.size(), cp = (c + k.width - 1) / k.width * k.width, ep = (e + k.width - 1) / k.width * k.width;
        T* panels = (T*)scratch(Slot::rows, (cp * d + (symmetric ? 0 : ep * d)) * sizeof(T));
        T* panels2 = symmetric ? panels : panels + cp * d;
        T* local = (T*)scratch(Slot::work, c * e * sizeof(T));
        std::fill(local, local + c * e, T(0));
        pack_all(rows.data(), d, d, c, panels);
        if (!symmetric) pack_all(rows2.data(), d, d, e, panels2);
        tiles.clear();
        for (int64_t r = 0; r < c; r += k.rows)
          for (int64_t j = 0; j < (symmetric ? std::min(r + k.rows, c) : e); j += k.width)
            tiles.push_back(r / k.rows), tiles.push_back(j / k.width);
        k.gram(panels, panels2, d * k.width, d, tiles.data(), 0, tiles.size() / 2, local, e, c, e);
        for (int64_t r = 0; r < c; ++r)
          for (int64_t j = 0; j < (symmetric ? r + 1 : e); ++j) sum[samples[r] * m + other[j]] += local[r * e + j];
      }
    }
  });
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t x = 0; x < n * m; ++x) out[x] += partial[(part - 1) * n * m + x];
  if (symmetric)
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = i + 1; j < n; ++j) out[i * n + j] = out[j * n + i];
}

}  // namespace

Tensor gram_embedding(const Tensor& ids_, const Tensor& b_, std::optional<Tensor> ids2_, std::optional<Tensor> b2_,
                      int64_t padding_idx) {
  STD_TORCH_CHECK(ids2_.has_value() == b2_.has_value(), "gram_embedding: ids2 and b2 are both given, or none");
  const bool symmetric = !ids2_.has_value();
  const ScalarType acc = accumulate_type(b_.scalar_type());
  const Tensor ids = dense(ids_, ScalarType::Long), b = dense(b_, acc);
  const Tensor ids2 = symmetric ? ids : dense(*ids2_, ScalarType::Long), b2 = symmetric ? b : dense(*b2_, acc);
  STD_TORCH_CHECK(ids.dim() == 2 && b.dim() == 3 && ids2.dim() == 2 && b2.dim() == 3, "gram_embedding: ids (n,t), b (n,t,d)");
  STD_TORCH_CHECK(b.size(0) == ids.size(0) && b.size(1) == ids.size(1) && b2.size(0) == ids2.size(0) && b2.size(1) == ids2.size(1) &&
                      b.size(2) == b2.size(2), "gram_embedding: ids and b do not go together");
  const int64_t n = ids.size(0), m = ids2.size(0), d = b.size(2);
  Tensor out = empty_like_dtype(b, {n, m}, acc);
  torch::stable::zero_(out);
  if (n == 0 || m == 0 || d == 0) return out;
  auto by_id = [&](const Tensor& x) { return sorted(data<int64_t>(x), x.size(0), x.size(1), padding_idx); };
  const std::vector<Entry> left = by_id(ids), right = symmetric ? std::vector<Entry>() : by_id(ids2);
  by_type(acc, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (!std::is_same_v<T, uint16_t>)
      run<T>(left, data<T>(b), symmetric ? left : right, data<T>(b2), symmetric, d, n, m, data<T>(out));
  });
  return out;
}

}  // namespace ef::cpu
