// Builds a Layout (params.h) from sizes and strides.
#pragma once

#include "params.h"

namespace subnet {

inline int64_t count_elements(int ndim, const int64_t* size) {
  int64_t count = 1;
  for (int d = 0; d < ndim; ++d) count *= size[d];
  return count;
}

// Writes into `order` the dimensions from the slowest to the fastest in memory, dimensions of size 1 left out, and
// returns how many they are; -1 if the elements overlap or leave gaps.
inline int storage_order(int ndim, const int64_t* size, const int64_t* stride, int* order) {
  int count = 0;
  for (int d = 0; d < ndim; ++d) {
    if (size[d] == 1) continue;
    int at = count++;
    for (; at > 0 && stride[order[at - 1]] < stride[d]; --at) order[at] = order[at - 1];
    order[at] = d;
  }
  int64_t expected = 1;
  for (int at = count - 1; at >= 0; --at) {
    if (stride[order[at]] != expected) return -1;
    expected *= size[order[at]];
  }
  return count;
}

// Strides agree wherever they matter: along dimensions longer than 1.
inline bool same_strides(int ndim, const int64_t* size, const int64_t* a, const int64_t* b) {
  for (int d = 0; d < ndim; ++d) {
    if (size[d] != 1 && a[d] != b[d]) return false;
  }
  return true;
}

inline void append_loop(Layout& layout, int64_t size, int64_t stride) {
  if (size == 1) return;
  if (layout.loop_dims > 0) {
    const int last = layout.loop_dims - 1;
    if (layout.loop_stride[last] == size * stride) {  // also merges 0 with 0
      layout.loop_size[last] *= size;
      layout.loop_stride[last] = stride;
      return;
    }
  }
  layout.loop_size[layout.loop_dims] = size;
  layout.loop_stride[layout.loop_dims++] = stride;
}

// Sizes are valid here: the weight is dense and has elements, each score size divides the weight's.
inline Layout make_layout(int ndim, const int64_t* weight_size, const int64_t* weight_stride, const int64_t* score_size,
                          const int64_t* score_stride, const int64_t* grad_stride) {
  Layout layout{};
  layout.num_weights = count_elements(ndim, weight_size);
  layout.num_scores = count_elements(ndim, score_size);
  layout.weights_per_score = layout.num_scores > 0 ? layout.num_weights / layout.num_scores : 0;
  layout.is_flat = layout.num_weights == layout.num_scores &&
                   same_strides(ndim, weight_size, weight_stride, score_stride) &&
                   same_strides(ndim, weight_size, weight_stride, grad_stride);
  if (layout.is_flat) return layout;

  int order[kMaxDims];
  const int count = storage_order(ndim, weight_size, weight_stride, order);
  int64_t position_stride[kMaxDims];
  int64_t stride = 1;
  for (int at = count - 1; at >= 0; --at) {
    position_stride[at] = stride;
    stride *= score_size[order[at]];
  }
  for (int at = 0; at < count; ++at) {
    const int d = order[at];
    append_loop(layout, score_size[d], position_stride[at]);
    append_loop(layout, weight_size[d] / score_size[d], 0);
    if (score_size[d] == 1) continue;
    layout.score_size[layout.score_dims] = score_size[d];
    layout.score_stride[layout.score_dims] = score_stride[d];
    layout.grad_stride[layout.score_dims++] = grad_stride[d];
  }
  if (layout.loop_dims == 0) {  // a weight of one element
    layout.loop_size[0] = 1;
    layout.loop_stride[0] = 0;
    layout.loop_dims = 1;
  }
  return layout;
}

}  // namespace subnet
