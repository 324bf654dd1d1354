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
