// What every launch of this folder needs, CUTLASS's too.
#pragma once

#include <cuda_runtime.h>

namespace subnet {

// Makes `device` the current one while `body` enqueues. Returns null or CUDA's error text.
template <class Body>
const char* launch_on(int device, const Body& body) {
  int previous = device;
  cudaError_t error = cudaGetDevice(&previous);
  if (error == cudaSuccess && previous != device) error = cudaSetDevice(device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  body();
  error = cudaGetLastError();
  if (previous != device) cudaSetDevice(previous);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace subnet
