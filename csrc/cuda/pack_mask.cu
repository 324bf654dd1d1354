// Masks at one bit per element and back: bit i%8 of byte i//8 is element i; the last byte is padded with zeros.
//
//   pack_mask_kernel     one thread per byte; reads 8 bytes of mask, writes 1
//   unpack_mask_kernel   one thread per byte; reads 1, writes 8
//   packed_weight_kernel out = weight where its bit is set, else 0. One thread per byte: reads it and eight weights (4 or
//                        2 B/element) once, writes eight (4 or 2 B)
#include "common.cuh"

namespace subnet {
namespace {

__device__ __forceinline__ int64_t byte_of_thread() { return (int64_t)blockIdx.x * kThreads + threadIdx.x; }

__global__ void __launch_bounds__(kThreads) pack_mask_kernel(const __grid_constant__ PackMask p) {
  const int64_t byte = byte_of_thread();
  const int64_t left = p.num - 8 * byte;
  if (left <= 0) return;
  uint64_t eight = 0;
  if (left >= 8 && are_aligned(p.mask)) {
    eight = reinterpret_cast<const uint64_t*>(p.mask)[byte];
  } else {
    for (int k = 0; k < 8 && k < left; ++k) eight |= (uint64_t)p.mask[8 * byte + k] << (8 * k);
  }
  uint32_t packed = 0;
#pragma unroll
  for (int k = 0; k < 8; ++k) packed |= (uint32_t)((eight >> (8 * k) & 0xff) != 0) << k;
  p.packed[byte] = (uint8_t)packed;
}

__global__ void __launch_bounds__(kThreads) unpack_mask_kernel(const __grid_constant__ UnpackMask p) {
  const int64_t byte = byte_of_thread();
  const int64_t left = p.num - 8 * byte;
  if (left <= 0) return;
  const uint32_t packed = p.packed[byte];
  uint64_t eight = 0;
#pragma unroll
  for (int k = 0; k < 8; ++k) eight |= (uint64_t)(packed >> k & 1) << (8 * k);
  if (left >= 8 && are_aligned(p.mask)) {
    reinterpret_cast<uint64_t*>(p.mask)[byte] = eight;
  } else {
    for (int k = 0; k < 8 && k < left; ++k) p.mask[8 * byte + k] = (uint8_t)(eight >> (8 * k));
  }
}

__global__ void __launch_bounds__(kThreads) packed_weight_kernel(const __grid_constant__ PackedWeight p) {
  const int64_t byte = byte_of_thread();
  const int64_t left = p.num - 8 * byte;
  if (left <= 0) return;
  const int count = left < 8 ? (int)left : 8;
  const uint32_t packed = p.packed[byte];
  float w[8];
  load_eight(p.weight, p.weight_dtype, 8 * byte, count, w);
#pragma unroll
  for (int k = 0; k < 8; ++k) w[k] *= packed >> k & 1 ? 1.0f : 0.0f;
  store_eight(p.out, p.out_dtype, 8 * byte, count, to_raw(w, p.out_dtype));
}

int64_t blocks_for(int64_t num) { return ((num + 7) / 8 + kThreads - 1) / kThreads; }

}  // namespace

const char* launch_pack_mask(const PackMask& params, int device, void* stream) {
  return launch_on(device, [&] { enqueue(pack_mask_kernel, blocks_for(params.num), params, stream); });
}

const char* launch_packed_weight(const PackedWeight& params, int device, void* stream) {
  return launch_on(device, [&] { enqueue(packed_weight_kernel, blocks_for(params.num), params, stream); });
}

const char* launch_unpack_mask(const UnpackMask& params, int device, void* stream) {
  return launch_on(device, [&] { enqueue(unpack_mask_kernel, blocks_for(params.num), params, stream); });
}

}  // namespace subnet
