// The CPU's side of PyTorch (binding_cuda.cpp is the GPU's): checks arguments, fills params.h structs, owns threads and
// workspace, calls kernels. Only the files named binding* see PyTorch.
//
// It uses the LibTorch stable ABI only, so that one file serves every PyTorch from 2.11 on. The ops carry no autograd;
// subnet_kernels/ops/ holds the public functions, which check first and in the user's words.
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "binding_checks.h"
#include "cpu/kernels.h"

namespace {

using subnet::kChunk;
using subnet::kGrain;
using subnet::Layout;

// ---- threads and workspace

template <class Body>
void split(int64_t count, int64_t grain, const Body& body) {
  if (count <= grain) {
    if (count > 0) body((int64_t)0, count);
    return;
  }
  torch::stable::parallel_for(0, count, grain, body);
}

// Uninitialized; small ones live on the stack.
template <class T, int64_t kOnStack>
class Workspace {
 public:
  explicit Workspace(int64_t count) : heap_(count > kOnStack ? new T[count] : nullptr) {}
  T* data() { return heap_ ? heap_.get() : stack_; }

 private:
  T stack_[kOnStack];
  std::unique_ptr<T[]> heap_;
};

using Partials = Workspace<double, 64>;
using MaskBuffer = Workspace<float, 256>;

double add_up(const double* partials, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += partials[i];
  return sum;
}

// ---- many tensors at once

// One tensor of a call with many: what it reads beside its own, and its size.
struct Entry {
  const void* weight;
  int64_t num_chunks;
};

// body(entry, chunk_begin, chunk_end) over all chunks of all entries, shared out together, so that many small tensors
// keep all threads busy. Neighbours with one weight (many masks over it) are taken chunk by chunk, all of them before the
// next chunk: the weight comes from memory once.
template <class Body>
void split_entries(const std::vector<Entry>& entries, const Body& body) {
  struct Run {
    size_t first;
    int64_t count, begin;
  };
  std::vector<Run> runs;
  int64_t total = 0;
  for (size_t i = 0; i < entries.size(); total += entries[i].num_chunks, ++i) {
    const bool is_joined = i > 0 && entries[i].weight != nullptr && entries[i].weight == entries[i - 1].weight &&
                           entries[i].num_chunks == entries[i - 1].num_chunks;
    is_joined ? (void)++runs.back().count : runs.push_back({i, 1, total});
  }
  split(total, kGrain / kChunk, [&](int64_t begin, int64_t end) {
    auto run = std::upper_bound(runs.begin(), runs.end(), begin,
                                [](int64_t at, const Run& other) { return at < other.begin; }) - 1;
    for (; run != runs.end() && run->begin < end; ++run) {
      const int64_t size = run->count * entries[run->first].num_chunks;
      const int64_t from = std::max(begin, run->begin) - run->begin, to = std::min(end - run->begin, size);
      if (run->count == 1) {
        if (from < to) body(run->first, from, to);
        continue;
      }
      for (int64_t at = from; at < to; ++at) {
        body(run->first + at % run->count, at / run->count, at / run->count + 1);
      }
    }
  });
}

// ---- effective_weight

// Runs the kernels and returns the sum of m over weights.
double run_effective_weight(subnet::EffectiveWeight params) {
  const subnet::CpuKernels& kernels = subnet::cpu_kernels();
  const Layout& layout = *params.layout;
  if (layout.num_weights == 0) return 0.0;
  const int64_t num_chunks = ceil_div(layout.num_scores, kChunk);
  Partials partials(num_chunks);
  params.partials = partials.data();
  if (layout.is_flat) {
    split(num_chunks, kGrain / kChunk,
          [&](int64_t begin, int64_t end) { kernels.effective_weight_flat(params, begin, end); });
    return add_up(params.partials, num_chunks);
  }
  MaskBuffer mask(layout.num_scores);
  params.mask = mask.data();
  split(num_chunks, kGrain / kChunk,
        [&](int64_t begin, int64_t end) { kernels.effective_weight_mask(params, begin, end); });
  const int64_t inner = layout.loop_size[layout.loop_dims - 1];
  split(layout.num_weights / inner, ceil_div(kGrain, inner),
        [&](int64_t begin, int64_t end) { kernels.effective_weight_rows(params, begin, end); });
  return add_up(params.partials, num_chunks) * (double)layout.weights_per_score;
}

subnet::EffectiveWeight effective_weight_of(const char* op, const Tensor& weight_, const Tensor& scores_, float beta,
                                            Kind kind, const Tensor& w_eff_, Layout& layout) {
  const View weight = view_of(op, "weight", weight_, cpu());
  const View scores = view_of_float32(op, "scores", scores_, cpu());
  const View w_eff = view_of(op, "w_eff", w_eff_, cpu());
  check_is_dense(op, weight);
  check_scores(op, scores, weight);
  check_strides(op, w_eff, weight);
  check_disjoint(op, w_eff, weight);
  check_disjoint(op, w_eff, scores);
  layout = Layout{};
  if (numel(weight) > 0) {
    layout = subnet::make_layout(weight.ndim, weight.size, weight.stride, scores.size, scores.stride, scores.stride);
  }
  subnet::EffectiveWeight params{};
  params.weight = weight.data;
  params.scores = reinterpret_cast<const float*>(scores.data);
  params.w_eff = w_eff.data;
  params.beta = beta;
  params.kind = kind;
  params.weight_dtype = weight.dtype;
  params.w_eff_dtype = w_eff.dtype;
  params.layout = &layout;
  return params;
}

void effective_weight(const Tensor& weight, const Tensor& scores, const Tensor& beta, int64_t kind,
                      const Tensor& w_eff, const Tensor& penalty) {
  const char* op = "effective_weight";
  float* to = scalar_of(op, "penalty", penalty, cpu());
  Layout layout;
  *to = (float)run_effective_weight(
      effective_weight_of(op, weight, scores, *scalar_of(op, "beta", beta, cpu()), kind_of(op, kind), w_eff, layout));
}

void effective_weights(const std::vector<Tensor>& weights, const std::vector<Tensor>& scores, const Tensor& beta,
                       int64_t kind, const std::vector<Tensor>& w_eff, const Tensor& penalties_) {
  const char* op = "effective_weights";
  const View penalties = check_lists(op, weights, scores, w_eff, penalties_, cpu());
  const float beta_value = *scalar_of(op, "beta", beta, cpu());
  const auto penalty = [&](size_t i) -> float& {
    return reinterpret_cast<float*>(penalties.data)[i * penalties.stride[0]];
  };
  std::vector<Layout> layouts(weights.size());
  std::vector<subnet::EffectiveWeight> tensors(weights.size());
  std::vector<Entry> flat;
  std::vector<size_t> flat_at;
  int64_t num_chunks = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    tensors[i] = effective_weight_of(op, weights[i], scores[i], beta_value, kind_of(op, kind), w_eff[i], layouts[i]);
    if (!layouts[i].is_flat || layouts[i].num_weights == 0) {
      penalty(i) = (float)run_effective_weight(tensors[i]);
      continue;
    }
    flat.push_back({tensors[i].weight, ceil_div(layouts[i].num_scores, kChunk)});
    flat_at.push_back(i);
    num_chunks += flat.back().num_chunks;
  }
  Partials partials(num_chunks);
  double* at = partials.data();
  for (size_t k = 0; k < flat.size(); at += flat[k].num_chunks, ++k) tensors[flat_at[k]].partials = at;
  const subnet::CpuKernels& kernels = subnet::cpu_kernels();
  split_entries(flat, [&](size_t k, int64_t begin, int64_t end) {
    kernels.effective_weight_flat(tensors[flat_at[k]], begin, end);
  });
  for (size_t k = 0; k < flat.size(); ++k) {
    penalty(flat_at[k]) = (float)add_up(tensors[flat_at[k]].partials, flat[k].num_chunks);
  }
}

