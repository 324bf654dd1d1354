// grad_scores = sum over the weights that a score governs of (grad_w_eff*weight + grad_penalty) * slope, and, where
// wanted, grad_weight = grad_w_eff * m.
//
// Flat: one pass; reads grad_w_eff, weight and scores once, writes grad_scores once, also over grad_w_eff itself.
// Other units: grad_w_eff*weight is summed per score in double, in storage order and in parts that depend on sizes only;
// then one pass over the scores adds the parts in their order and multiplies by the slope. (grad_weight is made by
// effective_weight's kernels there, with grad_w_eff in the place of weight.)
#include "kernels.h"
#include "score_gradient.h"
#include "walk.h"

namespace subnet {
namespace SUBNET_CAPABILITY {
namespace {

template <class G, class W, bool has_grad, bool has_grad_weight>
void grad_scores_range(const GradScores& p, int64_t begin, int64_t end) {
  const auto* grad = static_cast<const typename G::Stored*>(p.grad_w_eff);
  const auto* weight = static_cast<const typename W::Stored*>(p.weight);
  auto* grad_weight = static_cast<typename W::Stored*>(p.grad_weight);
  const Vector beta = broadcast(p.beta);
  const Vector grad_penalty = broadcast(p.grad_penalty);
  // No std::min, no std:: templates here: a copy compiled for AVX-512 could be linked into the other capabilities.
  const auto step = [&](auto load_g, auto load_w, Vector score, auto store_gw) -> Vector {
    const VectorMask::Pair pair = VectorMask::sigmoid_pair(beta * score);
    const Vector slope = beta * (pair.below * pair.above);
    Vector total = grad_penalty;
    if (has_grad) {
      const Vector g = load_g();
      total = g * load_w() + total;
      if (has_grad_weight) {
        store_gw(g * VectorMath::where_nonnegative(beta * score, pair.above, pair.below));
      }
    }
    return total * slope;
  };
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    const Vector result =
        step([&] { return G::load(grad + i); }, [&] { return W::load(weight + i); },
             load_as<Vector>(p.scores + i), [&](Vector value) { W::store(grad_weight + i, value); });
    Float32::store(p.grad_scores + i, result);
  }
  if (i < end) {
    const int64_t left = end - i;
    const Vector result =
        step([&] { return load_some<G>(grad + i, left); }, [&] { return load_some<W>(weight + i, left); },
             load_some<Float32>(p.scores + i, left),
             [&](Vector value) { store_some<W>(grad_weight + i, value, left); });
    store_some<Float32>(p.grad_scores + i, result, left);
  }
}

// The hard mask has no slope: scores get 0, whatever the gradient; grad_weight = grad_w_eff * m.
template <class G, class W>
void grad_scores_range_hard(const GradScores& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += kLanes) {
    const int64_t left = end - i < kLanes ? end - i : kLanes;
    if (p.grad_weight != nullptr && p.grad_w_eff != nullptr) {
      const Vector grad = load_some<G>(static_cast<const typename G::Stored*>(p.grad_w_eff) + i, left);
      const Vector mask = VectorMask::value<Kind::hard>(load_some<Float32>(p.scores + i, left), Vector{});
      store_some<W>(static_cast<typename W::Stored*>(p.grad_weight) + i, grad * mask, left);
    }
    store_some<Float32>(p.grad_scores + i, Vector{}, left);
  }
}

template <class G, class W>
double dot(const typename G::Stored* grad, const typename W::Stored* weight, int64_t count) {
  Sum sum;
  int64_t i = 0;
  for (; i + kGroup <= count; i += kGroup) {
    Vector product[4];
    for (int k = 0; k < 4; ++k) product[k] = G::load(grad + i + k * kLanes) * W::load(weight + i + k * kLanes);
    sum.add((product[0] + product[1]) + (product[2] + product[3]));
  }
  for (; i < count; i += kLanes) {
    const int64_t left = count - i < kLanes ? count - i : kLanes;
    sum.add(load_some<G>(grad + i, left) * load_some<W>(weight + i, left));
  }
  return sum.total();
}

// sums[i] += grad[i] * weight[i]
template <class G, class W>
void accumulate(const typename G::Stored* grad, const typename W::Stored* weight, double* sums, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    float product[kLanes];
    const int64_t left = count - i < kLanes ? count - i : kLanes;
    if (left == kLanes) {
      store_as(product, G::load(grad + i) * W::load(weight + i));
      for (int lane = 0; lane < kLanes; ++lane) sums[i + lane] += product[lane];
    } else {
      store_as(product, load_some<G>(grad + i, left) * load_some<W>(weight + i, left));
      for (int64_t lane = 0; lane < left; ++lane) sums[i + lane] += product[lane];
    }
  }
}

constexpr int64_t kShortRow = 64;
constexpr int64_t kRowBuffer = 1024;

