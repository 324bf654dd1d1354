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
  const View weight = on.matrix("weight", weight_, n, k, kernel->weight_dtype);
  const View grad_out = on.matrix("grad_out", grad_out_, m, n, kernel->dtype);
  const View x = on.matrix("x", x_, m, k, kernel->dtype);
  const View scores = on.matrix("scores", scores_, n, k, Dtype::float32);
  const View grad_scores = on.matrix("grad_scores", grad_scores_, n, k, Dtype::float32);
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

STABLE_TORCH_LIBRARY_FRAGMENT(SUBNET_GPU_OPS, m) {
  m.def("score_gradient(Tensor grad_out, Tensor? grad_penalty, Tensor x, Tensor weight, Tensor scores, Tensor beta,"
        " str kernel, Tensor(a!) grad_scores) -> ()");
  m.def("score_gradient_kernels() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(SUBNET_GPU_OPS, SUBNET_GPU_KEY, m) { m.impl("score_gradient", TORCH_BOX(&score_gradient)); }

STABLE_TORCH_LIBRARY_IMPL(SUBNET_GPU_OPS, CompositeExplicitAutograd, m) {
  m.impl("score_gradient_kernels", TORCH_BOX(&score_gradient_kernels));
}
