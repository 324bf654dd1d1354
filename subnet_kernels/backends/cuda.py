"""The backend ``cuda``: CUDA C++ kernels of the extension, compiled ahead of time, and the vendor's products.

Every elementwise op of many tensors is one launch, whose argument is the table of their addresses: nothing is copied to
the device beforehand, and in a captured CUDA graph it is one launch too. Scores of weight's shape.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..masks import Gumbel, MaskKind, SampledKind
from . import cuda_gemm
from .base import KIND_CODES, AdamW, Call, keeps_w_eff, numbers_of_entries
from .layout import aligned, is_dense
from .native import ExtensionBackend, has_cuda_kernels

_bump = torch.autograd.graph.increment_version


def _number(value: float | Tensor) -> tuple[float, Tensor | None]:
    """A number as the ops take it: (value, None), or (ignored, where the kernel reads it)."""
    return (0.0, value.to(torch.float32)) if isinstance(value, Tensor) else (value, None)


def _numbers(values: list[float | Tensor], none: Tensor) -> tuple[list[float], list[Tensor]]:
    """The same for lists, in which ``none`` stands for None."""
    pairs = [_number(value) for value in values]
    return [value for value, _ in pairs], [none if at is None else at for _, at in pairs]


class CudaBackend(ExtensionBackend):
    """Vendor matrix products, and our one-pass kernels for everything elementwise, on a GPU."""

    def __init__(self) -> None:
        super().__init__("cuda")

    def refuse(self, call: Call) -> str | None:
        if (reason := super().refuse(call)) is not None:
            return reason
        if not torch.cuda.is_available():
            return "torch can use no GPU here"
        if not has_cuda_kernels():
            return "the extension was built without CUDA kernels (no nvcc then) or torch has no CUDA"
        if not call.is_same_shape:
            return "scores coarser than weight are not built in CUDA C++ yet"
        return None

    def add_penalty_grad_(
        self, grads: list[Tensor], scores: list[Tensor], weights_per_score: list[int], beta: Tensor,
        lam: float | Tensor, kind: MaskKind,
    ) -> None:
        dense = [g if is_dense(g) else g.contiguous() for g in grads]
        flat = [aligned(g, s) for g, s in zip(dense, scores, strict=True)]
        op = self.ops.add_penalty_grad_of_many.default
        op(dense, flat, weights_per_score, beta, *_number(lam), KIND_CODES[kind.name])
        for grad, made in zip(grads, dense, strict=True):
            grad.copy_(made) if made is not grad else _bump(grad)

    def mask_adamw_(
        self, scores: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
        steps: list[Tensor], weights: list[Tensor], slots: list[tuple[Tensor, Tensor] | None], beta: Tensor,
        next_beta: Tensor, kind: MaskKind, numbers: AdamW | Sequence[AdamW],
        grad_penalties: list[Tensor | None] | None = None,
    ) -> None:
        if not scores:
            return
        each = numbers_of_entries(numbers, 1 if isinstance(numbers, AdamW) else len(scores))
        none = beta.new_empty(0)  # how the op is told that an entry has no effective weight, or no grad_penalty
        w_effs, penalties = zip(*(slot or (none, none) for slot in slots)) if slots else ((), ())
        arriving = [none if penalty is None else penalty for penalty in grad_penalties or [None] * len(scores)]
        self.ops.mask_adamw_of_many.default(
            scores, grads, exp_avgs, exp_avg_sqs, weights, w_effs, penalties, steps, arriving,
            grad_penalties is not None, beta, next_beta, KIND_CODES[kind.name], *_numbers([n.lr for n in each], none),
            each[0].beta1, each[0].beta2, each[0].eps, each[0].weight_decay, *_numbers([n.lam for n in each], none),
        )  # fmt: skip
        written = [tensor for slot in slots if slot is not None for tensor in slot]
        _bump([*scores, *exp_avgs, *exp_avg_sqs, *written])

    def sampled_weights(
        self, weight: Tensor, scores: Tensor, thresholds: Tensor | None, beta: Tensor, kind: SampledKind, out: Tensor
    ) -> None:
        if thresholds is None:
            thresholds = self.keep_thresholds(scores, beta, kind)
        weight, op = weight.contiguous(), self.ops.sampled_weights.default
        op(weight, thresholds, kind.key, kind.sample, kind.samples, out)
        _bump(out)

    def sampled_grad_scores_of_all_(
        self, grad_scores: Tensor, grad_w_eff: Tensor, weight: Tensor, scores: Tensor, beta: Tensor, kind: SampledKind
    ) -> None:
        tau, is_noisy = (kind.tau, True) if isinstance(kind, Gumbel) else (1.0, False)
        self.ops.sampled_grad_scores_of_all.default(
            grad_w_eff.contiguous(), weight.contiguous(), scores.contiguous(), beta, kind.key, kind.sample,
            kind.samples, tau, is_noisy, grad_scores,
        )  # fmt: skip
        _bump(grad_scores)

    sampled_weight, sampled_grad_scores_ = sampled_weights, sampled_grad_scores_of_all_  # of one sample: the same

    def masked_linear(
        self, x: Tensor, weight: Tensor, scores: Tensor, beta: Tensor, bias: Tensor | None, kind: MaskKind,
        plan: str | None, buffers: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        is_kept = buffers is not None or keeps_w_eff(plan)
        if is_kept or cuda_gemm.few_rows_refusal(x, weight, scores, kind) is not None:
            return super().masked_linear(x, weight, scores, beta, bias, kind, plan, buffers)
        return *cuda_gemm.masked_linear(self.ops, x, weight, scores, beta, bias), None

    def linear_grad_scores(
        self, grad_out: Tensor | None, x: Tensor | None, grad_penalty: Tensor | None, weight: Tensor, scores: Tensor,
        beta: Tensor, kind: MaskKind, needs_scores: bool, needs_weight: bool, is_fused: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        if grad_out is not None and x is not None and needs_scores and not needs_weight and kind.name == "sigmoid":
            kernel, _ = cuda_gemm.kernel_for(grad_out, x, weight, scores)
            if kernel is not None:
                return cuda_gemm.score_gradient(grad_out, x, grad_penalty, weight, scores, beta, kernel), None
        return super().linear_grad_scores(  # the vendor's product and a pass over it
            grad_out, x, grad_penalty, weight, scores, beta, kind, needs_scores, needs_weight, is_fused
        )
