"""One density for all methods: the weights of highest rank, and as many of them for each."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from subnets.subnet import Subnet


def at_density(scores: Mapping[str, Tensor], density: float) -> Subnet:
    """The ``round(density * n)`` weights of highest score among all n of all tensors; of equal ones those that come
    first stay, so that the number is exact.

    Raises:
        ValueError: scores that are not finite, or too few weights for one to stay.
    """
    flat = torch.cat([its.detach().flatten().float().cpu() for its in scores.values()])
    if not bool(torch.isfinite(flat).all()):
        raise ValueError("at_density: scores must be finite; the method's training has diverged, lower its rate")
    num_kept = round(density * len(flat))
    if num_kept < 1:
        raise ValueError(f"at_density: density {density:g} of {len(flat)} weights leaves none")
    kept = torch.zeros(len(flat), dtype=torch.bool)
    kept[flat.sort(descending=True, stable=True).indices[:num_kept]] = True
    parts = kept.split([its.numel() for its in scores.values()])
    return Subnet({name: part.view(its.shape) for (name, its), part in zip(scores.items(), parts, strict=True)})
