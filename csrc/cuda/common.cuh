// What the elementwise kernels share: access to memory, the walk over a block's elements, sums, the launch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../scalar_math.h"
#include "kernels.h"
#include "launch.cuh"

#if CUDART_VERSION < 12010
#error "csrc/cuda needs CUDA 12.1 or newer: kernel arguments of more than 4 KB"
#endif

namespace subnet {

using ScalarMask = Mask<ScalarMath>;

constexpr int kThreads = 256;
constexpr int kVector = 8;  // elements that a thread has at a time: 16 bytes of a 16-bit dtype, twice that of fp32

template <int N>
struct Width {
  static constexpr int value = N;
};

// ---- memory

// N neighbouring elements as they lie in memory, kept so until all loads are on their way. N is kVector or 1.
template <int N>
struct Raw {
  uint32_t word[N];  // fp32: one each; 16 bits: two a word, the lower one first
};

template <int N>
__device__ __forceinline__ Raw<N> load_raw(const void* from, Dtype dtype, int64_t at) {
  const bool is_wide = dtype == Dtype::float32;
  Raw<N> raw;
  if constexpr (N == 1) {
    raw.word[0] = is_wide ? static_cast<const uint32_t*>(from)[at] : static_cast<const uint16_t*>(from)[at];
  } else {
    const uint4* vector = reinterpret_cast<const uint4*>(static_cast<const char*>(from) + (is_wide ? 4 : 2) * at);
    const uint4 both[2] = {vector[0], is_wide ? vector[1] : uint4{}};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      raw.word[4 * i] = both[i].x, raw.word[4 * i + 1] = both[i].y;
      raw.word[4 * i + 2] = both[i].z, raw.word[4 * i + 3] = both[i].w;
    }
  }
  return raw;
}

template <int N>
__device__ __forceinline__ void to_floats(const Raw<N>& raw, Dtype dtype, float (&to)[N]) {
#pragma unroll
  for (int k = 0; k < N; ++k) {
    if (dtype == Dtype::float32) {
      to[k] = __uint_as_float(raw.word[k]);
    } else {
      const uint32_t half = k % 2 == 0 ? raw.word[k / 2] & 0xffffu : raw.word[k / 2] >> 16;
      to[k] = dtype == Dtype::bfloat16 ? __uint_as_float(half << 16) : __half2float(__ushort_as_half((uint16_t)half));
    }
  }
}

template <int N>
__device__ __forceinline__ void load(const void* from, Dtype dtype, int64_t at, float (&to)[N]) {
  to_floats(load_raw<N>(from, dtype, at), dtype, to);
}

template <int N>
__device__ __forceinline__ void store_raw(void* to, Dtype dtype, int64_t at, const Raw<N>& raw) {
  const bool is_wide = dtype == Dtype::float32;
  if constexpr (N == 1) {
    if (is_wide) {
      static_cast<uint32_t*>(to)[at] = raw.word[0];
    } else {
      static_cast<uint16_t*>(to)[at] = (uint16_t)raw.word[0];
    }
  } else {
    uint4* vector = reinterpret_cast<uint4*>(static_cast<char*>(to) + (is_wide ? 4 : 2) * at);
    vector[0] = uint4{raw.word[0], raw.word[1], raw.word[2], raw.word[3]};
    if (is_wide) vector[1] = uint4{raw.word[4], raw.word[5], raw.word[6], raw.word[7]};
  }
}

// 16-bit values, in the low halves of `half`, as they lie in memory.
template <int N>
__device__ __forceinline__ Raw<N> pack_halves(const uint32_t (&half)[N]) {
  Raw<N> raw{};
#pragma unroll
  for (int k = 0; k < N; ++k) raw.word[k / 2] |= half[k] << (k % 2 * 16);
  return raw;
}

// Rounded to the nearest.
template <int N>
__device__ __forceinline__ Raw<N> to_raw(const float (&from)[N], Dtype dtype) {
  if (dtype == Dtype::float32) {
    Raw<N> raw;
#pragma unroll
    for (int k = 0; k < N; ++k) raw.word[k] = __float_as_uint(from[k]);
    return raw;
  }
  uint32_t half[N];
#pragma unroll
  for (int k = 0; k < N; ++k) {
    half[k] = dtype == Dtype::bfloat16 ? __bfloat16_as_ushort(__float2bfloat16_rn(from[k]))
                                       : __half_as_ushort(__float2half_rn(from[k]));
  }
  return pack_halves(half);
}

template <int N>
__device__ __forceinline__ void store(void* to, Dtype dtype, int64_t at, const float (&from)[N]) {
  store_raw(to, dtype, at, to_raw(from, dtype));
}

// The k-th of eight 16-bit values, two a word.
__device__ __forceinline__ uint32_t half_of(const uint32_t* words, int k) {
  return words[k / 2] >> (k % 2 * 16) & 0xffffu;
}

// Whether all of these (null counts as well) begin at a multiple of 16 bytes.
template <class... Pointer>
__device__ __forceinline__ bool are_aligned(const Pointer*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) | ...) & 15) == 0;
}