// ---- grad_scores

// How many parts the sums of coarse scores are made in: from the sizes alone, never from the number of threads.
void choose_parts(const Layout& layout, subnet::GradScores& params) {
  const int64_t outer = layout.loop_dims > 1 ? layout.loop_size[0] : 1;
  int64_t parts = std::max<int64_t>(1, layout.num_weights / kGrain);
  params.parts_share_scores = layout.loop_dims < 2 || layout.loop_stride[0] == 0;
  if (params.parts_share_scores) parts = std::min<int64_t>({parts, 16, std::max<int64_t>(1, layout.weights_per_score / 4)});
  params.num_parts = std::min(parts, outer);
}

void run_grad_scores_coarse(subnet::GradScores& params) {
  const subnet::CpuKernels& kernels = subnet::cpu_kernels();
  const Layout& layout = *params.layout;
  if (params.grad_weight != nullptr) {  // grad_w_eff * m, by the forward's kernels
    subnet::EffectiveWeight product{};
    product.weight = params.grad_w_eff;
    product.scores = params.scores;
    product.w_eff = params.grad_weight;
    product.beta = params.beta;
    product.kind = params.kind;
    product.weight_dtype = params.grad_w_eff_dtype;
    product.w_eff_dtype = params.weight_dtype;
    product.layout = params.layout;
    run_effective_weight(product);
  }
  choose_parts(layout, params);
  const bool needs_sums = params.grad_w_eff != nullptr && params.kind != Kind::hard;
  if (!needs_sums) params.grad_w_eff = nullptr;
  Workspace<double, 128> sums(needs_sums ? layout.num_scores * (params.parts_share_scores ? params.num_parts : 1) : 0);
  params.sums = sums.data();
  if (needs_sums) {
    split(params.num_parts, 1, [&](int64_t begin, int64_t end) { kernels.grad_scores_reduce(params, begin, end); });
  }
  split(layout.num_scores, kGrain,
        [&](int64_t begin, int64_t end) { kernels.grad_scores_finish(params, begin, end); });
}

// A layout that only walks scores and their gradients.
Layout layout_of_scores(const View& scores, const View& grads) {
  int order[subnet::kMaxDims];
  if (subnet::storage_order(grads.ndim, grads.size, grads.stride, order) >= 0) {
    return subnet::make_layout(grads.ndim, grads.size, grads.stride, scores.size, scores.stride, grads.stride);
  }
  int64_t dense[subnet::kMaxDims];
  int64_t stride = 1;
  for (int d = scores.ndim - 1; d >= 0; --d) {
    dense[d] = stride;
    stride *= scores.size[d];
  }
  return subnet::make_layout(scores.ndim, scores.size, dense, scores.size, scores.stride, grads.stride);
}

