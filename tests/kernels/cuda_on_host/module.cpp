// The GPU's bindings and kernels as a module for CPU tensors: torch.ops.subnet_on_host.
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include "binding_cuda.cpp"
#include "cuda/add_penalty_grad.cu"
#include "cuda/effective_weight.cu"
#include "cuda/grad_scores.cu"
#include "cuda/mask_adamw.cu"
#include "cuda/pack_mask.cu"

STABLE_TORCH_LIBRARY(subnet_on_host, m) {  // those of binding.cpp
  m.def("effective_weight(Tensor weight, Tensor scores, Tensor beta, int kind, Tensor(a!) w_eff, Tensor(b!) penalty)"
        " -> ()");
  m.def("effective_weights(Tensor[] weights, Tensor[] scores, Tensor beta, int kind, Tensor(a!)[] w_eff,"
        " Tensor(b!) penalties) -> ()");
  m.def("grad_scores(Tensor? grad_w_eff, Tensor? grad_penalty, Tensor weight, Tensor scores, Tensor beta, int kind,"
        " Tensor(a!) grad_scores, Tensor(b!)? grad_weight) -> ()");
  m.def("pack_mask(Tensor mask) -> Tensor");
  m.def("unpack_mask(Tensor packed, int num) -> Tensor");
}

PyMODINIT_FUNC PyInit_cuda_on_host(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "cuda_on_host", nullptr, -1, nullptr, nullptr, nullptr, nullptr,
                               nullptr};
  return PyModule_Create(&module);
}
