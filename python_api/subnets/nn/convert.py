"""Between an ordinary layer and its masked twin, in place or as a new module."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from subnet_kernels.masks import MaskKind, expand_scores

from .base import MaskedLayer, MaskState, Unit, check_can_mask

Masked = TypeVar("Masked", bound=MaskedLayer)
AnyModule = TypeVar("AnyModule", bound=nn.Module)


def convert_in_place(
    module: nn.Module, cls: type[Masked], name: str, *, kind: str | MaskKind = "sigmoid",
    score_init: float | Tensor = -0.1, unit: Unit = "weight", state: MaskState | None = None,
) -> Masked:
    """``module`` itself, now of class ``cls``: hooks, flags and every reference to it stay good."""
    check_can_mask(module, name)
    original = module.__class__
    module.__class__ = cls
    try:
        module._add_mask(kind, score_init, unit, state)  # type: ignore[operator]
    except Exception:
        module.__class__ = original
        raise
    module.__dict__["base_class"] = original
    return module  # type: ignore[return-value]


def check_can_revert(module: MaskedLayer, name: str) -> type[nn.Module]:
    """The ordinary class to go back to.

    Raises:
        TypeError: there is none (a MaskedHFConv1D built by hand: the ordinary class is transformers').
    """
    base_class = getattr(module, "base_class", None)
    if base_class is None:
        raise TypeError(f"{name}: was not made from an ordinary layer, so there is none to go back to")
    return base_class


def revert_in_place(module: MaskedLayer) -> nn.Module:
    """The ordinary layer again, in place.

    Raises:
        TypeError: it never was one (a MaskedHFConv1D built by hand: the ordinary class is transformers').
    """
    base_class = check_can_revert(module, type(module).__name__)
    module._remove_mask()
    module.__class__ = base_class  # pyright: ignore
    return module


def _shallow_twin(layer: AnyModule) -> AnyModule:
    """A new module with the same parameters, and hook tables of its own."""
    twin = copy.copy(layer)
    for name, value in layer.__dict__.items():
        if isinstance(value, dict):
            twin.__dict__[name] = copy.copy(value)
    return twin


def from_layer(cls: type[Masked], layer: nn.Module, **kwargs: Any) -> Masked:
    """A new masked layer that shares ``layer``'s parameters."""
    wanted = getattr(cls, "base_class", type(layer))
    if type(layer) is not wanted:
        raise TypeError(
            f"{cls.__name__}: needs exactly a {wanted.__name__} (a subclass may compute something else), "
            f"got {type(layer).__name__}"
        )
    unknown = set(kwargs) - {"kind", "score_init", "unit"}
    if unknown:
        raise TypeError(f"{cls.__name__}: unknown arguments {sorted(unknown)}; kind, score_init and unit are known")
    return convert_in_place(_shallow_twin(layer), cls, cls.__name__, **kwargs)


def to_layer(layer: MaskedLayer, hard: bool) -> Any:
    """A new ordinary layer with the masked weight, on the same device and with the same flags."""
    kind = layer.kind.hard if hard else layer.current_kind
    with torch.no_grad():
        m = expand_scores(layer._value(kind, layer.scores), tuple(layer.weight.shape))
        masked = (layer.weight.to(m.dtype) * m).to(layer.weight.dtype)
    twin = _shallow_twin(layer)
    twin._parameters = {
        name: None if p is None else nn.Parameter(p.detach().clone(), p.requires_grad)
        for name, p in layer._parameters.items()
    }
    plain = revert_in_place(twin)
    with torch.no_grad():
        plain.weight.copy_(masked)  # type: ignore[union-attr, operator]
    return plain
