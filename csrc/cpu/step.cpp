// step: one pass over all parameters at once: Gram of directions, projected momentum step, look-ahead and its undo.
//
// The tensors are cut into blocks of a flat index space; threads take ranges of blocks. Per parameter of float32:
//   gram        k reads                                          4k bytes          2 FLOPs per pair, in double
//   update      read theta, v, g, k directions; write theta, v   4(5 + k) bytes    2(k + 3) FLOPs
//   lookahead   read theta, g; write theta and one byte          13 bytes;         the undo is the same
// Limit: copy bandwidth (with noise: Philox and Box-Muller, about 60 instructions a vector of normals).
#include "kernels.h"
#include "step.h"

namespace ef::cpu {
namespace {

template <class A>
void update(const std::vector<Block>& work, std::vector<Dense>& params, std::vector<Dense>& momentum, const std::vector<Tensor>& grads,
            const std::vector<Tensor>& directions, const A* coef, int64_t k, const Update& u, const Noise& noise) {
  for_stretches<A>(work, 3 + k, noise, [&](const Stretch<A>& s) {
    const int64_t i = s.tensor;
    A* theta = held(params[i].now, s, 0);
    A* v = momentum.empty() ? nullptr : held(momentum[i].now, s, 1);
    const A* g = staged<A>(grads[i], s.begin, s.count, s.room + 2 * kStage);
    step<A>().update(s.count, theta, v, g, directions_of(directions, params.size(), k, s, 3), coef, k, u, s.xi);
    unstage<A>(theta, params[i].now, s.begin, s.count);
    if (v) unstage<A>(v, momentum[i].now, s.begin, s.count);
  });
}

// a stand-in of another dtype could not be undone to the bit
void check_exact(const std::vector<Tensor>& params, const std::vector<Tensor>& grads) {
  check_sizes(params, grads, "params and grads differ in size");
  for (const Tensor& x : params)
    check(x.scalar_type() == element_type(x.scalar_type()), "look-ahead takes float32, float64 and bfloat16 parameters");
}

}  // namespace

Tensor step_gram(std::vector<Tensor> tensors, int64_t k) {
  check(k > 0 && !tensors.empty() && tensors.size() % k == 0, "step_gram needs k lists of the same tensors");
  const int64_t p = tensors.size() / k;
  ScalarType type = element_type(tensors[0].scalar_type());
  for (const Tensor& x : tensors)
    if (x.scalar_type() != type) type = any_double(tensors) ? ScalarType::Double : ScalarType::Float;
  std::vector<Tensor> xs;
  for (const Tensor& x : tensors) xs.push_back(dense(x, type));
  for (int64_t j = 0; j < k; ++j)
    for (int64_t i = 0; i < p; ++i) check(xs[j * p + i].numel() == xs[i].numel(), "directions differ in size");
  const std::vector<Block> work = blocks({xs.begin(), xs.begin() + p});
  Tensor out = empty_like_dtype(tensors[0], {k, k}, ScalarType::Double);
  double* o = data<double>(out);
  std::vector<double> part(work.size() * k * k, 0.0);  // one Gram a block, summed in block order
  by_type(type, [&](auto zero) {
    using T = decltype(zero);
    torch::stable::parallel_for(0, work.size(), 1, [&](int64_t first, int64_t last) {
      std::vector<const T*> x(k);
      for (int64_t q = first; q < last; ++q) {
        const Block& b = work[q];
        for (int64_t j = 0; j < k; ++j) x[j] = data<T>(xs[j * p + b.tensor]) + b.begin;
        elements<T>().dots(x.data(), k, b.count, part.data() + q * k * k);
      }
    });
  });
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = 0; j <= i; ++j) {
      double sum = 0;
      for (size_t q = 0; q < work.size(); ++q) sum += part[q * k * k + i * k + j];
      o[i * k + j] = o[j * k + i] = sum;
    }
  return out;
}

void step_update(std::vector<Tensor> params, std::vector<Tensor> momentum, std::vector<Tensor> grads,
                 std::vector<Tensor> directions, const Tensor& coef, double lr, double beta, double weight_decay, double noise,
                 int64_t seed, int64_t offset, std::optional<Tensor> counter) {
  const size_t p = params.size();
  const int64_t k = coef.numel();
  check(grads.size() == p && (momentum.empty() || momentum.size() == p) && directions.size() == k * p,
        "params, momentum, grads and directions differ in number");
  check_sizes(params, momentum, "params and momentum differ in size");
  check_sizes(params, grads, "params and grads differ in size");
  check_sizes(params, directions, "a direction differs in size");
  if (p == 0) return;
  std::vector<Dense> theta = dense_all(params), v = dense_all(momentum);
  const std::vector<Tensor> g = contiguous_all(grads), d = contiguous_all(directions);
  const std::vector<Block> work = blocks(params);
  const Update u{lr, beta, 1 - lr * weight_decay, noise};
  const Noise draw = noise_of(noise, seed, offset, counter);
  if (any_double(params)) update<double>(work, theta, v, g, d, data<double>(dense(coef, ScalarType::Double)), k, u, draw);
  else update<float>(work, theta, v, g, d, data<float>(dense(coef, ScalarType::Float)), k, u, draw);
  for (Dense& x : theta) x.finish();
  for (Dense& x : v) x.finish();
}

