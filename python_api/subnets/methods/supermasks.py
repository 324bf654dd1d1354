"""Masks over initial weights that are read off a trained network, and weights of one size for masks to choose from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from subnet_kernels.masks import is_among_highest

from ..discovery.scores import inputs_of_a_unit
from ..nn.hf_conv1d import is_hf_conv1d
from ..provenance import provenance_of
from ..subnet import Subnet
from ..subnet_file import listed, weights_hash
from ..subnet_fit import check_unmasked, kept_values
from ..targets import Targets, find_targets

CRITERIA: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "large_final": lambda initial, final: final.abs(),
    "magnitude_increase": lambda initial, final: final.abs() - initial.abs(),
    "large_final_same_sign": lambda initial, final: final * initial.sign(),
}


@torch.no_grad()
def supermask(
    initial: nn.Module, trained: nn.Module | Mapping[str, Tensor], criterion: str = "large_final",
    keep: float | Mapping[str, float] = 0.5, *, targets: Targets | None = None, exclude: Targets = (),
    rescale: bool = False,
) -> Subnet:
    """Return the subnet of ``initial`` whose weights score highest in ``trained``; nothing is trained here.

    Of each layer all but the ``int((1 - keep) * n)`` lowest scores are kept, with w_i the initial and w_f the trained
    weight, by ``criterion``: "large_final" abs(w_f); "magnitude_increase" abs(w_f) - abs(w_i);
    "large_final_same_sign" w_f * sign(w_i), and never a weight whose sign has changed.

    Args:
        initial: the network before training; unmasked, not changed.
        trained: the same network after it, or its parameters by name.
        criterion: one of the three.
        keep: the fraction of each layer that is kept, or one per parameter name ("0.weight").
        targets, exclude: which parameters get a mask, as for `subnets.mask_model`.
        rescale: multiply each layer's kept weights by n over their number (dynamic weight rescaling).

    Returns:
        A `Subnet` with the initial (rescaled) values of what it keeps, so that `subnets.transfer` can plant it. Of
        equal scores the first go.

    Raises:
        ValueError: an unknown criterion, keep outside (0, 1], other parameters than initial's, values not finite.
        TypeError: initial is no module.

    Source: Zhou, Lan, Liu, Yosinski, NeurIPS 2019 (arXiv 1905.01067).

    >>> initial, trained = nn.Linear(4, 1, bias=False), nn.Linear(4, 1, bias=False)
    >>> _ = initial.weight.data.copy_(torch.tensor([[1.0, -1.0, 2.0, 3.0]]))
    >>> _ = trained.weight.data.copy_(torch.tensor([[4.0, 2.0, 1.0, 3.5]]))
    >>> supermask(initial, trained, "magnitude_increase", keep=0.5).masks["weight"].tolist()
    [[True, True, False, False]]
    """
    if not isinstance(initial, nn.Module):
        raise TypeError(f"supermask: initial must be a torch.nn.Module, got {type(initial).__name__}")
    check_unmasked(initial, "supermask")
    if criterion not in CRITERIA:
        raise ValueError(f"supermask: criterion must be one of {list(CRITERIA)}, got {criterion!r}")
    names = list(find_targets(initial, targets, exclude))
    finals = dict(trained.named_parameters()) if isinstance(trained, nn.Module) else trained
    masks, weights, values = {}, {}, {}
    for name in names:
        weight, final = initial.get_parameter(name).detach(), _final(finals, name, initial.get_parameter(name))
        masks[name] = is_among_highest(CRITERIA[criterion](weight, final), _fraction(keep, name))
        if criterion == "large_final_same_sign":
            masks[name] &= weight * final > 0
        if rescale:
            weight = weight * (weight.numel() / max(int(masks[name].sum()), 1))
        weights[name], values[name] = weight, kept_values(masks[name], weight)
    provenance = provenance_of(
        initial, method="supermask", criterion=criterion, rescale=rescale,
        keep=dict(keep) if isinstance(keep, Mapping) else keep,
    )  # fmt: skip
    return Subnet(masks, provenance, base_hash=weights_hash(weights), weights=values)


def _final(finals: Mapping[str, Tensor], name: str, initial: Tensor) -> Tensor:
    if name not in finals or finals[name].shape != initial.shape:
        got = f"of shape {list(finals[name].shape)}" if name in finals else "not there"
        raise ValueError(
            f"supermask: trained must have initial's parameters, {name} of shape {list(initial.shape)} is {got}"
        )
    final = finals[name].detach().to(initial.device)
    if not bool(final.isfinite().all() and initial.isfinite().all()):
        raise ValueError(f"supermask: {name} has NaN or infinite values")
    return final


def _fraction(keep: float | Mapping[str, float], name: str) -> float:
    if isinstance(keep, Mapping) and name not in keep:
        raise ValueError(f"supermask: keep has no fraction for {name}, only for {listed(keep)}")
    fraction = keep[name] if isinstance(keep, Mapping) else keep
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction <= 1:
        raise ValueError(f"supermask: keep, the fraction of a layer that stays, must be in (0, 1], got {fraction!r}")
    return fraction


@torch.no_grad()
def signed_constant_(
    model: nn.Module, targets: Targets | None = None, exclude: Targets = (), *, size: str = "kaiming", kept: float = 1.0
) -> nn.Module:
    """Give all weights of a layer one size and leave their signs, in place: ``w = sign(w) * size``. Returns the model.

    Args:
        model: unmasked.  targets, exclude: which parameters, as for `subnets.mask_model`.
        size: "kaiming", sqrt(2 / (kept * inputs of a unit)); "std", the standard deviation of the layer's weights.
        kept: the fraction of the weights that a mask will keep: 1 is edge-popup's default; k is its ``scale_fan``, as
            its text means it (its code takes ``1 - prune_rate``, where prune_rate is what is kept).

    Raises:
        ValueError: another size, kept outside (0, 1], a masked model, or a weight without inputs (of one dimension).

    Source: Ramanujan et al., CVPR 2020 ("kaiming"); Zhou et al., NeurIPS 2019 ("std").

    >>> model = signed_constant_(nn.Linear(8, 3))
    >>> model.weight.abs().unique().tolist()
    [0.5]
    """
    check_unmasked(model, "signed_constant_")
    if size not in ("kaiming", "std"):
        raise ValueError(f"signed_constant_: size must be 'kaiming' or 'std', got {size!r}")
    if not 0 < kept <= 1:
        raise ValueError(f"signed_constant_: kept, the fraction that a mask will keep, must be in (0, 1], got {kept}")
    for name, target in find_targets(model, targets, exclude).items():
        weight = model.get_parameter(name)
        if size == "kaiming":
            its = math.sqrt(2 / (kept * inputs_of_a_unit(name, weight, is_hf_conv1d(target.module))))
        else:
            its = float(weight.std(correction=0))
        weight.copy_(weight.sign() * its)
    return model
