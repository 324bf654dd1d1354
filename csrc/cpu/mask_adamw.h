// One step of AdamW over a run of scores, and the effective weight of the new ones; mask_adamw.cpp has the formulas.
#pragma once

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#include "kernels.h"
#include "scale_by_mask.h"
#include "score_gradient.h"

namespace subnet {
namespace SUBNET_CAPABILITY {

// Subnormal operands and results count as 0 in this thread as long as it lives; only where eps is so large that the
// root of a subnormal v, at most 2^-63, is less than a quarter of a rounding beside it.
class FlushSubnormals {
#if defined(__SSE2__)
 public:
  explicit FlushSubnormals(const MaskAdamW& p) {
    if (is_right(p)) _mm_setcsr(before_ | 0x8040);
  }
  ~FlushSubnormals() { _mm_setcsr(before_); }
  static bool is_right(const MaskAdamW& p) { return p.settings.eps > p.rates.root_scale * 0x1p-37f; }

 private:
  const unsigned before_ = _mm_getcsr();
#else
 public:
  explicit FlushSubnormals(const MaskAdamW&) {}
  static bool is_right(const MaskAdamW&) { return false; }
#endif
};

// How moments are kept. A load or store is of a register, or of its first `count` elements.
struct Float32Moments {
  using Stored = float;
  static SUBNET_INLINE Vector load(const float* from, int64_t count) { return load_some<Float32>(from, count); }
  static SUBNET_INLINE void store(float* m_to, float* v_to, Vector m, Vector v, uint32_t, uint32_t, int64_t count) {
    store_some<Float32>(m_to, m, count);
    store_some<Float32>(v_to, v, count);
  }
};

struct BFloat16Moments {
  using Stored = uint16_t;
  static SUBNET_INLINE Vector load(const uint16_t* from, int64_t count) { return load_some<BFloat16>(from, count); }
  // index: of the first element in its tensor's storage order
  static SUBNET_INLINE void store(uint16_t* m_to, uint16_t* v_to, Vector m, Vector v, uint32_t index, uint32_t step,
                                  int64_t count) {
    VectorBits at;
    for (int lane = 0; lane < kLanes; ++lane) at[lane] = lane;
    const VectorBits random = rounding_bits(at + index, step);
    if (count == kLanes) {
      store_bf16(m_to, m, random & 0xffffu);
      store_bf16(v_to, v, random >> 16);
      return;
    }
    uint16_t m_bits[kLanes], v_bits[kLanes];
    store_bf16(m_bits, m, random & 0xffffu);
    store_bf16(v_bits, v, random >> 16);
    __builtin_memcpy(m_to, m_bits, count * sizeof(uint16_t));
    __builtin_memcpy(v_to, v_bits, count * sizeof(uint16_t));
  }
};

template <class F, bool is_exact>
struct AdamWRoot {
  using Float = F;
  static SUBNET_INLINE F over_root(F numerator, F v, float scale, float eps) {
    return is_exact ? numerator / (square_root(v) * scale + eps) : quick_over_root(numerator, v, scale, eps);
  }
};

// The new scores, and m and v brought forward. F is one register or several in step.
template <bool is_exact, class F>
SUBNET_INLINE F step_of(const MaskAdamW& p, float penalty_scale, F score, F grad, F& m, F& v) {
  if (penalty_scale != 0.0f) {
    grad = grad + penalty_scale * Mask<RegisterMath<F>>::template slope<Kind::sigmoid>(score, F{} + p.beta);
  }
  return adamw_step<AdamWRoot<F, is_exact>>(p.settings, p.rates, score, grad, m, v);
}

template <class M, bool is_exact>
__attribute__((noinline)) void adamw_run(const MaskAdamW& given, float penalty_scale, const float* grad, int64_t begin,
                                         int64_t count) {
  const MaskAdamW p = given;  // a copy that no store can be taken to change
  float* scores = p.scores + begin;
  auto* exp_avg = static_cast<typename M::Stored*>(p.exp_avg) + begin;
  auto* exp_avg_sq = static_cast<typename M::Stored*>(p.exp_avg_sq) + begin;
  const auto index = (uint32_t)(p.first + begin);
  const auto load = [](const typename M::Stored* from) -> Four {
    return {{M::load(from, kLanes), M::load(from + kLanes, kLanes)},
            {M::load(from + 2 * kLanes, kLanes), M::load(from + 3 * kLanes, kLanes)}};
  };
  int64_t i = 0;
  for (; i + kGroup <= count; i += kGroup) {
    Four m = load(exp_avg + i), v = load(exp_avg_sq + i);
    store_four<Float32>(scores + i, step_of<is_exact>(p, penalty_scale, load_four<Float32>(scores + i),
                                                         load_four<Float32>(grad + i), m, v));
    int64_t at = i;
    const auto keep = [&](Vector m, Vector v) {
      M::store(exp_avg + at, exp_avg_sq + at, m, v, index + (uint32_t)at, p.step, kLanes);
      at += kLanes;
    };
    keep(m.a.a, v.a.a), keep(m.a.b, v.a.b), keep(m.b.a, v.b.a), keep(m.b.b, v.b.b);
  }
  for (; i < count; i += kLanes) {
    const int64_t left = count - i < kLanes ? count - i : kLanes;
    Vector m = M::load(exp_avg + i, left), v = M::load(exp_avg_sq + i, left);
    const Vector score = step_of<is_exact>(p, penalty_scale, load_some<Float32>(scores + i, left),
                                              load_some<Float32>(grad + i, left), m, v);
    store_some<Float32>(scores + i, score, left);
    M::store(exp_avg + i, exp_avg_sq + i, m, v, index + (uint32_t)i, p.step, left);
  }
}

// Elements [begin, begin + count) of the tensor, `count` at most kStepRun, `sum` gets their new mask. grad: their
// gradients, at p.grad_dtype; of the effective weight if p.is_of_w_eff.
constexpr int64_t kStepRun = 1024;  // scores, gradients, moments and weights of that many fit the first-level cache

SUBNET_INLINE void mask_adamw_run(const MaskAdamW& p, const void* grad, int64_t begin, int64_t count, Sum& sum) {
  {
    const FlushSubnormals flush(p);
    alignas(64) float buffer[kStepRun];
    const float* of_scores = static_cast<const float*>(grad);
    float penalty_scale = p.penalty_scale;
    if (p.is_of_w_eff) {
      with_dtype(p.grad_dtype, [&](auto grad_dtype) {
        with_dtype(p.weight_dtype, [&](auto weight_dtype) {
          using G = decltype(grad_dtype);
          using W = decltype(weight_dtype);
          score_gradients<G, W>(static_cast<const typename G::Stored*>(grad),
                                static_cast<const typename W::Stored*>(p.weight) + begin, p.scores + begin, p.beta,
                                p.grad_penalty + penalty_scale, buffer, count);
        });
      });
      of_scores = buffer;
      penalty_scale = 0.0f;
    }
    const bool is_exact = !FlushSubnormals::is_right(p), is_bf16 = p.moment_dtype == Dtype::bfloat16;
    const auto run = is_bf16 ? (is_exact ? adamw_run<BFloat16Moments, true> : adamw_run<BFloat16Moments, false>)
                             : (is_exact ? adamw_run<Float32Moments, true> : adamw_run<Float32Moments, false>);
    run(p, penalty_scale, of_scores, begin, count);
  }
  if (p.w_eff == nullptr) return;
  with_dtype(p.weight_dtype, [&](auto weight_dtype) {
    with_dtype(p.w_eff_dtype, [&](auto w_eff_dtype) {
      using W = decltype(weight_dtype);
      using O = decltype(w_eff_dtype);
      scale_by_mask<Kind::sigmoid, W, O>(static_cast<const typename W::Stored*>(p.weight) + begin, p.scores + begin,
                                         p.next_beta, static_cast<typename O::Stored*>(p.w_eff) + begin, count, sum);
    });
  });
}

}  // namespace SUBNET_CAPABILITY
}  // namespace subnet
