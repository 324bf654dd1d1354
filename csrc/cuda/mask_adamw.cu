// One AdamW step of mask scores (adamw.h), with the penalty's gradient in it, and the next effective weight and the sum
// of its mask, for many layers in one launch.
//
//   g = grad + lam*slope(s, beta), or (grad*weight + grad_penalty + lam)*slope(s, beta) from an effective weight's grad
//   s, m, v: one step      w_eff = weight * mask(s, next_beta)
//
//   mask_adamw_kernel   grid: sum over layers of ceil(num/kCudaBlock) blocks of 256 threads, each of one layer, in the
//                       order of CudaBlocks. Reads s, grad, m, v and weight once, writes s, m, v and w_eff once: 32
//                       B/element with fp32 moments and bf16 weights, 24 with bf16 moments, 22 with bf16 gradients too;
//                       2 less for all masks of one weight but the first. It is bound by memory: a thread loads its 8
//                       elements of all five (up to 160 B) before it works on the first; roots and quotients are exact.
//   sum_masks_kernel    grid: one block per layer; adds its blocks' sums of the mask in a fixed order.
//
// Stored moments of bf16 are rounded by a hash of place and step (rounding.h).
#include "../rounding.h"
#include "common.cuh"
#include "write_masked.cuh"

namespace subnet {
namespace {

// Both moments, rounded as rounding.py says: m by the low half of the random bits, v by the high one.
template <int N>
__device__ __forceinline__ void store_rounded(void* exp_avg, void* exp_avg_sq, int64_t at, const float (&m)[N],
                                              const float (&v)[N], uint32_t step) {
  uint32_t m_half[N], v_half[N];
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const uint32_t random = rounding_bits((uint32_t)at + k, step);
    m_half[k] = round_to_bf16_bits(__float_as_uint(m[k]), random & 0xffffu);
    v_half[k] = round_to_bf16_bits(__float_as_uint(v[k]), random >> 16);
  }
  store_raw(exp_avg, Dtype::bfloat16, at, pack_halves(m_half));
  store_raw(exp_avg_sq, Dtype::bfloat16, at, pack_halves(v_half));
}

__device__ __forceinline__ double number_of(const CudaNumber& number) {
  return number.at == nullptr ? number.value : *number.at;
}

// What all elements of a layer share, made by one thread of each block.
struct Shared {
  Place place;  // here, so that no register keeps it while the rates are made
  AdamWRates rates;
  float beta, next_beta;
  float push;  // of the penalty: lam, and what reaches it from the loss beside gradients of effective weights
  uint32_t step;
};

// Four blocks a processor leave 64 registers, for which the last variant lacks three.
template <bool kHasBf16Moments, bool kHasWEffGrads>
__global__ void __launch_bounds__(kThreads, kHasBf16Moments && kHasWEffGrads ? 3 : 4)
    mask_adamw_kernel(const __grid_constant__ CudaMaskAdamW p) {
  __shared__ Shared shared;
  if (threadIdx.x == 0) {
    shared.place = place_of(p.blocks, blockIdx.x);
    const int tensor = shared.place.tensor;
    const float step = *p.step[tensor];
    const float lam = (float)number_of(p.lam[tensor]);
    const float* grad_penalty = kHasWEffGrads ? p.grad_penalty[tensor] : nullptr;
    shared.beta = *p.beta, shared.next_beta = *p.next_beta;
    shared.push = grad_penalty == nullptr ? lam : *grad_penalty + lam;
    shared.step = (uint32_t)step;
    shared.rates = adamw_rates(p.settings, number_of(p.lr[tensor]), step);
  }
  __syncthreads();
  const int tensor = shared.place.tensor;
  float* scores = p.scores[tensor];
  const void* grads = p.grads[tensor];
  void* exp_avg = p.exp_avg[tensor];
  void* exp_avg_sq = p.exp_avg_sq[tensor];
  void* w_eff = p.w_eff[tensor];
  const void* weight = kHasWEffGrads || w_eff != nullptr ? p.weight[tensor] : nullptr;
  const Dtype grad_dtype = kHasWEffGrads ? static_cast<Dtype>(p.grad_dtype[tensor]) : Dtype::float32;
  const Dtype weight_dtype = static_cast<Dtype>(p.weight_dtype[tensor]);
  const Dtype w_eff_dtype = static_cast<Dtype>(p.w_eff_dtype[tensor]);
  constexpr Dtype kMoment = kHasBf16Moments ? Dtype::bfloat16 : Dtype::float32;
  const bool is_aligned = are_aligned(scores, grads, exp_avg, exp_avg_sq, weight, w_eff);
  double sum = 0;
  for_each(share_of(p.blocks, shared.place), is_aligned, [&](auto width, int64_t at) {
    constexpr int N = decltype(width)::value;
    const Raw<N> raw_score = load_raw<N>(scores, Dtype::float32, at);
    const Raw<N> raw_grad = load_raw<N>(grads, grad_dtype, at);
    const Raw<N> raw_m = load_raw<N>(exp_avg, kMoment, at);
    const Raw<N> raw_v = load_raw<N>(exp_avg_sq, kMoment, at);
    Raw<N> raw_weight{};
    if (weight != nullptr) raw_weight = load_raw<N>(weight, weight_dtype, at);
    float score[N], grad[N], m[N], v[N], w[N];
    to_floats(raw_score, Dtype::float32, score);
    to_floats(raw_grad, grad_dtype, grad);
    to_floats(raw_m, kMoment, m);
    to_floats(raw_v, kMoment, v);
    to_floats(raw_weight, weight_dtype, w);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if (kHasWEffGrads) {
        grad[k] = (grad[k] * w[k] + shared.push) * ScalarMask::slope<Kind::sigmoid>(score[k], shared.beta);
      } else if (shared.push != 0.0f) {
        grad[k] += shared.push * ScalarMask::slope<Kind::sigmoid>(score[k], shared.beta);
      }
      score[k] = adamw_step<ExactRoot<ScalarMath>>(p.settings, shared.rates, score[k], grad[k], m[k], v[k]);
    }
    store(scores, Dtype::float32, at, score);
    if constexpr (kHasBf16Moments) {
      store_rounded(exp_avg, exp_avg_sq, at, m, v, shared.step);
    } else {
      store(exp_avg, Dtype::float32, at, m);
      store(exp_avg_sq, Dtype::float32, at, v);
    }
    if (w_eff != nullptr) sum += write_masked<Kind::sigmoid>(w, score, shared.next_beta, w_eff, w_eff_dtype, at);
  });
  if (w_eff == nullptr) return;
  sum = block_sum(sum);
  if (threadIdx.x == 0) p.partials[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads) sum_masks_kernel(const __grid_constant__ CudaMaskAdamW p) {
  float* penalty = p.penalty[blockIdx.x];
  if (penalty == nullptr) return;
  const double sum = sum_of_partials(p.blocks, blockIdx.x, p.partials);
  if (threadIdx.x == 0) *penalty = (float)sum;
}

static_assert(sizeof(CudaMaskAdamW) <= 32764, "what a kernel's argument holds");

}  // namespace

const char* launch_mask_adamw(const CudaMaskAdamW& params, int device, void* stream) {
  return launch_on(device, [&] {
    const int num_blocks = params.blocks.begin[params.blocks.num_tensors];
    if (params.has_bf16_moments) {
      enqueue(params.has_w_eff_grads ? mask_adamw_kernel<true, true> : mask_adamw_kernel<true, false>, num_blocks,
              params, stream);
    } else {
      enqueue(params.has_w_eff_grads ? mask_adamw_kernel<false, true> : mask_adamw_kernel<false, false>, num_blocks,
              params, stream);
    }
    bool writes = false;
    for (int i = 0; i < params.blocks.num_tensors; ++i) writes |= params.penalty[i] != nullptr;
    if (writes) enqueue(sum_masks_kernel, params.blocks.num_tensors, params, stream);
  });
}

}  // namespace subnet
