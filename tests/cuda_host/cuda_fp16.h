// float16 as cuda_fp16.h has it, as far as the kernels use it.
#pragma once
#include "cuda_host.h"

struct __half {
  _Float16 value;
  __half() = default;
  __half(float v) : value(_Float16(v)) {}
  operator float() const { return float(value); }
};
struct alignas(4) __half2 { __half x, y; };
using half = __half;
inline __half __float2half(float v) { return v; }
inline __half __float2half_rn(float v) { return v; }
inline float __half2float(__half v) { return v; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }
