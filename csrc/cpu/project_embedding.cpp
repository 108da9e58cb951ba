// project_embedding: c_ij = sum over positions of <b_it , D_j,id_it>, per-sample gradients of a lookup table onto k given directions.
//
// Threads share out the samples. Bytes: b once, k rows of d elements a position. FLOPs: 2 n t k d. Limit: reading for few directions,
// else loads of the dot products.
#include "kernels.h"
#include "lookup.h"

namespace ef::cpu {

Tensor project_embedding(const Tensor& ids_, const Tensor& b_, const Tensor& basis_, int64_t padding_idx) {
  const ScalarType type = accumulate_type(b_.scalar_type());
  const Tensor ids = dense(ids_, ScalarType::Long), b = dense(b_, type), basis = dense(basis_, type);
  STD_TORCH_CHECK(ids.dim() == 2 && b.dim() == 3 && basis.dim() == 3 && b.size(0) == ids.size(0) && b.size(1) == ids.size(1) &&
                      basis.size(2) == b.size(2),
                  "project_embedding: ids (n,t), b (n,t,d), basis (k,num_embeddings,d)");
  const int64_t n = b.size(0), t = b.size(1), d = b.size(2), k = basis.size(0), table = basis.size(1), *id = data<int64_t>(ids);
  rows_exist("project_embedding", id, n * t, table, padding_idx);
  Tensor out = empty_like_dtype(b, {n, k}, type);
  by_wide_type(type, [&](auto zero) {
    using T = decltype(zero);
    const auto& c = contract_of<T>();
    const T *from = data<T>(b), *rows = data<T>(basis);
    T* to = data<T>(out);
    torch::stable::parallel_for(0, n, std::max<int64_t>(1, 32768 / (t * d * k + 1)), [&](int64_t begin, int64_t end) {
      std::vector<double> sums(k);
      std::vector<const T*> directions(k);
      for (int64_t i = begin; i < end; ++i) {
        std::fill(sums.begin(), sums.end(), 0.0);
        for (int64_t p = i * t; p < (i + 1) * t; ++p) {
          if (is_padding(id[p], padding_idx)) continue;
          for (int64_t j = 0; j < k; ++j) directions[j] = rows + (j * table + id[p]) * d;
          c.dots(from + p * d, directions.data(), k, d, sums.data());
        }
        for (int64_t j = 0; j < k; ++j) to[i * k + j] = (T)sums[j];
      }
    });
  });
  return out;
}

}  // namespace ef::cpu
