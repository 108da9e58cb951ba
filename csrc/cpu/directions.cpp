#include "directions.h"

#include <algorithm>
#include <cstring>

namespace ef::cpu {

Directions directions_of(const char* op, int64_t k, int64_t seed, int64_t offset, const std::string& kind) {
  STD_TORCH_CHECK(k >= 0 && (kind == "sign" || kind == "gaussian"), op, ": k >= 0, kind sign or gaussian");
  return {(uint64_t)seed, (uint64_t)offset, 0, kind == "sign"};
}

void Directions::draw(int64_t block, const int64_t* elements, int64_t count, uint32_t* planes, int64_t pitch) const {
  const int64_t base = (int64_t)((uint64_t)block * (uint64_t)numel);
  (sign ? draws().words : draws().normals)(elements, count, base, seed, offset, planes, pitch);
}

template <class T> void Directions::row(int64_t j, const uint32_t* planes, int64_t pitch, int64_t count, T* out) const {
  if (sign) return signs_of<T>().row(planes + j % 128 / 32 * pitch, count, j % 32, out);
  planes += j % 4 * pitch;
  for (int64_t e = 0; e < count; ++e) out[e] = (T)__builtin_bit_cast(float, planes[e]);
}

template <class T> void Directions::panel(int64_t j, const uint32_t* planes, int64_t pitch, int64_t count, T* out) const {
  signs_of<T>().panel(planes + j % 128 / 32 * pitch, count, j % 32, out);
}

template <class T>
RandomGradients<T>::RandomGradients(int64_t first_, int64_t k, const Places& places_, bool columns_, const std::vector<Piece>& like,
                                    const Directions& directions_)
    : first(first_), places(places_), columns(columns_), directions(directions_) {
  this->n = k;
  this->pieces = like;
}

template <class T> int64_t RandomGradients<T>::work() const {
  int64_t most = 0;
  for (const Piece& p : this->pieces) most = std::max(most, p.o * p.j * 24 + p.cells * 16);
  return most;
}

// elements that follow one another in the cells, the padding between their runs left out; what was drawn is spread over it afterwards
template <class T> void RandomGradients<T>::draw(int64_t block, const Piece& p, uint32_t* planes, int64_t pitch, void* work) const {
  const int64_t runs = columns ? p.j : p.o, length = columns ? p.o : p.j, step = p.cells / runs, count = runs * length;
  const int64_t across = columns ? places.column : places.row, along = columns ? places.row : places.column;
  int64_t *elements = (int64_t*)work, at = p.group * places.group + p.o0 * places.row + p.j0 * places.column;
  for (int64_t r = 0; r < runs; ++r, at += across)
    for (int64_t e = 0; e < length; ++e) elements[r * length + e] = at + e * along;
  if (step == length) return directions.draw(block, elements, count, planes, pitch);
  uint32_t* drawn = (uint32_t*)(elements + count);
  directions.draw(block, elements, count, drawn, count);
  for (int64_t w = 0; w < 4; ++w)
    for (int64_t r = 0; r < runs; ++r) {
      uint32_t* to = planes + w * pitch + r * step;
      std::memcpy(to, drawn + w * count + r * length, length * sizeof(uint32_t));
      std::memset(to + length, 0, (step - length) * sizeof(uint32_t));
    }
}

template <class T>
void RandomGradients<T>::form_rows(int64_t from, int64_t count, const Piece& p, T* cells, int64_t ld, void* work) const {
  uint32_t* planes = (uint32_t*)((int64_t*)work + 3 * p.o * p.j);  // behind what draw() uses
  const int64_t begin = first + from, each = directions.each();
  for (int64_t j = begin; j < begin + count; ++j) {
    if (j == begin || j % each == 0) draw(j / each, p, planes, p.cells, work);
    directions.row(j, planes, p.cells, p.cells, cells + (j - begin) * ld);
  }
}

#define EF_INSTANTIATE(T)                                                                             \
  template void Directions::row<T>(int64_t, const uint32_t*, int64_t, int64_t, T*) const;             \
  template void Directions::panel<T>(int64_t, const uint32_t*, int64_t, int64_t, T*) const;           \
  template struct RandomGradients<T>;
EF_INSTANTIATE(float)
EF_INSTANTIATE(double)

}  // namespace ef::cpu
