"""Which layers of a model to mask: ``targets`` and ``exclude`` as a regex, names, types or "all-linear"."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from .nn import MaskedConv2d, MaskedHFConv1D, MaskedLayer, MaskedLinear
from .nn.hf_conv1d import is_hf_conv1d

Targets = str | type[nn.Module] | Sequence[str | type[nn.Module]]

# these read weights without calling the layer that owns them
_BYPASSING = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def masked_class(module: nn.Module) -> type[MaskedLayer] | None:
    """The masked twin of an ordinary layer, or None if there is none. Exact types only: a subclass may compute
    something else."""
    if type(module) is nn.Linear:
        return MaskedLinear
    if type(module) is nn.Conv2d:
        return MaskedConv2d
    if is_hf_conv1d(module):
        return MaskedHFConv1D
    return None


def _matches(pattern: str | type[nn.Module], name: str, module: nn.Module) -> bool:
    if isinstance(pattern, type):
        return isinstance(module, pattern)
    bare = pattern.removesuffix(".weight")
    if pattern == "all-linear":
        return masked_class(module) in (MaskedLinear, MaskedHFConv1D)
    if pattern == "all-conv":
        return masked_class(module) is MaskedConv2d
    return name == bare or name.endswith("." + bare)


def matches(targets: Targets, name: str, module: nn.Module) -> bool:
    """Whether ``targets`` names this module. A string is "all-linear", "all-conv" or a regex for the whole module name;
    a list holds module or parameter names (whole, or their last parts, as "c_attn") and types."""
    if isinstance(targets, type):
        return isinstance(module, targets)
    if isinstance(targets, str):
        if targets in ("all-linear", "all-conv"):
            return _matches(targets, name, module)
        try:
            return re.fullmatch(targets, name) is not None
        except re.error as error:
            raise ValueError(f"mask_model: targets {targets!r} is not a regular expression: {error}") from None
    return any(_matches(pattern, name, module) for pattern in targets)


def _check_form(argument: str, value: object) -> None:
    items = value if isinstance(value, (list, tuple, set, frozenset)) else [value]
    if not all(isinstance(item, (str, type)) for item in items):
        raise TypeError(
            f"mask_model: {argument} must be a regex, 'all-linear', 'all-conv', a module type, or a list of names and "
            f"types, got {value!r}"
        )


def _bypasser_of(name: str, modules: dict[str, nn.Module]) -> tuple[str, nn.Module] | None:
    """The module around ``name`` that would read its weight directly."""
    while "." in name:
        name = name.rpartition(".")[0]
        if isinstance(modules.get(name), _BYPASSING):
            return name, modules[name]
    return (name, modules[""]) if isinstance(modules.get(""), _BYPASSING) else None


def _users_of_weights(modules: dict[str, nn.Module]) -> dict[int, list[str]]:
    """For every parameter, which modules hold it."""
    users: dict[int, list[str]] = {}
    for name, module in modules.items():
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), []).append(name)
    return users


def _output_head(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return head if isinstance(head, nn.Module) else None


def find_targets(model: nn.Module, targets: Targets | None, exclude: Targets) -> dict[str, nn.Module]:
    """Name -> module of what mask_model masks.

    Raises:
        ValueError: nothing matches (the message lists what could), a named module can't be masked, its weight is tied,
            or a module around it would bypass the mask.
        TypeError: targets or exclude are of another form.
    """
    if targets is not None:
        _check_form("targets", targets)
    _check_form("exclude", exclude)
    modules = dict(model.named_modules())
    users = _users_of_weights(modules)
    head = _output_head(model)
    found: dict[str, nn.Module] = {}
    for name, module in modules.items():
        if exclude and matches(exclude, name, module):
            continue
        by_default = targets is None or targets in ("all-linear", "all-conv")
        if by_default and module is head:
            continue
        can_mask = masked_class(module) is not None
        is_bypassed = isinstance(module, nn.Linear) and _bypasser_of(name, modules) is not None
        if targets is None or (targets == "all-linear" and is_bypassed):
            wanted = can_mask or is_bypassed  # the latter to be refused
        elif name:
            wanted = matches(targets, name, module)
        else:
            wanted = can_mask and matches(targets, type(module).__name__, module)
        if not wanted:
            continue
        _check_is_not_bypassed(name, modules)
        if not can_mask:
            if isinstance(targets, str) or isinstance(module, nn.ModuleList | nn.Sequential):
                continue  # a regex may match containers on its way
            raise ValueError(
                f"mask_model: {name} is a {type(module).__name__}, which can't be masked; nn.Linear, nn.Conv2d and "
                "transformers' Conv1D can (not their subclasses)"
            )
        sharers = users.get(id(module._parameters.get("weight")), [])
        if len(sharers) > 1:
            if by_default:
                continue
            raise ValueError(f"mask_model: the weight of {name} is tied, shared by {sharers}; exclude it or untie it")
        found[name] = module
    if not found:
        possible = [f"{n or '(the model itself)'} ({type(m).__name__})" for n, m in modules.items() if masked_class(m)]
        raise ValueError(
            f"mask_model: targets={targets!r} with exclude={exclude!r} match nothing; what could be masked: "
            f"{', '.join(possible) if possible else 'nothing (no nn.Linear, nn.Conv2d or transformers Conv1D)'}"
        )
    for argument, value in (("targets", targets), ("exclude", exclude)):
        if not (value is None or isinstance(value, (str, type))):
            _check_every_item_matches(argument, value, modules)
    if isinstance(exclude, str) and not any(matches(exclude, name, module) for name, module in modules.items()):
        raise ValueError(f"mask_model: exclude={exclude!r} matches no whole module name; mend it or leave it out")
    return found


def _check_is_not_bypassed(name: str, modules: dict[str, nn.Module]) -> None:
    around = _bypasser_of(name, modules)
    if around is not None:
        raise ValueError(
            f"mask_model: {name or 'the model'} lies inside {around[0] or 'the model'} ({type(around[1]).__name__}), "
            f"which reads its weight without calling it, so a mask would be bypassed; leave it out with "
            f"exclude=r'{re.escape(around[0])}\\..*'"
        )


def _check_every_item_matches(
    argument: str, targets: Sequence[str | type[nn.Module]], modules: dict[str, nn.Module]
) -> None:
    """A name of a list that matches no module is a slip: leaving it out in silence would mask less than was meant."""
    idle = [
        item for item in targets
        if not any(_matches(item, name or type(module).__name__, module) for name, module in modules.items())
    ]  # fmt: skip
    if idle:
        raise ValueError(
            f"mask_model: {argument} {idle} match no module; a list holds types, and names of modules or weights, "
            "whole or their last parts"
        )
