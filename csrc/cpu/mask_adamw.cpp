// One step of AdamW on scores of weight's shape, with the penalty's gradient, and w_eff = weight * m of the new scores.
//
// One pass over memory: reads scores, gradient, both moments and weight once, writes scores, moments and w_eff once, 36
// bytes per weight in fp32; penalty gradient, AdamW and effective weight in passes of their own move 52. Within it, runs
// of kStepRun elements are taken through one stage after the other while they lie in the first-level cache.
//   g = grad + penalty_scale * slope(s, beta)       s = s - decay*s
//   or, from the gradient of w_eff:  g = (grad*weight + grad_penalty + penalty_scale) * slope(s, beta)
//   m = m + (1-beta1)*(g - m)                       v = beta2*v + (1-beta2)*g*g
//   s = s - step_size*m / (sqrt(v)*root_scale + eps)
//   w_eff = weight * mask(s, next_beta)             partials: sums of mask(s, next_beta), per chunk of kChunk
// Everything in fp32, in the order of torch's fused AdamW; moments may be kept in bf16 (rounding.h). w_eff and sums are
// those of effective_weight.cpp on the new scores, w_eff to the bit.
// Subnormal numbers (below 2^-126) count as 0 in the step, on x86: the moments of a weight whose mask has closed end
// there, and the step then takes ten times longer (30 % of 2,359,296 weights so, AVX-512, one thread: 45 ms, not 3.6).
// Source: Loshchilov, Hutter, ICLR 2019.
#include "mask_adamw.h"

namespace subnet {
namespace SUBNET_CAPABILITY {

void mask_adamw(const MaskAdamW& p, int64_t chunk_begin, int64_t chunk_end) {
  const int64_t grad_bytes = p.grad_dtype == Dtype::float32 ? 4 : 2;
  for (int64_t chunk = chunk_begin; chunk < chunk_end; ++chunk) {
    const int64_t first = chunk * kChunk, end = p.num - first < kChunk ? p.num : first + kChunk;
    Sum sum;
    for (int64_t at = first; at < end; at += kStepRun) {
      const void* grad = static_cast<const char*>(p.grad) + at * grad_bytes;
      mask_adamw_run(p, grad, at, end - at < kStepRun ? end - at : kStepRun, sum);
    }
    if (p.w_eff != nullptr) p.partials[chunk] = sum.total();
  }
}

}  // namespace SUBNET_CAPABILITY
}  // namespace subnet