template <class G, class W>
void reduce_rows(const GradScores& p, int64_t row_begin, int64_t row_end, double* sums) {
  const Layout& layout = *p.layout;
  const int last = layout.loop_dims - 1;
  const int64_t inner = layout.loop_size[last];
  const bool is_shared = layout.loop_stride[last] == 0;
  const auto* grad = static_cast<const typename G::Stored*>(p.grad_w_eff);
  const auto* weight = static_cast<const typename W::Stored*>(p.weight);
  Walk walk(last, layout.loop_size, layout.loop_stride, row_begin);
  if (inner >= kShortRow) {
    for (int64_t row = row_begin; row < row_end; ++row, walk.next()) {
      if (is_shared) {
        sums[walk.offset] += dot<G, W>(grad + row * inner, weight + row * inner, inner);
      } else {
        accumulate<G, W>(grad + row * inner, weight + row * inner, sums + walk.offset, inner);
      }
    }
    return;
  }
  double products[kRowBuffer];
  const int64_t rows_at_once = kRowBuffer / inner;
  for (int64_t row = row_begin; row < row_end;) {
    const int64_t rows = row_end - row < rows_at_once ? row_end - row : rows_at_once;
    __builtin_memset(products, 0, rows * inner * sizeof(double));
    accumulate<G, W>(grad + row * inner, weight + row * inner, products, rows * inner);
    const double* from = products;
    for (int64_t r = 0; r < rows; ++r, walk.next()) {
      double* to = sums + walk.offset;
      for (int64_t k = 0; k < inner; ++k) to[is_shared ? 0 : k] += *from++;
    }
    row += rows;
  }
}

}  // namespace

void grad_scores_flat(const GradScores& p, int64_t begin, int64_t end) {
  with_dtype(p.grad_w_eff_dtype, [&](auto grad_dtype) {
    with_dtype(p.weight_dtype, [&](auto weight_dtype) {
      using G = decltype(grad_dtype);
      using W = decltype(weight_dtype);
      if (p.kind == Kind::hard) return grad_scores_range_hard<G, W>(p, begin, end);
      if (p.grad_w_eff == nullptr) return grad_scores_range<G, W, false, false>(p, begin, end);
      if (p.grad_weight == nullptr) {
        const auto* grad = static_cast<const typename G::Stored*>(p.grad_w_eff) + begin;
        const auto* weight = static_cast<const typename W::Stored*>(p.weight) + begin;
        return score_gradients<G, W>(grad, weight, p.scores + begin, p.beta, p.grad_penalty, p.grad_scores + begin,
                                     end - begin);
      }
      return grad_scores_range<G, W, true, true>(p, begin, end);
    });
  });
}

void grad_scores_reduce(const GradScores& p, int64_t part_begin, int64_t part_end) {
  const Layout& layout = *p.layout;
  const int64_t outer = layout.loop_dims > 1 ? layout.loop_size[0] : 1;
  int64_t rows_per_outer = 1;
  for (int d = 1; d < layout.loop_dims - 1; ++d) rows_per_outer *= layout.loop_size[d];
  for (int64_t part = part_begin; part < part_end; ++part) {
    const int64_t first = outer * part / p.num_parts;
    const int64_t end = outer * (part + 1) / p.num_parts;
    double* sums = p.sums;
    if (p.parts_share_scores) {
      sums += part * layout.num_scores;
      __builtin_memset(sums, 0, layout.num_scores * sizeof(double));
    } else {
      const int64_t scores_per_outer = layout.num_scores / outer;
      __builtin_memset(sums + first * scores_per_outer, 0, (end - first) * scores_per_outer * sizeof(double));
    }
    with_dtype(p.grad_w_eff_dtype, [&](auto grad_dtype) {
      with_dtype(p.weight_dtype, [&](auto weight_dtype) {
        reduce_rows<decltype(grad_dtype), decltype(weight_dtype)>(p, first * rows_per_outer, end * rows_per_outer,
                                                                  sums);
      });
    });
  }
}

void grad_scores_finish(const GradScores& p, int64_t begin, int64_t end) {
  constexpr int64_t kBlock = 256;
  const Layout& layout = *p.layout;
  const int64_t num_sums = p.grad_w_eff == nullptr ? 0 : (p.parts_share_scores ? p.num_parts : 1);
  const double penalty = (double)p.grad_penalty * (double)layout.weights_per_score;
  const Vector beta = broadcast(p.beta);
  float scores[kBlock];
  float grads[kBlock];
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t count = end - at < kBlock ? end - at : kBlock;
    gather(p.scores, layout, at, count, scores);
    for (int64_t i = 0; i < count; ++i) {
      double sum = penalty;
      for (int64_t part = 0; part < num_sums; ++part) sum += p.sums[part * layout.num_scores + at + i];
      grads[i] = (float)sum;
    }
    for (int64_t i = 0; i < count; i += kLanes) {
      const int64_t left = count - i < kLanes ? count - i : kLanes;
      const Vector slope = VectorMask::slope<Kind::sigmoid>(load_some<Float32>(scores + i, left), beta);
      const Vector grad = load_some<Float32>(grads + i, left) * slope;
      store_some<Float32>(grads + i, p.kind == Kind::hard ? Vector{} : grad, left);
    }
    scatter(grads, layout, at, count, p.grad_scores);
  }
}

}  // namespace SUBNET_CAPABILITY
}  // namespace subnet
