"""Random masks of a wanted size: the controls of a subnet."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def sampled(
    candidates: Mapping[str, Tensor], sizes: Mapping[str, int], generator: torch.Generator, per_layer: bool
) -> dict[str, Tensor]:
    """Return parameter name -> bool mask, a uniform draw without replacement from ``candidates``.

    Args:
        candidates: parameter name to bool tensor, True where a weight may be drawn. Its order plays no role.
        sizes: how many to draw from each parameter; with ``per_layer`` False only their sum counts.
        generator: on the CPU; advanced.
        per_layer: draw each parameter's number from itself; else the sum from all of them together, which takes 8 bytes
            per candidate while it draws.
    """
    masks = {name: torch.zeros(mask.numel(), dtype=torch.bool) for name, mask in candidates.items()}
    positions = {name: candidates[name].reshape(-1).nonzero().reshape(-1) for name in sorted(candidates)}
    if per_layer:
        for name, places in positions.items():
            masks[name][places[_draw(places.numel(), sizes[name], generator)]] = True
    else:
        lengths = [places.numel() for places in positions.values()]
        chosen = torch.zeros(sum(lengths), dtype=torch.bool)
        chosen[_draw(chosen.numel(), sum(sizes.values()), generator)] = True
        for (name, places), part in zip(positions.items(), chosen.split(lengths), strict=True):
            masks[name][places[part]] = True
    return {name: mask.view_as(candidates[name]) for name, mask in masks.items()}


def _draw(of: int, size: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(of, generator=generator)[:size]
