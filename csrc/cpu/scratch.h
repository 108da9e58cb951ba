// Buffers that a thread keeps between calls, on huge pages: fresh 4-KiB pages cost as much as the arithmetic.
#pragma once

#include <cstddef>

namespace ef::cpu {

enum class Slot { panels, other_panels, rows, work, partial, count };

// at least `bytes` long, 64-byte aligned, contents undefined; valid until this thread asks for the same slot again
void* scratch(Slot slot, size_t bytes);

}  // namespace ef::cpu