std::tuple<std::vector<Tensor>, Tensor, Tensor> step_lookahead(std::vector<Tensor> params, std::vector<Tensor> grads, double alpha,
                                                               std::optional<int64_t> capacity) {
  check(params.size() == grads.size() && !params.empty(), "look-ahead needs one grad a parameter");
  check(!capacity || *capacity >= 0, "capacity is below 0");
  check_exact(params, grads);
  const auto room = [&](int64_t slots) {
    return std::pair{empty_like_dtype(params[0], {slots, 2}, ScalarType::Long), empty_like_dtype(params[0], {slots}, ScalarType::Double)};
  };
  auto [index, value] = room(capacity.value_or(0));  // before anything moves: there may be no such memory
  std::vector<Dense> theta = dense_all(params);
  std::vector<Tensor> ulps, g;
  for (size_t i = 0; i < params.size(); ++i) {
    g.push_back(dense(grads[i], params[i].scalar_type()));
    Tensor like = torch::stable::new_empty(theta[i].now, params[i].sizes(), ScalarType::Char);
    ulps.push_back(like);
  }
  const std::vector<Block> work = blocks(params);
  struct Far { int64_t tensor, element; double value; };
  std::vector<std::vector<Far>> far(work.size());
  torch::stable::parallel_for(0, work.size(), 1, [&](int64_t first, int64_t last) {
    for (int64_t q = first; q < last; ++q) {
      const Block& b = work[q];
      by_type(params[b.tensor].scalar_type(), [&](auto zero) {
        using T = decltype(zero);
        using A = typename Rows<T>::A;
        T old[kStage];
        for (int64_t at = 0; at < b.count; at += kStage) {
          const int64_t begin = b.begin + at, count = std::min(kStage, b.count - at);
          T* x = data<T>(theta[b.tensor].now) + begin;
          int8_t* off = data<int8_t>(ulps[b.tensor]) + begin;
          std::memcpy(old, x, count * sizeof(T));
          if (!elements<T>().lookahead(x, data<T>(g[b.tensor]) + begin, off, count, (A)alpha)) continue;
          for (int64_t e = 0; e < count; ++e)
            if (off[e] == -128) {
              if (capacity) x[e] = old[e];  // until it is known to have a slot
              else off[e] = 0;
              if (capacity && (int64_t)far[q].size() >= *capacity) continue;  // none for it
              A value;
              elements<T>().read(old + e, &value, 1);
              far[q].push_back({b.tensor, begin + e, (double)value});
            }
        }
      });
    }
  });
  int64_t slots = 0;
  for (const auto& f : far) slots += f.size();
  slots = capacity.value_or(slots);
  if (!capacity) std::tie(index, value) = room(slots);
  int64_t at = 0, *const places = data<int64_t>(index);
  double* const values = data<double>(value);
  const auto list = [&](const Far& x) {
    places[2 * at] = x.tensor, places[2 * at + 1] = x.element;
    values[at++] = x.value;
  };
  for (const auto& f : far)
    for (const Far& x : f) {
      if (at == slots) break;
      list(x);
      if (!capacity) continue;
      by_type(params[x.tensor].scalar_type(), [&](auto zero) {
        using T = decltype(zero);
        int8_t* off = data<int8_t>(ulps[x.tensor]) + x.element;
        elements<T>().lookahead(data<T>(theta[x.tensor].now) + x.element, data<T>(g[x.tensor]) + x.element, off, 1,
                                (typename Rows<T>::A)alpha);
        *off = 0;
      });
    }
  while (at < slots) list({-1, -1, 0.0});
  for (Dense& x : theta) x.finish();
  return {ulps, index, value};
}

void step_lookahead_undo(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> ulps, const Tensor& index,
                         const Tensor& value, double alpha) {
  check(params.size() == grads.size() && ulps.size() == params.size() && index.scalar_type() == ScalarType::Long &&
            value.scalar_type() == ScalarType::Double && index.numel() == 2 * value.numel(),
        "undo needs what step_lookahead was given and gave");
  check_exact(params, grads);
  std::vector<Dense> theta = dense_all(params);
  std::vector<Tensor> g, off;
  for (size_t i = 0; i < params.size(); ++i) {
    check(ulps[i].numel() == params[i].numel() && ulps[i].scalar_type() == ScalarType::Char, "ulps do not fit the parameters");
    g.push_back(dense(grads[i], params[i].scalar_type()));
    off.push_back(torch::stable::contiguous(ulps[i]));
  }
  const Tensor where = torch::stable::contiguous(index), what = torch::stable::contiguous(value);
  const int64_t *const places = data<int64_t>(where), slots = what.numel();
  const double* const values = data<double>(what);
  for (int64_t r = 0; r < slots; ++r) {
    const int64_t i = places[2 * r], e = places[2 * r + 1];
    check(i == -1 || (i >= 0 && i < (int64_t)theta.size() && e >= 0 && e < theta[i].now.numel()), "index is out of range");
  }
  const std::vector<Block> work = blocks(params);
  torch::stable::parallel_for(0, work.size(), 1, [&](int64_t first, int64_t last) {
    for (int64_t q = first; q < last; ++q) {
      const Block& b = work[q];
      by_type(params[b.tensor].scalar_type(), [&](auto zero) {
        using T = decltype(zero);
        elements<T>().undo(data<T>(theta[b.tensor].now) + b.begin, data<T>(g[b.tensor]) + b.begin,
                           data<int8_t>(off[b.tensor]) + b.begin, b.count, (typename Rows<T>::A)alpha);
      });
    }
  });
  for (int64_t r = 0; r < slots; ++r) {
    const int64_t i = places[2 * r], e = places[2 * r + 1];
    if (i == -1) continue;  // a slot that was left over
    by_type(params[i].scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      const typename Rows<T>::A x = values[r];
      elements<T>().write(&x, data<T>(theta[i].now) + e, 1);
    });
  }
  for (Dense& x : theta) x.finish();
}

}  // namespace ef::cpu