subnet::GradScores grad_scores_of(const char* op, const std::optional<Tensor>& grad_w_eff_,
                                  const std::optional<Tensor>& grad_penalty_, const Tensor& weight_,
                                  const Tensor& scores_, float beta, Kind kind, const Tensor& grad_scores_,
                                  const std::optional<Tensor>& grad_weight_, Layout& layout) {
  const View weight = view_of(op, "weight", weight_, cpu());
  const View scores = view_of_float32(op, "scores", scores_, cpu());
  const View grads = view_of_float32(op, "grad_scores", grad_scores_, cpu());
  check_is_dense(op, weight);
  check_scores(op, scores, weight);
  check_shape(op, grads, scores);
  check_has_no_overlap(op, grads);
  check_disjoint(op, grads, weight);
  check_disjoint(op, grads, scores);
  subnet::GradScores params{};
  params.weight = weight.data;
  params.scores = reinterpret_cast<const float*>(scores.data);
  params.grad_scores = reinterpret_cast<float*>(grads.data);
  params.beta = beta;
  params.grad_penalty = grad_penalty_ ? *scalar_of(op, "grad_penalty", *grad_penalty_, cpu()) : 0.0f;
  params.kind = kind;
  params.weight_dtype = weight.dtype;
  std::optional<View> grad_w_eff;
  if (grad_w_eff_) {
    grad_w_eff = view_of(op, "grad_w_eff", *grad_w_eff_, cpu());
    check_strides(op, *grad_w_eff, weight);
    const bool is_in_place = grad_w_eff->data == grads.data && grad_w_eff->dtype == Dtype::float32 &&
                             grads.ndim == weight.ndim &&
                             subnet::same_strides(weight.ndim, weight.size, weight.stride, grads.stride) &&
                             numel(grads) == numel(weight);
    if (!is_in_place) check_disjoint(op, grads, *grad_w_eff);
    params.grad_w_eff = grad_w_eff->data;
    params.grad_w_eff_dtype = grad_w_eff->dtype;
  }
  if (grad_weight_) {
    STD_TORCH_CHECK(grad_w_eff_, op, ": grad_weight needs grad_w_eff, got None");
    const View grad_weight = view_of(op, "grad_weight", *grad_weight_, cpu());
    check_strides(op, grad_weight, weight);
    STD_TORCH_CHECK(grad_weight.dtype == weight.dtype, op, ": grad_weight must have weight's dtype");
    for (const View& other : {weight, scores, grads, *grad_w_eff}) check_disjoint(op, grad_weight, other);
    params.grad_weight = grad_weight.data;
  }
  if (numel(grads) == 0 || numel(weight) == 0) {  // none, or scores that govern nothing: their gradient is 0
    layout = numel(grads) == 0 ? Layout{} : layout_of_scores(scores, grads);
    layout.num_weights = 0;
    params.kind = Kind::hard;
    params.grad_w_eff = nullptr;
  } else {
    layout = subnet::make_layout(weight.ndim, weight.size, weight.stride, scores.size, scores.stride, grads.stride);
  }
  params.layout = &layout;
  return params;
}

void run_grad_scores(subnet::GradScores& params) {
  const subnet::CpuKernels& kernels = subnet::cpu_kernels();
  const Layout& layout = *params.layout;
  if (layout.num_weights == 0) {
    if (layout.num_scores > 0) kernels.grad_scores_finish(params, 0, layout.num_scores);
    return;
  }
  if (!layout.is_flat) return run_grad_scores_coarse(params);
  split(layout.num_weights, kGrain,
        [&](int64_t begin, int64_t end) { kernels.grad_scores_flat(params, begin, end); });
}

void grad_scores(const std::optional<Tensor>& grad_w_eff, const std::optional<Tensor>& grad_penalty,
                 const Tensor& weight, const Tensor& scores, const Tensor& beta, int64_t kind,
                 const Tensor& grad_scores, const std::optional<Tensor>& grad_weight) {
  const char* op = "grad_scores";
  Layout layout;
  subnet::GradScores params =
      grad_scores_of(op, grad_w_eff, grad_penalty, weight, scores, *scalar_of(op, "beta", beta, cpu()),
                     kind_of(op, kind), grad_scores, grad_weight, layout);
  run_grad_scores(params);
}

// grad_penalties with 0 elements: none.
void grad_scores_of_many(const std::vector<Tensor>& grad_w_effs, const std::vector<Tensor>& grad_penalties,
                         const std::vector<Tensor>& weights, const std::vector<Tensor>& scores, const Tensor& beta,
                         int64_t kind, const std::vector<Tensor>& grad_scores) {
  const char* op = "grad_scores_of_many";
  const size_t num = scores.size();
  for (const size_t size : {grad_w_effs.size(), grad_penalties.size(), weights.size(), grad_scores.size()}) {
    STD_TORCH_CHECK(size == num, op, ": all lists must be as long as scores (", num, "), got one of ", size);
  }
  const float beta_value = *scalar_of(op, "beta", beta, cpu());
  std::vector<Layout> layouts(num);
  std::vector<subnet::GradScores> tensors(num);
  std::vector<Entry> flat;
  std::vector<size_t> flat_at;
  for (size_t i = 0; i < num; ++i) {
    const std::optional<Tensor> penalty =
        grad_penalties[i].numel() > 0 ? std::optional<Tensor>(grad_penalties[i]) : std::nullopt;
    tensors[i] = grad_scores_of(op, grad_w_effs[i], penalty, weights[i], scores[i], beta_value, kind_of(op, kind),
                                grad_scores[i], std::nullopt, layouts[i]);
    if (!layouts[i].is_flat || layouts[i].num_weights == 0) {
      run_grad_scores(tensors[i]);
      continue;
    }
    flat.push_back({tensors[i].weight, ceil_div(layouts[i].num_weights, kChunk)});
    flat_at.push_back(i);
  }
  const subnet::CpuKernels& kernels = subnet::cpu_kernels();
  split_entries(flat, [&](size_t k, int64_t begin, int64_t end) {
    const subnet::GradScores& params = tensors[flat_at[k]];
    kernels.grad_scores_flat(params, begin * kChunk, std::min(end * kChunk, params.layout->num_weights));
  });
}

// ---- linear, few rows of x

struct LinearSizes {
  int64_t m, n, k;
};

// A contiguous fp32 tensor of `count` elements.
float* floats_of(const char* op, const char* name, const Tensor& tensor, int64_t count) {
  const View view = view_of_float32(op, name, tensor, cpu());
  STD_TORCH_CHECK(tensor.is_contiguous() && numel(view) == count, op, ": ", name, " must be contiguous with ", count,
                  " elements, got shape ", text(view.ndim, view.size), " and strides ", text(view.ndim, view.stride));
  return reinterpret_cast<float*>(view.data);
}

// Sizes of x [..., k] and weight [n, k].
LinearSizes linear_sizes(const char* op, const Tensor& x_, const Tensor& weight_) {
  const View x = view_of_float32(op, "x", x_, cpu());
  const View weight = view_of_float32(op, "weight", weight_, cpu());
  STD_TORCH_CHECK(weight.ndim == 2 && numel(weight) > 0 && x.ndim >= 1 && x.size[x.ndim - 1] == weight.size[1], op,
                  ": weight must be a non-empty [N, K] and x [..., K], got ", text(weight.ndim, weight.size), " and ",
                  text(x.ndim, x.size));
  const LinearSizes sizes{numel(x) / weight.size[1], weight.size[0], weight.size[1]};
  STD_TORCH_CHECK(sizes.m >= 1 && sizes.m <= subnet::kLinearMostRows, op, ": x must have 1 to ",
                  subnet::kLinearMostRows, " rows, got ", sizes.m);
  return sizes;
}

