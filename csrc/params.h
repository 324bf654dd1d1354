// What the kernels are given: pointers, sizes and strides in elements. One struct per op; nothing here knows PyTorch.
#pragma once

#include <cstdint>

#include "adamw.h"
#include "dtype.h"
#include "mask.h"

namespace subnet {

constexpr int kMaxDims = 8;                // dimensions of a weight
constexpr int64_t kChunk = 16384;          // elements per partial sum: fixed, so sums do not depend on the thread count
constexpr int64_t kGrain = 32768;          // elements that are worth a thread of their own

// How scores of any unit lie over a dense weight, seen in the order in which the weight's elements are stored.
// `mask position` counts scores in that same order, densely.
//   loop   walks the weight: element offset = running index; mask position = sum(index[d] * loop_stride[d]), where a
//          stride is 0 along a dimension that one score governs. Adjacent dimensions are merged; the last is innermost.
//   score  walks the mask positions 0 .. num_scores-1 and says where score and gradient of that position are stored.
struct Layout {
  bool is_flat;                            // every score governs one weight and all tensors share their strides
  int64_t num_weights, num_scores, weights_per_score;
  int loop_dims;
  int64_t loop_size[2 * kMaxDims], loop_stride[2 * kMaxDims];
  int score_dims;
  int64_t score_size[kMaxDims], score_stride[kMaxDims], grad_stride[kMaxDims];
};

// w_eff = weight * m(scores) and sum(m).
struct EffectiveWeight {
  const void* weight;                      // [num_weights], weight_dtype, in storage order
  const float* scores;                     // flat: [num_weights], else by layout.score_stride
  void* w_eff;                             // [num_weights], w_eff_dtype, in storage order
  double* partials;                        // one sum of m per kChunk weights (flat) or scores (else)
  float* mask;                             // [num_scores] workspace by mask position; not flat only
  float beta;
  Kind kind;
  Dtype weight_dtype, w_eff_dtype;
  const Layout* layout;
};

// grad_scores = sum over governed weights of (grad_w_eff*weight + grad_penalty) * slope; grad_weight = grad_w_eff * m.
struct GradScores {
  const void* grad_w_eff;                  // [num_weights], grad_w_eff_dtype, in storage order; null: 0
  const void* weight;                      // [num_weights], weight_dtype, in storage order
  const float* scores;                     // flat: [num_weights], else by layout.score_stride
  float* grad_scores;                      // flat: [num_weights] and may be grad_w_eff, else by layout.grad_stride
  void* grad_weight;                       // [num_weights], weight_dtype, in storage order; null: not wanted
  double* sums;                            // [num_parts, num_scores] workspace by mask position; not flat only
  float beta, grad_penalty;
  Kind kind;
  Dtype grad_w_eff_dtype, weight_dtype;
  int64_t num_parts;                       // fixed by sizes alone; parts are added up in their order
  bool parts_share_scores;                 // false: parts touch different scores and use one row of sums together
  const Layout* layout;
};

constexpr int64_t kLinearRows = 6;         // rows of weight that a register tile of the linear kernels holds
constexpr int64_t kLinearBlock = 48;       // rows of weight that are a thread's unit of work in them
constexpr int64_t kLinearMostRows = 96;    // rows of x that they take

// out = x @ (weight * m).T + bias, w_eff = weight * m and sum(m); everything contiguous fp32, scores of weight's shape,
// kind sigmoid. Without scores: out = x @ w_eff.T + bias of the w_eff that is given, in the same arithmetic.
struct MaskedLinear {
  const float* x;                          // [m, k]
  const float* weight;                     // [n, k]; not read without scores
  const float* scores;                     // [n, k]; null: none
  const float* bias;                       // [n]; null: none
  float* w_eff;                            // [n, k]
  float* out;                              // [m, n]
  float* packed;                           // workspace: linear_packed_size(m, k)
  double* partials;                        // one sum of the mask per kLinearBlock rows; null without scores
  int64_t m, n, k;
  float beta;
};

// grad_scores = ((grad_out.T @ x) * weight + grad_penalty) * slope(scores); the same restrictions, kind sigmoid.
struct LinearGradScores {
  const float* grad_out;                   // [m, n]
  const float* x;                          // [m, k]
  const float* weight;                     // [n, k]
  const float* scores;                     // [n, k]
  float* grad_scores;                      // [n, k]
  float* packed;                           // workspace: linear_packed_size(k, m)
  int64_t m, n, k;
  float beta, grad_penalty;
};

// grads += scale * slope(scores), scale = lam * weights per score.
struct AddPenaltyGrad {
  const float* scores;
  float* grads;
  float beta, scale;
  Kind kind;
  const Layout* layout;                    // num_weights == num_scores here
};

// One step of AdamW on scores of weight's shape, and w_eff = weight * m and sum(m) of the new scores (mask_adamw.cpp has
// the formulas); kind sigmoid. All tensors lie alike in storage order.
struct MaskAdamW {
  float* scores;                           // [num]
  void* exp_avg;                           // [num], moment_dtype: float32 or bfloat16
  void* exp_avg_sq;                        // [num], moment_dtype
  const void* grad;                        // [num], grad_dtype: float32, unless it is of w_eff
  const void* weight;                      // [num], weight_dtype; read with w_eff or a gradient of w_eff only
  void* w_eff;                             // [num], w_eff_dtype; null: not wanted, then there are no sums either
  double* partials;                        // one sum of the new mask per kChunk weights (linear_step: per block of rows)
  int64_t num;
  int64_t first;                           // place of the first element in the whole tensor, for rounding.h
  uint32_t step;                           // its number, likewise
  bool is_of_w_eff;                        // grad is the effective weight's gradient, not the scores'
  float grad_penalty;                      // with that: the penalty's
  float beta, next_beta;                   // of the slope, of the new mask
  float penalty_scale;                     // lam * weights per score
  AdamWSettings settings;
  AdamWRates rates;
  Dtype weight_dtype, w_eff_dtype, grad_dtype, moment_dtype;
};

// 16-bit draws for elements of masks [samples, rows, columns]; subnet_kernels/random.py has the definition.
struct RandomBits {
  uint16_t* out;                           // [samples, rows, columns]
  int64_t rows, columns;
  const int64_t* seed;                     // one for all samples (seed_stride 0), or one each (1)
  int64_t seed_stride;
  uint32_t offset;
  uint32_t first_sample;                   // number of the first, where one seed serves all
};

// thresholds = ceil(2^16 * sigmoid(beta * scores) - 1/2), within 16 bits.
struct KeepThresholds {
  const float* scores;                     // [num]
  uint16_t* thresholds;                    // [num]
  int64_t num;
  float beta;
};

// out = weight where draw < threshold, else 0; draws of one sample, key = [seed, step].
struct SampledWeight {
  const void* weight;                      // [rows, columns], weight_dtype
  const uint16_t* thresholds;              // [rows, columns]
  void* out;                               // [rows, columns], out_dtype
  const int64_t* key;
  int64_t rows, columns;
  uint32_t sample;
  Dtype weight_dtype, out_dtype;
};

// grad_scores += grad_w_eff * weight * beta/tau * y(1-y), y = sigmoid((beta*scores + noise[draw]) / tau).
struct SampledGradScores {
  const void* grad_w_eff;                  // [rows, columns], grad_w_eff_dtype
  const void* weight;                      // [rows, columns], weight_dtype
  const float* scores;                     // [rows, columns]
  float* grad_scores;                      // [rows, columns]
  const float* noise;                      // [65536], of each draw; null: none
  const int64_t* key;
  int64_t rows, columns;
  uint32_t sample;
  float beta, tau;
  Dtype grad_w_eff_dtype, weight_dtype;
};

// out = weight where its bit is set, else 0.
struct PackedWeight {
  const void* weight;                      // [num], weight_dtype
  const uint8_t* packed;                   // [ceil(num/8)]
  void* out;                               // [num], out_dtype
  int64_t num;
  Dtype weight_dtype, out_dtype;
};

// packed bit i%8 of byte i//8 = mask[i] != 0; padding bits are zero.
struct PackMask {
  const uint8_t* mask;                     // [num] bytes, 0 or not 0
  uint8_t* packed;                         // [ceil(num/8)]
  int64_t num;
};

struct UnpackMask {
  const uint8_t* packed;                   // [ceil(num/8)]
  uint8_t* mask;                           // [num] bytes, 0 or 1
  int64_t num;
};

}  // namespace subnet
