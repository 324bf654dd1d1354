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
        inputs, named_inputs: as the model takes them; every tensor has the batch as its first dimension, and so must
            have what the masked layers see.

    Returns:
        The model's output with every tensor ``[T*B, ...]`` as ``[T, B, ...]``.

    Raises:
        ValueError: no subnet; a mask over a parameter that is not such a layer's weight, or of another shape; a masked
            layer that is not called, or sees no batch in front; the model is masked; the inputs hold no tensor or
            tensors of several batch sizes.
        TypeError: a subnet is none.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 1, bias=False))
        >>> first = Subnet({"0.weight": torch.tensor([[True, False]])})
        >>> torch.equal(outputs_of(net, [first, ~first], torch.ones(1, 2)).flatten(), net[0].weight.flatten())
        True
    """
    subnets = list(subnets)
    if not subnets:
        raise ValueError("outputs_of: needs at least one subnet")
    if wrong := [type(each).__name__ for each in subnets if not isinstance(each, Subnet)]:
        raise TypeError(f"outputs_of: subnets must be Subnets, got {wrong[0]}")
    if any(isinstance(module, MaskedLayer) for module in model.modules()):
        raise ValueError("outputs_of: the model is masked; pass the base network (masks_of(model).unmask())")
    num, size = len(subnets), _batch_size((inputs, named_inputs))
    copied_inputs, copied_named = _map(lambda t: t.repeat(num, *(1,) * (t.dim() - 1)), (inputs, named_inputs))
    was_training = [(module, module.training) for module in model.modules()]
    had_fastpath = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)  # nn.TransformerEncoderLayer's, which reads weights, not layers
    try:
        with _packed(model, subnets, num * size) as calls:
            made = model(*copied_inputs, **copied_named)
    finally:
        torch.backends.mha.set_fastpath_enabled(had_fastpath)
        for module, training in was_training:
            module.training = training
    if unused := sorted(name for name, count in calls.items() if not count):
        raise ValueError(
            f"outputs_of: {unused[0]} was never called in this pass (it is not used, or its weight is read past the "
            "layer); use subnet.applied(model) for one subnet at a time"
        )
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
def _packed(model: nn.Module, subnets: list[Subnet], rows: int) -> Iterator[dict[str, int]]:
    """Inside, layers whose weights are masked run with bit masks, each for its part of the ``rows``; gives how often
    each weight was used so far."""
    calls = dict.fromkeys(sorted({name for subnet in subnets for name in subnet.masks}), 0)
    forwards: dict[nn.Module, Callable[[Tensor], Tensor]] = {}
    for name in calls:
        weight, layers = _layers_of(model, name)
        everything = torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
        masks = [subnet.masks.get(name, everything).to(weight.device) for subnet in subnets]
        if wrong := [list(mask.shape) for mask in masks if mask.shape != weight.shape]:
            raise ValueError(f"outputs_of: the mask of {name} must have shape {list(weight.shape)}, got {wrong[0]}")
        is_transposed = is_hf_conv1d(layers[0])
        packed = torch.stack([pack_mask(mask.t() if is_transposed else mask) for mask in masks])
        for layer in layers:
            forwards[layer] = _counted(_forward_of(layer, packed), name, rows, calls)
    before = {layer: layer.__dict__.get("forward") for layer in forwards}
    try:
        for layer, forward in forwards.items():
            layer.forward = forward
        yield calls
    finally:
        for layer, forward in before.items():
            del layer.forward
            if forward is not None:
                layer.forward = forward


def _layers_of(model: nn.Module, name: str) -> tuple[Any, list[nn.Module]]:
    """The weight of that name, and all layers that use it: tied ones have one mask."""
    module_name, _, parameter = name.rpartition(".")
    named = dict(model.named_modules()).get(module_name)
    weight = named._parameters.get(parameter) if named is not None else None
    users = [m for m in model.modules() if weight is not None and any(p is weight for p in m._parameters.values())]
    kinds = {is_hf_conv1d(layer) for layer in users}
    if not users or len(kinds) > 1 or not all(_is_served(layer) and layer.weight is weight for layer in users):
        raise ValueError(
            f"outputs_of: {name} is not the weight of an nn.Linear, nn.Conv2d or transformers' Conv1D alone; use "
            "subnet.applied(model) for one subnet at a time"
        )
    return weight, users


def _counted(
    forward: Callable[[Tensor], Tensor], name: str, rows: int, calls: dict[str, int]
) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        calls[name] += 1
        if x.dim() < 2 or x.shape[0] % rows:
            raise ValueError(
                f"outputs_of: {name} must see the batch ({rows} rows side by side) in its first dimension, got "
                f"{list(x.shape)}; use subnet.applied(model) for one subnet at a time"
            )
        return forward(x)

    return run


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
