"""How weights, scores and gradients lie in memory, for kernels that make one flat pass over dense storage."""

from __future__ import annotations

import torch
from torch import Tensor


def with_strides_of(weight: Tensor, grad: Tensor) -> Tensor:
    return grad if grad.stride() == weight.stride() else torch.empty_like(weight, dtype=grad.dtype).copy_(grad)


def aligned(weight: Tensor, scores: Tensor) -> Tensor:
    """Scores of weight's shape in weight's strides: the kernels then make one flat pass; strided reads cost many times
    more than the copy."""
    if scores.stride() == weight.stride() or scores.shape != weight.shape:
        return scores
    return torch.empty_like(weight, dtype=scores.dtype, requires_grad=False).copy_(scores.detach())


def is_dense(weight: Tensor) -> bool:
    return weight.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(weight)


def empty_of_masks(weight: Tensor, num: int, dtype: torch.dtype) -> Tensor:
    """[num, *weight.shape], uninitialized; each part in weight's strides where weight is dense, else contiguous."""
    strides = weight.stride() if is_dense(weight) else weight.contiguous().stride()
    return torch.empty_strided(
        (num, *weight.shape), (max(weight.numel(), 1), *strides), dtype=dtype, device=weight.device
    )
