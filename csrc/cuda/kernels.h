// The interface of the CUDA kernels: plain C++, so that binding_cuda.cpp needs no CUDA header.
//
// Every kernel serves many tensors in one launch: the table of addresses is the kernel's argument, so nothing is copied
// to the device beforehand and a launch can be captured in a CUDA graph. A thread block has kCudaBlock elements of one
// tensor. beta and everything else that may change between replays is read by the kernel, never by the host.
// Each launch function enqueues on `stream` of `device` and returns null or CUDA's error text.
// Idea of the table as an argument: the multi-tensor kernels of NVIDIA's Apex.
#pragma once

#include "../adamw.h"
#include "../params.h"

namespace subnet {

constexpr int64_t kCudaBlock = 4096;      // elements per thread block; fixed, so sums depend on sizes only

// Which thread blocks are whose. Consecutive tensors over one weight (masks of it) are a run: the blocks of a run visit
// the first kCudaBlock elements of each of its tensors, then the next ones, so that the weight comes from memory once.
template <int kMost>
struct CudaBlocks {
  static_assert(kMost <= 128, "7 bits are searched, and a run's length has 8");
  int64_t num[kMost];                     // elements of each tensor
  int32_t begin[kMost + 1];               // thread blocks of those before it; the last entry is the grid's size
  uint8_t run[kMost];                     // the first tensor of its run; mostly the tensor itself
  uint8_t run_length[kMost];              // tensors of the run that begins here
  int num_tensors;

