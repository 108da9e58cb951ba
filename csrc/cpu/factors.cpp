#include "factors.h"

#include <algorithm>
#include <cstring>

namespace ef::cpu {
namespace {

constexpr int64_t kColumns = 128;                 // a piece of a linear layer's gradient: 16 samples of it stay in L2
template <class T> constexpr int64_t kRows = sizeof(T) == 2 ? 64 : 32;
constexpr int64_t kConvColumns = 256;             // most kernel elements in a piece of a convolution's
constexpr int64_t kConvLeast = 64;                // least: each piece transposes g once

int64_t up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// whether some window reads position q of size d
bool in_a_window(const ConvShape& s, int d, int64_t q) {
  for (int64_t k = 0; k < s.kernel[d]; ++k) {
    const int64_t from = q + s.padding[d] - k * s.dilation[d];
    if (from >= 0 && from % s.stride[d] == 0 && from / s.stride[d] < s.out[d]) return true;
  }
  return false;
}

}  // namespace

Layer layer(const char* op, const Tensor& a, const Tensor& b, ScalarType dtype) {
  STD_TORCH_CHECK(a.dim() == b.dim() && (a.dim() == 2 || a.dim() == 3), op, ": a and b are (n,d) or (n,t,d)");
  STD_TORCH_CHECK(a.size(0) == b.size(0) && (a.dim() == 2 || a.size(1) == b.size(1)), op, ": a and b differ in n or t");
  const int64_t last = a.dim() - 1;
  return {dense(a, dtype), dense(b, dtype), a.size(0), last == 2 ? a.size(1) : 1, a.size(last), b.size(last)};
}

template <class T>
LinearGradients<T>::LinearGradients(const T* a_, const T* b_, int64_t n_, int64_t t_, int64_t d_in_, int64_t d_out_)
    : a(a_), b(b_), t(t_), d_in(d_in_), d_out(d_out_) {
  this->n = n_;
  const auto& k = contract_of<T>();
  // the side that a panel holds is padded to its width: let it be the one that loses less
  if (up(d_in, k.rows) * up(d_out, k.width) < up(d_out, k.rows) * up(d_in, k.width)) {
    std::swap(a, b);
    std::swap(d_in, d_out);
  }
  for (int64_t o = 0; o < d_out; o += kRows<T>)
    for (int64_t j = 0; j < d_in; j += kColumns) {
      const int64_t rows = std::min(kRows<T>, d_out - o), columns = std::min(kColumns, d_in - j);
      this->pieces.push_back({o, rows, j, columns, rows * up(columns, k.width), 0});
    }
}

template <class T> int64_t LinearGradients<T>::work() const {
  const auto& k = contract_of<T>();
  return up(t, k.per) * (k.width + kRows<T>) * sizeof(T) + 64;
}

template <class T> void LinearGradients<T>::form(int64_t i, const Piece& p, T* cells, void* work) const {
  const auto& k = contract_of<T>();
  k.form(a + i * t * d_in + p.j0, d_in, b + i * t * d_out + p.o0, d_out, t, p.o, p.j, cells, up(p.j, k.width), (T*)work);
}

template <class T>
GivenGradients<T>::GivenGradients(const T* r, int64_t k, int64_t d_in_, int64_t d_out_, int64_t groups_, bool columns_,
                                  const std::vector<Piece>& like)
    : rows(r), d_in(d_in_), d_out(d_out_), groups(groups_), columns(columns_) {
  this->n = k;
  this->pieces = like;
}

template <class T> void GivenGradients<T>::form(int64_t i, const Piece& p, T* cells, void*) const {
  const T* from = rows + ((i * groups + p.group) * (d_out / groups) + p.o0) * d_in + p.j0;
  if (p.cells > p.o * p.j) std::memset((void*)cells, 0, p.cells * sizeof(T));
  const int64_t width = p.cells / (columns ? p.j : p.o);
  if (!columns)
    for (int64_t o = 0; o < p.o; ++o) std::memcpy(cells + o * width, from + o * d_in, p.j * sizeof(T));
  else
    for (int64_t j = 0; j < p.j; ++j)
      for (int64_t o = 0; o < p.o; ++o) cells[j * width + o] = from[o * d_in + j];
}

ConvShape conv_shape(const Tensor& x, const Tensor& g, const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                     const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups) {
  const int64_t nd = x.dim() - 2;
  STD_TORCH_CHECK(nd >= 1 && nd <= 3 && g.dim() == x.dim() && g.size(0) == x.size(0),
                  "convolution: x and g are (n, channels, 1 to 3 sizes)");
  for (const auto* list : {&kernel, &stride, &padding, &dilation})
    STD_TORCH_CHECK((int64_t)list->size() == nd && *std::min_element(list->begin(), list->end()) >= (list == &padding ? 0 : 1) &&
                        *std::max_element(list->begin(), list->end()) <= INT32_MAX,  // or products of them could overflow
                    "convolution: kernel_size, stride, padding and dilation hold a number for each size, "
                    "1 (padding: 0) or more, below 2^31");
  ConvShape s{x.size(0), x.size(1), g.size(1), groups, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}};
  for (int64_t d = 0; d < nd; ++d) {
    const int64_t to = 3 - nd + d;
    s.size[to] = x.size(2 + d), s.out[to] = g.size(2 + d);
    s.kernel[to] = kernel[d], s.stride[to] = stride[d], s.padding[to] = padding[d], s.dilation[to] = dilation[d];
    STD_TORCH_CHECK((s.out[to] - 1) * s.stride[to] + (s.kernel[to] - 1) * s.dilation[to] < s.size[to] + 2 * s.padding[to],
                    "convolution: g is larger than the output of x in size ", d);
    if (s.out[to] == 1) s.stride[to] = 1;  // never taken, and the copy of x has a line for each of its phases
  }
  STD_TORCH_CHECK(groups > 0 && s.c_in % groups == 0 && s.c_out % groups == 0, "convolution: groups must divide the channels");
  return s;
}

