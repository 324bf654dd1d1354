// w_eff = weight * m over a run of elements, and the sum of m.
#pragma once

#include "simd.h"

namespace subnet {
namespace SUBNET_CAPABILITY {

template <Kind kind, class W, class O>
SUBNET_INLINE void scale_by_mask(const typename W::Stored* weight, const float* scores, float beta_value,
                                 typename O::Stored* w_eff, int64_t count, Sum& sum) {
  const Vector beta = broadcast(beta_value);
  int64_t i = 0;
  for (; i + kGroup <= count; i += kGroup) {
    const Four mask = Mask<RegisterMath<Four>>::template value<kind>(load_four<Float32>(scores + i), Four{} + beta);
    store_four<O>(w_eff + i, load_four<W>(weight + i) * mask);
    sum.add((mask.a.a + mask.a.b) + (mask.b.a + mask.b.b));
  }
  for (; i < count; i += kLanes) {
    const int64_t left = count - i < kLanes ? count - i : kLanes;
    const Vector mask = VectorMask::value<kind>(load_some<Float32>(scores + i, left), beta);
    store_some<O>(w_eff + i, load_some<W>(weight + i, left) * mask, left);
    sum.add_some(mask, left);
  }
}

template <Kind kind, class W, class O>
double scale_by_mask(const typename W::Stored* weight, const float* scores, float beta, typename O::Stored* w_eff,
                     int64_t count) {
  Sum sum;
  scale_by_mask<kind, W, O>(weight, scores, beta, w_eff, count, sum);
  return sum.total();
}

}  // namespace SUBNET_CAPABILITY
}  // namespace subnet
