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

// shares_last: over the weight of the last one.
template <int kMost>
int append(const OnGpu& on, subnet::CudaBlocks<kMost>& blocks, const View& view, bool shares_last = false) {
  const int at = blocks.append(numel(view), shares_last);
  STD_TORCH_CHECK(at >= 0, on.op, ": too many weights for one call; split the list");
  return at;
}

// Appends an entry over `weight`, which params gets.
template <class Params>
int append_over(const OnGpu& on, Params& params, const View& weight) {
  const int last = params.blocks.num_tensors - 1;
  const int at = append(on, params.blocks, weight, last >= 0 && params.weight[last] == weight.data);
  params.weight[at] = weight.data;
  params.weight_dtype[at] = (uint8_t)weight.dtype;
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
  const int at = append_over(on, params, weight);
  params.scores[at] = reinterpret_cast<const float*>(scores.data);
  params.w_eff[at] = w_eff.data;
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
  const View penalties = check_lists(on.op, weights, scores, w_eff, penalties_, gpu());
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

// ---- grad_scores

// What is not given or not wanted: null. grad_scores may be grad_w_eff.
void add_grad_scores(const OnGpu& on, subnet::CudaGradScores& params, const Tensor* grad_w_eff_,
                     const Tensor* grad_penalty, const Tensor& weight_, const Tensor& scores_,
                     const Tensor& grad_scores_, const Tensor* grad_weight_) {
  const View weight = on.view("weight", weight_);
  const View scores = on.floats("scores", scores_);
  const View grads = on.floats("grad_scores", grad_scores_);
  check_is_dense(on.op, weight);
  check_scores(on.op, scores, weight);
  check_flat(on, scores, weight);
  check_flat(on, grads, weight);
  check_disjoint(on.op, grads, weight);
  check_disjoint(on.op, grads, scores);
  const int at = append_over(on, params, weight);
  params.scores[at] = reinterpret_cast<const float*>(scores.data);
  params.grad_scores[at] = reinterpret_cast<float*>(grads.data);
  if (grad_penalty != nullptr) params.grad_penalty[at] = on.scalar("grad_penalty", *grad_penalty);
  if (grad_w_eff_ == nullptr) {
    STD_TORCH_CHECK(grad_weight_ == nullptr, on.op, ": grad_weight needs grad_w_eff, got None");
    return;
  }
  const View grad_w_eff = on.view("grad_w_eff", *grad_w_eff_);
  check_strides(on.op, grad_w_eff, weight);
  if (grads.data != grad_w_eff.data || grad_w_eff.dtype != Dtype::float32) check_disjoint(on.op, grads, grad_w_eff);
  params.grad_w_eff[at] = grad_w_eff.data;
  params.grad_dtype[at] = (uint8_t)grad_w_eff.dtype;
  if (grad_weight_ == nullptr) return;
  const View grad_weight = on.view("grad_weight", *grad_weight_);
  check_strides(on.op, grad_weight, weight);
  STD_TORCH_CHECK(grad_weight.dtype == weight.dtype, on.op, ": grad_weight must have weight's dtype");
  for (const View& other : {weight, scores, grads, grad_w_eff}) check_disjoint(on.op, grad_weight, other);
  params.grad_weight[at] = grad_weight.data;
}

const Tensor* pointer_to(const std::optional<Tensor>& tensor) { return tensor ? &*tensor : nullptr; }

// In lists a tensor of 0 elements stands for none.
const Tensor* pointer_to(const Tensor& tensor) { return tensor.numel() == 0 ? nullptr : &tensor; }

void grad_scores(const std::optional<Tensor>& grad_w_eff, const std::optional<Tensor>& grad_penalty,
                 const Tensor& weight, const Tensor& scores, const Tensor& beta, int64_t kind,
                 const Tensor& grad_scores, const std::optional<Tensor>& grad_weight) {
  const OnGpu on("grad_scores", beta);
  subnet::CudaGradScores params{};
  params.kind = kind_of(on.op, kind);
  params.beta = on.scalar("beta", beta);
  add_grad_scores(on, params, pointer_to(grad_w_eff), pointer_to(grad_penalty), weight, scores, grad_scores,
                  pointer_to(grad_weight));
  on.run([&](int device, void* stream) { return subnet::launch_grad_scores(params, device, stream); });
}

void grad_scores_of_many(const std::vector<Tensor>& grad_w_effs, const std::vector<Tensor>& grad_penalties,
                         const std::vector<Tensor>& weights, const std::vector<Tensor>& scores, const Tensor& beta,
                         int64_t kind, const std::vector<Tensor>& grad_scores) {
  const OnGpu on("grad_scores_of_many", beta);
  check_lengths(on.op, weights.size(), {grad_w_effs.size(), grad_penalties.size(), scores.size(), grad_scores.size()});
  for (size_t i = 0; i < weights.size();) {
    subnet::CudaGradScores params{};
    params.kind = kind_of(on.op, kind);
    params.beta = on.scalar("beta", beta);
    for (; i < weights.size() && !params.blocks.is_full(); ++i) {
      add_grad_scores(on, params, &grad_w_effs[i], pointer_to(grad_penalties[i]), weights[i], scores[i],
                      grad_scores[i], nullptr);
    }
    on.run([&](int device, void* stream) { return subnet::launch_grad_scores(params, device, stream); });
  }
}

// ---- add_penalty_grad

void add_penalty_grad_of_many(const std::vector<Tensor>& grads_, const std::vector<Tensor>& scores_,
                              const std::vector<int64_t>& weights_per_score, const Tensor& beta, double lam,
                              const std::optional<Tensor>& lam_at, int64_t kind) {
  const OnGpu on("add_penalty_grad_of_many", beta);
  check_lengths(on.op, grads_.size(), {scores_.size(), weights_per_score.size()});
  for (size_t i = 0; i < grads_.size();) {
    subnet::CudaAddPenaltyGrad params{};
    params.kind = kind_of(on.op, kind);
    params.beta = on.scalar("beta", beta);
    params.lam = (float)lam;
    params.lam_at = lam_at ? on.scalar("lam", *lam_at) : nullptr;
    for (; i < grads_.size() && !params.blocks.is_full(); ++i) {
      const View grads = on.floats("grads", grads_[i]);
      const View scores = on.floats("scores", scores_[i]);
      check_is_dense(on.op, grads);
      check_flat(on, scores, grads);
      check_disjoint(on.op, grads, scores);
      const int at = append(on, params.blocks, grads);
      params.scores[at] = reinterpret_cast<const float*>(scores.data);
      params.grads[at] = reinterpret_cast<float*>(grads.data);
      params.scale[at] = (float)weights_per_score[i];
    }
    on.run([&](int device, void* stream) { return subnet::launch_add_penalty_grad(params, device, stream); });
  }
}

// ---- mask_adamw

// The tensors of one call, lists of one length.
struct MaskAdamWLists {
  const std::vector<Tensor>&scores, &grads, &exp_avgs, &exp_avg_sqs, &weights, &w_effs, &penalties, &steps,
      &grad_penalties, &lrs_at, &lams_at;
  const std::vector<double>&lrs, &lams;
};

// Of entry i; a list of one number is for all entries. One of 0 elements in memory: the value.
subnet::CudaNumber number_at(const OnGpu& on, const char* name, const std::vector<double>& values,
                             const std::vector<Tensor>& tensors, size_t i) {
  const size_t at = values.size() == 1 ? 0 : i;
  const Tensor* tensor = pointer_to(tensors[at]);
  return {tensor == nullptr ? nullptr : on.scalar(name, *tensor), values[at]};
}

// Appends entry i; what it writes and reads goes to the views.
void add_mask_adamw(const OnGpu& on, subnet::CudaMaskAdamW& params, const MaskAdamWLists& lists, size_t i,
                    std::vector<View>& written, std::vector<View>& read) {
  const View weight = on.view("weights", lists.weights[i]);
  check_is_dense(on.op, weight);
  const int at = append_over(on, params, weight);
  const auto take = [&](View view, std::vector<View>& views) {
    check_flat(on, view, weight);
    views.push_back(view);
    return view.data;
  };
  const View exp_avg = on.view("exp_avgs", lists.exp_avgs[i]);
  const View exp_avg_sq = on.view("exp_avg_sqs", lists.exp_avg_sqs[i]);
  const Dtype moment = params.has_bf16_moments ? Dtype::bfloat16 : Dtype::float32;
  STD_TORCH_CHECK(exp_avg.dtype == moment && exp_avg_sq.dtype == moment, on.op,
                  ": exp_avgs and exp_avg_sqs must all be float32 or all be bfloat16");
  const View grad = on.view("grads", lists.grads[i]);
  STD_TORCH_CHECK(params.has_w_eff_grads || grad.dtype == Dtype::float32, on.op, ": grads must be float32");
  params.scores[at] = reinterpret_cast<float*>(take(on.floats("scores", lists.scores[i]), written));
  params.exp_avg[at] = take(exp_avg, written);
  params.exp_avg_sq[at] = take(exp_avg_sq, written);
  params.grads[at] = take(grad, read);
  params.grad_dtype[at] = (uint8_t)grad.dtype;
  params.step[at] = on.scalar("steps", lists.steps[i]);
  params.lr[at] = number_at(on, "lr", lists.lrs, lists.lrs_at, i);
  params.lam[at] = number_at(on, "lam", lists.lams, lists.lams_at, i);
  if (params.has_w_eff_grads && pointer_to(lists.grad_penalties[i]) != nullptr) {
    params.grad_penalty[at] = on.scalar("grad_penalties", lists.grad_penalties[i]);
  }
  if (pointer_to(lists.penalties[i]) == nullptr) return;
  const View w_eff = on.view("w_effs", lists.w_effs[i]);
  params.w_eff[at] = take(w_eff, written);
  params.w_eff_dtype[at] = (uint8_t)w_eff.dtype;
  params.penalty[at] = on.scalar("penalties", lists.penalties[i]);
  written.push_back(on.view("penalties", lists.penalties[i]));
  read.push_back(weight);
}

// An entry without effective weight has 0 elements as its w_eff and its penalty, one without grad_penalty there. lrs and
// lams, with what stands for them in memory, have one number for all entries or one each.
void mask_adamw_of_many(const std::vector<Tensor>& scores, const std::vector<Tensor>& grads,
                        const std::vector<Tensor>& exp_avgs, const std::vector<Tensor>& exp_avg_sqs,
                        const std::vector<Tensor>& weights, const std::vector<Tensor>& w_effs,
                        const std::vector<Tensor>& penalties, const std::vector<Tensor>& steps,
                        const std::vector<Tensor>& grad_penalties, bool has_w_eff_grads, const Tensor& beta,
                        const Tensor& next_beta, int64_t kind, const std::vector<double>& lrs,
                        const std::vector<Tensor>& lrs_at, double beta1, double beta2, double eps, double weight_decay,
                        const std::vector<double>& lams, const std::vector<Tensor>& lams_at) {
  const OnGpu on("mask_adamw_of_many", beta);
  check_lengths(on.op, scores.size(), {grads.size(), exp_avgs.size(), exp_avg_sqs.size(), weights.size(),
                                       w_effs.size(), penalties.size(), steps.size(), grad_penalties.size()});
  for (const auto* values : {&lrs, &lams}) {
    check_lengths(on.op, values->size() == 1 ? 1 : scores.size(),
                  {values->size(), (values == &lrs ? lrs_at : lams_at).size()});
  }
  check_decay_rates(on.op, kind, beta1, beta2);
  subnet::CudaMaskAdamW all{};
  all.has_w_eff_grads = has_w_eff_grads;
  all.has_bf16_moments = !exp_avgs.empty() && dtype_of(on.op, "exp_avgs", exp_avgs[0]) == Dtype::bfloat16;
  all.beta = on.scalar("beta", beta);
  all.next_beta = on.scalar("next_beta", next_beta);
  all.settings = subnet::adamw_settings(0.0, beta1, beta2, eps, weight_decay);
  const MaskAdamWLists lists{scores, grads,  exp_avgs, exp_avg_sqs, weights, w_effs, penalties,
                             steps,  grad_penalties, lrs_at, lams_at, lrs,  lams};
  std::vector<subnet::CudaMaskAdamW> launches;
  std::vector<View> written, read;
  for (size_t i = 0; i < scores.size(); ++i) {
    if (launches.empty() || launches.back().blocks.is_full()) launches.push_back(all);
    add_mask_adamw(on, launches.back(), lists, i, written, read);
  }
  check_disjoint(on.op, written, read);  // before the first launch: what is refused changes nothing
  for (subnet::CudaMaskAdamW& params : launches) {
    const Tensor partials = on.workspace(beta, params.blocks.begin[params.blocks.num_tensors]);
    params.partials = static_cast<double*>(partials.data_ptr());
    on.run([&](int device, void* stream) { return subnet::launch_mask_adamw(params, device, stream); });
  }
}

// ---- random_bits

void random_bits(const Tensor& seed, const Tensor& offset, int64_t first_sample, const Tensor& out) {
  const OnGpu on("random_bits", out);
  on.check("seed", seed);
  on.check("offset", offset);
  int64_t num_groups;
  subnet::CudaRandomBits params{};
  params.out = draws_of(on.op, out, &num_groups);
  params.rows = out.size(1), params.columns = out.size(2);
  params.num_groups = (uint32_t)num_groups;
  params.seed = seed_of(on.op, seed, out.size(0), &params.seed_stride);
  params.offset = int64_of(on.op, "offset", offset);
  params.first_sample = first_sample_of(on.op, first_sample);
  on.run([&](int device, void* stream) { return subnet::launch_random_bits(params, device, stream); });
}

// ---- sampled masks

// Contiguous, of `count` elements.
View dense_view(const OnGpu& on, const char* name, const Tensor& tensor, int64_t count) {
  const View view = on.view(name, tensor);
  STD_TORCH_CHECK(tensor.is_contiguous() && numel(view) == count, on.op, ": ", name, " must be contiguous with ", count,
                  " elements, got shape ", text(view.ndim, view.size), " and strides ", text(view.ndim, view.stride));
  return view;
}

float* dense_floats(const OnGpu& on, const char* name, const Tensor& tensor, int64_t count) {
  on.floats(name, tensor);
  return reinterpret_cast<float*>(dense_view(on, name, tensor, count).data);
}

uint16_t* thresholds_of(const OnGpu& on, const Tensor& thresholds, const Tensor& like) {
  on.check("thresholds", thresholds);
  check_like(on.op, "thresholds", thresholds, like);
  return uint16_of(on.op, "thresholds", thresholds);
}

void keep_thresholds(const Tensor& scores, const Tensor& beta, const Tensor& out) {
  const OnGpu on("keep_thresholds", beta);
  subnet::CudaKeepThresholds params{};
  params.num = scores.numel();
  params.scores = dense_floats(on, "scores", scores, params.num);
  params.thresholds = thresholds_of(on, out, scores);
  params.beta = on.scalar("beta", beta);
  on.run([&](int device, void* stream) { return subnet::launch_keep_thresholds(params, device, stream); });
}

subnet::CudaSampledMasks sampled_masks(const OnGpu& on, const Tensor& weight_, const Tensor& key, int64_t sample,
                                       int64_t num_samples) {
  STD_TORCH_CHECK(num_samples >= 1 && num_samples <= INT32_MAX && sample <= (int64_t)UINT32_MAX - num_samples, on.op,
                  ": there must be at least one sample, numbered below 2^32, got ", num_samples, " from ", sample);
  on.check("key", key);
  const View weight = dense_view(on, "weight", weight_, weight_.numel());
  subnet::CudaSampledMasks masks{};
  masks.weight = weight.data;
  masks.weight_dtype = weight.dtype;
  masks.key = key_of(on.op, key);
  masks.num = numel(weight);
  masks.first_sample = first_sample_of(on.op, sample);
  masks.num_masks = (int)num_samples;
  int64_t rows, columns;
  set_rows(weight_, &rows, &columns);
  const int64_t num_groups = masks.num == 0 ? 0 : rows * ceil_div(columns, 8);
  STD_TORCH_CHECK(num_groups <= INT32_MAX && columns <= INT32_MAX, on.op, ": weight may have ", INT32_MAX,
                  " groups of eight columns, got ", num_groups);
  masks.columns = (uint32_t)columns;
  masks.num_groups = (uint32_t)num_groups;
  return masks;
}

// out [num_samples, *weight's shape]
void sampled_weights(const Tensor& weight, const Tensor& thresholds, const Tensor& key, int64_t sample,
                     int64_t num_samples, const Tensor& out_) {
  const OnGpu on("sampled_weights", weight);
  subnet::CudaSampledWeights params{};
  params.masks = sampled_masks(on, weight, key, sample, num_samples);
  params.thresholds = thresholds_of(on, thresholds, weight);
  const View out = dense_view(on, "out", out_, num_samples * params.masks.num);
  check_disjoint(on.op, out, on.view("weight", weight));
  params.w_eff = out.data;
  params.w_eff_dtype = out.dtype;
  on.run([&](int device, void* stream) { return subnet::launch_sampled_weights(params, device, stream); });
}

// grad_w_eff [num_samples, *weight's shape]. is_noisy: the noise of the draws is in the slope.
void sampled_grad_scores_of_all(const Tensor& grad_w_eff_, const Tensor& weight, const Tensor& scores,
                                const Tensor& beta, const Tensor& key, int64_t sample, int64_t num_samples, double tau,
                                bool is_noisy, const Tensor& grad_scores_) {
  const OnGpu on("sampled_grad_scores_of_all", beta);
  subnet::CudaSampledGradScores params{};
  params.masks = sampled_masks(on, weight, key, sample, num_samples);
  const int64_t num = params.masks.num;
  const View grad_w_eff = dense_view(on, "grad_w_eff", grad_w_eff_, num_samples * num);
  params.grad_w_eff = grad_w_eff.data;
  params.grad_dtype = grad_w_eff.dtype;
  params.scores = dense_floats(on, "scores", scores, num);
  params.grad_scores = dense_floats(on, "grad_scores", grad_scores_, num);
  const View grad_scores = on.view("grad_scores", grad_scores_);
  for (const Tensor* in : {&grad_w_eff_, &weight, &scores}) check_disjoint(on.op, grad_scores, on.view("an input", *in));
  params.beta = on.scalar("beta", beta);
  STD_TORCH_CHECK(std::isfinite(tau) && tau > 0, on.op, ": tau must be finite and > 0, got ", tau);
  params.is_noisy = is_noisy;
  params.tau = (float)tau;
  on.run([&](int device, void* stream) { return subnet::launch_sampled_grad_scores(params, device, stream); });
}

// ---- pack_mask

Tensor pack_mask(const Tensor& mask) {
  const OnGpu on("pack_mask", mask);
  subnet::PackMask params{};
  params.mask = bytes_of(on.op, "mask", mask, aoti_torch_dtype_bool(), "bool");
  params.num = mask.numel();
  Tensor packed = torch::stable::new_empty(mask, {ceil_div(params.num, 8)}, torch::headeronly::ScalarType::Byte);
  params.packed = static_cast<uint8_t*>(packed.data_ptr());
  on.run([&](int device, void* stream) { return subnet::launch_pack_mask(params, device, stream); });
  return packed;
}

Tensor unpack_mask(const Tensor& packed, int64_t num) {
  const OnGpu on("unpack_mask", packed);
  subnet::UnpackMask params{};
  params.packed = packed_bytes_of(on.op, packed, num);
  params.num = num;
  Tensor mask = torch::stable::new_empty(packed, {num}, torch::headeronly::ScalarType::Bool);
  params.mask = static_cast<uint8_t*>(mask.data_ptr());
  on.run([&](int device, void* stream) { return subnet::launch_unpack_mask(params, device, stream); });
  return mask;
}

void packed_weight(const Tensor& weight, const Tensor& packed, const Tensor& out) {
  const OnGpu on("packed_weight", weight);
  on.check("packed", packed);
  subnet::PackedWeight params{};
  params.num = weight.numel();
  const View from = dense_view(on, "weight", weight, params.num), to = dense_view(on, "out", out, params.num);
  check_disjoint(on.op, to, from);
  params.weight = from.data, params.weight_dtype = from.dtype;
  params.out = to.data, params.out_dtype = to.dtype;
  params.packed = packed_bytes_of(on.op, packed, params.num);
  on.run([&](int device, void* stream) { return subnet::launch_packed_weight(params, device, stream); });
}

// ---- masked_linear, few rows of x

void masked_linear_few_rows(const Tensor& x_, const Tensor& weight_, const Tensor& scores_, const Tensor& beta,
                            const std::optional<Tensor>& bias_, const Tensor& out_, const Tensor& penalty) {
  const OnGpu on("masked_linear_few_rows", beta);
  const View weight = on.view("weight", weight_), x = on.view("x", x_);
  STD_TORCH_CHECK(weight.ndim == 2 && x.ndim == 2 && numel(weight) > 0 && x.size[0] >= 1 &&
                      x.size[0] <= subnet::CudaMaskedLinear::kMostRows && weight.size[1] % 8 == 0 &&
                      weight.size[0] <= INT32_MAX && weight.size[1] <= INT32_MAX && weight.dtype != Dtype::float32,
                  on.op, ": weight must be a 16-bit [N, K] with K a multiple of 8 and x [M, K] with M from 1 to ",
                  subnet::CudaMaskedLinear::kMostRows, ", got ", text(weight.ndim, weight.size), " and ",
                  text(x.ndim, x.size));
  const int64_t m = x.size[0], n = weight.size[0], k = weight.size[1];
  subnet::CudaMaskedLinear params{};
  params.m = (int)m, params.n = (int)n, params.k = (int)k, params.dtype = weight.dtype;
  params.x = on.matrix("x", x_, m, k, weight.dtype).data;
  params.weight = on.matrix("weight", weight_, n, k, weight.dtype).data;
  params.scores = reinterpret_cast<const float*>(on.matrix("scores", scores_, n, k, Dtype::float32).data);
  const View out = on.matrix("out", out_, m, n, weight.dtype);
  params.out = out.data;
  for (const Tensor* in : {&x_, &weight_, &scores_}) check_disjoint(on.op, out, on.view("an input", *in));
  if (bias_) {
    const View bias = on.view("bias", *bias_);
    STD_TORCH_CHECK(bias.ndim == 1 && bias.size[0] == n && bias_->is_contiguous() && bias.dtype == weight.dtype, on.op,
                    ": bias must be contiguous with shape [", n, "] and weight's dtype, got ",
                    text(bias.ndim, bias.size));
    params.bias = bias.data;
  }
  params.beta = on.scalar("beta", beta);
  params.penalty = on.scalar("penalty", penalty);
  const Tensor partials = on.workspace(beta, subnet::masked_linear_blocks(m, n));
  params.partials = static_cast<double*>(partials.data_ptr());
  on.run([&](int device, void* stream) { return subnet::launch_masked_linear(params, device, stream); });
}

}  // namespace

