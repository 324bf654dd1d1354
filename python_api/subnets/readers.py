"""Subnets out of other people's checkpoints: NeuroSurgeon's, and plain dicts of boolean tensors.

Files are safetensors or of torch.save, and nothing that they say is run (`foreign_file`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .foreign_file import tensors_of
from .subnet import Subnet
from .subnet_file import listed, weights_hash

Source = str | os.PathLike[str] | Mapping[str, Any]
METHODS = ("continuous_sparsification", "hard_concrete", "magnitude_pruning")
_WRAPPERS = ("model", "root_model", "wrapped_model", "module")
_SUFFIXES = {"weight_mask_params": "weight", "bias_mask_params": "bias"}


def read_masks(source: Source) -> Subnet:
    """Return the subnet of a plain dict of parameter name to boolean tensor.

    Args:
        source: the dict, or a file of it: safetensors, or torch.save. Tensors of other types are taken where all their
            entries are 0 or 1.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or hostile, or a tensor has other entries than 0 and 1.
    """
    tensors = tensors_of(source, "read_masks")
    odd = [name for name, its in tensors.items() if its.is_complex() or not bool(((its == 0) | (its == 1)).all())]
    if odd or not tensors:
        what = f"these have other entries: {listed(odd)}" if odd else "it holds no tensor"
        raise ValueError(f"read_masks: every tensor must be a mask of parameter name to 0 or 1; {what}")
    return Subnet({name: its.bool() for name, its in tensors.items()})


def read_neurosurgeon(
    source: Source,
    method: str = "continuous_sparsification",
    *,
    base: nn.Module | None = None,
    keep_values: bool = False,
    prune_percentage: float | None = None,
    layers: Sequence[str] = (),
    mask_bias: bool = False,
) -> Subnet:
    """Return the subnet that a NeuroSurgeon model computes with in evaluation mode, to the bit.

    | method | a weight w with mask parameter p is in the subnet where |
    |---|---|
    | continuous_sparsification | ``p > 0`` |
    | hard_concrete | ``1.2 * sigmoid(p) - 0.1 > 0.5``, in p's dtype |
    | magnitude_pruning | ``w >= quantile(w of the layer, prune_percentage)``, ``>`` at 1.0; w itself, not its size |

    Names lose what wraps the model: ``wrapped_model.`` of CircuitModel and the probing classes, ``root_model.``,
    ``module.``, and ``model.`` if the whole checkpoint lies under it. Masks of biases become masks of ``<layer>.bias``.

    Args:
        source: state dict of a CircuitModel (or of a probe around one, or of what is in it), or a file of it:
            torch.save's or safetensors.
        method: ``mask_method`` of its CircuitConfig. A state dict does not say it.
        base: the unmasked model. Decides where a wrapper's name ends, in place of the rule above, and is checked
            against the masks.
        keep_values: have the subnet carry the checkpoint's kept weights.
        prune_percentage, layers, mask_bias: for magnitude_pruning, whose state dict holds no masks: of its
            ``mask_hparams``, and ``target_layers``.

    Returns:
        A Subnet with the hash of the checkpoint's weights, so that `transfer` notices another base network.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or hostile, holds no masks, its masks do not fit its weights or ``base``, or an
            argument is out of range.

    Source: NeuroSurgeon 0.1.0 (Lepori, Pavlick, Serre, arXiv 2309.00244).
    """
    caller = "read_neurosurgeon"
    if method not in METHODS:
        raise ValueError(f"{caller}: method must be one of {list(METHODS)}, got {method!r}")
    tensors = tensors_of(source, caller)
    if method == "magnitude_pruning":
        masks, weights = _by_magnitude(tensors, prune_percentage, layers, mask_bias)
    else:
        if prune_percentage is not None or layers or mask_bias:
            raise ValueError(f"{caller}: prune_percentage, layers and mask_bias are for magnitude_pruning")
        scores, weights = _scores_and_weights(tensors, base, caller)
        masks = {name: _expanded(name, _is_kept(its, method), weights, caller) for name, its in scores.items()}
    known = len(weights) == len(masks) and all(its.is_floating_point() for its in weights.values())
    subnet = Subnet(
        masks,
        {"method": f"NeuroSurgeon {method}"},
        base_hash=weights_hash(weights) if known else None,
        weights={name: weights[name][mask] for name, mask in masks.items()} if known and keep_values else None,
    )
    if keep_values and not known:
        raise ValueError(f"{caller}: keep_values=True needs the weights in the checkpoint, and it has not all of them")
    if base is not None:
        subnet.parameters_in(base, caller)
    return subnet


def read_neurosurgeon_scores(source: Source, *, base: nn.Module | None = None) -> dict[str, Tensor]:
    """Return parameter name -> scores of a continuous sparsification, to go on from:
    ``mask_model(model, targets=list(scores), init=scores)``, or `Subnet.with_ranks`; fp32, of the weight's shape or of
    a unit's (a "neuron" is our "row").

    Args:
        source, base: as for `read_neurosurgeon`, whose errors it raises.
    """
    caller = "read_neurosurgeon_scores"
    scores, _ = _scores_and_weights(tensors_of(source, caller), base, caller)
    return {name: its.float() for name, its in scores.items()}


def _is_kept(scores: Tensor, method: str) -> Tensor:
    if method == "hard_concrete":
        return torch.sigmoid(scores) * (1.1 - -0.1) + -0.1 > 0.5  # its arithmetic: near 0 rounding decides
    return scores > 0


def _scores_and_weights(
    tensors: Mapping[str, Tensor], base: nn.Module | None, caller: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Mask parameters and weights by the name that the parameter has in the unmasked model."""
    full = {}  # name of the parameter in the checkpoint -> of its mask parameters
    for name in tensors:
        path, _, last = name.rpartition(".")
        if last in _SUFFIXES and "to_hook" not in path.split("."):  # a probe holds its model a second time there
            full[f"{path}.{_SUFFIXES[last]}" if path else _SUFFIXES[last]] = name
    if not full:
        raise ValueError(
            f"{caller}: the checkpoint holds no weight_mask_params, of {listed(tensors)}; pass the state dict of a "
            "CircuitModel (with method='magnitude_pruning', prune_percentage= and layers= if it pruned by magnitude)"
        )
    prefix = _prefix(list(full), tensors, base, caller)
    scores = {name.removeprefix(prefix): tensors[mask] for name, mask in full.items()}
    odd = [name for name, its in scores.items() if not its.is_floating_point() or not bool(its.isfinite().all())]
    if odd:
        raise ValueError(f"{caller}: mask parameters must be finite floating-point numbers, not so: {listed(odd)}")
    return scores, {name.removeprefix(prefix): tensors[name] for name in full if name in tensors}


