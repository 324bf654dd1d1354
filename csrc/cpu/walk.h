// Walks strided dimensions in order, from any start, by incrementing instead of dividing.
#pragma once

#include "simd.h"

namespace subnet {
namespace SUBNET_CAPABILITY {

struct Walk {
  int dims;
  const int64_t* size;
  const int64_t* stride;
  int64_t index[2 * kMaxDims];
  int64_t offset = 0;

  Walk(int dims, const int64_t* size, const int64_t* stride, int64_t start) : dims(dims), size(size), stride(stride) {
    for (int d = dims - 1; d >= 0; --d) {
      index[d] = start % size[d];
      start /= size[d];
      offset += index[d] * stride[d];
    }
  }

  SUBNET_INLINE void next() {
    for (int d = dims - 1; d >= 0; --d) {
      offset += stride[d];
      if (++index[d] < size[d]) return;
      offset -= size[d] * stride[d];
      index[d] = 0;
    }
  }
};

// buffer[0 .. count) = the values at mask positions [start, start+count).
inline void gather(const float* from, const Layout& layout, int64_t start, int64_t count, float* buffer) {
  if (layout.is_flat) {
    __builtin_memcpy(buffer, from + start, count * sizeof(float));
    return;
  }
  Walk walk(layout.score_dims, layout.score_size, layout.score_stride, start);
  for (int64_t i = 0; i < count; ++i, walk.next()) buffer[i] = from[walk.offset];
}

inline void scatter(const float* buffer, const Layout& layout, int64_t start, int64_t count, float* to) {
  if (layout.is_flat) {
    __builtin_memcpy(to + start, buffer, count * sizeof(float));
    return;
  }
  Walk walk(layout.score_dims, layout.score_size, layout.grad_stride, start);
  for (int64_t i = 0; i < count; ++i, walk.next()) to[walk.offset] = buffer[i];
}

}  // namespace SUBNET_CAPABILITY
}  // namespace subnet
