// grad_scores = (grad_w_eff*weight + grad_penalty) * slope(scores), and where wanted grad_weight = grad_w_eff * m, for
// many tensors in one launch.
//
//   grad_scores_kernel   grid: sum over tensors of ceil(num/kCudaBlock) blocks of 256 threads, each of one tensor, in
//                        the order of CudaBlocks. Reads grad_w_eff, weight (4 or 2 B/element) and scores (4 B) once,
//                        writes grad_scores (4 B) once, also over grad_w_eff itself. fp32 arithmetic, exact exp; 8
//                        elements per thread and turn.
#include "common.cuh"

namespace subnet {
namespace {

template <Kind kind>
__global__ void __launch_bounds__(kThreads) grad_scores_kernel(const __grid_constant__ CudaGradScores p) {
  const Place place = place_of(p.blocks, blockIdx.x);
  const int tensor = place.tensor;
  const void* grad = p.grad_w_eff[tensor];
  const void* weight = p.weight[tensor];
  const float* scores = p.scores[tensor];
  float* grad_scores = p.grad_scores[tensor];
  void* grad_weight = p.grad_weight[tensor];
  const Dtype grad_dtype = static_cast<Dtype>(p.grad_dtype[tensor]);
  const Dtype weight_dtype = static_cast<Dtype>(p.weight_dtype[tensor]);
  const float beta = *p.beta;
  const float grad_penalty = p.grad_penalty[tensor] == nullptr ? 0.0f : *p.grad_penalty[tensor];
  const bool is_aligned = are_aligned(grad, weight, scores, grad_scores, grad_weight);
  for_each(share_of(p.blocks, place), is_aligned, [&](auto width, int64_t at) {
    constexpr int N = decltype(width)::value;
    Raw<N> raw_grad{}, raw_weight{};
    if (grad != nullptr) {
      raw_grad = load_raw<N>(grad, grad_dtype, at);
      raw_weight = load_raw<N>(weight, weight_dtype, at);
    }
    float score[N], g[N], w[N], to_scores[N], to_weight[N];
    load(scores, Dtype::float32, at, score);
    to_floats(raw_grad, grad_dtype, g);
    to_floats(raw_weight, weight_dtype, w);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float total = g[k] * w[k] + grad_penalty;
      // the hard mask has no slope: 0 whatever the gradient
      to_scores[k] = kind == Kind::hard ? 0.0f : total * ScalarMask::slope<kind>(score[k], beta);
      to_weight[k] = g[k] * ScalarMask::value<kind>(score[k], beta);
    }
    if (grad_scores != nullptr) store(grad_scores, Dtype::float32, at, to_scores);
    if (grad_weight != nullptr) store(grad_weight, weight_dtype, at, to_weight);
  });
}

}  // namespace

const char* launch_grad_scores(const CudaGradScores& params, int device, void* stream) {
  return launch_on(device, [&] {
    const int num_blocks = params.blocks.begin[params.blocks.num_tensors];
    enqueue(params.kind == Kind::hard ? grad_scores_kernel<Kind::hard> : grad_scores_kernel<Kind::sigmoid>, num_blocks,
            params, stream);
  });
}

}  // namespace subnet
