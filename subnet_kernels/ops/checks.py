"""Checks that every op shares. Shapes, dtypes and devices only: a look at a tensor's values inside an op would break
``torch.compile(fullgraph=True)`` and cost more than the product itself; values are checked where they enter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ..backends.base import PLANS
from ..masks import MaskKind, as_kind

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LARGEST_BETA = torch.finfo(torch.float32).max  # beta is kept in fp32


def shape_of(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def check_tensor(op: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")


def check_float_dtype(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: {name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")


def beta_tensor(op: str, beta: Tensor | float, like: Tensor) -> Tensor:
    """beta as a 0-d tensor on ``like``'s device: fp32, or fp64 beside fp64 scores. A float is checked: finite and not
    negative. A tensor's value is not read."""
    if isinstance(beta, Tensor):
        if beta.dim() != 0:
            raise ValueError(f"{op}: beta must be a float or a 0-d tensor, got a tensor of shape {shape_of(beta)}")
        if beta.requires_grad:
            raise ValueError(f"{op}: beta must not require grad (there is no gradient for beta); pass beta.detach()")
        if not beta.is_floating_point():
            raise TypeError(f"{op}: beta must be a floating point tensor, got {beta.dtype}")
        if beta.device != like.device:
            raise ValueError(f"{op}: beta must be on the scores' device {like.device}, got {beta.device}")
        return beta if beta.dtype == like.dtype else beta.to(like.dtype)
    if isinstance(beta, bool) or not isinstance(beta, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{op}: beta must be a float or a 0-d tensor, got {type(beta).__name__}")
    if not torch.compiler.is_compiling():
        check_beta_value(op, float(beta))
    return torch.full((), beta, dtype=like.dtype, device=like.device)


def check_beta_value(op: str, beta: float) -> float:
    """``beta`` itself if it is finite and >= 0; else a ValueError."""
    if not 0 <= beta <= LARGEST_BETA:  # a NaN is no number between
        raise ValueError(f"{op}: beta must be finite and >= 0, got {beta}")
    return beta


def is_of_masks(weight: Tensor, scores: Tensor) -> bool:
    """Whether scores carry a leading dimension of masks."""
    return scores.dim() == weight.dim() + 1


def check_weight_and_scores(op: str, weight: Tensor, scores: Tensor) -> None:
    """The scores' contract: weight's number of dimensions, each size divides weight's, fp32 (fp64 beside fp64); or all
    that behind a leading dimension of masks."""
    check_tensor(op, "weight", weight)
    check_tensor(op, "scores", scores)
    check_float_dtype(op, "weight", weight)
    wanted = torch.float64 if weight.dtype == torch.float64 else torch.float32
    if scores.dtype != wanted:
        raise TypeError(
            f"{op}: scores must be {wanted} beside a {weight.dtype} weight, got {scores.dtype}; use "
            f"scores.to({wanted}), and under FSDP a MixedPrecisionPolicy without param_dtype, which would cast them"
        )
    if scores.device != weight.device:
        raise ValueError(f"{op}: scores must be on weight's device {weight.device}, got {scores.device}")
    if scores.shape == weight.shape:
        return
    is_many = is_of_masks(weight, scores)
    if is_many and scores.shape[0] == 0:
        raise ValueError(f"{op}: scores must hold at least one mask, got shape {shape_of(scores)}")
    unit_shape = scores.shape[1:] if is_many else scores.shape
    fits = len(unit_shape) == weight.dim() and all(
        (s == w) if 0 in (s, w) else w % s == 0 for s, w in zip(unit_shape, weight.shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"{op}: scores must have weight's shape {shape_of(weight)} or sizes that divide it, got "
            f"{shape_of(scores)}; several masks go into a dimension in front"
        )


def check_kind(op: str, kind: str | MaskKind) -> MaskKind:
    try:
        return as_kind(kind)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{op}: {error}") from None


def check_plan(op: str, plan: str | None) -> None:
    if plan not in PLANS:
        raise ValueError(f"{op}: plan must be 'cached', 'fused', 'recompute' or None (dispatch chooses), got {plan!r}")


def check_bias(op: str, bias: Tensor | None, num_out: int, x: Tensor) -> None:
    if bias is None:
        return
    check_tensor(op, "bias", bias)
    if tuple(bias.shape) != (num_out,):
        raise ValueError(f"{op}: bias must have shape [{num_out}], got {shape_of(bias)}")
    if bias.dtype != x.dtype or bias.device != x.device:
        raise ValueError(
            f"{op}: bias must have x's dtype and device, {x.dtype} on {x.device}, got {bias.dtype} on {bias.device}"
        )


def check_x(op: str, x: Tensor, weight: Tensor, is_autocast: bool) -> None:
    check_tensor(op, "x", x)
    if x.device != weight.device:
        raise ValueError(f"{op}: x must be on weight's device {weight.device}, got {x.device}")
    same = x.dtype == weight.dtype
    if not same and not (is_autocast and torch.float64 not in (x.dtype, weight.dtype) and x.is_floating_point()):
        raise TypeError(f"{op}: x must have weight's dtype {weight.dtype}, got {x.dtype}")


def check_same_number(op: str, **lists: Sequence[object]) -> None:
    sizes = {name: len(values) for name, values in lists.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"{op}: needs lists of one length, got {sizes}")


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype to which autocast, if it is on for the tensor's device, would cast the inputs of F.linear."""
    device_type = tensor.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)


def cast_for_autocast(tensor: MaybeTensor, dtype: torch.dtype | None) -> MaybeTensor:
    """What autocast does to one input: floating tensors but fp64 are cast."""
    if tensor is None or dtype is None or tensor.dtype in (dtype, torch.float64) or not tensor.is_floating_point():
        return tensor
    return tensor.to(dtype)