// Blocks of rows of weight over the threads; a block counts by its weights and by its share of the product.
template <class Body>
void split_linear(const LinearSizes& sizes, const Body& body) {
  const int64_t work = subnet::kLinearBlock * sizes.k * (1 + sizes.m / 16);
  split(ceil_div(sizes.n, subnet::kLinearBlock), ceil_div(kGrain, work), body);
}

void run_linear(subnet::MaskedLinear& params, const LinearSizes& sizes) {
  params.m = sizes.m, params.n = sizes.n, params.k = sizes.k;
  Workspace<float, 256> packed(subnet::linear_packed_size(sizes.m, sizes.k));
  params.packed = packed.data();
  const subnet::CpuKernels& kernels = subnet::cpu_kernels();
  split(sizes.k, ceil_div(kGrain / 4, sizes.m),
        [&](int64_t begin, int64_t end) { kernels.masked_linear_pack(params, begin, end); });
  split_linear(sizes, [&](int64_t begin, int64_t end) { kernels.masked_linear(params, begin, end); });
}

void masked_linear(const Tensor& x, const Tensor& weight, const Tensor& scores, const Tensor& beta,
                   const std::optional<Tensor>& bias, const Tensor& w_eff, const Tensor& penalty, const Tensor& out) {
  const char* op = "masked_linear";
  const LinearSizes sizes = linear_sizes(op, x, weight);
  check_shape(op, view_of_float32(op, "scores", scores, cpu()), view_of_float32(op, "weight", weight, cpu()));
  const int64_t num_weights = sizes.n * sizes.k;
  subnet::MaskedLinear params{};
  params.x = floats_of(op, "x", x, sizes.m * sizes.k);
  params.weight = floats_of(op, "weight", weight, num_weights);
  params.scores = floats_of(op, "scores", scores, num_weights);
  params.bias = bias ? floats_of(op, "bias", *bias, sizes.n) : nullptr;
  params.w_eff = floats_of(op, "w_eff", w_eff, num_weights);
  params.out = floats_of(op, "out", out, sizes.m * sizes.n);
  for (const Tensor* in : {&x, &weight, &scores}) {
    check_disjoint(op, view_of(op, "w_eff", w_eff, cpu()), view_of(op, "an input", *in, cpu()));
    check_disjoint(op, view_of(op, "out", out, cpu()), view_of(op, "an input", *in, cpu()));
  }
  params.beta = *scalar_of(op, "beta", beta, cpu());
  float* to = scalar_of(op, "penalty", penalty, cpu());
  const int64_t num_blocks = ceil_div(sizes.n, subnet::kLinearBlock);
  Partials partials(num_blocks);
  params.partials = partials.data();
  run_linear(params, sizes);
  *to = (float)add_up(params.partials, num_blocks);
}

void linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& out) {
  const char* op = "linear";
  const LinearSizes sizes = linear_sizes(op, x, weight);
  subnet::MaskedLinear params{};
  params.x = floats_of(op, "x", x, sizes.m * sizes.k);
  params.w_eff = floats_of(op, "weight", weight, sizes.n * sizes.k);
  params.bias = bias ? floats_of(op, "bias", *bias, sizes.n) : nullptr;
  params.out = floats_of(op, "out", out, sizes.m * sizes.n);
  for (const Tensor* in : {&x, &weight}) {
    check_disjoint(op, view_of(op, "out", out, cpu()), view_of(op, "an input", *in, cpu()));
  }
  run_linear(params, sizes);
}

// What both ways of using grad_out.T @ x need, but for the scores' gradient.
subnet::LinearGradScores linear_gradient(const char* op, const Tensor& grad_out,
                                         const std::optional<Tensor>& grad_penalty, const Tensor& x,
                                         const Tensor& weight, const Tensor& scores, const Tensor& beta) {
  const LinearSizes sizes = linear_sizes(op, x, weight);
  check_shape(op, view_of_float32(op, "scores", scores, cpu()), view_of_float32(op, "weight", weight, cpu()));
  const int64_t num_weights = sizes.n * sizes.k;
  subnet::LinearGradScores params{};
  params.m = sizes.m, params.n = sizes.n, params.k = sizes.k;
  params.grad_out = floats_of(op, "grad_out", grad_out, sizes.m * sizes.n);
  params.x = floats_of(op, "x", x, sizes.m * sizes.k);
  params.weight = floats_of(op, "weight", weight, num_weights);
  params.scores = floats_of(op, "scores", scores, num_weights);
  params.beta = *scalar_of(op, "beta", beta, cpu());
  params.grad_penalty = grad_penalty ? *scalar_of(op, "grad_penalty", *grad_penalty, cpu()) : 0.0f;
  return params;
}

// Packs x, then runs body(begin, end) over blocks of rows of weight.
template <class Body>
void run_linear_gradient(subnet::LinearGradScores& params, const Body& body) {
  Workspace<float, 256> packed(subnet::linear_packed_size(params.k, params.m));
  params.packed = packed.data();
  const subnet::CpuKernels& kernels = subnet::cpu_kernels();
  split(params.m, ceil_div(kGrain / 4, params.k),
        [&](int64_t begin, int64_t end) { kernels.linear_grad_scores_pack(params, begin, end); });
  split_linear({params.m, params.n, params.k}, body);
}

void linear_grad_scores(const Tensor& grad_out, const std::optional<Tensor>& grad_penalty, const Tensor& x,
                        const Tensor& weight, const Tensor& scores, const Tensor& beta, const Tensor& grad_scores) {
  const char* op = "linear_grad_scores";
  subnet::LinearGradScores params = linear_gradient(op, grad_out, grad_penalty, x, weight, scores, beta);
  params.grad_scores = floats_of(op, "grad_scores", grad_scores, params.n * params.k);
  for (const Tensor* in : {&grad_out, &x, &weight, &scores}) {
    check_disjoint(op, view_of(op, "grad_scores", grad_scores, cpu()), view_of(op, "an input", *in, cpu()));
  }
  run_linear_gradient(params, [&](int64_t begin, int64_t end) {
    subnet::cpu_kernels().linear_grad_scores(params, begin, end);
  });
}

