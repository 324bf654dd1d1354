"""How an op is registered: one place that defines the schema, the implementation, the fake and the gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "subnet_kernels"
_library = torch.library.Library(NAMESPACE, "DEF")


def register_op(
    name: str,
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    is_mutating: bool = False,
) -> Callable[..., Any]:
    """Define ``subnet_kernels::name`` with ``schema`` ("(Tensor x, ...) -> Tensor") and return the callable op.

    The implementation serves every device: it chooses the backend itself. An op without ``backward`` refuses to be
    differentiated, in words, instead of giving a silently wrong gradient; one that writes its arguments
    (``is_mutating``) must be given tensors that need no gradient.
    """
    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    qualified = f"{NAMESPACE}::{name}"
    torch.library.register_fake(qualified, fake, lib=_library)
    if not is_mutating:
        torch.library.register_autograd(
            qualified, backward or _refuse_backward(name), setup_context=setup_context, lib=_library
        )
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def register_vmap(name: str, rule: Callable[..., Any]) -> None:
    """How torch.func.vmap takes an op that was defined here: ``rule(info, in_dims, *args) -> (outputs, out_dims)``."""
    torch.library.register_vmap(f"{NAMESPACE}::{name}", rule, lib=_library)


def _refuse_backward(name: str) -> Callable[..., Any]:
    def refuse(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"{name}: double backward is not supported (the gradients of masked ops can't be differentiated again)"
        )

    return refuse
