// THE mask functions of the C++ and CUDA code: value and slope of every kind, for host and device.
//
// subnet_kernels/masks.py is the definition; this is its one translation. Both functions are written over a policy
// `Math`, so that the same text serves a scalar on the device (cuda/) and a SIMD register on the host (cpu/simd.h).
// A policy provides
//   Float                                    one value or one register of values, fp32
//   exp_minus(Float a)                       exp(-a) for a >= 0; exactly 0 above kNegligible; NaN stays NaN
//   reciprocal_1p(Float e)                   1/(1 + e) for e in [0, 1]
//   absolute(Float z)
//   where_nonnegative(Float z, a, b)         z >= 0 ? a : b      (b for NaN)
//   where_positive(Float z, a, b)            z > 0 ? a : b       (b for NaN)
#pragma once

#if defined(__CUDACC__)
#define SUBNET_INLINE __host__ __device__ __forceinline__
#else
#define SUBNET_INLINE inline __attribute__((always_inline))
#endif

namespace subnet {

enum class Kind : int { sigmoid = 0, hard = 1 };

// exp(-a) is 0 for a above this, 100 ln 2, so that a sigmoid below 2^-100 is 0. Kept, it would make subnormal weights and
// gradients, which the matrix products of a CPU multiply a hundred times slower (docs/design.md).
constexpr float kNegligible = 69.3147181f;

template <class Math>
struct Mask {
  using Float = typename Math::Float;

  // With e = exp(-|z|): sigmoid(|z|) = 1/(1+e) and sigmoid(-|z|) = e/(1+e). Both come from one exp, neither from a
  // subtraction from 1, so that the slope keeps its relative accuracy far into saturation.
  struct Pair {
    Float above;  // sigmoid(|z|), in [0.5, 1]
    Float below;  // sigmoid(-|z|), in [0, 0.5]
  };

  static SUBNET_INLINE Pair sigmoid_pair(Float z) {
    const Float e = Math::exp_minus(Math::absolute(z));
    const Float above = Math::reciprocal_1p(e);
    return {above, e * above};
  }

  // sigmoid: m = 1/(1 + exp(-beta*s)).   hard: m = 1[s > 0]; a score of exactly 0 is out.
  template <Kind kind>
  static SUBNET_INLINE Float value(Float score, Float beta) {
    if (kind == Kind::hard) {
      return Math::where_positive(score, Float{} + 1.0f, Float{});
    }
    const Float z = beta * score;
    const Pair pair = sigmoid_pair(z);
    return Math::where_nonnegative(z, pair.above, pair.below);
  }

  // sigmoid: dm/ds = beta * m * sigmoid(-beta*s).   hard: 0.
  template <Kind kind>
  static SUBNET_INLINE Float slope(Float score, Float beta) {
    if (kind == Kind::hard) {
      return Float{};
    }
    const Pair pair = sigmoid_pair(beta * score);
    return beta * (pair.below * pair.above);
  }
};

}  // namespace subnet
