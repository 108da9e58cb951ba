#include "scratch.h"

#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ef::cpu {
namespace {

constexpr size_t kHuge = 2u << 20;

struct Buffers {
  void* at[(int)Slot::count] = {};
  size_t size[(int)Slot::count] = {};
  ~Buffers() {
    for (void* p : at) std::free(p);
  }
};

thread_local Buffers buffers;

}  // namespace

void* scratch(Slot slot, size_t bytes) {
  void*& p = buffers.at[(int)slot];
  size_t& size = buffers.size[(int)slot];
#if defined(__SANITIZE_ADDRESS__)
  const bool fits = false;  // exact buffers, so that an overrun is seen
  const size_t align = 64, want = (bytes + 63) / 64 * 64;
#else
  const bool fits = bytes <= size;
  const size_t align = bytes >= kHuge ? kHuge : 64, want = (bytes + align - 1) / align * align;
#endif
  if (fits) return p;
  std::free(p);
  p = std::aligned_alloc(align, want ? want : align);
  if (!p) {
    size = 0;
    throw std::bad_alloc();
  }
  size = want;
#if defined(__linux__)
  if (align == kHuge) madvise(p, want, MADV_HUGEPAGE);
#endif
  return p;
}

}  // namespace ef::cpu
