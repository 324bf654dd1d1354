"""Products with sampled masks: ``samples`` masks of one kind and key, each for its part of the batch.

Nothing of a mask is kept between the passes: the draws of a mask are a function of the key and each score's place, so
the backward pass makes its effective weight again. One effective weight exists at a time; what is kept beside the
inputs are the thresholds, two bytes per score for all samples together.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.base import SAMPLED, Backend, ConvArgs, as_matrix, linear_of_masks
from ..dispatch import choose_for
from ..masks import MaskKind, SampledKind, weights_per_score
from .many_masks import conv2d_of_masks
from .once import differentiable_once


def choose_sampled(weight: Tensor, scores: Tensor, kind: str, dtype: torch.dtype, backend: str | None) -> Backend:
    """The backend that makes sampled effective weights and their gradients."""
    return choose_for(SAMPLED, weight, scores, kind, dtype, None, backend)


def check_key(op: str, kind: MaskKind, key: Tensor | None, scores: Tensor) -> MaskKind:
    """``kind`` with its key.

    Raises:
        ValueError, TypeError: a sampled kind without key, a key of another form, or a key beside another kind.
    """
    if not isinstance(kind, SampledKind):
        if key is not None:
            raise ValueError(f"{op}: kind {kind.name!r} draws nothing; leave key out")
        return kind
    key = kind.key if key is None else key
    if key is None:
        raise ValueError(f"{op}: kind {kind.name!r} is sampled; give key=, int64 [seed, step] on the scores' device")
    if not isinstance(key, Tensor) or key.dtype != torch.int64 or tuple(key.shape) != (2,):
        got = f"{key.dtype} {list(key.shape)}" if isinstance(key, Tensor) else type(key).__name__
        raise TypeError(f"{op}: key must be an int64 tensor [seed, step], got {got}")
    if key.device != scores.device:
        raise ValueError(f"{op}: key must be on the scores' device {scores.device}, got {key.device}")
    return kind.at(key.contiguous())


def check_one_mask(op: str, kind: MaskKind) -> None:
    """Scores of several masks are for kinds that draw nothing.

    Raises:
        NotImplementedError: the kind is sampled.
    """
    if kind.is_sampled:
        raise NotImplementedError(
            f"{op}: kind {kind.name!r} is sampled and takes the scores of one mask; its own ``samples`` draws several"
        )


def check_plan_of_sampled(op: str, kind: MaskKind, plan: str | None) -> None:
    """A sampled mask is made again for each product: plan None or "recompute"."""
    if kind.is_sampled and plan not in (None, "recompute"):
        raise NotImplementedError(
            f"{op}: plan {plan!r} is not built for kind {kind.name!r}, which keeps no effective weight; leave plan None"
        )


def _check_batch(op: str, x: Tensor, kind: SampledKind) -> None:
    num = kind.samples
    if num > 1 and (x.dim() < 2 or x.shape[0] % num):
        raise ValueError(
            f"{op}: the batch must divide by the {num} samples of kind {kind.name!r} (each serves a part of it), got "
            f"x of shape {list(x.shape)}"
        )


# --- effective weights -----------------------------------------------------------------------------------------------


def sampled_effective_weight(
    backend: Backend, weight: Tensor, scores: Tensor, beta: Tensor, kind: SampledKind, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(w_eff of weight's shape, or [samples, ...] if there are several; penalty, 0-d)."""
    thresholds = backend.keep_thresholds(scores, beta, kind)
    w_eff = torch.empty((kind.samples, *weight.shape), dtype=dtype, device=weight.device)
    backend.sampled_weights(weight, scores, thresholds, beta, kind, w_eff)
    return w_eff if kind.samples > 1 else w_eff[0], penalty_of(weight, scores, beta, kind)


def penalty_of(weight: Tensor, scores: Tensor, beta: Tensor, kind: MaskKind) -> Tensor:
    """The sum of the kind's penalty over weights; it does not depend on draws."""
    return kind.penalty(scores, beta).sum() * weights_per_score(tuple(weight.shape), tuple(scores.shape))


def _penalty_gradient(
    grad_penalty: Tensor | None, weight: Tensor, scores: Tensor, beta: Tensor, kind: MaskKind
) -> Tensor:
    grad_scores = torch.zeros(scores.shape, dtype=scores.dtype, device=scores.device)
    if grad_penalty is not None:
        count = weights_per_score(tuple(weight.shape), tuple(scores.shape))
        grad_scores += grad_penalty * (count * kind.penalty_slope(scores, beta))
    return grad_scores


def _weight_gradient(
    backend: Backend, grad_w_eff: Tensor, weight: Tensor, scores: Tensor, thresholds: Tensor | None, beta: Tensor,
    kind: SampledKind,
) -> Tensor:
    """grad_w_eff * m, by the very decisions of the forward pass."""
    grad_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    backend.sampled_weight(grad_w_eff.contiguous(), scores, thresholds, beta, kind, grad_weight)
    return grad_weight


