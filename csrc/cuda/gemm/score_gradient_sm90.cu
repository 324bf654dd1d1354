// The score gradient of a linear layer in one kernel for sm_90a, on CUTLASS 4.2: grad_out^T x by wgmma, and the mask's
// chain rule in its epilogue, so that the weight's gradient never leaves the chip.
//
//   grad_scores[n, k] = ((sum over m of grad_out[m, n] * x[m, k]) * weight[n, k] + grad_penalty) * slope(scores[n, k])
//
// Grid: persistent, one CTA per SM in clusters of two, which share the loads of x. Both factors lie with n and k
// innermost (wgmma takes them transposed); they, weight and scores come by TMA through pipelines of mbarriers, results
// leave by TMA. Reads weight (2 or 4 B per weight) and scores (4 B) once, writes 4 B. fp32 accumulation; the epilogue
// is fp32 and exact (mask.h). Tiles of [n, k], by the name that setup.py compiles them under:
//   pingpong  128x128, two consumer warp groups that each own a tile: one's epilogue runs beside the other's product.
//   wide      128x256, two consumer warp groups on one tile: fewest bytes of shared memory per FLOP, epilogue exposed.
//   stream_k  128x128, as wide; a last wave that would be part empty is shared by all SMs along m, and the parts are
//             added in a fixed order through a workspace before the epilogue.
// Source of the visitor tree: CUTLASS's own (Chen et al., "EVT: Accelerating Deep Learning Training with Epilogue
// Visitor Tree", ASPLOS 2024).
#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "score_gradient_kernel.h"

namespace subnet {
namespace sm90 {

using cute::_1;
using cute::_128;
using cute::_2;
using cute::_256;
using cute::_32;
using cute::_64;
using cute::Shape;
using cutlass::layout::ColumnMajor;
using cutlass::layout::RowMajor;
namespace gemm = cutlass::gemm;
namespace epilogue = cutlass::epilogue;
namespace fusion = cutlass::epilogue::fusion;

// kLoads and kStores: subtiles of the epilogue that may be in flight. Its buffers take from the main loop's.
struct pingpong {
  using Tile = Shape<_128, _128, _64>;
  using Subtile = Shape<_64, _32>;
  using Mainloop = gemm::KernelTmaWarpSpecializedPingpong;
  using Scheduler = gemm::PersistentScheduler;
  static constexpr int kLoads = 4, kStores = 2, kEpilogueThreads = 128;
};

struct wide {
  using Tile = Shape<_128, _256, _64>;
  using Subtile = Shape<_128, _32>;
  using Mainloop = gemm::KernelTmaWarpSpecializedCooperative;
  using Scheduler = gemm::PersistentScheduler;
  static constexpr int kLoads = 2, kStores = 2, kEpilogueThreads = 256;
};

struct stream_k {
  using Tile = Shape<_128, _128, _64>;
  using Subtile = Shape<_128, _32>;
  using Mainloop = gemm::KernelTmaWarpSpecializedCooperative;
  using Scheduler = gemm::StreamKScheduler;
  static constexpr int kLoads = 2, kStores = 2, kEpilogueThreads = 256;
};

template <class Element, class Weight, class Config>
struct ScoreGradient {
  using Tile = typename Config::Tile;
  using Subtile = typename Config::Subtile;
  using Cluster = Shape<_2, _1, _1>;
  static constexpr int kFragment = cute::size(Subtile{}) / Config::kEpilogueThreads;
  using Policy = epilogue::Sm90TmaWarpSpecialized<Config::kLoads, Config::kStores, kFragment, false, true>;

  struct Descriptor {  // what AuxLoadDescriptor asks of CUTLASS's own EpilogueDescriptor
    using EpilogueTile = Subtile;
    static constexpr int StagesC = Config::kLoads;
  };
  template <class T, class From = epilogue::collective::detail::AuxLoadDescriptor<Descriptor, RowMajor, T>>
  using Load = fusion::Sm90AuxLoad<From::Stages, Subtile, T, typename From::Stride, typename From::SmemLayoutAtom,
                                   typename From::CopyOpS2R, 128 / cutlass::sizeof_bits_v<T>, false>;
  using Scalar = fusion::Sm90ScalarBroadcast<float>;
  using ChainRule =
      fusion::Sm90Compute<ScoreGradientEpilogue, float, float, cutlass::FloatRoundStyle::round_to_nearest>;
  using Tree = fusion::Sm90EVT<ChainRule, fusion::Sm90AccFetch, Load<Weight>, Load<float>, Scalar, Scalar>;

  using Epilogue = typename epilogue::collective::detail::Sm90TmaBuilderImpl<
      Tile, Subtile, float, float, void, RowMajor, 4, float, RowMajor, 4, Tree, Policy>::CollectiveOp;
  using Mainloop = typename gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, ColumnMajor, 8, Element, RowMajor, 8, float, Tile,
      Cluster, gemm::collective::StageCountAutoCarveout<(int)sizeof(typename Epilogue::SharedStorage)>,
      typename Config::Mainloop>::CollectiveOp;
  using Kernel =
      gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue, typename Config::Scheduler>;
  static_assert(Mainloop::DispatchPolicy::Stages >= 3, "too few to keep loads in flight");
  static_assert(Kernel::SharedStorageSize <= gemm::collective::detail::sm90_smem_capacity_bytes, "can not launch");

  static typename Kernel::Arguments arguments(const CudaScoreGradient& p) {
    typename Kernel::Arguments args{};
    args.mode = gemm::GemmUniversalMode::kGemm;
    args.problem_shape = {p.n, p.k, p.m, 1};
    args.mainloop.ptr_A = static_cast<const Element*>(p.grad_out);
    args.mainloop.dA = {{}, p.n, 0};
    args.mainloop.ptr_B = static_cast<const Element*>(p.x);
    args.mainloop.dB = {{}, p.k, 0};
    const typename Kernel::StrideD rows{p.k, {}, 0};
    args.epilogue.ptr_D = p.grad_scores;
    args.epilogue.dD = rows;
    args.epilogue.thread = {{},
                            {static_cast<const Weight*>(p.weight), Weight(0), rows},
                            {p.scores, 0.0f, rows},
                            {{0.0f}, {p.beta}},
                            {{0.0f}, {p.grad_penalty}},
                            {}};
    args.scheduler.max_swizzle_size = 8;  // neighbours in time are neighbours in both factors, for L2's sake
    return args;
  }
};

}  // namespace sm90
}  // namespace subnet

SUBNET_DEFINE_SCORE_GRADIENT(sm90)