// Ops of the GPU alone: lists in one launch, numbers that are read from its memory.
STABLE_TORCH_LIBRARY_FRAGMENT(SUBNET_GPU_OPS, m) {
  m.def("add_penalty_grad_of_many(Tensor(a!)[] grads, Tensor[] scores, int[] weights_per_score, Tensor beta,"
        " float lam, Tensor? lam_at, int kind) -> ()");
  m.def("mask_adamw_of_many(Tensor(a!)[] scores, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
        " Tensor[] weights, Tensor(d!)[] w_effs, Tensor(e!)[] penalties, Tensor[] steps, Tensor[] grad_penalties,"
        " bool has_w_eff_grads, Tensor beta, Tensor next_beta, int kind, float[] lrs, Tensor[] lrs_at, float beta1,"
        " float beta2, float eps, float weight_decay, float[] lams, Tensor[] lams_at) -> ()");
  m.def("masked_linear_few_rows(Tensor x, Tensor weight, Tensor scores, Tensor beta, Tensor? bias, Tensor(a!) out,"
        " Tensor(b!) penalty) -> ()");
  m.def("sampled_weights(Tensor weight, Tensor thresholds, Tensor key, int sample, int num_samples, Tensor(a!) out)"
        " -> ()");
  m.def("sampled_grad_scores_of_all(Tensor grad_w_eff, Tensor weight, Tensor scores, Tensor beta, Tensor key,"
        " int sample, int num_samples, float tau, bool is_noisy, Tensor(a!) grad_scores) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(SUBNET_GPU_OPS, SUBNET_GPU_KEY, m) {
  m.impl("effective_weight", TORCH_BOX(&effective_weight));
  m.impl("effective_weights", TORCH_BOX(&effective_weights));
  m.impl("grad_scores", TORCH_BOX(&grad_scores));
  m.impl("grad_scores_of_many", TORCH_BOX(&grad_scores_of_many));
  m.impl("add_penalty_grad_of_many", TORCH_BOX(&add_penalty_grad_of_many));
  m.impl("mask_adamw_of_many", TORCH_BOX(&mask_adamw_of_many));
  m.impl("random_bits", TORCH_BOX(&random_bits));
  m.impl("masked_linear_few_rows", TORCH_BOX(&masked_linear_few_rows));
  m.impl("keep_thresholds", TORCH_BOX(&keep_thresholds));
  m.impl("sampled_weights", TORCH_BOX(&sampled_weights));
  m.impl("sampled_grad_scores_of_all", TORCH_BOX(&sampled_grad_scores_of_all));
  m.impl("pack_mask", TORCH_BOX(&pack_mask));
  m.impl("unpack_mask", TORCH_BOX(&unpack_mask));
  m.impl("packed_weight", TORCH_BOX(&packed_weight));
}
