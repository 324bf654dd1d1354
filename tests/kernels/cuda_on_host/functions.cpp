// Functions of the headers that host and device share, for ctypes: over arrays, as a C++ compiler makes them.
#include "adamw.h"
#include "philox.h"
#include "rounding.h"
#include "scalar_math.h"

using subnet::Kind;
using subnet::ScalarMath;
using ScalarMask = subnet::Mask<ScalarMath>;

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void mask_value(const float* scores, float beta, float* out, int64_t num) {
  for (int64_t i = 0; i < num; ++i) out[i] = ScalarMask::value<Kind::sigmoid>(scores[i], beta);
}

EXPORT void mask_slope(const float* scores, float beta, float* out, int64_t num) {
  for (int64_t i = 0; i < num; ++i) out[i] = ScalarMask::slope<Kind::sigmoid>(scores[i], beta);
}

EXPORT void hard_value(const float* scores, float* out, int64_t num) {
  for (int64_t i = 0; i < num; ++i) out[i] = ScalarMask::value<Kind::hard>(scores[i], 0.0f);
}

EXPORT void philox(const uint32_t* counter, const uint32_t* key, uint32_t* out) {
  const auto block = subnet::Philox<subnet::ScalarWords>::draw({{counter[0], counter[1], counter[2], counter[3]}},
                                                               key[0], key[1]);
  for (int k = 0; k < 4; ++k) out[k] = block.word[k];
}

EXPORT void rounding_bits(uint32_t step, uint32_t* out, int64_t num) {
  for (int64_t i = 0; i < num; ++i) out[i] = subnet::rounding_bits((uint32_t)i, step);
}

EXPORT void round_to_bf16_bits(const uint32_t* bits, const uint32_t* random, uint32_t* out, int64_t num) {
  for (int64_t i = 0; i < num; ++i) out[i] = subnet::round_to_bf16_bits(bits[i], random[i]);
}

// numbers: lr, beta1, beta2, eps, weight_decay, step
EXPORT void adamw(const double* numbers, float* scores, const float* grads, float* m, float* v, int64_t num) {
  const auto settings = subnet::adamw_settings(numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]);
  const auto rates = subnet::adamw_rates(settings, settings.lr, numbers[5]);
  for (int64_t i = 0; i < num; ++i) {
    scores[i] = subnet::adamw_step<subnet::ExactRoot<ScalarMath>>(settings, rates, scores[i], grads[i], m[i], v[i]);
  }
}
