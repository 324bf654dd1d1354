// grads += lam * scale * slope(scores), for many tensors in one launch.
//
//   add_penalty_grad_kernel   grid: sum over tensors of ceil(num/kCudaBlock) blocks of 256 threads, each of one tensor.
//                             Reads scores and grads (4 B/element each) once, writes grads once.
#include "common.cuh"

namespace subnet {
namespace {

__global__ void __launch_bounds__(kThreads) add_penalty_grad_kernel(const __grid_constant__ CudaAddPenaltyGrad p) {
  const Place place = place_of(p.blocks, blockIdx.x);
  const int tensor = place.tensor;
  const float* scores = p.scores[tensor];
  float* grads = p.grads[tensor];
  const float beta = *p.beta;
  const float scale = (p.lam_at == nullptr ? p.lam : *p.lam_at) * p.scale[tensor];
  for_each(share_of(p.blocks, place), are_aligned(scores, grads), [&](auto width, int64_t at) {
    constexpr int N = decltype(width)::value;
    const Raw<N> raw = load_raw<N>(grads, Dtype::float32, at);
    float score[N], grad[N];
    load(scores, Dtype::float32, at, score);
    to_floats(raw, Dtype::float32, grad);
#pragma unroll
    for (int k = 0; k < N; ++k) grad[k] += scale * ScalarMask::slope<Kind::sigmoid>(score[k], beta);
    store(grads, Dtype::float32, at, grad);
  });
}

}  // namespace

const char* launch_add_penalty_grad(const CudaAddPenaltyGrad& params, int device, void* stream) {
  return launch_on(device, [&] {
    if (params.kind == Kind::hard) return;  // its slope is 0
    enqueue(add_penalty_grad_kernel, params.blocks.begin[params.blocks.num_tensors], params, stream);
  });
}

}  // namespace subnet
