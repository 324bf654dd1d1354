"""What torch.autograd.Function costs in the ordinary case, avoided: two steps that only special cases need."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def plain_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` without its preparations for torch.func transforms, of which none may be at work."""
    return super(torch.autograd.Function, function).apply  # pyright: ignore


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """torch's once_differentiable where a graph of the backward pass is wanted; elsewhere ``backward`` itself."""
    refusing = once_differentiable(backward)

    @functools.wraps(backward)
    def choose(ctx: Any, *grads: Any) -> Any:
        return refusing(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

    return choose
