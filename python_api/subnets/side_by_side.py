"""Many subnetworks of one network in one forward pass, a bit of memory per weight for each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from subnet_kernels import pack_mask, packed_linear
from subnet_kernels.ops.packed import packed_weight

from .nn import MaskedLayer
from .nn.hf_conv1d import is_hf_conv1d
from .subnet import Subnet


@torch.no_grad()
def outputs_of(model: nn.Module, subnets: Sequence[Subnet], *inputs: Any, **named_inputs: Any) -> Any:
    """What each subnet's network says, in one forward pass: ``model`` runs on T copies of the batch side by side, and
    each masked layer multiplies copy t by its weight under mask t.

    Args:
        model: the base network, unmasked; it runs in eval mode, without gradient, and is left as it was.
        subnets: T of them, over weights of nn.Linear, nn.Conv2d or transformers' Conv1D; each may mask other layers
            (a layer that it does not mask keeps all of its weights).
        inputs, named_inputs: as the model takes them; every tensor has the batch as its first dimension.

    Returns:
        The model's output with every tensor ``[T*B, ...]`` as ``[T, B, ...]``.

    Raises:
        ValueError: no subnet; a mask over a parameter that is not such a layer's weight, or of another shape; the model
            is masked; the inputs hold no tensor or tensors of several batch sizes.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 1, bias=False))
        >>> first = Subnet({"0.weight": torch.tensor([[True, False]])})
        >>> torch.equal(outputs_of(net, [first, ~first], torch.ones(1, 2)).flatten(), net[0].weight.flatten())
        True
    """
    subnets = list(subnets)
    if not subnets:
        raise ValueError("outputs_of: needs at least one subnet")
    if any(isinstance(module, MaskedLayer) for module in model.modules()):
        raise ValueError("outputs_of: the model is masked; pass the base network (masks_of(model).unmask())")
    num, size = len(subnets), _batch_size((inputs, named_inputs))
    copied_inputs, copied_named = _map(lambda t: t.repeat(num, *(1,) * (t.dim() - 1)), (inputs, named_inputs))
    was_training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with _packed(model, subnets):
            made = model(*copied_inputs, **copied_named)
    finally:
        for module, training in was_training:
            module.training = training
    return _map(lambda t: t.unflatten(0, (num, size)) if t.dim() and t.shape[0] == num * size else t, made)


def _map(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """``function`` of every tensor in nested lists, tuples and dicts (transformers' outputs among them)."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        made = {key: _map(function, each) for key, each in value.items()}
        return made if type(value) is dict else type(value)(**made)
    if isinstance(value, (list, tuple)):
        made = [_map(function, each) for each in value]
        return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
    return value


def _batch_size(inputs: Any) -> int:
    sizes: set[int] = set()
    _map(lambda t: (sizes.add(t.shape[0] if t.dim() else -1), t)[1], inputs)
    if len(sizes) != 1 or -1 in sizes:
        found = sorted(sizes) or "no tensor"
        raise ValueError(f"outputs_of: all tensors of the inputs must have one batch as first dimension, got {found}")
    return sizes.pop()


@contextlib.contextmanager
def _packed(model: nn.Module, subnets: list[Subnet]) -> Iterator[None]:
    """Inside, layers whose weights are masked run with bit masks, each for its part of the batch."""
    modules = dict(model.named_modules())
    names = sorted({name for subnet in subnets for name in subnet.masks})
    layers: dict[str, nn.Module] = {}
    for name in names:
        layer = modules.get(name.rpartition(".")[0])
        if name.rpartition(".")[2] != "weight" or not _is_served(layer):
            raise ValueError(
                f"outputs_of: {name} is not the weight of an nn.Linear, nn.Conv2d or transformers' Conv1D; use "
                "subnet.applied(model) for one subnet at a time"
            )
        assert layer is not None
        layers[name] = layer
    forwards: dict[str, Callable[[Tensor], Tensor]] = {}
    for name, layer in layers.items():
        weight: Any = layer.weight
        everything = torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
        masks = [subnet.masks.get(name, everything).to(weight.device) for subnet in subnets]
        if wrong := [list(mask.shape) for mask in masks if mask.shape != weight.shape]:
            raise ValueError(f"outputs_of: the mask of {name} must have shape {list(weight.shape)}, got {wrong[0]}")
        if is_hf_conv1d(layer):
            masks = [mask.t() for mask in masks]
        forwards[name] = _forward_of(layer, torch.stack([pack_mask(mask) for mask in masks]))
    try:
        for name, layer in layers.items():
            layer.forward = forwards[name]
        yield
    finally:
        for layer in layers.values():
            layer.__dict__.pop("forward", None)


def _is_served(layer: nn.Module | None) -> bool:
    return layer is not None and (type(layer) in (nn.Linear, nn.Conv2d) or is_hf_conv1d(layer))


def _forward_of(layer: Any, packed: Tensor) -> Callable[[Tensor], Tensor]:
    if isinstance(layer, nn.Conv2d):

        def convolve(x: Tensor) -> Tensor:
            weight = layer.weight.contiguous()
            w_eff = torch.empty_like(weight)
            outs = []
            for part, bits in zip(x.chunk(len(packed)), packed, strict=True):
                packed_weight(weight, bits, w_eff)
                outs.append(layer._conv_forward(part, w_eff, layer.bias))
            return torch.cat(outs)

        return convolve
    weight = layer.weight.t() if is_hf_conv1d(layer) else layer.weight
    return lambda x: packed_linear(x, weight, packed, layer.bias)
