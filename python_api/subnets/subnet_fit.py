"""Whether a subnet fits a model, and what it takes from it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .nn import MaskedLayer
from .subnet_file import listed


def fitting_parameters(masks: Mapping[str, Tensor], model: nn.Module, caller: str) -> dict[str, nn.Parameter]:
    """Return ``model``'s parameters named in ``masks``. See `Subnet.parameters_in`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: a model must be a torch.nn.Module, got {type(model).__name__}")
    available = dict(model.named_parameters(remove_duplicate=False))
    found = {name: available[name] for name in masks if name in available}
    missing = [name for name in masks if name not in available]
    reshaped = [
        f"{name} (subnet {list(masks[name].shape)}, model {list(parameter.shape)})"
        for name, parameter in found.items()
        if parameter.shape != masks[name].shape
    ]
    if missing or reshaped:
        extra = [name for name, parameter in available.items() if name not in masks and parameter.ndim > 1]
        problems = [("missing from the model", missing), ("differently shaped", reshaped)]
        text = "; ".join(f"{what}: {listed(names)}" for what, names in problems if names)
        hint = f"; the model has besides: {listed(extra)}" if missing and extra else ""
        raise ValueError(f"{caller}: the subnet does not fit the model; {text}{hint}; pass the model it was made for")
    _check_plain(found, caller)
    return found


def _check_plain(parameters: Mapping[str, nn.Parameter], caller: str) -> None:
    seen: dict[int, str] = {}
    for name, parameter in parameters.items():
        if id(parameter) in seen:
            raise ValueError(
                f"{caller}: {seen[id(parameter)]} and {name} are the same tied parameter and both have a mask; "
                "keep the mask of one of the names"
            )
        seen[id(parameter)] = name
        is_plain = type(parameter.data) is Tensor and parameter.layout == torch.strided
        if not is_plain or not parameter.is_floating_point() or parameter.device.type == "meta":
            raise ValueError(
                f"{caller}: {name} must be a plain floating-point parameter with values, got "
                f"{type(parameter.data).__name__} {parameter.dtype} on {parameter.device}; "
                "sharded, quantized and meta parameters are not handled"
            )


def kept_values(mask: Tensor, weight: Tensor) -> Tensor:
    """Return ``weight[mask]`` in C order: ``[kept]``, a copy on weight's device."""
    return weight.detach()[mask.to(weight.device)]


def check_finite(values: Mapping[str, Tensor], caller: str) -> None:
    """Raise ValueError naming the parameters whose kept values hold a NaN or an infinity."""
    bad = [name for name, kept in values.items() if not bool(torch.isfinite(kept).all())]
    if bad:
        raise ValueError(f"{caller}: the kept values must be finite, these hold NaN or infinity: {listed(bad)}")


def check_unmasked(model: nn.Module, caller: str) -> None:
    """Raise ValueError if the model has masks of its own."""
    if any(isinstance(module, MaskedLayer) for module in model.modules()):
        raise ValueError(f"{caller}: the model is masked, so its own masks would come on top; unmask() it first")


def check_same_parameters(first: Mapping[str, Tensor], second: Mapping[str, Tensor], caller: str) -> None:
    """Raise ValueError, listing what differs, unless both hold masks of the same names and shapes."""
    odd = [name for name in {**first, **second} if _shape(first, name) != _shape(second, name)]
    if odd:
        sides = listed(f"{name} ({_shape(first, name)} and {_shape(second, name)})" for name in odd)
        raise ValueError(f"{caller}: both sides must mask the same parameters, these differ: {sides}")


def _shape(masks: Mapping[str, Tensor], name: str) -> list[int] | str:
    return list(masks[name].shape) if name in masks else "absent"
