// Chooses the CPU kernels by what the processor (and the operating system, for wide registers) supports.
#include <atomic>
#include <cstring>

#include "kernels.h"

namespace subnet {
namespace {

#define SUBNET_TABLE(capability, fused_linear_rows)                                                                  \
  {                                                                                                                  \
    #capability, fused_linear_rows, capability::effective_weight_flat, capability::effective_weight_mask,            \
        capability::effective_weight_rows, capability::grad_scores_flat, capability::grad_scores_reduce,             \
        capability::grad_scores_finish, capability::masked_linear_pack, capability::masked_linear,                   \
        capability::linear_grad_scores_pack, capability::linear_grad_scores, capability::linear_step,                \
        capability::add_penalty_grad, capability::mask_adamw, capability::random_bits, capability::keep_thresholds,  \
        capability::sampled_weight, capability::sampled_grad_scores, capability::packed_weight,                      \
        capability::pack_mask, capability::unpack_mask                                                               \
  }

// Best first.
const CpuKernels kTables[] = {
#if defined(SUBNET_X86)
    SUBNET_TABLE(avx512, kLinearMostRows),
    SUBNET_TABLE(avx2, 16),
#endif
    SUBNET_TABLE(portable, 0),
};

bool is_supported(const char* name) {
#if defined(SUBNET_X86)
  __builtin_cpu_init();
  if (std::strcmp(name, "avx512") == 0) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }
  if (std::strcmp(name, "avx2") == 0) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }
#endif
  return std::strcmp(name, "portable") == 0;
}

std::atomic<const CpuKernels*> chosen{nullptr};

}  // namespace

const CpuKernels& cpu_kernels() {
  const CpuKernels* kernels = chosen.load(std::memory_order_acquire);
  if (kernels == nullptr) {
    kernels = kTables;
    while (!is_supported(kernels->name)) ++kernels;  // the last one always is
    chosen.store(kernels, std::memory_order_release);
  }
  return *kernels;
}

bool force_cpu_kernels(const char* name) {
  for (const CpuKernels& kernels : kTables) {
    if (std::strcmp(kernels.name, name) == 0 && is_supported(name)) {
      chosen.store(&kernels, std::memory_order_release);
      return true;
    }
  }
  return false;
}

}  // namespace subnet
