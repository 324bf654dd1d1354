// ds = (grad_w_eff*weight + grad_penalty) * slope over a run of elements, each of which has its own score.
#pragma once

#include "simd.h"

namespace subnet {
namespace SUBNET_CAPABILITY {

template <class F>
SUBNET_INLINE F score_gradient(F grad, F weight, F score, float beta, float grad_penalty) {
  return (grad * weight + grad_penalty) * Mask<RegisterMath<F>>::template slope<Kind::sigmoid>(score, F{} + beta);
}

template <class G, class W>
void score_gradients(const typename G::Stored* grad, const typename W::Stored* weight, const float* scores, float beta,
                     float grad_penalty, float* grad_scores, int64_t count) {
  int64_t i = 0;
  for (; i + kGroup <= count; i += kGroup) {
    store_four<Float32>(grad_scores + i, score_gradient(load_four<G>(grad + i), load_four<W>(weight + i),
                                                        load_four<Float32>(scores + i), beta, grad_penalty));
  }
  for (; i < count; i += kLanes) {
    const int64_t left = count - i < kLanes ? count - i : kLanes;
    const Vector result = score_gradient(load_some<G>(grad + i, left), load_some<W>(weight + i, left),
                                         load_some<Float32>(scores + i, left), beta, grad_penalty);
    store_some<Float32>(grad_scores + i, result, left);
  }
}

}  // namespace SUBNET_CAPABILITY
}  // namespace subnet