// ---- add_penalty_grad

void add_penalty_grad(const std::vector<Tensor>& grads_, const std::vector<Tensor>& scores_,
                      const std::vector<int64_t>& weights_per_score, const Tensor& beta, double lam, int64_t kind) {
  const char* op = "add_penalty_grad";
  STD_TORCH_CHECK(scores_.size() == grads_.size() && weights_per_score.size() == grads_.size(), op,
                  ": scores and weights_per_score must be lists as long as grads (", grads_.size(), "), got ",
                  scores_.size(), " and ", weights_per_score.size());
  subnet::AddPenaltyGrad params{};
  params.beta = *scalar_of(op, "beta", beta, cpu());
  params.kind = kind_of(op, kind);
  for (size_t i = 0; i < grads_.size(); ++i) {
    const View grads = view_of_float32(op, "grads", grads_[i], cpu());
    const View scores = view_of_float32(op, "scores", scores_[i], cpu());
    check_shape(op, grads, scores);
    check_has_no_overlap(op, grads);
    check_disjoint(op, grads, scores);
    if (numel(scores) == 0) continue;
    const Layout layout = layout_of_scores(scores, grads);
    params.scores = reinterpret_cast<const float*>(scores.data);
    params.grads = reinterpret_cast<float*>(grads.data);
    params.scale = (float)(lam * (double)weights_per_score[i]);
    params.layout = &layout;
    const subnet::CpuKernels& kernels = subnet::cpu_kernels();
    split(layout.num_scores, kGrain,
          [&](int64_t begin, int64_t end) { kernels.add_penalty_grad(params, begin, end); });
  }
}

// ---- mask_adamw

struct AdamW {
  double lr, beta1, beta2, eps, weight_decay, lam;
};

// What does not differ between the tensors of a call.
subnet::MaskAdamW settings_of(const char* op, const AdamW& adamw, const Tensor& beta, const Tensor& next_beta,
                              int64_t kind) {
  check_decay_rates(op, kind, adamw.beta1, adamw.beta2);
  subnet::MaskAdamW params{};
  params.beta = *scalar_of(op, "beta", beta, cpu());
  params.next_beta = *scalar_of(op, "next_beta", next_beta, cpu());
  params.penalty_scale = (float)adamw.lam;
  params.settings = subnet::adamw_settings(adamw.lr, adamw.beta1, adamw.beta2, adamw.eps, adamw.weight_decay);
  return params;
}

void run_mask_adamw(std::vector<subnet::MaskAdamW>& tensors, const std::vector<float*>& penalties) {
  std::vector<Entry> entries;
  int64_t num_chunks = 0;
  for (const subnet::MaskAdamW& params : tensors) {
    entries.push_back({params.weight, ceil_div(params.num, kChunk)});
    num_chunks += entries.back().num_chunks;
  }
  Partials partials(num_chunks);
  double* at = partials.data();
  for (size_t i = 0; i < tensors.size(); at += entries[i].num_chunks, ++i) tensors[i].partials = at;
  const subnet::CpuKernels& kernels = subnet::cpu_kernels();
  split_entries(entries, [&](size_t i, int64_t begin, int64_t end) { kernels.mask_adamw(tensors[i], begin, end); });
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (penalties[i] != nullptr) *penalties[i] = (float)add_up(tensors[i].partials, entries[i].num_chunks);
  }
}

// Moments: both float32, or both bfloat16.
void* moment_of(const char* op, const char* name, const Tensor& tensor, const View& weight, Dtype dtype,
                std::vector<View>& written) {
  written.push_back(view_of(op, name, tensor, cpu()));
  check_strides(op, written.back(), weight);
  STD_TORCH_CHECK(written.back().dtype == dtype && dtype != Dtype::float16, op,
                  ": exp_avgs and exp_avg_sqs must be float32 or bfloat16, both alike");
  return written.back().data;
}

// The step's own numbers.
void set_step(const char* op, subnet::MaskAdamW& params, const AdamW& adamw, double step) {
  STD_TORCH_CHECK(step >= 1 && step < 0x1p53, op, ": steps count from 1, got ", step);
  params.step = (uint32_t)(int64_t)step;
  params.rates = subnet::adamw_rates(params.settings, adamw.lr, step);
}

