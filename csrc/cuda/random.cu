// 16-bit draws for mask elements; subnet_kernels/random.py is the definition.
//
//   random_bits_kernel   one thread per group of eight columns: one Philox call, 16 bytes written. seed and offset are
//                        read from the device's memory, so that a captured CUDA graph draws anew at every replay.
#include "../philox.h"
#include "common.cuh"

namespace subnet {
namespace {

__global__ void __launch_bounds__(kThreads) random_bits_kernel(const __grid_constant__ CudaRandomBits p) {
  const uint32_t groups = ((uint32_t)p.columns + 7) / 8;
  const uint32_t at = blockIdx.x * kThreads + threadIdx.x;
  if (at >= p.num_groups) return;
  const uint32_t line = at / groups, group = at % groups;  // line: a row of a sample
  const uint32_t sample = line / (uint32_t)p.rows, row = line % (uint32_t)p.rows;
  const auto seed = (uint64_t)p.seed[sample * p.seed_stride];
  const auto drawn = Philox<ScalarWords>::draw({{row, group, p.seed_stride ? 0 : p.first_sample + sample, (uint32_t)*p.offset}},
                                               (uint32_t)seed, (uint32_t)(seed >> 32));
  uint16_t* out = p.out + (int64_t)line * p.columns + 8 * group;
  const int64_t left = p.columns - 8 * (int64_t)group;
  if (left >= 8 && are_aligned(out)) {
    *reinterpret_cast<uint4*>(out) = uint4{drawn.word[0], drawn.word[1], drawn.word[2], drawn.word[3]};
    return;
  }
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    if (k < left) out[k] = (uint16_t)(drawn.word[k / 2] >> (k % 2 * 16));
  }
}

}  // namespace

const char* launch_random_bits(const CudaRandomBits& params, int device, void* stream) {
  return launch_on(device, [&] {
    enqueue(random_bits_kernel, ((int64_t)params.num_groups + kThreads - 1) / kThreads, params, stream);
  });
}

}  // namespace subnet