// Eight neighbours wherever they lie, or the first `count` of them: at once where they can be.
__device__ __forceinline__ bool is_whole(const void* memory, Dtype dtype, int64_t at, int count) {
  return count == 8 && are_aligned(static_cast<const char*>(memory) + (dtype == Dtype::float32 ? 4 : 2) * at);
}

// As they lie in memory; 0 beyond count.
__device__ __forceinline__ Raw<8> load_eight(const void* from, Dtype dtype, int64_t at, int count) {
  if (is_whole(from, dtype, at, count)) return load_raw<8>(from, dtype, at);
  Raw<8> raw{};
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    const uint32_t word = k < count ? load_raw<1>(from, dtype, at + k).word[0] : 0;
    raw.word[dtype == Dtype::float32 ? k : k / 2] |= dtype == Dtype::float32 ? word : word << (k % 2 * 16);
  }
  return raw;
}

__device__ __forceinline__ void load_eight(const void* from, Dtype dtype, int64_t at, int count, float (&to)[8]) {
  to_floats(load_eight(from, dtype, at, count), dtype, to);
}

__device__ __forceinline__ void store_eight(void* to, Dtype dtype, int64_t at, int count, const Raw<8>& raw) {
  if (is_whole(to, dtype, at, count)) return store_raw(to, dtype, at, raw);
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    const Raw<1> one{{dtype == Dtype::float32 ? raw.word[k] : half_of(raw.word, k)}};
    if (k < count) store_raw(to, dtype, at + k, one);
  }
}

// ---- walk

// What a thread block works on: the elements from kCudaBlock*chunk on of a tensor.
struct Place {
  int tensor, chunk;
};

// Thread block `block`'s: of the last run that does not begin after it, see CudaBlocks.
template <int kMost>
__device__ __forceinline__ Place place_of(const CudaBlocks<kMost>& blocks, int block) {
  int tensor = 0;
  for (int step = 64; step > 0; step /= 2) {
    if (tensor + step < blocks.num_tensors && blocks.begin[tensor + step] <= block) tensor += step;
  }
  const int run = blocks.run[tensor], length = blocks.run_length[run], at = block - blocks.begin[run];
  return length == 1 ? Place{run, at} : Place{run + at % length, at / length};
}

// A thread block's share of its tensor: elements [first, first + count).
struct Share {
  int64_t first;
  int count;
};

template <int kMost>
__device__ __forceinline__ Share share_of(const CudaBlocks<kMost>& blocks, const Place& place) {
  const int64_t first = place.chunk * kCudaBlock;
  const int64_t left = blocks.num[place.tensor] - first;
  return {first, (int)(left < kCudaBlock ? left : kCudaBlock)};
}

// body(Width<N>, at) for N elements from `at` on, over all of the share; N = 1 for a rest and where not is_aligned.
template <class Body>
__device__ __forceinline__ void for_each(const Share& share, bool is_aligned, const Body& body) {
  const int vectors = is_aligned ? share.count / kVector : 0;
  for (int i = threadIdx.x; i < vectors; i += kThreads) body(Width<kVector>{}, share.first + kVector * i);
  for (int i = kVector * vectors + threadIdx.x; i < share.count; i += kThreads) body(Width<1>{}, share.first + i);
}

// ---- sums

template <int N>
__device__ __forceinline__ float sum_of(const float (&value)[N]) {
  if constexpr (N == 1) {
    return value[0];
  } else {
    return ((value[0] + value[1]) + (value[2] + value[3])) + ((value[4] + value[5]) + (value[6] + value[7]));
  }
}

// Sum of `value` over the block, in thread 0; the tree is the same every time.
__device__ __forceinline__ double block_sum(double value) {
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

// Sum of a tensor's partials, one a block, in thread 0, in an order that depends on its size only; eight loads are on
// their way at once.
template <int kMost>
__device__ __forceinline__ double sum_of_partials(const CudaBlocks<kMost>& blocks, int tensor, const double* partials) {
  const int run = blocks.run[tensor], length = blocks.run_length[run];
  const int num_chunks = blocks.begin[tensor + 1] - blocks.begin[tensor];
  partials += blocks.begin[run] + tensor - run;
  double sum = 0;
#pragma unroll 8
  for (int chunk = threadIdx.x; chunk < num_chunks; chunk += kThreads) sum += partials[(int64_t)chunk * length];
  return block_sum(sum);
}

// ---- launch

// One launch of a kernel whose argument is `params`; none for a grid of no blocks.
template <class Params>
void enqueue(void (*kernel)(Params), int64_t num_blocks, const Params& params, void* stream) {
  if (num_blocks == 0) return;
  void* arguments[] = {const_cast<Params*>(&params)};
  cudaLaunchKernel(kernel, dim3((unsigned)num_blocks), dim3(kThreads), arguments, 0, static_cast<cudaStream_t>(stream));
}

}  // namespace subnet