// An entry without effective weight has 0 elements as its w_eff and its penalty. of_w_eff: grads are the effective
// weights' gradients, grad_penalties the penalties' (0 elements: none). firsts: place of an entry in its whole tensor.
void mask_adamw(const std::vector<Tensor>& scores, const std::vector<Tensor>& grads,
                const std::vector<Tensor>& exp_avgs, const std::vector<Tensor>& exp_avg_sqs,
                const std::vector<Tensor>& weights, const std::vector<Tensor>& w_effs,
                const std::vector<Tensor>& penalties, const std::vector<double>& steps, const Tensor& beta,
                const Tensor& next_beta, int64_t kind, const std::vector<double>& lrs, double beta1, double beta2,
                double eps, double weight_decay, const std::vector<double>& lams, bool of_w_eff,
                const std::vector<Tensor>& grad_penalties, const std::vector<int64_t>& firsts) {
  const char* op = "mask_adamw";
  const size_t num = scores.size();
  for (const size_t size : {grads.size(), exp_avgs.size(), exp_avg_sqs.size(), weights.size(), w_effs.size(),
                            penalties.size(), steps.size(), grad_penalties.size(), firsts.size(), lrs.size(),
                            lams.size()}) {
    STD_TORCH_CHECK(size == num, op, ": all lists must be as long as scores (", num, "), got one of ", size);
  }
  std::vector<subnet::MaskAdamW> tensors(num);
  std::vector<float*> penalty_at(num);
  std::vector<View> written, read;
  for (size_t i = 0; i < num; ++i) {
    const AdamW adamw{lrs[i], beta1, beta2, eps, weight_decay, lams[i]};
    tensors[i] = settings_of(op, adamw, beta, next_beta, kind);
    const View weight = view_of(op, "weights", weights[i], cpu());
    check_is_dense(op, weight);
    subnet::MaskAdamW& params = tensors[i];
    params.num = numel(weight);
    STD_TORCH_CHECK(firsts[i] >= 0, op, ": firsts must be at least 0, got ", firsts[i]);
    params.first = firsts[i];
    written.push_back(view_of_float32(op, "scores", scores[i], cpu()));
    check_strides(op, written.back(), weight);
    params.scores = reinterpret_cast<float*>(written.back().data);
    params.moment_dtype = dtype_of(op, "exp_avgs", exp_avgs[i]);
    params.exp_avg = moment_of(op, "exp_avgs", exp_avgs[i], weight, params.moment_dtype, written);
    params.exp_avg_sq = moment_of(op, "exp_avg_sqs", exp_avg_sqs[i], weight, params.moment_dtype, written);
    read.push_back(of_w_eff ? view_of(op, "grads", grads[i], cpu()) : view_of_float32(op, "grads", grads[i], cpu()));
    check_strides(op, read.back(), weight);
    params.grad = read.back().data;
    params.grad_dtype = read.back().dtype;
    params.is_of_w_eff = of_w_eff;
    if (of_w_eff && grad_penalties[i].numel() > 0) {
      params.grad_penalty = *scalar_of(op, "grad_penalties", grad_penalties[i], cpu());
    }
    params.weight = weight.data;
    params.weight_dtype = weight.dtype;
    if (of_w_eff) read.push_back(weight);
    set_step(op, params, adamw, steps[i]);
    const View w_eff = view_of(op, "w_effs", w_effs[i], cpu());
    if (penalties[i].numel() == 0) {
      STD_TORCH_CHECK(numel(w_eff) == 0, op, ": w_effs without penalty must have 0 elements, got shape ",
                      text(w_eff.ndim, w_eff.size));
      continue;
    }
    check_strides(op, w_eff, weight);
    penalty_at[i] = scalar_of(op, "penalties", penalties[i], cpu());
    written.push_back(w_eff);
    written.push_back(view_of(op, "penalties", penalties[i], cpu()));
    if (!of_w_eff) read.push_back(weight);
    params.w_eff = w_eff.data;
    params.w_eff_dtype = w_eff.dtype;
  }
  check_disjoint(op, written, read);
  run_mask_adamw(tensors, penalty_at);
}

// mask_adamw of one linear layer, from the gradients of its output and penalty. w_eff and penalty: 0 elements for none.
void linear_step(const Tensor& grad_out, const std::optional<Tensor>& grad_penalty, const Tensor& x,
                 const Tensor& scores, const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& weight,
                 const Tensor& w_eff, const Tensor& penalty, double step, const Tensor& beta, const Tensor& next_beta,
                 double lr, double beta1, double beta2, double eps, double weight_decay, double lam) {
  const char* op = "linear_step";
  subnet::LinearGradScores product = linear_gradient(op, grad_out, grad_penalty, x, weight, scores, beta);
  const AdamW adamw{lr, beta1, beta2, eps, weight_decay, lam};
  subnet::MaskAdamW params = settings_of(op, adamw, beta, next_beta, (int64_t)Kind::sigmoid);
  const int64_t num_weights = product.n * product.k;
  const View weight_view = view_of(op, "weight", weight, cpu());
  std::vector<View> written{view_of(op, "scores", scores, cpu())};
  std::vector<View> read{view_of(op, "grad_out", grad_out, cpu()), view_of(op, "x", x, cpu()), weight_view};
  params.num = num_weights;
  params.scores = floats_of(op, "scores", scores, num_weights);
  params.moment_dtype = dtype_of(op, "exp_avg", exp_avg);
  params.exp_avg = moment_of(op, "exp_avg", exp_avg, weight_view, params.moment_dtype, written);
  params.exp_avg_sq = moment_of(op, "exp_avg_sq", exp_avg_sq, weight_view, params.moment_dtype, written);
  params.is_of_w_eff = true;
  params.grad_penalty = product.grad_penalty;
  params.weight = product.weight;
  set_step(op, params, adamw, step);
  float* penalty_at = nullptr;
  const int64_t num_blocks = ceil_div(product.n, subnet::kLinearBlock);
  Partials partials(num_blocks);
  STD_TORCH_CHECK(penalty.numel() > 0 || w_eff.numel() == 0, op, ": w_eff without penalty must have 0 elements");
  if (penalty.numel() > 0) {
    penalty_at = scalar_of(op, "penalty", penalty, cpu());
    params.w_eff = floats_of(op, "w_eff", w_eff, num_weights);
    params.partials = partials.data();
    written.push_back(view_of(op, "w_eff", w_eff, cpu()));
    written.push_back(view_of(op, "penalty", penalty, cpu()));
  }
  check_disjoint(op, written, read);
  run_linear_gradient(product, [&](int64_t begin, int64_t end) {
    subnet::cpu_kernels().linear_step(product, params, begin, end);
  });
  if (penalty_at != nullptr) *penalty_at = (float)add_up(params.partials, num_blocks);
}

// ---- random_bits

void random_bits(const Tensor& seed, const Tensor& offset, int64_t first_sample, const Tensor& out) {
  const char* op = "random_bits";
  int64_t num_groups;
  subnet::RandomBits params{};
  params.out = draws_of(op, out, &num_groups);
  params.rows = out.size(1), params.columns = out.size(2);
  params.seed = seed_of(op, seed, out.size(0), &params.seed_stride);
  params.offset = (uint32_t)*int64_of(op, "offset", offset);
  params.first_sample = first_sample_of(op, first_sample);
  const subnet::CpuKernels& kernels = subnet::cpu_kernels();
  split(num_groups, kGrain / 8, [&](int64_t begin, int64_t end) { kernels.random_bits(params, begin, end); });
}

