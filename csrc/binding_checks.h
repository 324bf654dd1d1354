// Checks of binding.cpp and binding_cuda.cpp: what a tensor must be before a kernel sees its pointer. Each refusal says
// op, argument,
// expectation and what came.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <string>
#include <vector>

#include "layout.h"

namespace {

using subnet::Dtype;
using subnet::Kind;
using torch::stable::Tensor;

struct View {
  const char* name;
  char* data;
  int ndim;
  const int64_t* size;
  const int64_t* stride;
  Dtype dtype;
};

inline std::string text(int ndim, const int64_t* values) {
  std::string out = "[";
  for (int d = 0; d < ndim; ++d) out += (d ? ", " : "") + std::to_string(values[d]);
  return out + "]";
}

inline Dtype dtype_of(const char* op, const char* name, const Tensor& tensor) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  if (dtype == aoti_torch_dtype_float32()) return Dtype::float32;
  if (dtype == aoti_torch_dtype_bfloat16()) return Dtype::bfloat16;
  STD_TORCH_CHECK(dtype == aoti_torch_dtype_float16(), op, ": ", name,
                  " must be float32, bfloat16 or float16; use the reference backend for other dtypes");
  return Dtype::float16;
}

inline View view_of(const char* op, const char* name, const Tensor& tensor, int32_t device_type) {
  int32_t actual;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &actual));
  STD_TORCH_CHECK(actual == device_type, op, ": ", name, " must be on the same device as the other tensors");
  const auto size = tensor.sizes();
  STD_TORCH_CHECK(size.size() <= (size_t)subnet::kMaxDims, op, ": ", name, " must have at most ", subnet::kMaxDims,
                  " dimensions, got ", size.size());
  return {name, static_cast<char*>(tensor.data_ptr()), (int)size.size(), size.data(), tensor.strides().data(),
          dtype_of(op, name, tensor)};
}

inline View view_of_float32(const char* op, const char* name, const Tensor& tensor, int32_t device_type) {
  const View view = view_of(op, name, tensor, device_type);
  STD_TORCH_CHECK(view.dtype == Dtype::float32, op, ": ", name, " must be float32");
  return view;
}

// A 0-d float32 tensor's place.
inline float* scalar_of(const char* op, const char* name, const Tensor& tensor, int32_t device_type) {
  const View view = view_of_float32(op, name, tensor, device_type);
  STD_TORCH_CHECK(view.ndim == 0, op, ": ", name, " must be 0-d, got shape ", text(view.ndim, view.size));
  return reinterpret_cast<float*>(view.data);
}

inline void check_shape(const char* op, const View& view, const View& like) {
  bool is_same = view.ndim == like.ndim;
  for (int d = 0; is_same && d < view.ndim; ++d) is_same = view.size[d] == like.size[d];
  STD_TORCH_CHECK(is_same, op, ": ", view.name, " must have the shape of ", like.name, ", ", text(like.ndim, like.size),
                  ", got ", text(view.ndim, view.size));
}

inline int64_t numel(const View& view) { return subnet::count_elements(view.ndim, view.size); }

// Bytes from the first to the last element.
inline int64_t extent(const View& view) {
  if (numel(view) == 0) return 0;
  int64_t last = 0;
  for (int d = 0; d < view.ndim; ++d) last += (view.size[d] - 1) * view.stride[d];
  return (last + 1) * (view.dtype == Dtype::float32 ? 4 : 2);
}

inline void check_disjoint(const char* op, const View& out, const View& in) {
  STD_TORCH_CHECK(out.data + extent(out) <= in.data || in.data + extent(in) <= out.data, op, ": ", out.name,
                  " must not share memory with ", in.name);
}

// No tensor of `written` shares memory with another one of either list.
inline void check_disjoint(const char* op, const std::vector<View>& written, const std::vector<View>& read) {
  struct Range {
    const View* view;
    bool is_written;
  };
  std::vector<Range> ranges;
  ranges.reserve(written.size() + read.size());
  for (const View& view : written) ranges.push_back({&view, true});
  for (const View& view : read) ranges.push_back({&view, false});
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.view->data < b.view->data; });
  const View* last = nullptr;          // the one that ends last so far, of all and of the written ones
  const View* last_written = nullptr;
  for (const Range& range : ranges) {
    if (numel(*range.view) == 0) continue;
    const View* before = range.is_written ? last : last_written;
    if (before != nullptr) {
      range.is_written ? check_disjoint(op, *range.view, *before) : check_disjoint(op, *before, *range.view);
    }
    const auto ends_later = [&](const View* than) {
      return than == nullptr || range.view->data + extent(*range.view) > than->data + extent(*than);
    };
    if (ends_later(last)) last = range.view;
    if (range.is_written && ends_later(last_written)) last_written = range.view;
  }
}

