// The arithmetic of one AdamW step of mask scores, for host and device, in fp32 and in the order of torch's fused AdamW.
//
// Over a policy `Root` that provides Float and over_root(numerator, v, scale, eps) = numerator / (sqrt(v)*scale + eps).
// Source: Loshchilov, Hutter, ICLR 2019.
#pragma once

#include <math.h>

#include "mask.h"

namespace subnet {

// What the user sets.
struct AdamWSettings {
  double lr, weight_decay;
  double log2_beta1, log2_beta2;  // so that powers are exp2 of a product; -infinity for a decay rate of 0
  float one_minus_beta1, beta2, one_minus_beta2, eps;
};

SUBNET_INLINE AdamWSettings adamw_settings(double lr, double beta1, double beta2, double eps, double weight_decay) {
  return {lr, weight_decay, log2(beta1), log2(beta2), (float)(1 - beta1), (float)beta2, (float)(1 - beta2), (float)eps};
}

// What follows from the number of the step, the same for all of a tensor's elements.
struct AdamWRates {
  float decay;       // lr * weight_decay
  float step_size;   // lr / (1 - beta1^step)
  float root_scale;  // 1 / sqrt(1 - beta2^step)
};

// step counts from 1. In double: 1 - beta2^step loses digits.
SUBNET_INLINE AdamWRates adamw_rates(const AdamWSettings& settings, double lr, double step) {
  return {(float)(lr * settings.weight_decay), (float)(lr / (1 - exp2(step * settings.log2_beta1))),
          (float)(1 / sqrt(1 - exp2(step * settings.log2_beta2)))};
}

// The new scores; m and v, the moments, are brought forward.
//   s = s - decay*s      m = m + (1-beta1)*(g - m)      v = beta2*v + (1-beta2)*g*g
//   s = s - step_size*m / (sqrt(v)*root_scale + eps)
template <class Root>
SUBNET_INLINE typename Root::Float adamw_step(const AdamWSettings& settings, const AdamWRates& rates,
                                              typename Root::Float score, typename Root::Float grad,
                                              typename Root::Float& m, typename Root::Float& v) {
  score = score - rates.decay * score;
  m = m + settings.one_minus_beta1 * (grad - m);
  v = settings.beta2 * v + settings.one_minus_beta2 * grad * grad;
  return score - Root::over_root(rates.step_size * m, v, rates.root_scale, settings.eps);
}

// With Math's square root and division, both rounded correctly.
template <class Math>
struct ExactRoot {
  using Float = typename Math::Float;
  static SUBNET_INLINE Float over_root(Float numerator, Float v, float scale, float eps) {
    return numerator / (Math::square_root(v) * scale + eps);
  }
};

}  // namespace subnet