// ---- sampled and packed masks

void keep_thresholds(const Tensor& scores, const Tensor& beta, const Tensor& out) {
  const char* op = "keep_thresholds";
  subnet::KeepThresholds params{};
  params.scores = reinterpret_cast<const float*>(view_of_float32(op, "scores", scores, cpu()).data);
  check_like(op, "scores", scores, out);
  check_like(op, "out", out, scores);
  params.thresholds = uint16_of(op, "out", out);
  params.num = scores.numel();
  params.beta = *scalar_of(op, "beta", beta, cpu());
  const subnet::CpuKernels& kernels = subnet::cpu_kernels();
  split(params.num, kGrain, [&](int64_t begin, int64_t end) { kernels.keep_thresholds(params, begin, end); });
}

void sampled_weight(const Tensor& weight, const Tensor& thresholds, const Tensor& key, int64_t sample,
                    const Tensor& out) {
  const char* op = "sampled_weight";
  subnet::SampledWeight params{};
  const View from = view_of(op, "weight", weight, cpu()), to = view_of(op, "out", out, cpu());
  check_like(op, "weight", weight, weight);
  check_like(op, "thresholds", thresholds, weight);
  check_like(op, "out", out, weight);
  check_disjoint(op, to, from);
  params.weight = from.data, params.weight_dtype = from.dtype;
  params.out = to.data, params.out_dtype = to.dtype;
  params.thresholds = uint16_of(op, "thresholds", thresholds);
  params.key = key_of(op, key), params.sample = first_sample_of(op, sample);
  set_rows(weight, &params.rows, &params.columns);
  const subnet::CpuKernels& kernels = subnet::cpu_kernels();
  split(params.rows * ceil_div(params.columns, 8), kGrain / 8,
        [&](int64_t begin, int64_t end) { kernels.sampled_weight(params, begin, end); });
}

// By draw: -logit((draw + 1/2) / 2^16).
const float* logistic_noise() {
  static const std::vector<float> table = [] {
    std::vector<float> made(65536);
    for (int draw = 0; draw < 65536; ++draw) {
      const double u = (draw + 0.5) / 65536;
      made[draw] = (float)(std::log1p(-u) - std::log(u));
    }
    return made;
  }();
  return table.data();
}

void sampled_grad_scores(const Tensor& grad_w_eff, const Tensor& weight, const Tensor& scores, const Tensor& beta,
                         const Tensor& key, int64_t sample, double tau, bool is_noisy, const Tensor& grad_scores) {
  const char* op = "sampled_grad_scores";
  subnet::SampledGradScores params{};
  const View grad = view_of(op, "grad_w_eff", grad_w_eff, cpu()), from = view_of(op, "weight", weight, cpu());
  const View to = view_of_float32(op, "grad_scores", grad_scores, cpu());
  const View of_scores = view_of_float32(op, "scores", scores, cpu());
  for (const auto& [name, tensor] : {std::pair<const char*, const Tensor&>{"grad_w_eff", grad_w_eff},
                                     {"weight", weight}, {"scores", scores}, {"grad_scores", grad_scores}}) {
    check_like(op, name, tensor, weight);
  }
  for (const View& read : {grad, from, of_scores}) check_disjoint(op, to, read);
  STD_TORCH_CHECK(tau > 0, op, ": tau must be > 0, got ", tau);
  params.grad_w_eff = grad.data, params.grad_w_eff_dtype = grad.dtype;
  params.weight = from.data, params.weight_dtype = from.dtype;
  params.scores = reinterpret_cast<const float*>(of_scores.data);
  params.grad_scores = reinterpret_cast<float*>(to.data);
  params.noise = is_noisy ? logistic_noise() : nullptr;
  params.key = key_of(op, key), params.sample = first_sample_of(op, sample);
  params.beta = *scalar_of(op, "beta", beta, cpu()), params.tau = (float)tau;
  set_rows(weight, &params.rows, &params.columns);
  const subnet::CpuKernels& kernels = subnet::cpu_kernels();
  split(params.rows * ceil_div(params.columns, 8), kGrain / 8,
        [&](int64_t begin, int64_t end) { kernels.sampled_grad_scores(params, begin, end); });
}

void packed_weight(const Tensor& weight, const Tensor& packed, const Tensor& out) {
  const char* op = "packed_weight";
  subnet::PackedWeight params{};
  const View from = view_of(op, "weight", weight, cpu()), to = view_of(op, "out", out, cpu());
  check_like(op, "weight", weight, weight);
  check_like(op, "out", out, weight);
  check_disjoint(op, to, from);
  params.weight = from.data, params.weight_dtype = from.dtype;
  params.out = to.data, params.out_dtype = to.dtype;
  params.num = weight.numel();
  params.packed = packed_bytes_of(op, packed, params.num);
  const subnet::CpuKernels& kernels = subnet::cpu_kernels();
  split(ceil_div(params.num, 16), kGrain / 16, [&](int64_t begin, int64_t end) {  // in pairs of bytes
    kernels.packed_weight(params, 2 * begin, std::min(2 * end, ceil_div(params.num, 8)));
  });
}

// ---- pack_mask

Tensor pack_mask(const Tensor& mask) {
  const char* op = "pack_mask";
  subnet::PackMask params{};
  params.mask = bytes_of(op, "mask", mask, aoti_torch_dtype_bool(), "bool");
  params.num = mask.numel();
  const int64_t num_bytes = ceil_div(params.num, 8);
  Tensor packed = torch::stable::new_empty(mask, {num_bytes}, torch::headeronly::ScalarType::Byte);
  params.packed = static_cast<uint8_t*>(packed.data_ptr());
  const subnet::CpuKernels& kernels = subnet::cpu_kernels();
  split(num_bytes, kGrain, [&](int64_t begin, int64_t end) { kernels.pack_mask(params, begin, end); });
  return packed;
}