inline void check_is_dense(const char* op, const View& weight) {
  int order[subnet::kMaxDims];
  STD_TORCH_CHECK(numel(weight) == 0 || subnet::storage_order(weight.ndim, weight.size, weight.stride, order) >= 0, op,
                  ": ", weight.name, " must be dense in memory in some order of its dimensions, got shape ",
                  text(weight.ndim, weight.size), " and strides ", text(weight.ndim, weight.stride),
                  "; call .contiguous() first");
}

inline void check_strides(const char* op, const View& view, const View& weight) {
  check_shape(op, view, weight);
  STD_TORCH_CHECK(numel(weight) == 0 || subnet::same_strides(weight.ndim, weight.size, weight.stride, view.stride), op,
                  ": ", view.name, " must have weight's strides ", text(weight.ndim, weight.stride), ", got ",
                  text(view.ndim, view.stride));
}

inline void check_has_no_overlap(const char* op, const View& view) {
  int order[subnet::kMaxDims];
  int count = 0;
  for (int d = 0; d < view.ndim; ++d) {
    if (view.size[d] == 1) continue;
    int at = count++;
    for (; at > 0 && view.stride[order[at - 1]] > view.stride[d]; --at) order[at] = order[at - 1];
    order[at] = d;
  }
  int64_t last = 0;
  for (int at = 0; at < count && numel(view) > 0; ++at) {
    STD_TORCH_CHECK(view.stride[order[at]] > last, op, ": ", view.name,
                    " must not hold one element at several indices, got strides ", text(view.ndim, view.stride));
    last += (view.size[order[at]] - 1) * view.stride[order[at]];
  }
}

// Each score size divides the weight's: one score governs a block of neighbours along each dimension.
inline void check_scores(const char* op, const View& scores, const View& weight) {
  bool is_valid = scores.ndim == weight.ndim;
  for (int d = 0; is_valid && d < weight.ndim; ++d) {
    const int64_t k = scores.size[d], n = weight.size[d];
    is_valid = k == n || (k > 0 && n % k == 0);
  }
  STD_TORCH_CHECK(is_valid, op, ": scores must have weight's number of dimensions and sizes that divide weight's ",
                  text(weight.ndim, weight.size), ", got ", text(scores.ndim, scores.size));
}

inline Kind kind_of(const char* op, int64_t kind) {
  STD_TORCH_CHECK(kind == 0 || kind == 1, op, ": kind must be 0 (sigmoid) or 1 (hard), got ", kind);
  return static_cast<Kind>(kind);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The lists fit each other and penalties, which is returned.
inline View check_lists(const char* op, const std::vector<Tensor>& weights, const std::vector<Tensor>& scores,
                 const std::vector<Tensor>& w_eff, const Tensor& penalties_, int32_t device_type) {
  const View penalties = view_of_float32(op, "penalties", penalties_, device_type);
  const int64_t num = (int64_t)weights.size();
  STD_TORCH_CHECK(scores.size() == weights.size() && w_eff.size() == weights.size(), op,
                  ": scores and w_eff must be lists as long as weights (", num, "), got ", scores.size(), " and ",
                  w_eff.size());
  STD_TORCH_CHECK(penalties.ndim == 1 && penalties.size[0] == num, op, ": penalties must have shape [", num,
                  "], got ", text(penalties.ndim, penalties.size));
  check_has_no_overlap(op, penalties);
  return penalties;
}

// A contiguous tensor of bytes (uint8 or bool).
inline uint8_t* bytes_of(const char* op, const char* name, const Tensor& tensor, int32_t dtype, const char* dtype_name) {
  int32_t actual;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &actual));
  STD_TORCH_CHECK(actual == dtype, op, ": ", name, " must be ", dtype_name);
  STD_TORCH_CHECK(tensor.is_contiguous(), op, ": ", name, " must be contiguous; call .contiguous() first");
  return static_cast<uint8_t*>(tensor.data_ptr());
}

// A 0-d int64 tensor's place.
inline const int64_t* int64_of(const char* op, const char* name, const Tensor& tensor) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  STD_TORCH_CHECK(dtype == aoti_torch_dtype_int64() && tensor.dim() == 0, op, ": ", name, " must be a 0-d int64 tensor");
  return static_cast<const int64_t*>(tensor.data_ptr());
}

