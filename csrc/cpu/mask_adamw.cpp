// One step of AdamW on scores of weight's shape, with the penalty's gradient, and w_eff = weight * m of the new scores.
//
// One pass over memory: reads scores, gradient, both moments and weight once, writes scores, moments and w_eff once, 36
// bytes per weight in fp32; penalty gradient, AdamW and effective weight in passes of their own move 52. Within it, the
// new scores of a chunk are made first and read again for w_eff while they lie in the second-level cache.
//   g = grad + penalty_scale * slope(s, beta)       s = s - decay*s
//   m = m + (1-beta1)*(g - m)                       v = beta2*v + (1-beta2)*g*g
//   s = s - step_size*m / (sqrt(v)*root_scale + eps)
//   w_eff = weight * mask(s, next_beta)             partials: sums of mask(s, next_beta), per chunk of kChunk
// Everything in fp32, in the order of torch's fused AdamW; roots and quotients are the processor's exact ones. Mask,
// w_eff and sums have the bits of effective_weight.cpp on the new scores.
// Subnormal numbers (below 2^-126) count as 0 in the step, on x86: the moments of a weight whose mask has closed end
// there, and the step then takes ten times longer (30 % of 2,359,296 weights so, AVX-512, one thread: 45 ms, not 3.6).
// Source: Loshchilov, Hutter, ICLR 2019.
#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#include "kernels.h"
#include "scale_by_mask.h"

namespace subnet {
namespace SUBNET_CAPABILITY {
namespace {

// The new scores, and m and v brought forward. F is one register or several in step.
template <class F>
SUBNET_INLINE F step(const MaskAdamW& p, F score, F grad, F& m, F& v) {
  if (p.penalty_scale != 0.0f) {
    grad = grad + p.penalty_scale * Mask<RegisterMath<F>>::template slope<Kind::sigmoid>(score, F{} + p.beta);
  }
  score = score - p.decay * score;
  m = m + p.one_minus_beta1 * (grad - m);
  v = p.beta2 * v + p.one_minus_beta2 * grad * grad;
  return score - p.step_size * m / (square_root(v) * p.root_scale + p.eps);
}

// Subnormal operands and results count as 0 in this thread as long as it lives; only where eps is so large that the
// root of a subnormal v, at most 2^-63, is less than a quarter of a rounding beside it.
class FlushSubnormals {
#if defined(__SSE2__)
 public:
  explicit FlushSubnormals(const MaskAdamW& p) {
    if (p.eps > p.root_scale * 0x1p-37f) _mm_setcsr(before_ | 0x8040);
  }
  ~FlushSubnormals() { _mm_setcsr(before_); }

 private:
  const unsigned before_ = _mm_getcsr();
#else
 public:
  explicit FlushSubnormals(const MaskAdamW&) {}
#endif
};

// Not inlined, so that no arithmetic moves out of the caller's FlushSubnormals.
__attribute__((noinline)) void step_all(const MaskAdamW& given, int64_t begin, int64_t end) {
  const MaskAdamW p = given;  // a copy that no store can be taken to change
  int64_t i = begin;
  for (; i + kGroup <= end; i += kGroup) {
    Four m = load_four<Float32>(p.exp_avg + i);
    Four v = load_four<Float32>(p.exp_avg_sq + i);
    const Four grad = load_four<Float32>(p.grad + i);
    store_four<Float32>(p.scores + i, step(p, load_four<Float32>(p.scores + i), grad, m, v));
    store_four<Float32>(p.exp_avg + i, m);
    store_four<Float32>(p.exp_avg_sq + i, v);
  }
  for (; i < end; i += kLanes) {
    const int64_t left = end - i < kLanes ? end - i : kLanes;
    Vector m = load_some<Float32>(p.exp_avg + i, left);
    Vector v = load_some<Float32>(p.exp_avg_sq + i, left);
    const Vector grad = load_some<Float32>(p.grad + i, left);
    store_some<Float32>(p.scores + i, step(p, load_some<Float32>(p.scores + i, left), grad, m, v), left);
    store_some<Float32>(p.exp_avg + i, m, left);
    store_some<Float32>(p.exp_avg_sq + i, v, left);
  }
}

}  // namespace

void mask_adamw(const MaskAdamW& p, int64_t chunk_begin, int64_t chunk_end) {
  for (int64_t chunk = chunk_begin; chunk < chunk_end; ++chunk) {
    const int64_t at = chunk * kChunk;
    const int64_t count = p.num - at < kChunk ? p.num - at : kChunk;
    {
      const FlushSubnormals flush(p);
      step_all(p, at, at + count);
    }
    if (p.w_eff == nullptr) continue;
    with_dtype(p.weight_dtype, [&](auto weight_dtype) {
      with_dtype(p.w_eff_dtype, [&](auto w_eff_dtype) {
        using W = decltype(weight_dtype);
        using O = decltype(w_eff_dtype);
        const auto* weight = static_cast<const typename W::Stored*>(p.weight) + at;
        auto* w_eff = static_cast<typename O::Stored*>(p.w_eff) + at;
        p.partials[chunk] = scale_by_mask<Kind::sigmoid, W, O>(weight, p.scores + at, p.next_beta, w_eff, count);
      });
    });
  }
}

}  // namespace SUBNET_CAPABILITY
}  // namespace subnet
