// What the GPU's bindings share: the device of a call, its stream, workspace.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "binding_checks.h"

#if defined(SUBNET_CUDA_ON_HOST)  // a test compiles all this for the host, over CPU tensors
#define SUBNET_GPU_OPS subnet_on_host
#define SUBNET_GPU_KEY CPU
#else
#define SUBNET_GPU_OPS subnet_native
#define SUBNET_GPU_KEY CUDA
#endif

// Weak, so that this file also loads into a CPU build of PyTorch, which has no such function.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace {

inline int32_t gpu() {
#if defined(SUBNET_CUDA_ON_HOST)
  return aoti_torch_device_type_cpu();
#else
  return aoti_torch_device_type_cuda();
#endif
}

// The op that runs and the GPU that all of its tensors must be on.
struct OnGpu {
  const char* op;
  int32_t device;

  OnGpu(const char* op, const Tensor& like) : op(op), device(like.get_device_index()) {}

  void check(const char* name, const Tensor& tensor) const {
    int32_t type;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
    STD_TORCH_CHECK(type == gpu() && tensor.get_device_index() == device, op, ": ", name,
                    " must be on the same device as the other tensors");
  }
  View view(const char* name, const Tensor& tensor) const {
    check(name, tensor);
    return view_of(op, name, tensor, gpu());
  }
  View floats(const char* name, const Tensor& tensor) const {
    check(name, tensor);
    return view_of_float32(op, name, tensor, gpu());
  }
  float* scalar(const char* name, const Tensor& tensor) const {
    check(name, tensor);
    return scalar_of(op, name, tensor, gpu());
  }
  // A matrix [rows, columns] that a product can read: row-major without gaps, on 16 bytes.
  View matrix(const char* name, const Tensor& tensor, int64_t rows, int64_t columns, Dtype dtype) const {
    static const char* const kNames[] = {"float32", "bfloat16", "float16"};
    const View found = view(name, tensor);
    STD_TORCH_CHECK(found.ndim == 2 && found.size[0] == rows && found.size[1] == columns && tensor.is_contiguous() &&
                        found.dtype == dtype && reinterpret_cast<uintptr_t>(found.data) % 16 == 0,
                    op, ": ", name, " must be contiguous with shape [", rows, ", ", columns, "] and dtype ",
                    kNames[(int)dtype], " at a multiple of 16 bytes, got shape ", text(found.ndim, found.size),
                    ", strides ", text(found.ndim, found.stride), " and dtype ", kNames[(int)found.dtype]);
    return found;
  }
  // Doubles; they live as long as the tensor that is returned, and the memory is not given to another stream.
  Tensor workspace(const Tensor& like, int64_t num_doubles) const {
    return torch::stable::new_empty(like, {2 * std::max<int64_t>(num_doubles, 1)},
                                    torch::headeronly::ScalarType::Float);
  }
  void* stream() const {
    void* stream = nullptr;
#if !defined(SUBNET_CUDA_ON_HOST)
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
#endif
    return stream;
  }
  // launch(device, stream) returns null or an error text.
  template <class Launch>
  void run(const Launch& launch) const {
    const char* error = launch(device, stream());
    STD_TORCH_CHECK(error == nullptr, op, ": CUDA refused the launch: ", error);
  }
};

}  // namespace
