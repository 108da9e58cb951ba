// project_random_embedding: c_ij = sum over ids of <S_i,id , D_j,id>, S_i,id the sum of b_it over the positions with that id.
//
// Positions are sorted by id: a row that occurs is drawn once a direction and meets the samples that hold it. Threads share out
// the directions: each reads all of b, and no sum depends on their number. Draws: k d a row that occurs. FLOPs: 2 k d for each
// sample that holds it. Limit: integer arithmetic where few samples share an id, else the FMA rate.
#include "kernels.h"
#include "lookup.h"
#include "scratch.h"

namespace ef::cpu {
namespace {

constexpr int64_t kColumns = 512;  // of a row, drawn, packed and multiplied at a time

template <class T>
void run(const std::vector<Entry>& all, const T* b, int64_t d, int64_t k, int64_t table, const Stream& stream, T* out) {
  const auto& c = contract_of<T>();
  constexpr int64_t ld = kColumns + 16;  // off the power of two, or rows share a cache set
  const int64_t grain = std::max<int64_t>(1, 32768 / (int64_t)(all.size() * d + 1));
  torch::stable::parallel_for(0, k, grain, [&](int64_t first, int64_t last) {
    std::vector<T> rows;
    std::vector<int64_t> samples;
    std::vector<int32_t> tiles;
    std::vector<float> room(kColumns + 3);
    T* drawn = (T*)scratch(Slot::rows, c.width * ld * sizeof(T));
    T* right = (T*)scratch(Slot::other_panels, c.width * kColumns * sizeof(T));
    for (size_t e = 0, end; e < all.size(); e = end) {
      end = end_of_id(all, e);
      gather(all, e, end, b, d, rows, samples);
      const int64_t m = samples.size(), padded = (m + c.width - 1) / c.width * c.width;
      T* left = (T*)scratch(Slot::panels, padded * d * sizeof(T));
      T* sums = (T*)scratch(Slot::work, m * c.width * sizeof(T));
      pack_all(rows.data(), d, d, m, left);
      tiles.clear();
      for (int64_t r = 0; r < m; r += c.rows) tiles.push_back(r / c.rows), tiles.push_back(0);
      for (int64_t j = first; j < last; j += c.width) {
        const int64_t many = std::min<int64_t>(c.width, last - j);
        std::fill(sums, sums + m * c.width, T(0));
        for (int64_t q = 0; q < d; q += kColumns) {
          const int64_t columns = std::min(kColumns, d - q);
          for (int64_t r = 0; r < many; ++r) {
            const float* z = stream.draw(((j + r) * table + all[e].id) * d + q, columns, room.data());
            for (int64_t x = 0; x < columns; ++x) drawn[r * ld + x] = (T)z[x];
          }
          pack_all(drawn, ld, columns, many, right);
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
  const Stream stream = stream_of("project_random_embedding", k, seed, offset, kind);
  const ScalarType type = accumulate_type(b_.scalar_type());
  const Tensor ids = dense(ids_, ScalarType::Long), b = dense(b_, type);
  STD_TORCH_CHECK(ids.dim() == 2 && b.dim() == 3 && b.size(0) == ids.size(0) && b.size(1) == ids.size(1),
                  "project_random_embedding: ids (n,t), b (n,t,d)");
  Tensor out = empty_like_dtype(b, {b.size(0), k}, type);
  torch::stable::zero_(out);
  if (out.numel() == 0 || b.numel() == 0) return out;
  rows_exist("project_random_embedding", data<int64_t>(ids), ids.numel(), num_embeddings, padding_idx);
  const std::vector<Entry> all = sorted(data<int64_t>(ids), ids.size(0), ids.size(1), padding_idx);
  by_wide_type(type, [&](auto zero) {
    using T = decltype(zero);
    run<T>(all, data<T>(b), b.size(2), k, num_embeddings, stream, data<T>(out));
  });
  return out;
}

}  // namespace ef::cpu
