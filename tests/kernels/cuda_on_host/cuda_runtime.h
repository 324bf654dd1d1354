// Stands in for CUDA's header of that name, so that a C++ compiler makes host functions of csrc/cuda: a launch runs block
// after block, each thread of a block on a stack of its own, from barrier to barrier. Threads of a block must meet at
// the same barriers, and a block's thread may not end before the others' last one; anything else aborts.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static
#define CUDART_VERSION 13000

struct uint4 {
  uint32_t x, y, z, w;
};

struct dim3 {
  unsigned x;
  explicit dim3(unsigned x) : x(x) {}
};

struct CudaIndex {
  unsigned x;
};
inline CudaIndex threadIdx, blockIdx;

// ---- threads of a block

struct CudaThread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 17);
  int barrier = 0;  // which kind it waits at; 0: it has ended
};

struct CudaBlock {
  std::vector<CudaThread> threads;
  ucontext_t scheduler;
  void (*body)(void*);
  void* argument;
};
inline CudaBlock cuda_block;

inline void cuda_thread_entry() {
  cuda_block.body(cuda_block.argument);
  cuda_block.threads[threadIdx.x].barrier = 0;
}

inline void cuda_wait_at(int barrier) {
  CudaThread& thread = cuda_block.threads[threadIdx.x];
  thread.barrier = barrier;
  swapcontext(&thread.context, &cuda_block.scheduler);
}

inline void cuda_run_block(unsigned num_threads, void (*body)(void*), void* argument) {
  if (cuda_block.threads.size() < num_threads) cuda_block.threads.resize(num_threads);
  cuda_block.body = body, cuda_block.argument = argument;
  for (unsigned i = 0; i < num_threads; ++i) {
    CudaThread& thread = cuda_block.threads[i];
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    thread.context.uc_link = &cuda_block.scheduler;
    makecontext(&thread.context, cuda_thread_entry, 0);
  }
  for (int barrier = 1; barrier != 0;) {
    for (unsigned i = 0; i < num_threads; ++i) {
      threadIdx.x = i;
      swapcontext(&cuda_block.scheduler, &cuda_block.threads[i].context);
      if (i == 0) barrier = cuda_block.threads[0].barrier;
      if (cuda_block.threads[i].barrier != barrier) {
        fprintf(stderr, "thread %u of block %u missed the barrier that thread 0 is at\n", i, blockIdx.x);
        abort();
      }
    }
  }
}

inline void __syncthreads() { cuda_wait_at(1); }

template <class T>
T __shfl_down_sync(unsigned, T value, unsigned offset) {
  static T slots[1024];
  slots[threadIdx.x] = value;
  cuda_wait_at(2);
  const T taken = threadIdx.x % 32 + offset < 32 ? slots[threadIdx.x + offset] : value;
  cuda_wait_at(3);  // read by all before the next one is written
  return taken;
}

// ---- runtime

typedef int cudaError_t;
typedef void* cudaStream_t;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetDevice(int*) { return cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "none"; }

template <class Params>
cudaError_t cudaLaunchKernel(void (*kernel)(Params), dim3 grid, dim3 block, void** arguments, size_t, cudaStream_t) {
  struct Call {
    void (*kernel)(Params);
    const Params* params;
  } call{kernel, static_cast<const Params*>(arguments[0])};
  for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
    cuda_run_block(block.x, [](void* at) { static_cast<Call*>(at)->kernel(*static_cast<Call*>(at)->params); }, &call);
  }
  return cudaSuccess;
}

// ---- conversions

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

inline float __uint_as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// ---- tensor cores

// d += a b of a warp's fragments: row-major a [16, 16], column-major b [16, 8], fp32 d [16, 8]; g = lane/4, t = lane%4.
//   a[0..3]  rows g, g + 8, g, g + 8; columns 2t and 2t + 1, of the last two 8 further
//   b0, b1   column g; rows 2t and 2t + 1, of b1 8 further      d[0..3]  rows g, g, g + 8, g + 8; columns 2t, 2t + 1 twice
// Source: PTX ISA 9.0, 9.7.14.5.8, matrix fragments for mma.m16n8k16 with 16-bit types.
inline float cuda_half_to_float(uint16_t bits, bool is_bf16) {
  if (is_bf16) return __uint_as_float((uint32_t)bits << 16);
  _Float16 value;
  memcpy(&value, &bits, 2);
  return (float)value;
}

inline void cuda_mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool is_bf16) {
  static uint32_t left[1024][4], right[1024][2];
  const unsigned first = threadIdx.x / 32 * 32, group = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
  for (int i = 0; i < 4; ++i) left[threadIdx.x][i] = a[i];
  right[threadIdx.x][0] = b0, right[threadIdx.x][1] = b1;
  cuda_wait_at(4);
  const auto half = [&](uint32_t word, unsigned k) {
    return cuda_half_to_float((uint16_t)(word >> k % 2 * 16), is_bf16);
  };
  for (int i = 0; i < 4; ++i) {
    const unsigned row = group + i / 2 * 8, column = 2 * quad + i % 2;
    float sum = 0;
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned lane_of_k = k % 8 / 2;
      sum += half(left[first + row % 8 * 4 + lane_of_k][row / 8 + k / 8 * 2], k) *
             half(right[first + column * 4 + lane_of_k][k / 8], k);
    }
    d[i] += sum;
  }
  cuda_wait_at(5);
}
