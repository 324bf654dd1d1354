"""`transfer` writes a subnet's weights into another network and holds them there; `release` lets go."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..subnet import Subnet
from ..subnet_file import listed, weights_hash
from ..subnet_fit import check_finite, fitting_parameters, kept_values
from .anchor import ATTRIBUTE, Anchor, anchor_of


class _Planting(NamedTuple):
    """One parameter's part of a transfer: where, which entries, which values."""

    parameter: nn.Parameter
    mask: Tensor
    values: Tensor


def transfer(
    subnet: Subnet,
    source: nn.Module | None,
    target: nn.Module,
    *,
    anchor: str | float = "frozen",
    fraction: float = 1.0,
    check_hash: bool = True,
    keep_positions: bool = False,
) -> nn.Module:
    """Return ``target`` with the subnet planted: ``target[mask] = source[mask]`` in place, for every mask.

    Names, shapes, Parameter objects and state_dict of target do not change, and neither does any other entry. All is
    checked before the first write.

    ``anchor="frozen"``: the planted entries stay bit-identical to the source after any number of steps of any
    `torch.optim.Optimizer` built before or after (weight decay, momentum, fused, foreach, under
    ``torch.compile(optimizer.step)``). Their gradient is zeroed during backward, so clipping by norm does not see them,
    and their values are put back by torch's global optimizer-step post-hook. It lasts through deepcopy,
    ``.to(device)``, ``.to(dtype)`` (the values round as the parameter's do) and torch.save / torch.load of the module.
    It does not see what writes weights without an optimizer step: what `load_state_dict` writes holds until the next
    step puts the planted values back; ``load_state_dict(assign=True)``, pruning and FSDP replace the Parameter and with
    it the anchor. In DistributedDataParallel transfer into the inner module, the same on every rank, before or after
    wrapping.

    Cost of "frozen": one bit per weight and one value per planted weight, beside temporaries of the layer in work.
    Time per training step (zeroing the gradients and putting the values back; fastest of many) on one core of a Xeon,
    for the matrices of GPT-2 layers of width 128 at density 0.18 in fp32; the training step itself, AdamW on a batch of
    50 x 4 tokens, takes 15 ms (1 layer) and 160 ms (12 layers):

    | masked weights | packed (default) | ``keep_positions=True`` |
    |---|---|---|
    | 196,608 (1 layer) | 1.8 ms, 0.17 MB | 0.4 ms, 0.31 MB |
    | 12 x 196,608 | 37 ms, 2.0 MB | 7.6 ms, 3.7 MB |

    Args:
        subnet: what to plant; its names are target's parameter names.
        source: unmasked network to take the values from; its dtypes must be target's. None takes the values that the
            subnet carries (a file saved with ``weights=``).
        target: network to plant in. May be ``source``: that freezes the subnet where it is. Frozen parameters
            (requires_grad False) are planted as well and stay frozen. A tied parameter changes in all its places.
        anchor: "frozen", or "free": planted, then trained like everything else. A number (elastic pull) is kept for
            later and refused.
        fraction: the highest-scored part of the subnet to plant (`Subnet.top`); below 1.0 the subnet needs ranks.
        check_hash: refuse a source other than the network that the subnet remembers (`Subnet.base_hash`); needs one
            pass over the masked parameters. A subnet without hash is not checked.
        keep_positions: keep the planted positions as int32 beside the packed mask (only for "frozen").

    Planting again into the same target adds: both subnets are planted and held. An entry that is already held may be
    planted again with the same bits; another value is refused, `release` first.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: the subnet does not fit source or target (names listed), dtypes differ, a value to plant is not
            finite, the source is another network than the subnet's, no source and no values, or entries held with
            other values, or a fraction below 1 of a subnet without ranks.
        NotImplementedError: a number as anchor.

    Source: Zhang, Lepori, Pavlick, "Instilling Inductive Biases with Subnetworks" (arXiv 2310.10899), section 3.
    """
    _check_arguments(subnet, anchor, fraction)
    if fraction != 1:
        subnet = subnet.top(fraction, "transfer")
    values = _values_to_plant(subnet, source, check_hash)
    parameters = fitting_parameters(subnet.masks, target, "transfer: target")
    plantings = {name: _planting(name, subnet.masks[name], values[name], parameters[name]) for name in parameters}
    _check_held(plantings)
    owners = _owners(target)
    for planting in plantings.values():
        with torch.no_grad():
            planting.parameter.masked_scatter_(planting.mask, planting.values)
        if anchor == "frozen":
            _hold(owners[id(planting.parameter)], planting, keep_positions)
    return target


