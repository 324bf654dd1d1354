// Sampled masks over one weight, drawn where they are needed; subnet_kernels/masks.py and random.py are the definition.
//
//   keep_thresholds_kernel       thresholds = ceil(2^16 * sigmoid(beta*scores) - 1/2). One thread for eight scores; reads
//                                4 bytes, writes 2 a score.
//   sampled_weights_kernel       w_eff[g] = weight * 1[draw[g] < threshold] of each mask g. One thread for eight columns of
//                                a row and all masks: weight (4 or 2 B/element) and threshold (2 B) are read once, w_eff
//                                (4 or 2 B) is written once for each mask; one Philox call a mask.
//   sampled_grad_scores_kernel   grad_scores += weight * sum over g of grad_w_eff[g] * slope. The same; reads grad_w_eff
//                                once, scores, weight and grad_scores once for all masks. fp32 arithmetic, exact exp and
//                                log; the masks are added up in their order.
//
// Seed and step are read from the device's memory, so that a captured CUDA graph draws anew at every replay.
#include <math.h>

#include "../philox.h"
#include "common.cuh"

namespace subnet {
namespace {

constexpr Dtype kSixteenBits = Dtype::float16;  // of thresholds: what load_eight needs to know

// Up to eight columns of a row.
struct Eight {
  uint32_t row, group;
  int64_t at;   // place of the first one
  int count;    // 0: none
};

__device__ __forceinline__ Eight eight_of_thread(const CudaSampledMasks& masks) {
  const uint32_t groups = (masks.columns + 7) / 8;
  const uint32_t index = blockIdx.x * kThreads + threadIdx.x;
  if (index >= masks.num_groups) return {0, 0, 0, 0};
  const uint32_t row = index / groups, group = index % groups;
  const uint32_t left = masks.columns - 8 * group;
  return {row, group, (int64_t)row * masks.columns + 8 * group, left < 8 ? (int)left : 8};
}

__device__ __forceinline__ Philox<ScalarWords>::Block draw_eight(const CudaSampledMasks& masks, const Eight& eight,
                                                                 int mask) {
  const auto seed = (uint64_t)masks.key[0];
  return Philox<ScalarWords>::draw({{eight.row, eight.group, masks.first_sample + mask, (uint32_t)masks.key[1]}},
                                   (uint32_t)seed, (uint32_t)(seed >> 32));
}

__global__ void __launch_bounds__(kThreads) keep_thresholds_kernel(const __grid_constant__ CudaKeepThresholds p) {
  const int64_t at = 8 * ((int64_t)blockIdx.x * kThreads + threadIdx.x);
  if (at >= p.num) return;
  const int count = p.num - at < 8 ? (int)(p.num - at) : 8;
  float score[8];
  load_eight(p.scores, Dtype::float32, at, count, score);
  const float beta = *p.beta;
  uint32_t threshold[8];
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    const float kept = ceilf(65536.0f * ScalarMask::value<Kind::sigmoid>(score[k], beta) - 0.5f);
    threshold[k] = kept > 0.0f ? kept < 65535.0f ? (uint32_t)kept : 65535u : 0u;  // 0 for NaN
  }
  store_eight(p.thresholds, kSixteenBits, at, count, pack_halves(threshold));
}

__global__ void __launch_bounds__(kThreads) sampled_weights_kernel(const __grid_constant__ CudaSampledWeights p) {
  const Eight eight = eight_of_thread(p.masks);
  if (eight.count == 0) return;
  const Raw<8> threshold = load_eight(p.thresholds, kSixteenBits, eight.at, eight.count);
  float w[8];
  load_eight(p.masks.weight, p.masks.weight_dtype, eight.at, eight.count, w);
  for (int mask = 0; mask < p.masks.num_masks; ++mask) {
    const auto drawn = draw_eight(p.masks, eight, mask);
    float out[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) out[k] = w[k] * (half_of(drawn.word, k) < half_of(threshold.word, k) ? 1.0f : 0.0f);
    store_eight(p.w_eff, p.w_eff_dtype, eight.at + mask * p.masks.num, eight.count, to_raw(out, p.w_eff_dtype));
  }
}

template <bool is_noisy>
__global__ void __launch_bounds__(kThreads) sampled_grad_scores_kernel(const __grid_constant__ CudaSampledGradScores p) {
  const Eight eight = eight_of_thread(p.masks);
  if (eight.count == 0) return;
  float score[8], total[8] = {};
  load_eight(p.scores, Dtype::float32, eight.at, eight.count, score);
  const float beta = *p.beta, inverse_tau = 1.0f / p.tau;
  for (int mask = 0; mask < p.masks.num_masks; ++mask) {
    float g[8];
    load_eight(p.grad_w_eff, p.grad_dtype, eight.at + mask * p.masks.num, eight.count, g);
    if (is_noisy) {
      const auto drawn = draw_eight(p.masks, eight, mask);
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const float u = (float)half_of(drawn.word, k) + 0.5f;  // times 2^16
        const float noise = logf((65536.0f - u) / u);
        g[k] *= ScalarMask::slope<Kind::sigmoid>(beta * score[k] + noise, inverse_tau);
      }
    }
#pragma unroll
    for (int k = 0; k < 8; ++k) total[k] += g[k];
  }
  float w[8], sum[8];
  load_eight(p.masks.weight, p.masks.weight_dtype, eight.at, eight.count, w);
  load_eight(p.grad_scores, Dtype::float32, eight.at, eight.count, sum);
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    sum[k] += w[k] * total[k] * (is_noisy ? beta : ScalarMask::slope<Kind::sigmoid>(score[k], beta));
  }
  store_eight(p.grad_scores, Dtype::float32, eight.at, eight.count, to_raw(sum, Dtype::float32));
}

int64_t blocks_of(int64_t num_threads) { return (num_threads + kThreads - 1) / kThreads; }

}  // namespace

const char* launch_keep_thresholds(const CudaKeepThresholds& params, int device, void* stream) {
  return launch_on(device, [&] {
    enqueue(keep_thresholds_kernel, blocks_of((params.num + 7) / 8), params, stream);
  });
}

const char* launch_sampled_weights(const CudaSampledWeights& params, int device, void* stream) {
  return launch_on(device, [&] {
    enqueue(sampled_weights_kernel, blocks_of(params.masks.num_groups), params, stream);
  });
}

const char* launch_sampled_grad_scores(const CudaSampledGradScores& params, int device, void* stream) {
  return launch_on(device, [&] {
    enqueue(params.is_noisy ? sampled_grad_scores_kernel<true> : sampled_grad_scores_kernel<false>,
            blocks_of(params.masks.num_groups), params, stream);
  });
}

}  // namespace subnet
