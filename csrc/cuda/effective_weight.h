// Interface of effective_weight.cu: plain C++, so that binding.cpp needs no CUDA header.
#pragma once

#include "../params.h"

namespace subnet {

constexpr int kCudaTensors = 96;          // per launch: the table travels as a kernel argument (4 KB at most)
constexpr int64_t kCudaBlock = 8192;      // weights per thread block; fixed, so sums depend on sizes only

// One layer each, all in storage order; scores have the weight's strides.
struct CudaEffectiveWeights {
  const void* weight[kCudaTensors];       // [num], weight_dtype
  const float* scores[kCudaTensors];      // [num]
  void* w_eff[kCudaTensors];              // [num], w_eff_dtype
  int64_t num[kCudaTensors];
  int32_t block_begin[kCudaTensors + 1];  // first thread block of each layer; the last entry is the grid's size
  uint8_t weight_dtype[kCudaTensors], w_eff_dtype[kCudaTensors];
  int num_tensors;
  const float* beta;                      // 0-d on the device: read by the kernel, never by the host
  double* partials;                       // [block_begin[num_tensors]] workspace
  float* penalties;                       // [num_tensors], stride penalty_stride
  int64_t penalty_stride;
};

// Enqueues both kernels on `stream` of `device`. Returns null or CUDA's error text.
const char* launch_effective_weights(const CudaEffectiveWeights& params, Kind kind, int device, void* stream);

}  // namespace subnet
