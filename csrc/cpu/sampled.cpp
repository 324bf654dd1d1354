// Masks that are drawn: the decision is draw < threshold, in integers, so that equal thresholds give equal masks on every
// backend. No mask is stored: each pass draws it again. subnet_kernels/masks.py is the definition.
#include "draws.h"
#include "kernels.h"

namespace subnet {
namespace SUBNET_CAPABILITY {
namespace {

typedef uint16_t VectorDraws __attribute__((vector_size(kLanes * 2)));

SUBNET_INLINE VectorBits widened(const uint16_t* from, int64_t count) {
  VectorDraws values{};
  if (count == kLanes) {
    values = load_as<VectorDraws>(from);
  } else {
    __builtin_memcpy(&values, from, 2 * count);
  }
  return __builtin_convertvector(values, VectorBits);
}

// value where `is_kept` is all ones, else 0
SUBNET_INLINE Vector only(VectorInt is_kept, Vector value) { return (Vector)((VectorInt)value & is_kept); }

}  // namespace

void keep_thresholds(const KeepThresholds& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += kLanes) {
    const int64_t left = end - i < kLanes ? end - i : kLanes;
    const Vector mask = VectorMask::value<Kind::sigmoid>(load_some<Float32>(p.scores + i, left), broadcast(p.beta));
    const Vector scaled = mask * 65536.0f - 0.5f;
    const Vector positive = only((VectorInt)(scaled > 0.0f), scaled);  // a NaN keeps nothing
    const VectorInt whole = __builtin_convertvector(positive, VectorInt);
    const VectorInt up = whole - (VectorInt)(positive > __builtin_convertvector(whole, Vector));  // true is -1
    const VectorInt is_over = (VectorInt)(up > 65535);
    const auto thresholds = __builtin_convertvector((up & ~is_over) | (is_over & 65535), VectorDraws);
    __builtin_memcpy(p.thresholds + i, &thresholds, 2 * left);
  }
}

void sampled_weight(const SampledWeight& p, int64_t group_begin, int64_t group_end) {
  with_dtype(p.weight_dtype, [&](auto weight_dtype) {
    with_dtype(p.out_dtype, [&](auto out_dtype) {
      using W = decltype(weight_dtype);
      using O = decltype(out_dtype);
      for_draws({(uint64_t)p.key[0], (uint32_t)p.key[1], p.sample}, p.columns, group_begin, group_end,
                [&](int64_t row, int64_t column, int64_t count, const uint16_t* draws) {
                  const int64_t at = row * p.columns + column;
                  const auto* weight = static_cast<const typename W::Stored*>(p.weight) + at;
                  auto* out = static_cast<typename O::Stored*>(p.out) + at;
                  for (int64_t i = 0; i < count; i += kLanes) {
                    const int64_t left = count - i < kLanes ? count - i : kLanes;
                    const VectorInt is_kept =
                        (VectorInt)(widened(draws + i, left) < widened(p.thresholds + at + i, left));
                    store_some<O>(out + i, only(is_kept, load_some<W>(weight + i, left)), left);
                  }
                });
    });
  });
}

void sampled_grad_scores(const SampledGradScores& p, int64_t group_begin, int64_t group_end) {
  const Vector beta = broadcast(p.beta), per_tau = broadcast(1.0f / p.tau);
  with_dtype(p.grad_w_eff_dtype, [&](auto grad_dtype) {
    with_dtype(p.weight_dtype, [&](auto weight_dtype) {
      using G = decltype(grad_dtype);
      using W = decltype(weight_dtype);
      for_draws({(uint64_t)p.key[0], (uint32_t)p.key[1], p.sample}, p.columns, group_begin, group_end,
                [&](int64_t row, int64_t column, int64_t count, const uint16_t* draws) {
                  const int64_t at = row * p.columns + column;
                  const auto* grad = static_cast<const typename G::Stored*>(p.grad_w_eff) + at;
                  const auto* weight = static_cast<const typename W::Stored*>(p.weight) + at;
                  for (int64_t i = 0; i < count; i += kLanes) {
                    const int64_t left = count - i < kLanes ? count - i : kLanes;
                    Vector noise{};
                    for (int lane = 0; lane < kLanes && p.noise != nullptr; ++lane) noise[lane] = p.noise[draws[i + lane]];
                    const Vector z = beta * load_some<Float32>(p.scores + at + i, left);
                    const VectorMask::Pair y = VectorMask::sigmoid_pair((z + noise) * per_tau);
                    const Vector slope = beta * per_tau * (y.above * y.below);
                    const Vector made = load_some<G>(grad + i, left) * load_some<W>(weight + i, left) * slope;
                    float* sum = p.grad_scores + at + i;
                    store_some<Float32>(sum, load_some<Float32>(sum, left) + made, left);
                  }
                });
    });
  });
}

void packed_weight(const PackedWeight& p, int64_t byte_begin, int64_t byte_end) {
  VectorBits bit_of_lane;
  for (int lane = 0; lane < kLanes; ++lane) bit_of_lane[lane] = 1u << lane;
  const auto kept = [&](uint32_t bits, Vector value) {
    return only((VectorInt)(((VectorBits{} + bits) & bit_of_lane) != 0), value);
  };
  const int64_t end = 8 * byte_end < p.num ? 8 * byte_end : p.num;
  with_dtype(p.weight_dtype, [&](auto weight_dtype) {
    with_dtype(p.out_dtype, [&](auto out_dtype) {
      using W = decltype(weight_dtype);
      using O = decltype(out_dtype);
      const auto* weight = static_cast<const typename W::Stored*>(p.weight);
      auto* out = static_cast<typename O::Stored*>(p.out);
      int64_t at = 8 * byte_begin;
      for (; at + 16 <= end; at += 16) {
        const uint32_t bits = p.packed[at / 8] | (uint32_t)p.packed[at / 8 + 1] << 8;
        for (int lane = 0; lane < 16; lane += kLanes) {
          O::store(out + at + lane, kept(bits >> lane, W::load(weight + at + lane)));
        }
      }
      for (; at < end; at += kLanes) {
        const int64_t left = end - at < kLanes ? end - at : kLanes;
        uint32_t bits = p.packed[at / 8];
        if (at / 8 + 1 < byte_end) bits |= (uint32_t)p.packed[at / 8 + 1] << 8;
        store_some<O>(out + at, kept(bits >> at % 8, load_some<W>(weight + at, left)), left);
      }
    });
  });
}

}  // namespace SUBNET_CAPABILITY
}  // namespace subnet
