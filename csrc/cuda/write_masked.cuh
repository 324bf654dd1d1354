// The last step of effective_weight.cu and mask_adamw.cu.
#pragma once

#include "common.cuh"

namespace subnet {

// w_eff = weight * m at N elements, given their scores; returns the sum of m.
template <Kind kind, int N>
__device__ __forceinline__ float write_masked(const float (&weight)[N], const float (&score)[N], float beta, void* w_eff,
                                              Dtype w_eff_dtype, int64_t at) {
  float mask[N], out[N];
#pragma unroll
  for (int k = 0; k < N; ++k) {
    mask[k] = ScalarMask::value<kind>(score[k], beta);
    out[k] = weight[k] * mask[k];
  }
  store(w_eff, w_eff_dtype, at, out);
  return sum_of(mask);
}

}  // namespace subnet