def sampled_effective_weight_backward(
    backend: Backend, grad_w_eff: Tensor | None, grad_penalty: Tensor | None, weight: Tensor, scores: Tensor,
    beta: Tensor, kind: SampledKind, needs_scores: bool, needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(grad_scores, grad_weight) of :func:`sampled_effective_weight`."""
    grad_scores = _penalty_gradient(grad_penalty, weight, scores, beta, kind) if needs_scores else None
    grad_weight = None
    if grad_w_eff is not None:
        parts = grad_w_eff if kind.samples > 1 else grad_w_eff.unsqueeze(0)
        if grad_scores is not None:
            backend.sampled_grad_scores_of_all_(grad_scores, parts, weight, scores, beta, kind)
        if needs_weight:
            thresholds = backend.keep_thresholds(scores, beta, kind)
            for part, one in zip(parts.unbind(), kind.each(), strict=True):
                made = _weight_gradient(backend, part, weight, scores, thresholds, beta, one)
                grad_weight = made if grad_weight is None else grad_weight.add_(made)
    return grad_scores, grad_weight


# --- products --------------------------------------------------------------------------------------------------------


class _Sampled(torch.autograd.Function):
    """A linear product (args None) or a convolution."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scores: Tensor, beta: Tensor, key: Tensor, bias: Tensor | None,
        kind: SampledKind, args: ConvArgs | None, name: str | None, wants_penalty: bool,
    ) -> Any:
        backend = choose_sampled(weight, scores, kind.name, x.dtype, name)
        thresholds = backend.keep_thresholds(scores, beta, kind)
        w_eff = torch.empty(weight.shape, dtype=x.dtype, device=weight.device)
        outs = []
        for part, one in zip(x.chunk(kind.samples) if kind.samples > 1 else [x], kind.each(), strict=True):
            backend.sampled_weight(weight, scores, thresholds, beta, one, w_eff)
            if args is None:
                outs.append(F.linear(part, w_eff, bias))
            else:
                outs.append(F.conv2d(part, w_eff, bias, args.stride, args.padding, args.dilation, args.groups))
        ctx.backend, ctx.kind, ctx.args = backend, kind, args
        ctx.save_for_backward(x, weight, scores, beta, key, thresholds)
        ctx.set_materialize_grads(False)
        out = outs[0] if len(outs) == 1 else torch.cat(outs)
        return (out, penalty_of(weight, scores, beta, kind)) if wants_penalty else out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_out: Tensor | None, grad_penalty: Tensor | None = None) -> Any:
        x, weight, scores, beta, _key, thresholds = ctx.saved_tensors
        kind, args, backend = ctx.kind, ctx.args, ctx.backend
        needs_x, needs_weight, needs_scores, needs_bias = (ctx.needs_input_grad[i] for i in (0, 1, 2, 5))
        grad_scores = _penalty_gradient(grad_penalty, weight, scores, beta, kind) if needs_scores else None
        grad_weight = grad_bias = None
        grad_x: list[Tensor] = []
        if grad_out is not None:
            if needs_bias:
                grad_bias = as_matrix(grad_out).sum(0) if args is None else grad_out.sum((0, 2, 3))
            w_eff = torch.empty(weight.shape, dtype=x.dtype, device=weight.device) if needs_x or args else None
            num = kind.samples
            pairs = zip(grad_out.chunk(num), x.chunk(num), strict=True) if num > 1 else [(grad_out, x)]
            for (rows, part), one in zip(pairs, kind.each(), strict=True):
                if w_eff is not None:
                    backend.sampled_weight(weight, scores, thresholds, beta, one, w_eff)
                if args is None:
                    if needs_x:
                        assert w_eff is not None
                        grad_x.append(as_matrix(rows).mm(w_eff).view(part.shape))
                    grad_w_eff = as_matrix(rows).t().mm(as_matrix(part)) if needs_scores or needs_weight else None
                else:
                    assert w_eff is not None
                    wanted = (needs_x, needs_scores or needs_weight, False)
                    of_x, grad_w_eff, _ = backend.conv2d_backward(rows, part, w_eff, args, one, wanted)
                    grad_x += [] if of_x is None else [of_x]
                if grad_scores is not None and grad_w_eff is not None:
                    backend.sampled_grad_scores_(grad_scores, grad_w_eff, weight, scores, beta, one)
                if needs_weight and grad_w_eff is not None:
                    made = _weight_gradient(backend, grad_w_eff, weight, scores, thresholds, beta, one)
                    grad_weight = made if grad_weight is None else grad_weight.add_(made)
        total = None if not grad_x else grad_x[0] if len(grad_x) == 1 else torch.cat(grad_x)
        return total, grad_weight, grad_scores, None, None, grad_bias, None, None, None, None


def run_sampled(
    x: Tensor, weight: Tensor, scores: Tensor, beta: Tensor, bias: Tensor | None, kind: SampledKind,
    args: ConvArgs | None, backend: str | None, wants_penalty: bool,
) -> Any:
    """masked_linear (args None) or masked_conv2d without checks, for a kind with its key: (out, penalty) or out."""
    from .effective_weight import effective_weight_unchecked  # which needs this module's effective weights

    _check_batch("masked_linear" if args is None else "masked_conv2d", x, kind)
    weight, scores = weight.contiguous(), scores.contiguous()  # a transposed or channels_last pair is copied
    if not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active():
        return _Sampled.apply(x, weight, scores, beta, kind.key, bias, kind, args, backend, wants_penalty)
    w_eff, penalty = effective_weight_unchecked(weight, scores, beta, kind, x.dtype, backend)
    if kind.samples == 1:
        w_eff = w_eff.unsqueeze(0)
    out = linear_of_masks(x, w_eff, bias, False) if args is None else conv2d_of_masks(x, w_eff, bias, args, False)
    return (out, penalty) if wants_penalty else out
