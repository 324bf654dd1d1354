"""Backward functions that can't be differentiated again, without once_differentiable's cost in the ordinary case."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """torch's once_differentiable where a graph of the backward pass is wanted; elsewhere ``backward`` itself."""
    refusing = once_differentiable(backward)

    @functools.wraps(backward)
    def choose(ctx: Any, *grads: Any) -> Any:
        return refusing(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

    return choose
