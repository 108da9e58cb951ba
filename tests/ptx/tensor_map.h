// What cudart.cpp leaves in a CUtensorMap and cluster.h reads: 3 dimensions of 2 bytes, boxes of 128 bytes' rows, swizzled.
#pragma once

#include <cstdint>

namespace ptx {

constexpr uint64_t kTensorMap = 0x70616D726F736E74;
struct TensorMap {
  uint64_t kind, address, size[3], stride[2];
  uint32_t box[3];
};

}  // namespace ptx
