// The arithmetic of one AdamW step of mask scores, for host and device, in fp32 and in the order of torch's fused AdamW.
//
// Over a policy `Math` as in mask.h, which also provides square_root(Float), rounded correctly.
// Source: Loshchilov, Hutter, ICLR 2019.
#pragma once

#include <math.h>

#include "mask.h"

namespace subnet {

// What the user sets. log2 of the decay rates, so that their powers are exp2 of a product: -infinity for a rate of 0.
struct AdamWSettings {
  double lr, beta1, beta2, eps, weight_decay;
  double log2_beta1, log2_beta2;
};

// The numbers of one step that all of a tensor's elements share.
struct AdamWNumbers {
  float decay;                // lr * weight_decay
  float one_minus_beta1, beta2, one_minus_beta2, eps;
  float step_size;            // lr / (1 - beta1^step)
  float root_scale;           // 1 / sqrt(1 - beta2^step)
};

// step counts from 1; powers in double, as 1 - beta2^step loses digits.
SUBNET_INLINE AdamWNumbers adamw_numbers(const AdamWSettings& given, double lr, double step) {
  AdamWNumbers numbers;
  numbers.decay = (float)(lr * given.weight_decay);
  numbers.one_minus_beta1 = (float)(1 - given.beta1);
  numbers.beta2 = (float)given.beta2;
  numbers.one_minus_beta2 = (float)(1 - given.beta2);
  numbers.eps = (float)given.eps;
  numbers.step_size = (float)(lr / (1 - exp2(step * given.log2_beta1)));
  numbers.root_scale = (float)(1 / sqrt(1 - exp2(step * given.log2_beta2)));
  return numbers;
}

// The new scores; m and v, the moments, are brought forward.
//   s = s - decay*s      m = m + (1-beta1)*(g - m)      v = beta2*v + (1-beta2)*g*g
//   s = s - step_size*m / (sqrt(v)*root_scale + eps)
template <class Math>
SUBNET_INLINE typename Math::Float adamw_step(const AdamWNumbers& numbers, typename Math::Float score,
                                              typename Math::Float grad, typename Math::Float& m,
                                              typename Math::Float& v) {
  score = score - numbers.decay * score;
  m = m + numbers.one_minus_beta1 * (grad - m);
  v = numbers.beta2 * v + numbers.one_minus_beta2 * grad * grad;
  return score - numbers.step_size * m / (Math::square_root(v) * numbers.root_scale + numbers.eps);
}

}  // namespace subnet
