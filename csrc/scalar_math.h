// The policy of mask.h and adamw.h over one fp32 value, for host and device.
#pragma once

#include <math.h>

#include "mask.h"

namespace subnet {

struct ScalarMath {
  using Float = float;
  static SUBNET_INLINE float absolute(float z) { return fabsf(z); }
  static SUBNET_INLINE float exp_minus(float a) { return a > kNegligible ? 0.0f : expf(-a); }
  static SUBNET_INLINE float reciprocal_1p(float e) {
#if defined(__CUDA_ARCH__)
    // 1 + e is in [1, 2], so an approximation and one Newton step are exact to rounding; a division would bring a branch
    // and a call for the range that can't occur.
    const float x = 1.0f + e;
    float approx;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(approx) : "f"(x));
    return fmaf(approx, fmaf(-x, approx, 1.0f), approx);
#else
    return 1.0f / (1.0f + e);
#endif
  }
  static SUBNET_INLINE float where_nonnegative(float z, float a, float b) { return z >= 0.0f ? a : b; }
  static SUBNET_INLINE float where_positive(float z, float a, float b) { return z > 0.0f ? a : b; }
  static SUBNET_INLINE float square_root(float a) { return sqrtf(a); }
};

}  // namespace subnet
