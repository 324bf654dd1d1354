// w_eff = weight * m, penalty = sum(m).
//
// Flat: one pass; reads weight and scores once, writes w_eff once, keeps the mask in registers.
// Other units: the mask of each score is made once (num_scores values of workspace), then weights are scaled by it in
// storage order; scores are gathered once, weights are never copied.
// m is computed in fp32; its sum is kept in double per chunk of kChunk elements, and the caller adds the chunks in order.
#include "kernels.h"
#include "scale_by_mask.h"
#include "walk.h"

namespace subnet {
namespace SUBNET_CAPABILITY {
namespace {

template <Kind kind>
double make_mask(const float* scores, float beta_value, float* mask, int64_t count) {
  const Vector beta = broadcast(beta_value);
  Sum sum;
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t left = count - i < kLanes ? count - i : kLanes;
    const Vector value = VectorMask::value<kind>(load_some<Float32>(scores + i, left), beta);
    store_some<Float32>(mask + i, value, left);
    sum.add_some(value, left);
  }
  return sum.total();
}

// out[i] = weight[i] * mask[i], or * mask[0] if is_shared.
template <class W, class O>
void scale(const typename W::Stored* weight, const float* mask, bool is_shared, typename O::Stored* out,
           int64_t count) {
  const Vector shared = broadcast(mask[0]);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    O::store(out + i, W::load(weight + i) * (is_shared ? shared : load_as<Vector>(mask + i)));
  }
  if (i < count) {
    const int64_t left = count - i;
    const Vector value = is_shared ? shared : load_some<Float32>(mask + i, left);
    store_some<O>(out + i, load_some<W>(weight + i, left) * value, left);
  }
}

constexpr int64_t kShortRow = 64;    // rows shorter than this are scaled many at a time
constexpr int64_t kRowBuffer = 1024;

template <class W, class O>
void scale_rows(const EffectiveWeight& p, int64_t row_begin, int64_t row_end) {
  const Layout& layout = *p.layout;
  const int last = layout.loop_dims - 1;
  const int64_t inner = layout.loop_size[last];
  const bool is_shared = layout.loop_stride[last] == 0;
  const auto* weight = static_cast<const typename W::Stored*>(p.weight);
  auto* w_eff = static_cast<typename O::Stored*>(p.w_eff);
  Walk walk(last, layout.loop_size, layout.loop_stride, row_begin);
  if (inner >= kShortRow) {
    for (int64_t row = row_begin; row < row_end; ++row, walk.next()) {
      scale<W, O>(weight + row * inner, p.mask + walk.offset, is_shared, w_eff + row * inner, inner);
    }
    return;
  }
  float expanded[kRowBuffer];
  const int64_t rows_at_once = kRowBuffer / inner;
  for (int64_t row = row_begin; row < row_end;) {
    const int64_t rows = row_end - row < rows_at_once ? row_end - row : rows_at_once;
    float* to = expanded;
    for (int64_t r = 0; r < rows; ++r, walk.next()) {
      const float* from = p.mask + walk.offset;
      for (int64_t k = 0; k < inner; ++k) *to++ = is_shared ? *from : from[k];
    }
    scale<W, O>(weight + row * inner, expanded, false, w_eff + row * inner, rows * inner);
    row += rows;
  }
}

}  // namespace

void effective_weight_flat(const EffectiveWeight& p, int64_t chunk_begin, int64_t chunk_end) {
  with_dtype(p.weight_dtype, [&](auto weight_dtype) {
    with_dtype(p.w_eff_dtype, [&](auto w_eff_dtype) {
      using W = decltype(weight_dtype);
      using O = decltype(w_eff_dtype);
      for (int64_t chunk = chunk_begin; chunk < chunk_end; ++chunk) {
        const int64_t at = chunk * kChunk;
        const int64_t left = p.layout->num_weights - at;
        const int64_t count = left < kChunk ? left : kChunk;
        const auto* weight = static_cast<const typename W::Stored*>(p.weight) + at;
        auto* w_eff = static_cast<typename O::Stored*>(p.w_eff) + at;
        p.partials[chunk] = p.kind == Kind::hard
                                ? scale_by_mask<Kind::hard, W, O>(weight, p.scores + at, p.beta, w_eff, count)
                                : scale_by_mask<Kind::sigmoid, W, O>(weight, p.scores + at, p.beta, w_eff, count);
      }
    });
  });
}

void effective_weight_mask(const EffectiveWeight& p, int64_t chunk_begin, int64_t chunk_end) {
  constexpr int64_t kBlock = 1024;
  float scores[kBlock];
  for (int64_t chunk = chunk_begin; chunk < chunk_end; ++chunk) {
    const int64_t end = (chunk + 1) * kChunk < p.layout->num_scores ? (chunk + 1) * kChunk : p.layout->num_scores;
    double sum = 0;
    for (int64_t at = chunk * kChunk; at < end; at += kBlock) {
      const int64_t count = end - at < kBlock ? end - at : kBlock;
      gather(p.scores, *p.layout, at, count, scores);
      sum += p.kind == Kind::hard ? make_mask<Kind::hard>(scores, p.beta, p.mask + at, count)
                                  : make_mask<Kind::sigmoid>(scores, p.beta, p.mask + at, count);
    }
    p.partials[chunk] = sum;
  }
}

void effective_weight_rows(const EffectiveWeight& p, int64_t row_begin, int64_t row_end) {
  with_dtype(p.weight_dtype, [&](auto weight_dtype) {
    with_dtype(p.w_eff_dtype, [&](auto w_eff_dtype) {
      scale_rows<decltype(weight_dtype), decltype(w_eff_dtype)>(p, row_begin, row_end);
    });
  });
}

}  // namespace SUBNET_CAPABILITY
}  // namespace subnet
