// The score gradient of a linear layer in one kernel for sm_80 and newer, on CUTLASS's 2.x kernels: grad_out^T x by
// mma.sync, and the mask's chain rule in its epilogue. What score_gradient_sm90.cu is where there is no wgmma.
//
//   grad_scores[n, k] = ((sum over m of grad_out[m, n] * x[m, k]) * weight[n, k] + grad_penalty) * slope(scores[n, k])
//
// Grid: stream-K (Osama et al., PPoPP 2023): as many CTAs as fit share the tiles of [n, k] and, where the tiles don't
// fill the last wave, the sum over m; parts are added through a workspace in a fixed order, before the epilogue. Factors
// come by 16-byte cp.async, four stages ahead. Weight, scores and the result pass the epilogue once, by 16-byte accesses
// of what a thread holds. fp32 accumulation; the epilogue is fp32 and exact (mask.h).
#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/default_gemm_universal_with_visitor.h>
// needs the two above
#include <cutlass/epilogue/threadblock/fusion/visitors.hpp>

#include "score_gradient_kernel.h"

namespace subnet {
namespace sm80 {

namespace gemm = cutlass::gemm;
namespace visit = cutlass::epilogue::threadblock;

struct stream_k {
  using Tile = gemm::GemmShape<128, 128, 32>;
  using Warp = gemm::GemmShape<64, 64, 32>;
  using Swizzle = gemm::threadblock::ThreadblockSwizzleStreamK;
  static constexpr int kStages = 4;
};

template <class Element, class Weight, class Config>
struct ScoreGradient {
  using Rows = cute::Stride<int64_t, cute::_1, int64_t>;
  using Threads = visit::OutputTileThreadLayout<typename Config::Tile, typename Config::Warp, float, 4, 1>;
  template <class T>
  using Load = visit::VisitorAuxLoad<Threads, T, Rows>;
  using Scalar = visit::VisitorScalarBroadcast<float>;
  using ChainRule =
      visit::VisitorCompute<ScoreGradientEpilogue, float, float, cutlass::FloatRoundStyle::round_to_nearest>;
  using Store = visit::VisitorAuxStore<Threads, float, cutlass::FloatRoundStyle::round_to_nearest, Rows>;
  using Tree = visit::Sm80EVT<
      Store, visit::Sm80EVT<ChainRule, visit::VisitorAccFetch, Load<Weight>, Load<float>, Scalar, Scalar>>;
  using Kernel = typename gemm::kernel::DefaultGemmWithVisitor<
      Element, cutlass::layout::ColumnMajor, cutlass::ComplexTransform::kNone, 8, Element, cutlass::layout::RowMajor,
      cutlass::ComplexTransform::kNone, 8, float, cutlass::layout::RowMajor, 4, float, float,
      cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80, typename Config::Tile, typename Config::Warp,
      gemm::GemmShape<16, 8, 16>, Tree, typename Config::Swizzle, Config::kStages, cutlass::arch::OpMultiplyAdd,
      1>::GemmKernel;

  static typename Kernel::Arguments arguments(const CudaScoreGradient& p) {
    const Rows rows{p.k, {}, 0};
    const typename Tree::Arguments tree{
        {{},
         {const_cast<Weight*>(static_cast<const Weight*>(p.weight)), Weight(0), rows},
         {const_cast<float*>(p.scores), 0.0f, rows},
         {{0.0f}, {p.beta}},
         {{0.0f}, {p.grad_penalty}},
         {}},
        {p.grad_scores, rows}};
    // C and D are the tree's; one batch, so batch strides are not used; all SMs
    return {gemm::GemmUniversalMode::kGemm, {p.n, p.k, p.m}, 1, tree, p.grad_out, p.x, nullptr, nullptr, 0, 0, 0, 0,
            p.n, p.k, 0, 0, -1};
  }
};

}  // namespace sm80
}  // namespace subnet

SUBNET_DEFINE_SCORE_GRADIENT(sm80)
