// w_eff = weight * m(beta*scores) for many layers in one launch, and sum(m) of each.
//
//   effective_weights_kernel   grid: sum over layers of ceil(num/8192) blocks of 256 threads; a block serves one layer.
//                              Reads weight (4 or 2 B/element) and scores (4 B) once, writes w_eff (4 or 2 B) once and
//                              one double per block. fp32 arithmetic, exact exp; 4 elements per thread and turn.
//   sum_partials_kernel        grid: one block of 256 threads per layer; adds that layer's partials in a fixed order.
//
// m is summed in fp32 over groups of 4, in double beyond, in an order that depends on sizes only: runs are bit-identical.
// Nothing is read back to the host, so the launch can be captured in a CUDA graph.
// Idea of the table of pointers as a kernel argument: the multi-tensor kernels of NVIDIA's Apex.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "effective_weight.h"

namespace subnet {
namespace {

constexpr int kThreads = 256;

struct ScalarMath {
  using Float = float;
  static SUBNET_INLINE float absolute(float z) { return fabsf(z); }
  static SUBNET_INLINE float exp_minus(float a) { return a > kNegligible ? 0.0f : expf(-a); }
  static SUBNET_INLINE float reciprocal_1p(float e) { return 1.0f / (1.0f + e); }
  static SUBNET_INLINE float where_nonnegative(float z, float a, float b) { return z >= 0.0f ? a : b; }
  static SUBNET_INLINE float where_positive(float z, float a, float b) { return z > 0.0f ? a : b; }
};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ void from_float(float& to, float value) { to = value; }
__device__ __forceinline__ void from_float(__nv_bfloat16& to, float value) { to = __float2bfloat16_rn(value); }
__device__ __forceinline__ void from_float(__half& to, float value) { to = __float2half_rn(value); }

template <class T>
struct alignas(4 * sizeof(T)) Four {
  T at[4];
};

// Sum of `value` over the block, in thread 0; the tree is the same every time.
__device__ double block_sum(double value) {
  __shared__ double warp_sums[kThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
  __syncthreads();
  double sum = 0;
  if (threadIdx.x == 0) {
    for (int warp = 0; warp < kThreads / 32; ++warp) sum += warp_sums[warp];
  }
  return sum;
}

// One thread's share of [0, count); returns its sum of m.
template <Kind kind, class W, class O>
__device__ double scale_by_mask(const W* weight, const float* scores, float beta, O* w_eff, int count) {
  const auto address = reinterpret_cast<uintptr_t>(weight) % sizeof(Four<W>) |
                       reinterpret_cast<uintptr_t>(scores) % sizeof(Four<float>) |
                       reinterpret_cast<uintptr_t>(w_eff) % sizeof(Four<O>);
  const int vectors = address == 0 ? count / 4 : 0;
  double sum = 0;
#pragma unroll 4
  for (int i = threadIdx.x; i < vectors; i += kThreads) {
    const Four<W> w = reinterpret_cast<const Four<W>*>(weight)[i];
    const Four<float> s = reinterpret_cast<const Four<float>*>(scores)[i];
    Four<O> out;
    float mask[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      mask[k] = Mask<ScalarMath>::value<kind>(s.at[k], beta);
      from_float(out.at[k], to_float(w.at[k]) * mask[k]);
    }
    reinterpret_cast<Four<O>*>(w_eff)[i] = out;
    sum += (mask[0] + mask[1]) + (mask[2] + mask[3]);
  }
  for (int i = 4 * vectors + threadIdx.x; i < count; i += kThreads) {
    const float mask = Mask<ScalarMath>::value<kind>(scores[i], beta);
    from_float(w_eff[i], to_float(weight[i]) * mask);
    sum += mask;
  }
  return sum;
}

template <Kind kind, class W>
__device__ double scale_by_mask(const CudaEffectiveWeights& p, int tensor, int64_t begin, int count) {
  const W* weight = static_cast<const W*>(p.weight[tensor]) + begin;
  const float* scores = p.scores[tensor] + begin;
  const float beta = *p.beta;
  switch (static_cast<Dtype>(p.w_eff_dtype[tensor])) {
    case Dtype::float32:
      return scale_by_mask<kind>(weight, scores, beta, static_cast<float*>(p.w_eff[tensor]) + begin, count);
    case Dtype::bfloat16:
      return scale_by_mask<kind>(weight, scores, beta, static_cast<__nv_bfloat16*>(p.w_eff[tensor]) + begin, count);
    default:
      return scale_by_mask<kind>(weight, scores, beta, static_cast<__half*>(p.w_eff[tensor]) + begin, count);
  }
}

template <Kind kind>
__global__ void __launch_bounds__(kThreads) effective_weights_kernel(const __grid_constant__ CudaEffectiveWeights p) {
  int tensor = 0;  // the last one whose first block is not after this block
  for (int step = 64; step > 0; step /= 2) {
    if (tensor + step < p.num_tensors && p.block_begin[tensor + step] <= (int)blockIdx.x) tensor += step;
  }
  const int64_t begin = (int64_t)(blockIdx.x - p.block_begin[tensor]) * kCudaBlock;
  const int64_t left = p.num[tensor] - begin;
  const int count = (int)(left < kCudaBlock ? left : kCudaBlock);
  double sum;
  switch (static_cast<Dtype>(p.weight_dtype[tensor])) {
    case Dtype::float32: sum = scale_by_mask<kind, float>(p, tensor, begin, count); break;
    case Dtype::bfloat16: sum = scale_by_mask<kind, __nv_bfloat16>(p, tensor, begin, count); break;
    default: sum = scale_by_mask<kind, __half>(p, tensor, begin, count); break;
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) p.partials[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads) sum_partials_kernel(const __grid_constant__ CudaEffectiveWeights p) {
  double sum = 0;
  for (int i = p.block_begin[blockIdx.x] + threadIdx.x; i < p.block_begin[blockIdx.x + 1]; i += kThreads) {
    sum += p.partials[i];
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) p.penalties[blockIdx.x * p.penalty_stride] = (float)sum;
}

static_assert(sizeof(CudaEffectiveWeights) <= 4096, "a kernel argument holds 4 KB");
static_assert(kCudaTensors <= 128, "effective_weights_kernel searches 7 bits");

}  // namespace

const char* launch_effective_weights(const CudaEffectiveWeights& params, Kind kind, int device, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  int previous = device;
  cudaError_t error = cudaGetDevice(&previous);
  if (error == cudaSuccess && previous != device) error = cudaSetDevice(device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const int num_blocks = params.block_begin[params.num_tensors];
  if (num_blocks > 0) {
    if (kind == Kind::hard) {
      effective_weights_kernel<Kind::hard><<<num_blocks, kThreads, 0, cuda_stream>>>(params);
    } else {
      effective_weights_kernel<Kind::sigmoid><<<num_blocks, kThreads, 0, cuda_stream>>>(params);
    }
  }
  sum_partials_kernel<<<params.num_tensors, kThreads, 0, cuda_stream>>>(params);
  error = cudaGetLastError();
  if (previous != device) cudaSetDevice(previous);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace subnet
