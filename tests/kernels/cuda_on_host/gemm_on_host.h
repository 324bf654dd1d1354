// Stands in for the kernels on CUTLASS, so that their binding runs on the host: plain loops over their interface, with
// their own epilogue.
#pragma once

#include <string.h>

#include "cuda/common.cuh"
#include "cuda/gemm/score_gradient.h"
#include "cuda/gemm/score_gradient_epilogue.h"

namespace subnet {

constexpr size_t kGemmWorkspace = 40;

template <int kDtype, int kWeightDtype>
const char* launch_gemm_on_host(const CudaScoreGradient& p, void* workspace, int, void*) {
  memset(workspace, 0xff, kGemmWorkspace);
  const auto at = [](const void* from, int dtype, int64_t i) {
    float value[1];
    load(from, static_cast<Dtype>(dtype), i, value);
    return value[0];
  };
  for (int64_t n = 0; n < p.n; ++n) {
    for (int64_t k = 0; k < p.k; ++k) {
      float sum = 0;
      for (int64_t m = 0; m < p.m; ++m) sum += at(p.grad_out, kDtype, m * p.n + n) * at(p.x, kDtype, m * p.k + k);
      const float penalty = p.grad_penalty == nullptr ? 0.0f : *p.grad_penalty;
      const int64_t i = n * p.k + k;
      p.grad_scores[i] =
          ScoreGradientEpilogue<float>{}(sum, at(p.weight, kWeightDtype, i), p.scores[i], *p.beta, penalty);
    }
  }
  return nullptr;
}

inline size_t gemm_workspace_on_host(const CudaScoreGradient&, int) { return kGemmWorkspace; }

// The dtypes stand in the name: sm90_bf16_fp32_wide has bf16 factors and an fp32 weight.
constexpr bool names(const char* name, const char* part) {
  for (; *name != 0; ++name) {
    int i = 0;
    while (part[i] != 0 && name[i] == part[i]) ++i;
    if (part[i] == 0) return true;
  }
  return false;
}
constexpr Dtype factor_dtype(const char* name) { return names(name, "fp16") ? Dtype::float16 : Dtype::bfloat16; }
constexpr Dtype weight_dtype(const char* name) { return names(name, "fp32") ? Dtype::float32 : factor_dtype(name); }

#define SUBNET_ON_HOST(name)                                                                           \
  const ScoreGradientKernel score_gradient_##name{                                                     \
      #name, factor_dtype(#name), weight_dtype(#name), gemm_workspace_on_host,                         \
      launch_gemm_on_host<(int)factor_dtype(#name), (int)weight_dtype(#name)>};
SUBNET_SCORE_GRADIENT_KERNELS(SUBNET_ON_HOST)
#undef SUBNET_ON_HOST

}  // namespace subnet
