// Random directions, drawn where they are used: read off Philox blocks that serve many directions of one element.
#pragma once

#include "factors.h"

namespace ef::cpu {

// Directions over a weight of `numel` elements, as reference/philox.py defines them
struct Directions {
  uint64_t seed, offset;
  int64_t numel;
  bool sign;
  int64_t each() const { return sign ? 128 : 4; }  // directions that one block serves
  // what directions [block * each, block * each + each) are read off at `count` elements: 4 planes, of words or of normals, `pitch` apart
  void draw(int64_t block, const int64_t* elements, int64_t count, uint32_t* planes, int64_t pitch) const;
  // direction j of that block
  template <class T> void row(int64_t j, const uint32_t* planes, int64_t pitch, int64_t count, T* out) const;
  // sign: directions j, j + 1, ... as columns of a panel, half of its width
  template <class T> void panel(int64_t j, const uint32_t* planes, int64_t pitch, int64_t count, T* out) const;
};
// the arguments of random directions, checked in the name of `op`; numel is still to be set
Directions directions_of(const char* op, int64_t k, int64_t seed, int64_t offset, const std::string& kind);

struct Places {  // how far apart neighbouring groups, rows and columns of a weight are, laid flat
  int64_t group, row, column;
};

// Rows that are drawn: directions first, first + 1, ...; cut as given ones are. What stands in the padding of cells is finite.
template <class T> struct RandomGradients : Gradients<T> {
  int64_t first;  // a multiple of 128
  Places places;
  bool columns;
  Directions directions;
  RandomGradients(int64_t first, int64_t k, const Places&, bool columns, const std::vector<Piece>& like, const Directions&);
  int64_t work() const override;
  void form(int64_t row, const Piece& piece, T* cells, void* work) const override { form_rows(row, 1, piece, cells, 0, work); }
  void form_rows(int64_t from, int64_t count, const Piece&, T* cells, int64_t ld, void* work) const override;
  void draw(int64_t block, const Piece&, uint32_t* planes, int64_t pitch, void* work) const;  // planes of piece.cells
};

// out (n, k) += products with rows that are drawn
template <class T> void contract_drawn(const Gradients<T>& x, const RandomGradients<T>& y, T* out);

}  // namespace ef::cpu
