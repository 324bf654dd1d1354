// The GPU's side of PyTorch: checks arguments, fills the structs of cuda/kernels.h, owns workspace, launches.
//
// Lists of any length: a chunk of as many tensors as a kernel's argument holds is one launch.
#include <cmath>
#include <optional>
#include <vector>

#include "binding_cuda.h"
#include "cuda/kernels.h"

namespace {

using subnet::same_strides;

// Tensors of one element order and number, dense: weight gives them, or whatever stands first.
void check_flat(const OnGpu& on, const View& view, const View& weight) {
  check_shape(on.op, view, weight);
  STD_TORCH_CHECK(numel(weight) == 0 || same_strides(weight.ndim, weight.size, weight.stride, view.stride), on.op,
                  ": on CUDA ", view.name, " must have ", weight.name, "'s strides ", text(weight.ndim, weight.stride),
                  ", got ", text(view.ndim, view.stride), "; copy it first, or use another backend");
}

template <int kMost>
int append(const OnGpu& on, subnet::CudaBlocks<kMost>& blocks, const View& view) {
  const int at = blocks.append(numel(view));
  STD_TORCH_CHECK(at >= 0, on.op, ": too many weights for one call; split the list");
  return at;
}

// ---- effective_weight

void add_layer(const OnGpu& on, subnet::CudaEffectiveWeights& params, const Tensor& weight_, const Tensor& scores_,
               const Tensor& w_eff_) {
  const View weight = on.view("weight", weight_);
  const View scores = on.floats("scores", scores_);
  const View w_eff = on.view("w_eff", w_eff_);
  check_is_dense(on.op, weight);
  check_scores(on.op, scores, weight);
  check_flat(on, scores, weight);
  check_strides(on.op, w_eff, weight);
  check_disjoint(on.op, w_eff, weight);
  check_disjoint(on.op, w_eff, scores);
  const int at = append(on, params.blocks, weight);
  params.weight[at] = weight.data;
  params.scores[at] = reinterpret_cast<const float*>(scores.data);
  params.w_eff[at] = w_eff.data;
  params.weight_dtype[at] = (uint8_t)weight.dtype;
  params.w_eff_dtype[at] = (uint8_t)w_eff.dtype;
}

void run_effective_weights(const OnGpu& on, subnet::CudaEffectiveWeights& params, const Tensor& like) {
  const Tensor partials = on.workspace(like, params.blocks.begin[params.blocks.num_tensors]);
  params.partials = static_cast<double*>(partials.data_ptr());
  on.run([&](int device, void* stream) { return subnet::launch_effective_weights(params, device, stream); });
}

void effective_weight(const Tensor& weight, const Tensor& scores, const Tensor& beta, int64_t kind,
                      const Tensor& w_eff, const Tensor& penalty) {
  const OnGpu on("effective_weight", beta);
  subnet::CudaEffectiveWeights params{};
  params.kind = kind_of(on.op, kind);
  params.beta = on.scalar("beta", beta);
  params.penalties = on.scalar("penalty", penalty);
  add_layer(on, params, weight, scores, w_eff);
  run_effective_weights(on, params, beta);
}

void effective_weights(const std::vector<Tensor>& weights, const std::vector<Tensor>& scores, const Tensor& beta,
                       int64_t kind, const std::vector<Tensor>& w_eff, const Tensor& penalties_) {
  const OnGpu on("effective_weights", beta);
  const View penalties = check_lists(on.op, weights, scores, w_eff, penalties_, aoti_torch_device_type_cuda());
  on.check("penalties", penalties_);
  for (size_t i = 0; i < weights.size();) {
    subnet::CudaEffectiveWeights params{};
    params.kind = kind_of(on.op, kind);
    params.beta = on.scalar("beta", beta);
    params.penalty_stride = penalties.stride[0];
    params.penalties = reinterpret_cast<float*>(penalties.data) + (int64_t)i * penalties.stride[0];
    for (; i < weights.size() && !params.blocks.is_full(); ++i) add_layer(on, params, weights[i], scores[i], w_eff[i]);
    run_effective_weights(on, params, beta);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(subnet_native, CUDA, m) {
  m.impl("effective_weight", TORCH_BOX(&effective_weight));
  m.impl("effective_weights", TORCH_BOX(&effective_weights));
}
