"""target_density: lam is steered so that the density ends where it is wanted.

After epoch e (from 1) of E, with d the soft density (the mean of the mask over all masked weights at the epoch's last
beta), d_0 that of the initial scores and D the target::

    plan(e) = d_0^(1 - e/E) * D^(e/E)                    a straight line in log density
    lam <- lam * clip((d / plan(e))^GAIN, 1/STEP, STEP)  kept within [lam_0/RANGE, lam_0*RANGE]

A density above plan raises lam, one below lowers it. lam acts on the sign of a score's drift, so that factors, not
differences, move the density. Masks hardly move once beta has hardened them, so it takes some ten epochs or more, and
scores that training moves at all. Nothing is drawn at random: the same run gives the same lam.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from subnet_kernels.masks import as_kind

from ..masking import MaskSet
from .config import DiscoveryConfig

GAIN = 4.0
STEP = 4.0
RANGE = 1e4


def soft_density(masks: MaskSet) -> float:
    """The mean of the soft mask over all masked weights, at the masks' beta."""
    total = weights = 0.0
    with torch.no_grad():
        for layer in masks.layers.values():
            total += float(layer.kind.value(layer.scores, masks.beta).double().sum()) * layer.weights_per_score
            weights += layer.weight.numel()
    return total / max(weights, 1)


class DensityControl:
    """lam per member, steered to one density; ``lams`` is all its state.

    Args:
        lams: each member's first lam.  starts: each member's initial soft density.
    """

    def __init__(self, target: float, epochs: int, lams: Iterable[float], starts: Iterable[float]) -> None:
        self.target, self.epochs = target, epochs
        self.first, self.starts = list(lams), list(starts)
        self.lams = list(self.first)

    def update(self, member: int, done: int, density: float) -> None:
        """Set the member's lam for the epoch after ``done`` epochs, at whose end this was its soft density."""
        share = done / self.epochs
        plan = self.starts[member] ** (1 - share) * self.target**share
        factor = min(max((density / plan) ** GAIN, 1 / STEP), STEP)
        first = self.first[member]
        self.lams[member] = min(max(self.lams[member] * factor, first / RANGE), first * RANGE)


def density_control(masks: MaskSet, config: DiscoveryConfig) -> DensityControl | None:
    """The control of all members of this config; None without target_density. All scores are one value at first."""
    if config.target_density is None:
        return None
    members, kind = config.members(), as_kind(config.kind)
    inits = [torch.tensor(member.score_init, dtype=torch.float64) for member in members]
    starts = [float(kind.value(init, config.beta_start)) for init in inits]
    return DensityControl(config.target_density, config.epochs, [member.lam for member in members], starts)
