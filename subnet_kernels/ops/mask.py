"""The mask itself, scores-shaped."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import choose_for
from ..masks import MaskKind, as_kind
from . import checks
from .registry import register_op
from .sampled import check_key


def _implementation(scores: Tensor, beta: Tensor, kind: str, params: list[float], key: Tensor | None) -> Tensor:
    return as_kind(kind, params, key).value(scores, beta)


def _fake(scores, beta, kind, params, key):
    return torch.empty_like(scores)


def _backward_implementation(
    grad: Tensor, scores: Tensor, beta: Tensor, kind: str, params: list[float], key: Tensor | None
) -> Tensor:
    return grad * as_kind(kind, params, key).slope(scores, beta)


def _backward_fake(grad, scores, beta, kind, params, key):
    return torch.empty_like(scores)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    scores, beta, kind, params, key = inputs
    ctx.save_for_backward(scores, beta, key)
    ctx.rest = kind, params


def _backward(ctx: Any, grad: Tensor) -> Any:
    scores, beta, key = ctx.saved_tensors
    kind, params = ctx.rest
    grad_scores = _backward_op(grad, scores, beta, kind, params, key) if as_kind(kind, params).is_trainable else None
    return grad_scores, None, None, None, None


_backward_op = register_op(
    "mask_backward",
    "(Tensor grad, Tensor scores, Tensor beta, str kind, float[] params, Tensor? key) -> Tensor",
    _backward_implementation,
    _backward_fake,
)
_op = register_op(
    "mask",
    "(Tensor scores, Tensor beta, str kind, float[] params, Tensor? key) -> Tensor",
    _implementation,
    _fake,
    _backward,
    _setup_context,
)


def mask(
    scores: Tensor, beta: Tensor | float, *, kind: str | MaskKind = "sigmoid", key: Tensor | None = None
) -> Tensor:
    """``sigmoid(beta * scores)``, or ``1[scores > 0]`` for kind "hard": the mask value of every score.

    The PyTorch line it equals: ``torch.sigmoid(beta * scores)``. A score of exactly 0 gives .5 while soft and is out
    when hard.

    Args:
        scores: fp32 or fp64, any shape.
        beta: inverse temperature, a float (finite, >= 0) or a 0-d tensor on the scores' device.
        kind: "sigmoid", "hard", another kind's name or a MaskKind (masks.py lists them); of a sampled one its first
            sample.
        key: for a sampled kind, int64 [seed, step] on the scores' device.

    Returns:
        Tensor of scores' shape and dtype. Differentiable in scores for "sigmoid".

    Raises:
        ValueError, TypeError: an argument does not fit.

    Example:
        >>> import torch
        >>> mask(torch.tensor([-1.0, 0.0, 1.0]), 200.0, kind="hard").tolist()
        [0.0, 0.0, 1.0]
    """
    op = "mask"
    checks.check_tensor(op, "scores", scores)
    if scores.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: scores must be torch.float32 or torch.float64, got {scores.dtype}")
    mask_kind = check_key(op, checks.check_kind(op, kind), key, scores)
    beta = checks.beta_tensor(op, beta, scores)
    choose_for(op, scores, scores, mask_kind.name, scores.dtype)  # raises where the backend asked for can't run it
    return _op(scores, beta, mask_kind.name, mask_kind.params(), getattr(mask_kind, "key", None))