def release(target: nn.Module) -> nn.Module:
    """Return ``target`` with no entry held any more: hooks and attributes are gone, values stay, all entries train.

    Args:
        target: a network that `transfer` planted in; one that holds nothing is returned as it is.

    Raises:
        TypeError: target is no module.
    """
    if not isinstance(target, nn.Module):
        raise TypeError(f"release: target must be a torch.nn.Module, got {type(target).__name__}")
    for parameter in target.parameters():
        held = anchor_of(parameter)
        if held is not None:
            held.detach()
    for module in target.modules():
        module.__dict__.pop(ATTRIBUTE, None)
    return target


def _check_arguments(subnet: Subnet, anchor: str | float, fraction: float) -> None:
    if not isinstance(subnet, Subnet):
        raise TypeError(f"transfer: subnet must be a Subnet, got {type(subnet).__name__}; load one with Subnet.load")
    if isinstance(anchor, (int, float)) and not isinstance(anchor, bool):
        raise NotImplementedError(
            f"transfer: an elastic anchor (a number) is not available yet, got {anchor}; use 'frozen' or 'free'"
        )
    if anchor not in ("frozen", "free"):
        raise ValueError(f"transfer: anchor must be 'frozen' or 'free', got {anchor!r}")
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction <= 1:
        raise ValueError(f"transfer: fraction must be a number in (0, 1], got {fraction!r}")


def _values_to_plant(subnet: Subnet, source: nn.Module | None, check_hash: bool) -> dict[str, Tensor]:
    if source is None:
        if subnet.weights is None:
            raise ValueError(
                "transfer: source is None and the subnet carries no values; pass the source network, or a subnet "
                "loaded from a file that was saved with weights="
            )
        values = subnet.weights
    else:
        parameters = fitting_parameters(subnet.masks, source, "transfer: source")
        if check_hash and subnet.base_hash is not None and (found := weights_hash(parameters)) != subnet.base_hash:
            raise ValueError(
                f"transfer: source must be the network that the subnet was found in (hash {subnet.base_hash[:12]}), "
                f"got one with hash {found[:12]}; pass that network, or check_hash=False to plant from this one"
            )
        values = {name: kept_values(subnet.masks[name], parameter) for name, parameter in parameters.items()}
    check_finite(values, "transfer")
    return values


def _planting(name: str, mask: Tensor, values: Tensor, parameter: nn.Parameter) -> _Planting:
    if values.dtype != parameter.dtype:
        raise ValueError(
            f"transfer: source and target must have the same dtype, planted entries are bit-identical; {name} is "
            f"{values.dtype} in the source and {parameter.dtype} in target; convert one of them"
        )
    # A copy of its own: subnet.weights must not become the anchor's storage.
    return _Planting(parameter, mask.to(parameter.device), values.to(parameter.device, copy=True))


def _check_held(plantings: dict[str, _Planting]) -> None:
    """Raise ValueError if an entry that is already held would get other bits."""
    clashing = []
    for name, (parameter, mask, values) in plantings.items():
        held = anchor_of(parameter)
        if held is None:
            continue
        both = mask & held.mask_of(parameter)
        planted = parameter.detach().clone()
        held.restore(planted)
        new = planted.clone().masked_scatter_(mask, values)
        if not torch.equal(_bits(new[both]), _bits(planted[both])):
            clashing.append(name)
    if clashing:
        raise ValueError(
            f"transfer: target already holds some of these entries with other values, in {listed(clashing)}; "
            "call release(target) first to plant anew"
        )


def _hold(owner: tuple[nn.Module, str], planting: _Planting, keep_positions: bool) -> None:
    """Anchor the planted entries, together with those that the parameter holds already."""
    module, name = owner
    parameter, mask, values = planting
    held = anchor_of(parameter)
    if held is not None:
        held.restore(parameter)  # load_state_dict may have written over it since the last step
        mask = mask | held.mask_of(parameter)
        values = kept_values(mask, parameter)
        held.detach()
    module.__dict__.setdefault(ATTRIBUTE, {})[name] = Anchor(parameter, mask, values, keep_positions)


def _owners(target: nn.Module) -> dict[int, tuple[nn.Module, str]]:
    """Return id of a parameter -> (module that holds it, its name there); for a tied one the first."""
    owners: dict[int, tuple[nn.Module, str]] = {}
    for module in target.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), (module, name))
    return owners


def _bits(values: Tensor) -> Tensor:
    """Return the values' bytes, so that -0.0 differs from 0.0."""
    return values.contiguous().view(torch.uint8)
