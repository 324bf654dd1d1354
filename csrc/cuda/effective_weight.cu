// w_eff = weight * m(beta*scores) for many layers in one launch, and sum(m) of each.
//
//   effective_weights_kernel   grid: sum over layers of ceil(num/kCudaBlock) blocks of 256 threads, each of one layer,
//                              in the order of CudaBlocks. Reads weight (4 or 2 B/element; of several masks over it all
//                              but the first from the L2 cache) and scores (4 B) once, writes w_eff (4 or 2 B) once and
//                              one double per block. fp32 arithmetic, exact exp; 8 elements per thread and turn.
//   sum_masks_kernel           grid: one block per layer; adds that layer's partials in a fixed order.
//
// m is summed in fp32 over groups of 8, in double beyond, in an order that depends on sizes only: runs are bit-identical.
#include "common.cuh"
#include "write_masked.cuh"

namespace subnet {
namespace {

template <Kind kind>
__global__ void __launch_bounds__(kThreads) effective_weights_kernel(const __grid_constant__ CudaEffectiveWeights p) {
  const Place place = place_of(p.blocks, blockIdx.x);
  const int tensor = place.tensor;
  const void* weight = p.weight[tensor];
  const float* scores = p.scores[tensor];
  void* w_eff = p.w_eff[tensor];
  const Dtype weight_dtype = static_cast<Dtype>(p.weight_dtype[tensor]);
  const Dtype w_eff_dtype = static_cast<Dtype>(p.w_eff_dtype[tensor]);
  const float beta = *p.beta;
  double sum = 0;
  for_each(share_of(p.blocks, place), are_aligned(weight, scores, w_eff), [&](auto width, int64_t at) {
    constexpr int N = decltype(width)::value;
    const Raw<N> raw = load_raw<N>(weight, weight_dtype, at);
    float score[N], w[N];
    load(scores, Dtype::float32, at, score);
    to_floats(raw, weight_dtype, w);
    sum += write_masked<kind>(w, score, beta, w_eff, w_eff_dtype, at);
  });
  sum = block_sum(sum);
  if (threadIdx.x == 0) p.partials[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads) sum_masks_kernel(const __grid_constant__ CudaEffectiveWeights p) {
  const double sum = sum_of_partials(p.blocks, blockIdx.x, p.partials);
  if (threadIdx.x == 0) p.penalties[blockIdx.x * p.penalty_stride] = (float)sum;
}

static_assert(sizeof(CudaEffectiveWeights) <= 4096, "see kMost");

}  // namespace

const char* launch_effective_weights(const CudaEffectiveWeights& params, int device, void* stream) {
  return launch_on(device, [&] {
    const int num_blocks = params.blocks.begin[params.blocks.num_tensors];
    enqueue(params.kind == Kind::hard ? effective_weights_kernel<Kind::hard> : effective_weights_kernel<Kind::sigmoid>,
            num_blocks, params, stream);
    enqueue(sum_masks_kernel, params.blocks.num_tensors, params, stream);
  });
}

}  // namespace subnet