Padded::Padded(const ConvShape& s) {
  const int64_t sw = s.stride[2], phase = (s.size[2] + 2 * s.padding[2] + sw - 1) / sw;
  row = sw * phase;
  plane = (s.size[1] + 2 * s.padding[1]) * row;
  channel = (s.size[0] + 2 * s.padding[0]) * plane;
  for (int64_t c = 0; c < s.c_in / s.groups; ++c)
    for (int64_t d = 0; d < s.kernel[0]; ++d)
      for (int64_t h = 0; h < s.kernel[1]; ++h)
        for (int64_t w = 0; w < s.kernel[2]; ++w) {
          const int64_t at = w * s.dilation[2];
          base.push_back(c * channel + d * s.dilation[0] * plane + h * s.dilation[1] * row + at % sw * phase + at / sw);
        }
  for (int64_t d = 0; d < s.out[0]; ++d)
    for (int64_t h = 0; h < s.out[1]; ++h) offset.push_back(d * s.stride[0] * plane + h * s.stride[1] * row);
  runs = offset.size(), length = s.out[2];
  // outputs that follow one another in the input too are one run
  bool joined = true;
  for (int64_t r = 0; r < runs; ++r) joined &= offset[r] == r * length;
  if (joined && runs) length *= runs, runs = 1;
  for (int d : {0, 1}) {
    read[d].resize(s.size[d]);
    for (int64_t q = 0; q < s.size[d]; ++q) read[d][q] = in_a_window(s, d, q);
  }
  for (int64_t p = 0; p < sw; ++p)  // columns whose padded position is p modulo the stride
    for (int64_t q = ((p - s.padding[2]) % sw + sw) % sw; q < s.size[2]; q += sw)
      if (in_a_window(s, 2, q)) columns.emplace_back(q, p * phase + (q + s.padding[2]) / sw);
}

// The border is left alone: it was zeroed once. So is what no window reads: bfloat16 is multiplied in pairs, and behind a run of
// odd length the zero of its pair would make a NaN of a NaN there.
template <class T> void Padded::copy(const ConvShape& s, const T* x, int64_t channels, T* out) const {
  const int64_t w = s.size[2];
  const bool whole = w > 0 && s.stride[2] == 1 && (int64_t)columns.size() == w;  // of no columns x may have no address
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t d = 0; d < s.size[0]; ++d)
      for (int64_t h = 0; h < s.size[1]; ++h) {
        if (!read[0][d] || !read[1][h]) continue;
        const T* from = x + ((c * s.size[0] + d) * s.size[1] + h) * w;
        T* to = out + c * channel + (d + s.padding[0]) * plane + (h + s.padding[1]) * row;
        if (whole) std::memcpy(to + s.padding[2], from, w * sizeof(T));
        else
          for (const auto& [q, at] : columns) to[at] = from[q];
      }
}

template <class T> ConvGradients<T>::ConvGradients(const T* x_, const T* g_, const ConvShape& shape)
    : x(x_), g(g_), s(shape), padded(shape) {
  this->n = s.n;
  const auto& k = contract_of<T>();
  const int64_t width = s.c_in / s.groups * s.volume(), rows = s.c_out / s.groups;
  units = padded.runs * ((padded.length + k.per - 1) / k.per);
  channels = 0;
  // enough pieces for all threads
  const int64_t share = width * ((rows + k.width - 1) / k.width) * s.groups / (2 * (int64_t)torch::stable::get_num_threads());
  const int64_t most = std::clamp(up(share, k.rows), kConvLeast, kConvColumns);
  for (int64_t group = 0; group < s.groups; ++group)
    for (int64_t o = 0; o < rows; o += k.width)
      for (int64_t j = 0; j < width; j += most) {
        const int64_t columns = std::min(most, width - j);
        this->pieces.push_back({o, std::min<int64_t>(k.width, rows - o), j, columns, columns * k.width, group});
        channels = std::max(channels, (j + columns - 1) / s.volume() - j / s.volume() + 1);
      }
}

