// Stands in for CUDA's header of that name; see cuda_runtime.h.
#pragma once

#include "cuda_runtime.h"

typedef _Float16 __half;

inline __half __float2half_rn(float value) { return (__half)value; }
inline float __half2float(__half value) { return (float)value; }

inline __half __ushort_as_half(uint16_t bits) {
  __half value;
  memcpy(&value, &bits, 2);
  return value;
}

inline uint16_t __half_as_ushort(__half value) {
  uint16_t bits;
  memcpy(&bits, &value, 2);
  return bits;
}
