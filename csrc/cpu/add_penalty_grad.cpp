// grads += lam * weights_per_score * slope(scores), in one pass: what lam * (sum of m over weights) adds to the gradient.
#include "kernels.h"
#include "walk.h"

namespace subnet {
namespace SUBNET_CAPABILITY {

void add_penalty_grad(const AddPenaltyGrad& p, int64_t begin, int64_t end) {
  if (p.kind == Kind::hard) return;  // its slope is 0
  constexpr int64_t kBlock = 256;
  const Layout& layout = *p.layout;
  const Vector beta = broadcast(p.beta);
  const Vector scale = broadcast(p.scale);
  float scores[kBlock];
  float grads[kBlock];
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t count = end - at < kBlock ? end - at : kBlock;
    gather(p.scores, layout, at, count, scores);
    if (layout.is_flat) {
      __builtin_memcpy(grads, p.grads + at, count * sizeof(float));
    } else {
      Walk walk(layout.score_dims, layout.score_size, layout.grad_stride, at);
      for (int64_t i = 0; i < count; ++i, walk.next()) grads[i] = p.grads[walk.offset];
    }
    for (int64_t i = 0; i < count; i += kLanes) {
      const int64_t left = count - i < kLanes ? count - i : kLanes;
      const Vector slope = VectorMask::slope<Kind::sigmoid>(load_some<Float32>(scores + i, left), beta);
      store_some<Float32>(grads + i, load_some<Float32>(grads + i, left) + scale * slope, left);
    }
    scatter(grads, layout, at, count, p.grads);
  }
}

}  // namespace SUBNET_CAPABILITY
}  // namespace subnet
