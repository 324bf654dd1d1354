// What both score-gradient products share: the names of their dtypes, and how a compiled kernel becomes a
// ScoreGradientKernel.
#pragma once

#include "../launch.cuh"
#include "score_gradient.h"
#include "score_gradient_epilogue.h"

#if !defined(NDEBUG)
#error "compile with -DNDEBUG: an assert is a call, around which ptxas serialises the wgmma instructions (C7510)"
#endif

namespace subnet {

using bf16 = cutlass::bfloat16_t;
using fp16 = cutlass::half_t;
using fp32 = float;

inline constexpr Dtype dtype_of(bf16) { return Dtype::bfloat16; }
inline constexpr Dtype dtype_of(fp16) { return Dtype::float16; }
inline constexpr Dtype dtype_of(fp32) { return Dtype::float32; }

template <class Gemm, class Product>
struct ScoreGradientLaunch {
  static size_t workspace_bytes(const CudaScoreGradient& params, int device) {
    size_t bytes = 0;
    launch_on(device, [&] { bytes = Gemm::get_workspace_size(Product::arguments(params)); });
    return bytes;
  }

  static const char* launch(const CudaScoreGradient& params, void* workspace, int device, void* stream) {
    cutlass::Status status = cutlass::Status::kSuccess;
    const char* error = launch_on(device, [&] {
      const auto args = Product::arguments(params);
      status = Gemm::can_implement(args);
      Gemm gemm;
      if (status == cutlass::Status::kSuccess) status = gemm(args, workspace, static_cast<cudaStream_t>(stream));
    });
    if (error != nullptr) return error;
    return status == cutlass::Status::kSuccess ? nullptr : cutlass::cutlassGetStatusString(status);
  }
};

}  // namespace subnet

// Defines the kernel that setup.py asked for by SUBNET_KERNEL (its name), SUBNET_DTYPE, SUBNET_WEIGHT_DTYPE and
// SUBNET_TILE; `arch` is the namespace of this source. The struct names the device function, for a disassembly.
#define SUBNET_PASTE_(a, b) a##b
#define SUBNET_PASTE(a, b) SUBNET_PASTE_(a, b)
#define SUBNET_TEXT_(text) #text
#define SUBNET_TEXT(text) SUBNET_TEXT_(text)
#define SUBNET_NAME SUBNET_PASTE(score_gradient_, SUBNET_KERNEL)
#define SUBNET_DEFINE_SCORE_GRADIENT(arch)                                                                         \
  namespace subnet {                                                                                               \
  using Product = arch::ScoreGradient<SUBNET_DTYPE, SUBNET_WEIGHT_DTYPE, arch::SUBNET_TILE>;                       \
  namespace kernels {                                                                                              \
  struct SUBNET_NAME : Product::Kernel {};                                                                         \
  }                                                                                                                \
  using Launch = ScoreGradientLaunch<cutlass::gemm::device::GemmUniversalAdapter<kernels::SUBNET_NAME>, Product>;  \
  const ScoreGradientKernel SUBNET_NAME{SUBNET_TEXT(SUBNET_KERNEL), dtype_of(SUBNET_DTYPE{}),                      \
                                        dtype_of(SUBNET_WEIGHT_DTYPE{}), Launch::workspace_bytes, Launch::launch}; \
  }
