// What both score-gradient products do with a finished element of grad_out^T x, before it is stored.
#pragma once

#include "../../scalar_math.h"

namespace subnet {

// (product*weight + grad_penalty) * slope(score), elementwise over `Vector`: float, or an array of floats with
// kElements and operator[] (cutlass::Array). The argument order is that of the epilogue's visitor tree.
template <class Vector>
struct ScoreGradientEpilogue {
  SUBNET_INLINE Vector operator()(const Vector& product, const Vector& weight, const Vector& scores,
                                  const Vector& beta, const Vector& grad_penalty) const {
    Vector out;
    const ScoreGradientEpilogue<typename Vector::Element> one;
#pragma unroll
    for (int i = 0; i < Vector::kElements; ++i) {
      out[i] = one(product[i], weight[i], scores[i], beta[i], grad_penalty[i]);
    }
    return out;
  }
};

template <>
struct ScoreGradientEpilogue<float> {
  SUBNET_INLINE float operator()(float product, float weight, float score, float beta, float grad_penalty) const {
    return (product * weight + grad_penalty) * Mask<ScalarMath>::slope<Kind::sigmoid>(score, beta);
  }
};

}  // namespace subnet
