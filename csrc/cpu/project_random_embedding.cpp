// project_random_embedding: c_ij = sum over ids of <S_i,id , D_j,id>, S_i,id the sum of b_it over the positions with that id.
//
// Positions are sorted by id: a row that occurs is drawn once and meets the samples that hold it. Threads share out the
// directions by panels: each reads all of b, and no sum depends on their number. Philox blocks: d ceil(k / 128) a row that occurs,
// d ceil(k / 4) for normals. FLOPs: 2 k d for each sample that holds it. Limit: integer arithmetic where few samples share an id and
// directions are few, else the FMA rate.
#include "directions.h"
#include "kernels.h"
#include "lookup.h"
#include "scratch.h"

namespace ef::cpu {
namespace {

constexpr int64_t kColumns = 512;  // of a row, packed and multiplied at a time

template <class T> void run(const std::vector<Entry>& all, const T* b, int64_t d, int64_t k, const Directions& directions, T* out) {
  const auto& c = contract_of<T>();
  constexpr int64_t ld = kColumns + 16;  // off the power of two, or rows share a cache set
  const int64_t grain = std::max<int64_t>(1, 32768 / (int64_t)(all.size() * d * c.width + 1));
  torch::stable::parallel_for(0, (k + c.width - 1) / c.width, grain, [&](int64_t begin, int64_t end) {
    std::vector<T> rows;
    std::vector<int64_t> samples, elements(d);
    std::vector<int32_t> tiles;
    std::vector<uint32_t> planes(4 * (directions.sign ? d : kColumns));
    T* drawn = (T*)scratch(Slot::rows, c.width * ld * sizeof(T));
    T* right = (T*)scratch(Slot::other_panels, c.width * kColumns * sizeof(T));
    for (size_t e = 0, stop; e < all.size(); e = stop) {
      stop = end_of_id(all, e);
      gather(all, e, stop, b, d, rows, samples);
      const int64_t m = samples.size(), padded = (m + c.width - 1) / c.width * c.width;
      T* left = (T*)scratch(Slot::panels, padded * d * sizeof(T));
      T* sums = (T*)scratch(Slot::work, m * c.width * sizeof(T));
      pack_all(rows.data(), d, d, m, left);
      tiles.clear();
      for (int64_t r = 0; r < m; r += c.rows) tiles.push_back(r / c.rows), tiles.push_back(0);
      for (int64_t x = 0; x < d; ++x) elements[x] = all[e].id * d + x;
      for (int64_t j = begin * c.width; j < std::min(end * c.width, k); j += c.width) {
        const int64_t many = std::min<int64_t>(c.width, k - j);
        if (directions.sign && (j == begin * c.width || j % 128 == 0)) directions.draw(j / 128, elements.data(), d, planes.data(), d);
        std::fill(sums, sums + m * c.width, T(0));
        for (int64_t q = 0; q < d; q += kColumns) {
          const int64_t columns = std::min(kColumns, d - q);
          if (directions.sign) {
            for (int64_t r = 0; r < c.width; r += c.lanes) directions.panel(j + r, planes.data() + q, d, columns, right + r);
          } else {
            for (int64_t r = 0; r < many; ++r) {
              if (r % 4 == 0) directions.draw((j + r) / 4, elements.data() + q, columns, planes.data(), columns);
              directions.row(j + r, planes.data(), columns, columns, drawn + r * ld);
            }
            pack_all(drawn, ld, columns, many, right);
          }
          c.gram(left + q * c.width, right, d * c.width, columns, tiles.data(), 0, tiles.size() / 2, sums, c.width, m, many);
        }
        for (int64_t r = 0; r < m; ++r)
          for (int64_t x = 0; x < many; ++x) out[samples[r] * k + j + x] += sums[r * c.width + x];
      }
    }
  });
}

}  // namespace

Tensor project_random_embedding(const Tensor& ids_, const Tensor& b_, int64_t k, int64_t num_embeddings, int64_t seed, int64_t offset,
                                std::string kind, int64_t padding_idx) {
  Directions directions = directions_of("project_random_embedding", k, seed, offset, kind);
  const ScalarType type = accumulate_type(b_.scalar_type());
  const Tensor ids = dense(ids_, ScalarType::Long), b = dense(b_, type);
  STD_TORCH_CHECK(ids.dim() == 2 && b.dim() == 3 && b.size(0) == ids.size(0) && b.size(1) == ids.size(1),
                  "project_random_embedding: ids (n,t), b (n,t,d)");
  Tensor out = empty_like_dtype(b, {b.size(0), k}, type);
  torch::stable::zero_(out);
  if (out.numel() == 0 || b.numel() == 0) return out;
  rows_exist("project_random_embedding", data<int64_t>(ids), ids.numel(), num_embeddings, padding_idx);
  const std::vector<Entry> all = sorted(data<int64_t>(ids), ids.size(0), ids.size(1), padding_idx);
  directions.numel = num_embeddings * b.size(2);
  by_wide_type(type, [&](auto zero) {
    using T = decltype(zero);
    run<T>(all, data<T>(b), b.size(2), k, directions, data<T>(out));
  });
  return out;
}

}  // namespace ef::cpu
