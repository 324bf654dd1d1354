"""The specification: plain PyTorch on any device and dtype. Every other backend is tested against this one in fp64."""

from __future__ import annotations

import torch
from torch import Tensor

from ..masks import MaskKind, expand_scores, sum_to_scores, weights_per_score
from .base import Backend, Call, gradients_wanted


def _accumulate_dtype(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


class ReferenceBackend(Backend):
    name = "reference"

    def refuse(self, call: Call) -> str | None:
        return None

    def effective_weight(
        self, weight: Tensor, scores: Tensor, beta: Tensor, kind: MaskKind, dtype: torch.dtype,
        out: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        m = expand_scores(kind.value(scores, beta), tuple(weight.shape))
        penalty = kind.penalty(scores, beta).sum() * weights_per_score(tuple(weight.shape), tuple(scores.shape))
        masked = (weight.to(_accumulate_dtype(weight)) * m).to(dtype)
        if out is not None:
            return out[0].copy_(masked), out[1].copy_(penalty)
        w_eff = torch.empty_like(weight, dtype=dtype)  # weight's strides
        return w_eff.copy_(masked), penalty

    def grad_scores(
        self, grad_w_eff: Tensor | None, grad_penalty: Tensor | None, weight: Tensor, scores: Tensor, beta: Tensor,
        kind: MaskKind, needs_scores: bool, needs_weight: bool, may_overwrite: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        accumulate = _accumulate_dtype(weight)
        grad_scores = grad_weight = None
        if grad_w_eff is not None:
            grad_w_eff = grad_w_eff.to(accumulate)
        wants_scores, wants_weight = gradients_wanted(kind, grad_w_eff, grad_penalty, needs_scores, needs_weight)
        if wants_scores:
            grad_scores = torch.zeros_like(scores)
            if grad_w_eff is not None:
                per_score = sum_to_scores(grad_w_eff * weight.to(accumulate), tuple(scores.shape))
                grad_scores += per_score * kind.slope(scores, beta)
            if grad_penalty is not None:
                count = weights_per_score(tuple(weight.shape), tuple(scores.shape))
                grad_scores += grad_penalty * (count * kind.penalty_slope(scores, beta))
        if wants_weight and grad_w_eff is not None:
            m = expand_scores(kind.value(scores, beta), tuple(weight.shape))
            grad_weight = (grad_w_eff * m).to(weight.dtype)
        return grad_scores, grad_weight

    def add_penalty_grad_(
        self, grads: list[Tensor], scores: list[Tensor], weights_per_score: list[int], beta: Tensor,
        lam: float | Tensor, kind: MaskKind,
    ) -> None:
        for grad, score, count in zip(grads, scores, weights_per_score, strict=True):
            slope = kind.penalty_slope(score, beta).to(grad.dtype)
            if isinstance(lam, Tensor):
                grad.addcmul_(slope, lam.to(grad.dtype) * count)
            else:
                grad.add_(slope, alpha=lam * count)