  bool is_full() const { return num_tensors == kMost; }
  // The new tensor's place; -1 if the grid would be too large. shares_last: it has the weight of the last one.
  int append(int64_t count, bool shares_last) {
    const int64_t end = begin[num_tensors] + (count + kCudaBlock - 1) / kCudaBlock;
    if (end > INT32_MAX) return -1;
    num[num_tensors] = count;
    begin[num_tensors + 1] = (int32_t)end;
    run[num_tensors] = shares_last && num[num_tensors - 1] == count ? run[num_tensors - 1] : (uint8_t)num_tensors;
    ++run_length[run[num_tensors]];
    return num_tensors++;
  }
};

// A number of one tensor: in the device's memory, or, with a null address, this value.
struct CudaNumber {
  const float* at;                        // 0-d
  double value;
};

// w_eff = weight * m and sum(m). One layer each, all in storage order; scores have the weight's strides.
struct CudaEffectiveWeights {
  static constexpr int kMost = 96;        // so that the argument has less than 4 KB: the launch of every layer
  CudaBlocks<kMost> blocks;
  const void* weight[kMost];              // [num], weight_dtype
  const float* scores[kMost];             // [num]
  void* w_eff[kMost];                     // [num], w_eff_dtype
  uint8_t weight_dtype[kMost], w_eff_dtype[kMost];
  Kind kind;
  const float* beta;                      // 0-d
  double* partials;                       // [blocks] workspace
  float* penalties;                       // [num_tensors], stride penalty_stride
  int64_t penalty_stride;
};
const char* launch_effective_weights(const CudaEffectiveWeights& params, int device, void* stream);

// grad_scores = (grad_w_eff*weight + grad_penalty) * slope; grad_weight = grad_w_eff * m. The rest as above.
struct CudaGradScores {
  static constexpr int kMost = 64;
  CudaBlocks<kMost> blocks;
  const void* grad_w_eff[kMost];          // [num], grad_dtype; null: 0
  const float* grad_penalty[kMost];       // 0-d; null: 0
  const void* weight[kMost];              // [num], weight_dtype
  const float* scores[kMost];             // [num]
  float* grad_scores[kMost];              // [num]; may be grad_w_eff; null: not wanted
  void* grad_weight[kMost];               // [num], weight_dtype; null: not wanted
  uint8_t grad_dtype[kMost], weight_dtype[kMost];
  Kind kind;
  const float* beta;                      // 0-d
};
const char* launch_grad_scores(const CudaGradScores& params, int device, void* stream);

// grads += lam * scale * slope(scores)
struct CudaAddPenaltyGrad {
  static constexpr int kMost = 96;
  CudaBlocks<kMost> blocks;
  const float* scores[kMost];             // [num]
  float* grads[kMost];                    // [num]
  float scale[kMost];                     // weights per score
  Kind kind;
  const float* beta;                      // 0-d
  const float* lam_at;                    // 0-d; null: lam
  float lam;
};
const char* launch_add_penalty_grad(const CudaAddPenaltyGrad& params, int device, void* stream);

// One AdamW step (adamw.h) of scores of weight's shape, kind sigmoid, with the penalty's gradient; then w_eff = weight *
// m and sum(m) of the new scores.
struct CudaMaskAdamW {
  static constexpr int kMost = 128;
  CudaBlocks<kMost> blocks;
  float* scores[kMost];                   // [num]
  const void* grads[kMost];               // [num], grad_dtype: of the scores (fp32), or of the effective weights
  void* exp_avg[kMost];                   // [num], fp32, or bf16 where has_bf16_moments
  void* exp_avg_sq[kMost];                // [num], the same
  const void* weight[kMost];              // [num], weight_dtype; read for w_eff and for gradients of effective weights
  void* w_eff[kMost];                     // [num], w_eff_dtype; null: not wanted
  float* penalty[kMost];                  // 0-d; null without w_eff
  const float* step[kMost];               // 0-d, counts from 1
  const float* grad_penalty[kMost];       // 0-d, beside gradients of effective weights; null: 0
  uint8_t grad_dtype[kMost], weight_dtype[kMost], w_eff_dtype[kMost];
  bool has_bf16_moments, has_w_eff_grads;
  const float *beta, *next_beta;          // 0-d: of the gradients, of the new mask
  CudaNumber lr[kMost], lam[kMost];
  AdamWSettings settings;                 // but its lr
  double* partials;                       // [blocks] workspace
};
const char* launch_mask_adamw(const CudaMaskAdamW& params, int device, void* stream);

// RandomBits with seed and offset in memory.
struct CudaRandomBits {
  uint16_t* out;                          // [samples, rows, columns]
  int64_t rows, columns;
  uint32_t num_groups;                    // samples * rows * ceil(columns / 8)
  const int64_t *seed, *offset;           // one offset; seeds: see RandomBits
  int64_t seed_stride;
  uint32_t first_sample;
};
const char* launch_random_bits(const CudaRandomBits& params, int device, void* stream);

// KeepThresholds with beta in memory.
struct CudaKeepThresholds {
  const float* scores;                    // [num]
  uint16_t* thresholds;                   // [num]
  const float* beta;                      // 0-d
  int64_t num;
};
const char* launch_keep_thresholds(const CudaKeepThresholds& params, int device, void* stream);

// Masks over one weight; their draws are those of RandomBits with this key.
struct CudaSampledMasks {
  const void* weight;                     // [rows, columns], weight_dtype
  Dtype weight_dtype;
  const int64_t* key;                     // [seed, step]
  int64_t num;                            // rows * columns
  uint32_t columns, num_groups;           // num_groups: rows * ceil(columns / 8)
  uint32_t first_sample;                  // number of the first mask
  int num_masks;
};

// w_eff = weight * 1[draw < threshold] of each mask.
struct CudaSampledWeights {
  CudaSampledMasks masks;
  const uint16_t* thresholds;             // [rows, columns]
  void* w_eff;                            // [num_masks, rows, columns], w_eff_dtype
  Dtype w_eff_dtype;
};
const char* launch_sampled_weights(const CudaSampledWeights& params, int device, void* stream);

// grad_scores += weight * sum over masks of grad_w_eff * slope; the slope is that of sigmoid((beta*s + noise)/tau) with the
// mask's noise, or that of sigmoid(beta*s).
struct CudaSampledGradScores {
  CudaSampledMasks masks;
  const void* grad_w_eff;                 // [num_masks, rows, columns], grad_dtype
  Dtype grad_dtype;
  const float* scores;                    // [rows, columns]
  const float* beta;                      // 0-d
  float* grad_scores;                     // [rows, columns]
  bool is_noisy;
  float tau;
};
const char* launch_sampled_grad_scores(const CudaSampledGradScores& params, int device, void* stream);

const char* launch_pack_mask(const PackMask& params, int device, void* stream);
const char* launch_unpack_mask(const UnpackMask& params, int device, void* stream);
const char* launch_packed_weight(const PackedWeight& params, int device, void* stream);

// out = x (weight * m)^T + bias and sum(m), kind sigmoid, for few rows of x: the effective weight stays in registers.
struct CudaMaskedLinear {
  static constexpr int kMostRows = 256;   // of x: beyond, the mask is better made once, in memory
  const void* x;                          // [m, k], dtype, like all matrices here row-major without gaps
  const void* weight;                     // [n, k], dtype
  const float* scores;                    // [n, k]
  const void* bias;                       // [n], dtype; null: none
  void* out;                              // [m, n], dtype
  const float* beta;                      // 0-d
  double* partials;                       // [masked_linear_blocks(m, n)] workspace
  float* penalty;                         // 0-d
  int m, n, k;                            // k is a multiple of 8, addresses of matrices of 16 bytes; none is 0
  Dtype dtype;                            // bfloat16 or float16
  int row_blocks, column_tiles;           // the launch's
};
int64_t masked_linear_blocks(int64_t m, int64_t n);
const char* launch_masked_linear(const CudaMaskedLinear& params, int device, void* stream);

}  // namespace subnet
