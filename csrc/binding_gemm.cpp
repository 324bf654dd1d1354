// The CUTLASS products' side of PyTorch (cuda/gemm/): checks arguments, owns workspace, launches.
#include <limits>
#include <optional>
#include <string>

#include "binding_cuda.h"
#include "cuda/gemm/score_gradient.h"

namespace {

const subnet::ScoreGradientKernel* const kScoreGradients[] = {
#define SUBNET_ADDRESS(name) &subnet::score_gradient_##name,
    SUBNET_SCORE_GRADIENT_KERNELS(SUBNET_ADDRESS)
#undef SUBNET_ADDRESS
};

// The kernels' names, with a space between.
std::string score_gradient_kernels() {
  std::string names;
  for (const auto* kernel : kScoreGradients) names += (names.empty() ? "" : " ") + std::string(kernel->name);
  return names;
}

// A matrix [rows, columns] that the products can read: row-major, without gaps, on 16 bytes.
View matrix(const OnGpu& on, const char* name, const Tensor& tensor, int64_t rows, int64_t columns, Dtype dtype) {
  const View view = on.view(name, tensor);
  STD_TORCH_CHECK(view.dtype == dtype, on.op, ": ", name, " must have the kernel's dtype");
  STD_TORCH_CHECK(view.ndim == 2 && view.size[0] == rows && view.size[1] == columns && tensor.is_contiguous(), on.op,
                  ": ", name, " must be contiguous with shape [", rows, ", ", columns, "], got shape ",
                  text(view.ndim, view.size), " and strides ", text(view.ndim, view.stride));
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(view.data) % 16 == 0, on.op, ": ", name,
                  " must begin at a multiple of 16 bytes");
  return view;
}

void score_gradient(const Tensor& grad_out_, const std::optional<Tensor>& grad_penalty, const Tensor& x_,
                    const Tensor& weight_, const Tensor& scores_, const Tensor& beta, const std::string& name,
                    const Tensor& grad_scores_) {
  const OnGpu on("score_gradient", beta);
  const subnet::ScoreGradientKernel* kernel = nullptr;
  for (const auto* one : kScoreGradients) {
    if (name == one->name) kernel = one;
  }
  STD_TORCH_CHECK(kernel != nullptr, on.op, ": kernel must be one of ", score_gradient_kernels(), ", got '", name, "'");
  const View shape = on.view("weight", weight_);
  STD_TORCH_CHECK(shape.ndim == 2 && x_.dim() == 2, on.op, ": weight must be [N, K] and x [M, K], got ",
                  text(shape.ndim, shape.size), " and a tensor of ", x_.dim(), " dimensions");
  const int64_t m = x_.size(0), n = shape.size[0], k = shape.size[1];
  STD_TORCH_CHECK(m >= 1 && n >= 1 && k >= 1 && n % 8 == 0 && k % 8 == 0 &&
                      std::max({m, n, k}) <= std::numeric_limits<int>::max(),
                  on.op, ": N and K must be multiples of 8, for rows of 16 bytes, and M at least 1, got M ", m, ", N ",
                  n, ", K ", k);
  const View weight = matrix(on, "weight", weight_, n, k, kernel->weight_dtype);
  const View grad_out = matrix(on, "grad_out", grad_out_, m, n, kernel->dtype);
  const View x = matrix(on, "x", x_, m, k, kernel->dtype);
  const View scores = matrix(on, "scores", scores_, n, k, Dtype::float32);
  const View grad_scores = matrix(on, "grad_scores", grad_scores_, n, k, Dtype::float32);
  for (const View& in : {weight, grad_out, x, scores}) check_disjoint(on.op, grad_scores, in);
  subnet::CudaScoreGradient params{};
  params.grad_out = grad_out.data;
  params.x = x.data;
  params.weight = weight.data;
  params.scores = reinterpret_cast<const float*>(scores.data);
  params.grad_scores = reinterpret_cast<float*>(grad_scores.data);
  params.beta = on.scalar("beta", beta);
  params.grad_penalty = grad_penalty ? on.scalar("grad_penalty", *grad_penalty) : nullptr;
  params.m = (int)m, params.n = (int)n, params.k = (int)k;
  const Tensor workspace = on.workspace(beta, (int64_t)(kernel->workspace_bytes(params, on.device) + 7) / 8);
  on.run([&](int device, void* stream) { return kernel->launch(params, workspace.data_ptr(), device, stream); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(subnet_native, m) {
  m.def("score_gradient(Tensor grad_out, Tensor? grad_penalty, Tensor x, Tensor weight, Tensor scores, Tensor beta,"
        " str kernel, Tensor(a!) grad_scores) -> ()");
  m.def("score_gradient_kernels() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(subnet_native, CUDA, m) { m.impl("score_gradient", TORCH_BOX(&score_gradient)); }

STABLE_TORCH_LIBRARY_IMPL(subnet_native, CompositeExplicitAutograd, m) {
  m.impl("score_gradient_kernels", TORCH_BOX(&score_gradient_kernels));
}
