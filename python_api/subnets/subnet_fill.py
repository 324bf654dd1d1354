"""What weights become that are taken out of a network: zero, a mean, fresh values, or another network's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from .subnet_file import listed

Fill = str | nn.Module | Mapping[str, Tensor]
FILLS = ("zero", "mean", "reinit")
Filler = Callable[[str, nn.Parameter], Tensor]
Initialise = Callable[[nn.Module], object]


def filler(
    fill: Fill, model: nn.Module, parameters: Mapping[str, nn.Parameter], generator: torch.Generator | None, caller: str
) -> Filler:
    """Return a function of (name, parameter) that gives the new values: 0-d, or of the parameter's shape.

    Everything that can be refused is refused here, before anything is written. See `Subnet.apply_` for the arguments.
    """
    if generator is not None and fill != "reinit":
        raise ValueError(f"{caller}: generator is for fill='reinit', got fill={_named(fill)}; leave it out")
    if isinstance(fill, str):
        if fill not in FILLS:
            raise ValueError(f"{caller}: fill must be one of {list(FILLS)}, a model or a state dict, got {fill!r}")
        if fill == "zero":
            return lambda name, parameter: torch.zeros((), dtype=parameter.dtype, device=parameter.device)
        if fill == "mean":
            return lambda name, parameter: parameter.detach().mean(dtype=torch.float64).to(parameter.dtype)
        return _reinitialiser(model, parameters, generator, caller)
    return _resampler(fill, parameters, caller)


def _named(fill: Fill) -> str:
    return repr(fill) if isinstance(fill, str) else type(fill).__name__


def _resampler(fill: nn.Module | Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], caller: str) -> Filler:
    if isinstance(fill, nn.Module):
        fill = dict(fill.named_parameters(remove_duplicate=False))
    if not isinstance(fill, Mapping):
        raise TypeError(
            f"{caller}: fill must be one of {list(FILLS)}, a model or a state dict, got {type(fill).__name__}"
        )
    given = fill
    missing = [name for name in parameters if not isinstance(given.get(name), Tensor)]
    reshaped = [
        f"{name} ({list(given[name].shape)}, here {list(parameter.shape)})"
        for name, parameter in parameters.items()
        if name not in missing and (given[name].shape != parameter.shape or not given[name].is_floating_point())
    ]
    if missing or reshaped:
        problems = (("missing", missing), ("of another shape, or not floating-point", reshaped))
        text = "; ".join(f"{what}: {listed(names)}" for what, names in problems if names)
        raise ValueError(f"{caller}: fill must hold the subnet's parameters as the model has them; {text}")
    return lambda name, parameter: given[name].detach().to(parameter.device, parameter.dtype)


def _reinitialiser(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], generator: torch.Generator | None, caller: str
) -> Filler:
    if not isinstance(generator, torch.Generator) or generator.device.type != "cpu":
        raise TypeError(
            f"{caller}: fill='reinit' needs generator=, a CPU torch.Generator, got {generator!r}; pass "
            "torch.Generator().manual_seed(seed)"
        )
    ways = {name: _initialisation(model, name) for name in parameters}
    without = [name for name, way in ways.items() if way is None]
    if without:
        raise ValueError(
            f"{caller}: the model has no way to initialise {listed(without)} (neither transformers' _init_weights nor "
            "the module's reset_parameters); pass a freshly made model as fill"
        )
    # A seed each: the draw of one parameter does not depend on which others the subnet has.
    seeds = {name: int(torch.randint(2**62, (), generator=generator)) for name in sorted(parameters)}
    fresh = {}
    for name, way in ways.items():
        path, _, attribute = name.rpartition(".")
        twin = copy.deepcopy(model.get_submodule(path)).cpu()
        values = getattr(twin, attribute)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seeds[name])
            values.fill_(torch.nan)
            cast(Initialise, way)(twin)
        if bool(values.isnan().any()):
            raise ValueError(f"{caller}: initialising {name} left it as it was; pass a freshly made model as fill")
        fresh[name] = values.detach()
    return lambda name, parameter: fresh[name].to(parameter.device, parameter.dtype)


def _initialisation(model: nn.Module, name: str) -> Initialise | None:
    """What initialises a copy of the module that holds this parameter: the `_init_weights` of the nearest transformers
    model around it, or its own `reset_parameters`."""
    path = name.rpartition(".")[0]
    parts = path.split(".") if path else []
    for length in range(len(parts), -1, -1):
        around = model.get_submodule(".".join(parts[:length]))
        if callable(getattr(around, "_init_weights", None)):
            return cast(Initialise, around._init_weights)
    owner = model.get_submodule(path)
    for method in ("reset_parameters", "_reset_parameters"):
        if callable(getattr(owner, method, None)):
            return lambda module: getattr(module, method)()
    return None