Tensor unpack_mask(const Tensor& packed, int64_t num) {
  const char* op = "unpack_mask";
  subnet::UnpackMask params{};
  params.packed = packed_bytes_of(op, packed, num);
  params.num = num;
  Tensor mask = torch::stable::new_empty(packed, {num}, torch::headeronly::ScalarType::Bool);
  params.mask = static_cast<uint8_t*>(mask.data_ptr());
  const subnet::CpuKernels& kernels = subnet::cpu_kernels();
  split(packed.numel(), kGrain, [&](int64_t begin, int64_t end) { kernels.unpack_mask(params, begin, end); });
  return mask;
}

// ---- capability

int64_t fused_linear_rows() { return subnet::cpu_kernels().fused_linear_rows; }

std::string cpu_capability() { return subnet::cpu_kernels().name; }

void set_cpu_capability(const std::string& name) {
  STD_TORCH_CHECK(subnet::force_cpu_kernels(name.c_str()),
                  "set_cpu_capability: name must be avx512, avx2 or portable, built in and supported by this "
                  "processor, got '", name, "'");
}

}  // namespace

STABLE_TORCH_LIBRARY(subnet_native, m) {
  m.def("effective_weight(Tensor weight, Tensor scores, Tensor beta, int kind, Tensor(a!) w_eff, Tensor(b!) penalty)"
        " -> ()");
  m.def("effective_weights(Tensor[] weights, Tensor[] scores, Tensor beta, int kind, Tensor(a!)[] w_eff,"
        " Tensor(b!) penalties) -> ()");
  m.def("grad_scores(Tensor? grad_w_eff, Tensor? grad_penalty, Tensor weight, Tensor scores, Tensor beta, int kind,"
        " Tensor(a!) grad_scores, Tensor(b!)? grad_weight) -> ()");
  m.def("grad_scores_of_many(Tensor[] grad_w_effs, Tensor[] grad_penalties, Tensor[] weights, Tensor[] scores,"
        " Tensor beta, int kind, Tensor(a!)[] grad_scores) -> ()");
  m.def("masked_linear(Tensor x, Tensor weight, Tensor scores, Tensor beta, Tensor? bias,"
        " Tensor(a!) w_eff, Tensor(b!) penalty, Tensor(c!) out) -> ()");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) out) -> ()");
  m.def("linear_grad_scores(Tensor grad_out, Tensor? grad_penalty, Tensor x, Tensor weight, Tensor scores,"
        " Tensor beta, Tensor(a!) grad_scores) -> ()");
  m.def("add_penalty_grad(Tensor(a!)[] grads, Tensor[] scores, int[] weights_per_score, Tensor beta, float lam,"
        " int kind) -> ()");
  m.def("mask_adamw(Tensor(a!)[] scores, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
        " Tensor[] weights, Tensor(d!)[] w_effs, Tensor(e!)[] penalties, float[] steps, Tensor beta, Tensor next_beta,"
        " int kind, float[] lrs, float beta1, float beta2, float eps, float weight_decay, float[] lams, bool of_w_eff,"
        " Tensor[] grad_penalties, int[] firsts) -> ()");
  m.def("linear_step(Tensor grad_out, Tensor? grad_penalty, Tensor x, Tensor(a!) scores, Tensor(b!) exp_avg,"
        " Tensor(c!) exp_avg_sq, Tensor weight, Tensor(d!) w_eff, Tensor(e!) penalty, float step, Tensor beta,"
        " Tensor next_beta, float lr, float beta1, float beta2, float eps, float weight_decay, float lam) -> ()");
  m.def("random_bits(Tensor seed, Tensor offset, int first_sample, Tensor(a!) out) -> ()");
  m.def("keep_thresholds(Tensor scores, Tensor beta, Tensor(a!) out) -> ()");
  m.def("sampled_weight(Tensor weight, Tensor thresholds, Tensor key, int sample, Tensor(a!) out) -> ()");
  m.def("sampled_grad_scores(Tensor grad_w_eff, Tensor weight, Tensor scores, Tensor beta, Tensor key, int sample,"
        " float tau, bool is_noisy, Tensor(a!) grad_scores) -> ()");
  m.def("packed_weight(Tensor weight, Tensor packed, Tensor(a!) out) -> ()");
  m.def("pack_mask(Tensor mask) -> Tensor");
  m.def("unpack_mask(Tensor packed, int num) -> Tensor");
  m.def("fused_linear_rows() -> int");
  m.def("cpu_capability() -> str");
  m.def("set_cpu_capability(str name) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(subnet_native, CPU, m) {
  m.impl("effective_weight", TORCH_BOX(&effective_weight));
  m.impl("effective_weights", TORCH_BOX(&effective_weights));
  m.impl("grad_scores", TORCH_BOX(&grad_scores));
  m.impl("grad_scores_of_many", TORCH_BOX(&grad_scores_of_many));
  m.impl("masked_linear", TORCH_BOX(&masked_linear));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_grad_scores", TORCH_BOX(&linear_grad_scores));
  m.impl("add_penalty_grad", TORCH_BOX(&add_penalty_grad));
  m.impl("mask_adamw", TORCH_BOX(&mask_adamw));
  m.impl("linear_step", TORCH_BOX(&linear_step));
  m.impl("random_bits", TORCH_BOX(&random_bits));
  m.impl("keep_thresholds", TORCH_BOX(&keep_thresholds));
  m.impl("sampled_weight", TORCH_BOX(&sampled_weight));
  m.impl("sampled_grad_scores", TORCH_BOX(&sampled_grad_scores));
  m.impl("packed_weight", TORCH_BOX(&packed_weight));
  m.impl("pack_mask", TORCH_BOX(&pack_mask));
  m.impl("unpack_mask", TORCH_BOX(&unpack_mask));
}

STABLE_TORCH_LIBRARY_IMPL(subnet_native, CompositeExplicitAutograd, m) {
  m.impl("fused_linear_rows", TORCH_BOX(&fused_linear_rows));
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
  m.impl("set_cpu_capability", TORCH_BOX(&set_cpu_capability));
}

// `import subnet_kernels._C` registers the ops above; the module itself is empty.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
