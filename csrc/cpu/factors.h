// A layer's factors as the contractions see them: per-sample gradients a piece at a time, or positions as rows.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common.h"
#include "isa.h"

namespace ef::cpu {

struct Layer {  // a (n,t,d_in) or (n,d_in), b (n,t,d_out) or (n,d_out), contiguous
  Tensor a, b;
  int64_t n, t, d_in, d_out;
};
// both as `dtype`, their shapes checked in the name of `op`
Layer layer(const char* op, const Tensor& a, const Tensor& b, ScalarType dtype);

// A piece of the gradient: rows [o0, o0+o) x columns [j0, j0+j), `cells` elements with padding, of group `group`.
struct Piece {
  int64_t o0, o, j0, j, cells, group;
};

struct Stretch {  // pieces [first, last) of all rows, `cells` elements a row together
  size_t first, last;
  int64_t cells, widest;
};

template <class T> struct Gradients {
  int64_t n = 0;
  std::vector<Piece> pieces;
  virtual ~Gradients() = default;
  virtual int64_t work() const = 0;                                             // bytes of buffer form() needs
  virtual void prepare(void* work) const {}                                     // once a thread, before form()
  virtual void form(int64_t sample, const Piece&, T* cells, void* work) const = 0;
  // rows [first, first + count), ld elements apart
  virtual void form_rows(int64_t first, int64_t count, const Piece& piece, T* cells, int64_t ld, void* work) const {
    for (int64_t i = 0; i < count; ++i) form(first + i, piece, cells + i * ld, work);
  }
  // form and pack tasks [begin, end) of a stretch, of contract_of<T>().lanes rows of a piece each
  virtual void panels(const Stretch&, int64_t begin, int64_t end, T* out) const;
};

// b^T a of a linear layer, a (n,t,d_in), b (n,t,d_out) contiguous
template <class T> struct LinearGradients : Gradients<T> {
  const T *a, *b;
  int64_t t, d_in, d_out;
  LinearGradients(const T* a, const T* b, int64_t n, int64_t t, int64_t d_in, int64_t d_out);
  int64_t work() const override;
  void form(int64_t sample, const Piece&, T* cells, void* work) const override;
};

// Rows that are gradients already: weights (k, d_out, d_in). Cut as `like` is, whose o counts from the first of its group; columns: a
// piece's cells stand j-major, as a convolution's do.
template <class T> struct GivenGradients : Gradients<T> {
  const T* rows;
  int64_t d_in, d_out, groups;
  bool columns;
  GivenGradients(const T* rows, int64_t k, int64_t d_in, int64_t d_out, int64_t groups, bool columns, const std::vector<Piece>& like);
  int64_t work() const override { return 0; }
  void form(int64_t sample, const Piece&, T* cells, void* work) const override;
};

struct ConvShape {  // 1 to 3 sizes, as 3
  int64_t n, c_in, c_out, groups, size[3], out[3], kernel[3], stride[3], padding[3], dilation[3];
  int64_t volume() const { return kernel[0] * kernel[1] * kernel[2]; }
  int64_t positions() const { return out[0] * out[1] * out[2]; }
};
ConvShape conv_shape(const Tensor& x, const Tensor& g, const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                     const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups);

// One sample's input, padded and split by stride phase, so that neighbours in the output read neighbours here:
// a convolution needs no unfolded copy.
struct Padded {
  int64_t row, plane, channel;           // strides: a row of all phases, a plane, a channel
  std::vector<int64_t> base, offset;     // of each kernel element (all channels of a group), of each run of outputs
  std::vector<std::pair<int64_t, int64_t>> columns;  // that some window reads: where from in x, where to in a row
  std::vector<char> read[2];             // whether some window reads a plane, a line of x
  int64_t runs, length;
  explicit Padded(const ConvShape&);
  template <class T> void copy(const ConvShape&, const T* x, int64_t channels, T* out) const;
};

template <class T> struct ConvGradients : Gradients<T> {
  const T *x, *g;
  ConvShape s;
  Padded padded;
  int64_t channels, units;  // channels of the widest piece; units of k in all runs
  ConvGradients(const T* x, const T* g, const ConvShape&);
  int64_t work() const override;
  void prepare(void* work) const override;
  void form(int64_t sample, const Piece&, T* cells, void* work) const override;
};

// Rows (n·t, d_a) and (n·t, d_b) whose products per position make the Gram
template <class T> struct Positions {
  int64_t n = 0, t = 0, d_a = 0, d_b = 0;  // d_a, d_b: padded to whole units
  virtual ~Positions() = default;
  virtual int64_t work(int64_t rows) const = 0;
  // where rows [first, first + count) stand, row-major d_a and d_b apart; may fill `work`
  virtual void rows(int64_t first, int64_t count, const T** a, const T** b, void* work) const = 0;
};

template <class T> struct LinearPositions : Positions<T> {
  const T *a, *b;
  LinearPositions(const T* a, const T* b, int64_t n, int64_t t, int64_t d_in, int64_t d_out);
  int64_t work(int64_t) const override { return 0; }
  void rows(int64_t first, int64_t count, const T** a, const T** b, void* work) const override;
};

template <class T> struct ConvPositions : Positions<T> {
  const T *x, *g;
  ConvShape s;
  Padded padded;
  int64_t group;
  ConvPositions(const T* x, const T* g, const ConvShape&, int64_t group);
  int64_t work(int64_t rows) const override;
  void rows(int64_t first, int64_t count, const T** a, const T** b, void* work) const override;
};

// out (n, m) += ...; y null: symmetric, only the lower triangle is right. Acc: float for bfloat16.
template <class T, class Acc> void contract_tiles(const Gradients<T>& x, const Gradients<T>* y, Acc* out);
template <class T, class Acc> void contract_pairs(const Positions<T>& x, const Positions<T>* y, Acc* out);
// out (n, k) = products with few rows y, cut alike, one by one: no panels, nothing padded to their width
template <class T> void contract_few(const Gradients<T>& x, const Gradients<T>& y, T* out);
// out (n) = squared norms
template <class T, class Acc> void contract_square(const Gradients<T>& x, Acc* out);

}  // namespace ef::cpu