template <class T> int64_t ConvGradients<T>::work() const {
  const auto& k = contract_of<T>();
  return up(channels * padded.channel + 2 * k.per, 64) * sizeof(T) + units * k.per * k.width * sizeof(T) + 64;
}

template <class T> void ConvGradients<T>::prepare(void* work) const {
  std::memset(work, 0, up(channels * padded.channel + 2 * contract_of<T>().per, 64) * sizeof(T));
}

template <class T> void ConvGradients<T>::form(int64_t i, const Piece& p, T* cells, void* work) const {
  const auto& k = contract_of<T>();
  const int64_t volume = s.volume(), in = s.c_in / s.groups, first = p.j0 / volume, last = (p.j0 + p.j - 1) / volume;
  const int64_t inner = s.size[0] * s.size[1] * s.size[2], positions = s.positions();
  T* image = (T*)work;
  T* panel = image + up(channels * padded.channel + 2 * k.per, 64);
  padded.copy(s, x + (i * s.c_in + p.group * in + first) * inner, last - first + 1, image);
  k.pack_runs(g + (i * s.c_out + p.group * (s.c_out / s.groups) + p.o0) * positions, positions, p.o, padded.runs,
              padded.length, panel);
  k.form_conv(image - first * padded.channel, padded.base.data() + p.j0, p.j, panel,
              {padded.runs, padded.length, padded.offset.data()}, cells);
}

template <class T>
LinearPositions<T>::LinearPositions(const T* a_, const T* b_, int64_t n_, int64_t t_, int64_t d_in, int64_t d_out)
    : a(a_), b(b_) {
  this->n = n_, this->t = t_, this->d_a = d_in, this->d_b = d_out;
}

template <class T>
void LinearPositions<T>::rows(int64_t first, int64_t, const T** pa, const T** pb, void*) const {
  *pa = a + first * this->d_a, *pb = b + first * this->d_b;
}

template <class T> ConvPositions<T>::ConvPositions(const T* x_, const T* g_, const ConvShape& shape, int64_t group_)
    : x(x_), g(g_), s(shape), padded(shape), group(group_) {
  const auto& k = contract_of<T>();
  this->n = s.n, this->t = s.positions();
  this->d_a = up(s.c_in / s.groups * s.volume(), k.per), this->d_b = up(s.c_out / s.groups, k.per);
}

template <class T> int64_t ConvPositions<T>::work(int64_t rows) const {
  return (rows * (this->d_a + this->d_b) + s.c_in / s.groups * padded.channel + 128) * sizeof(T);
}

template <class T>
void ConvPositions<T>::rows(int64_t first, int64_t count, const T** pa, const T** pb, void* work) const {
  const int64_t in = s.c_in / s.groups, out = s.c_out / s.groups, inner = s.size[0] * s.size[1] * s.size[2];
  const int64_t elements = padded.base.size(), t = this->t;
  T *a = (T*)work, *b = a + count * this->d_a, *image = b + count * this->d_b;
  std::memset((void*)a, 0, (count * (this->d_a + this->d_b) + in * padded.channel) * sizeof(T));
  int64_t have = -1;
  for (int64_t r = 0; r < count; ++r) {
    const int64_t i = (first + r) / t, p = (first + r) % t;
    if (i != have) padded.copy(s, x + (i * s.c_in + group * in) * inner, in, image), have = i;
    const T* at = image + padded.offset[p / padded.length] + p % padded.length;
    for (int64_t j = 0; j < elements; ++j) a[r * this->d_a + j] = at[padded.base[j]];
    const T* gi = g + (i * s.c_out + group * out) * t + p;
    for (int64_t o = 0; o < out; ++o) b[r * this->d_b + o] = gi[o * t];
  }
  *pa = a, *pb = b;
}

#define EF_INSTANTIATE(T)                                                  \
  template struct LinearGradients<T>;                                      \
  template struct GivenGradients<T>;                                       \
  template struct ConvGradients<T>;                                        \
  template struct LinearPositions<T>;                                      \
  template struct ConvPositions<T>;
EF_INSTANTIATE(float)
EF_INSTANTIATE(double)
EF_INSTANTIATE(uint16_t)

}  // namespace ef::cpu
