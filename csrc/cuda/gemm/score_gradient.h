// The interface of the score-gradient products: plain C++, so that binding_gemm.cpp needs neither CUDA nor CUTLASS.
#pragma once

#include <cstddef>

#include "../../dtype.h"

namespace subnet {

// grad_scores[n, k] = ((grad_out^T x)[n, k] * weight[n, k] + *grad_penalty) * slope(scores[n, k], *beta), kind sigmoid.
// All tensors are row-major without gaps; n and k are multiples of 8 and addresses of 16 bytes, as TMA and 16-byte
// copies need; m, n and k are at least 1.
struct CudaScoreGradient {
  const void* grad_out;                    // [m, n], dtype
  const void* x;                           // [m, k], dtype
  const void* weight;                      // [n, k], weight_dtype
  const float* scores;                     // [n, k]
  float* grad_scores;                      // [n, k]
  const float* beta;                       // 0-d on the device: read by the kernel, never by the host
  const float* grad_penalty;               // the same; null: 0
  int m, n, k;
};

// A kernel that was compiled. A launch reads nothing back and may be captured in a CUDA graph; it returns null or an
// error in words.
struct ScoreGradientKernel {
  const char* name;                        // sm90_...: needs compute capability 9.0; sm80_...: runs from 8.0 on
  Dtype dtype, weight_dtype;
  size_t (*workspace_bytes)(const CudaScoreGradient&, int device);
  const char* (*launch)(const CudaScoreGradient&, void* workspace, int device, void* stream);
};

// setup.py compiles score_gradient_sm90.cu and _sm80.cu once for each of these.
#define SUBNET_SCORE_GRADIENT_KERNELS(kernel)                                                                  \
  kernel(sm90_bf16_pingpong) kernel(sm90_bf16_wide) kernel(sm90_bf16_stream_k) kernel(sm90_fp16_pingpong)      \
  kernel(sm90_bf16_fp32_pingpong) kernel(sm80_bf16_stream_k) kernel(sm80_fp16_stream_k)                        \
  kernel(sm80_bf16_fp32_stream_k)

#define SUBNET_DECLARE(name) extern const ScoreGradientKernel score_gradient_##name;
SUBNET_SCORE_GRADIENT_KERNELS(SUBNET_DECLARE)
#undef SUBNET_DECLARE

}  // namespace subnet
