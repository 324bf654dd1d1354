// The table of CPU kernels of one capability. Kernels work on a range, so that the caller owns the threads.
#pragma once

#include "../params.h"

namespace subnet {

struct CpuKernels {
  const char* name;
  int64_t fused_linear_rows;  // up to so many rows of x, masked_linear and linear_grad_scores beat a BLAS after a pass
  // Flat: weights [chunk_begin*kChunk, chunk_end*kChunk) of w_eff, and their partial sums.
  void (*effective_weight_flat)(const EffectiveWeight&, int64_t chunk_begin, int64_t chunk_end);
  // Not flat, first: mask positions [chunk_begin*kChunk, ...) of `mask`, and their partial sums.
  void (*effective_weight_mask)(const EffectiveWeight&, int64_t chunk_begin, int64_t chunk_end);
  // Not flat, second: rows of the loop (row = one walk of its innermost dimension).
  void (*effective_weight_rows)(const EffectiveWeight&, int64_t row_begin, int64_t row_end);
  // Flat: elements [begin, end).
  void (*grad_scores_flat)(const GradScores&, int64_t begin, int64_t end);
  // Not flat: sums of grad_w_eff*weight per score, for parts [part_begin, part_end) of the outermost loop dimension.
  void (*grad_scores_reduce)(const GradScores&, int64_t part_begin, int64_t part_end);
  // Not flat: gradients of the mask positions [begin, end) from the sums.
  void (*grad_scores_finish)(const GradScores&, int64_t begin, int64_t end);
  // Few rows of x, a product fused with the pass over its weight. `pack` comes first and fills p.packed for steps
  // [begin, end) of k (forward) or m (backward); then blocks of kLinearBlock rows of weight.
  void (*masked_linear_pack)(const MaskedLinear&, int64_t begin, int64_t end);
  void (*masked_linear)(const MaskedLinear&, int64_t block_begin, int64_t block_end);
  void (*linear_grad_scores_pack)(const LinearGradScores&, int64_t begin, int64_t end);
  void (*linear_grad_scores)(const LinearGradScores&, int64_t block_begin, int64_t block_end);
  void (*linear_step)(const LinearGradScores&, const MaskAdamW&, int64_t block_begin, int64_t block_end);
  // Mask positions [begin, end).
  void (*add_penalty_grad)(const AddPenaltyGrad&, int64_t begin, int64_t end);
  // Chunks [chunk_begin, chunk_end) of kChunk weights, and their partial sums.
  void (*mask_adamw)(const MaskAdamW&, int64_t chunk_begin, int64_t chunk_end);
  // Groups [begin, end) of eight columns, over all rows of all samples.
  void (*random_bits)(const RandomBits&, int64_t group_begin, int64_t group_end);
  // Elements [begin, end).
  void (*keep_thresholds)(const KeepThresholds&, int64_t begin, int64_t end);
  // Groups [begin, end) of eight columns, over all rows.
  void (*sampled_weight)(const SampledWeight&, int64_t group_begin, int64_t group_end);
  void (*sampled_grad_scores)(const SampledGradScores&, int64_t group_begin, int64_t group_end);
  // Bytes [begin, end) of the packed mask.
  void (*packed_weight)(const PackedWeight&, int64_t begin, int64_t end);
  void (*pack_mask)(const PackMask&, int64_t begin, int64_t end);
  void (*unpack_mask)(const UnpackMask&, int64_t begin, int64_t end);
};

#define SUBNET_DECLARE_CAPABILITY(capability)                                       \
  namespace capability {                                                            \
  void effective_weight_flat(const EffectiveWeight&, int64_t, int64_t);             \
  void effective_weight_mask(const EffectiveWeight&, int64_t, int64_t);             \
  void effective_weight_rows(const EffectiveWeight&, int64_t, int64_t);             \
  void grad_scores_flat(const GradScores&, int64_t, int64_t);                       \
  void grad_scores_reduce(const GradScores&, int64_t, int64_t);                     \
  void grad_scores_finish(const GradScores&, int64_t, int64_t);                     \
  void masked_linear_pack(const MaskedLinear&, int64_t, int64_t);                   \
  void masked_linear(const MaskedLinear&, int64_t, int64_t);                        \
  void linear_grad_scores_pack(const LinearGradScores&, int64_t, int64_t);          \
  void linear_grad_scores(const LinearGradScores&, int64_t, int64_t);               \
  void linear_step(const LinearGradScores&, const MaskAdamW&, int64_t, int64_t);    \
  void add_penalty_grad(const AddPenaltyGrad&, int64_t, int64_t);                   \
  void mask_adamw(const MaskAdamW&, int64_t, int64_t);                              \
  void random_bits(const RandomBits&, int64_t, int64_t);                            \
  void keep_thresholds(const KeepThresholds&, int64_t, int64_t);                    \
  void sampled_weight(const SampledWeight&, int64_t, int64_t);                      \
  void sampled_grad_scores(const SampledGradScores&, int64_t, int64_t);             \
  void packed_weight(const PackedWeight&, int64_t, int64_t);                        \
  void pack_mask(const PackMask&, int64_t, int64_t);                                \
  void unpack_mask(const UnpackMask&, int64_t, int64_t);                            \
  }

SUBNET_DECLARE_CAPABILITY(portable)
#if defined(SUBNET_X86)
SUBNET_DECLARE_CAPABILITY(avx2)
SUBNET_DECLARE_CAPABILITY(avx512)
#endif

// Floats of workspace for a packed matrix of that many columns and steps, whatever the capability.
inline int64_t linear_packed_size(int64_t columns, int64_t steps) { return (columns + 15) / 16 * 16 * steps; }

// The best kernels that this processor runs, unless force_cpu_kernels chose others.
const CpuKernels& cpu_kernels();
// False if `name` is not a capability that this build has and this processor runs; then nothing changes.
bool force_cpu_kernels(const char* name);

}  // namespace subnet
