// The GPU's bindings and kernels as ops of CPU tensors: torch.ops.subnet_on_host.
#include "binding_cuda.cpp"
#include "binding_gemm.cpp"
#include "cuda/add_penalty_grad.cu"
#include "cuda/effective_weight.cu"
#include "cuda/grad_scores.cu"
#include "cuda/mask_adamw.cu"
#include "cuda/masked_linear.cu"
#include "cuda/pack_mask.cu"
#include "cuda/random.cu"
#include "cuda/sampled.cu"
#include "gemm_on_host.h"

STABLE_TORCH_LIBRARY(subnet_on_host, m) {  // those of binding.cpp
  m.def("effective_weight(Tensor weight, Tensor scores, Tensor beta, int kind, Tensor(a!) w_eff, Tensor(b!) penalty)"
        " -> ()");
  m.def("effective_weights(Tensor[] weights, Tensor[] scores, Tensor beta, int kind, Tensor(a!)[] w_eff,"
        " Tensor(b!) penalties) -> ()");
  m.def("grad_scores(Tensor? grad_w_eff, Tensor? grad_penalty, Tensor weight, Tensor scores, Tensor beta, int kind,"
        " Tensor(a!) grad_scores, Tensor(b!)? grad_weight) -> ()");
  m.def("grad_scores_of_many(Tensor[] grad_w_effs, Tensor[] grad_penalties, Tensor[] weights, Tensor[] scores,"
        " Tensor beta, int kind, Tensor(a!)[] grad_scores) -> ()");
  m.def("random_bits(Tensor seed, Tensor offset, int first_sample, Tensor(a!) out) -> ()");
  m.def("keep_thresholds(Tensor scores, Tensor beta, Tensor(a!) out) -> ()");
  m.def("pack_mask(Tensor mask) -> Tensor");
  m.def("packed_weight(Tensor weight, Tensor packed, Tensor(a!) out) -> ()");
  m.def("unpack_mask(Tensor packed, int num) -> Tensor");
}