def _prefix(names: Sequence[str], everything: Iterable[str], base: nn.Module | None, caller: str) -> str:
    """What stands before the model's own names, in all of ``names``."""
    everything = list(everything)
    available = None if base is None else {name for name, _ in base.named_parameters(remove_duplicate=False)}
    prefix = ""
    while True:
        if available is not None and all(name.removeprefix(prefix) in available for name in names):
            return prefix
        step = names[0].removeprefix(prefix).partition(".")[0]
        longer = f"{prefix}{step}."
        goes_on = step in _WRAPPERS and all(name.startswith(longer) for name in names)
        if goes_on and step == "model" and available is None:
            goes_on = all(name.startswith(longer) for name in everything if name.startswith(prefix))
        if not goes_on:
            break
        prefix = longer
    if available is not None:
        raise ValueError(f"{caller}: the masked parameters are not those of base: {listed(names)}; pass its base model")
    return prefix


def _expanded(name: str, mask: Tensor, weights: Mapping[str, Tensor], caller: str) -> Tensor:
    """The mask of a whole neuron for each of its weights."""
    shape = weights[name].shape if name in weights else mask.shape
    fits = mask.ndim == len(shape) and all(m in (1, s) for m, s in zip(mask.shape, shape, strict=True))
    if not fits:
        raise ValueError(
            f"{caller}: the mask parameters of {name} have shape {list(mask.shape)}, its weight {list(shape)}; they "
            "must agree, or be 1 along dimensions that they share"
        )
    return mask.expand(shape)


def _by_magnitude(
    tensors: Mapping[str, Tensor], quantile: float | None, layers: Sequence[str], mask_bias: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    caller = "read_neurosurgeon"
    if quantile is None or isinstance(layers, str) or not layers:
        raise ValueError(
            f"{caller}: a checkpoint of magnitude_pruning holds no masks, they follow from its weights; pass "
            "prune_percentage= and layers=, the list of target_layers, of its CircuitConfig"
        )
    if isinstance(quantile, bool) or not isinstance(quantile, (int, float)) or not 0 <= quantile <= 1:
        raise ValueError(f"{caller}: prune_percentage must be a number in [0, 1], got {quantile!r}")
    wanted = [f"{layer}.{kind}" for layer in layers for kind in (("weight", "bias") if mask_bias else ("weight",))]
    found = {}
    for name in wanted:
        fitting = [full for full in tensors if full == name or _is_wrapped(full, name)]
        if fitting:
            found[name] = tensors[min(fitting, key=len)]
    missing = [name for name in wanted if name not in found and name.endswith(".weight")]  # not all layers have a bias
    if missing:
        raise ValueError(f"{caller}: the checkpoint holds no {listed(missing)}, of {listed(tensors)}; mend layers=")
    masks = {}
    for name, weight in found.items():
        if not weight.is_floating_point() or weight.numel() == 0:
            got = f"{weight.dtype} {list(weight.shape)}"
            raise ValueError(f"{caller}: {name} must hold floating-point numbers, got {got}")
        try:
            threshold = torch.quantile(weight.reshape(-1), quantile)
        except RuntimeError as error:  # too many entries for it, or a dtype that it does not take
            raise ValueError(f"{caller}: the quantile of {name} can't be taken ({error})") from error
        masks[name] = weight > threshold if quantile == 1 else weight >= threshold
    return masks, found


def _is_wrapped(full: str, name: str) -> bool:
    before = full.removesuffix(f".{name}")
    return before != full and all(part in _WRAPPERS for part in before.split("."))