// One seed for all samples (0-d, `stride` gets 0) or one for each ([samples], 1).
inline const int64_t* seed_of(const char* op, const Tensor& seed, int64_t samples, int64_t* stride) {
  *stride = seed.dim();
  if (seed.dim() == 0) return int64_of(op, "seed", seed);
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(seed.get(), &dtype));
  STD_TORCH_CHECK(dtype == aoti_torch_dtype_int64() && seed.dim() == 1 && seed.size(0) == samples && seed.is_contiguous(),
                  op, ": seed must be int64, 0-d or contiguous [", samples, "], one for each sample");
  return static_cast<const int64_t*>(seed.data_ptr());
}

inline uint32_t first_sample_of(const char* op, int64_t first_sample) {
  STD_TORCH_CHECK(first_sample >= 0 && first_sample <= UINT32_MAX, op, ": samples are numbered from 0 to ", UINT32_MAX,
                  ", got ", first_sample);
  return (uint32_t)first_sample;
}

// Where draws [samples, rows, columns] go; `num_groups` gets how many groups of eight columns they are.
inline uint16_t* draws_of(const char* op, const Tensor& out, int64_t* num_groups) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(out.get(), &dtype));
  STD_TORCH_CHECK(dtype == aoti_torch_dtype_uint16() && out.dim() == 3 && out.is_contiguous(), op,
                  ": out must be a contiguous uint16 [samples, rows, columns]");
  *num_groups = out.numel() == 0 ? 0 : out.size(0) * out.size(1) * ceil_div(out.size(2), 8);
  STD_TORCH_CHECK(*num_groups <= INT32_MAX, op, ": at most ", INT32_MAX, " groups of eight columns a call, got ",
                  *num_groups, "; draw fewer samples at a time");
  return static_cast<uint16_t*>(out.data_ptr());
}

// A contiguous tensor of `shape`'s sizes.
inline void check_like(const char* op, const char* name, const Tensor& tensor, const Tensor& shape) {
  bool is_same = tensor.dim() == shape.dim() && tensor.is_contiguous();
  for (int64_t d = 0; is_same && d < tensor.dim(); ++d) is_same = tensor.size(d) == shape.size(d);
  STD_TORCH_CHECK(is_same, op, ": ", name, " must be contiguous and of weight's shape");
}

inline uint16_t* uint16_of(const char* op, const char* name, const Tensor& tensor) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  STD_TORCH_CHECK(dtype == aoti_torch_dtype_uint16(), op, ": ", name, " must be uint16");
  return static_cast<uint16_t*>(tensor.data_ptr());
}

// [seed, step]
inline const int64_t* key_of(const char* op, const Tensor& key) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(key.get(), &dtype));
  STD_TORCH_CHECK(dtype == aoti_torch_dtype_int64() && key.dim() == 1 && key.numel() == 2 && key.is_contiguous(), op,
                  ": key must be int64 [seed, step]");
  return static_cast<const int64_t*>(key.data_ptr());
}

// How masks of this shape are drawn: the first dimension is the row, the others together the column.
inline void set_rows(const Tensor& weight, int64_t* rows, int64_t* columns) {
  *rows = weight.dim() > 1 ? weight.size(0) : 1;
  *columns = *rows == 0 ? 0 : weight.numel() / *rows;
}

// The bytes of a packed mask of `num` elements.
inline uint8_t* packed_bytes_of(const char* op, const Tensor& packed, int64_t num) {
  uint8_t* bytes = bytes_of(op, "packed", packed, aoti_torch_dtype_uint8(), "uint8");
  STD_TORCH_CHECK(num >= 0 && packed.dim() == 1 && packed.numel() == num / 8 + (num % 8 != 0), op,
                  ": packed must be 1-d with ceil(num/8) bytes for num = ", num, ", got ", packed.numel(), " bytes in ",
                  packed.dim(), " dimensions");
  return bytes;
}

inline void check_lengths(const char* op, size_t num, const std::vector<size_t>& others) {
  for (const size_t other : others) {
    STD_TORCH_CHECK(other == num, op, ": all lists must be of one length, got ", num, " and ", other);
  }
}

// What every mask_adamw refuses.
inline void check_decay_rates(const char* op, int64_t kind, double beta1, double beta2) {
  STD_TORCH_CHECK(kind_of(op, kind) == Kind::sigmoid, op, ": kind must be 0 (sigmoid), a hard mask has no slope");
  for (const double decay_rate : {beta1, beta2}) {
    STD_TORCH_CHECK(decay_rate >= 0 && decay_rate < 1, op, ": beta1 and beta2 must be in [0, 1), got ", beta1, " and ",
                    beta2);
  }
}

inline int32_t cpu() { return aoti_torch_device_type_cpu(); }

}  // namespace
