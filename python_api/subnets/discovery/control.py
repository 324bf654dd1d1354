"""target_density: lam is steered so that the density ends where it is wanted.

After every epoch, d = the mean of sigmoid(beta_end * s) over all masked weights, the density that the present scores
would have at the end, and D the target::

    ahead = d + (d - d of the epoch before) * epochs / 8     where d is heading, an eighth of the run ahead
    lam  <- lam * clip((ahead / D)^2, 1/4, 4)                kept within [lam_0/10000, lam_0*10000]

A density above the target raises lam, one below lowers it. lam decides by its size, on a log scale, which scores fall,
so it is multiplied. Scores answer late, after AdamW's momentum, hence the look ahead; and they stop answering once beta
has hardened the masks, so it takes ten epochs or more. A first lam that is too low is made good more easily than one
that is too high: scores that it has pushed far below zero come back slowly. Nothing is drawn at random: the same run
gives the same lam.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from subnet_kernels.masks import as_kind

from ..masking import MaskSet
from .config import DiscoveryConfig

LOOK_AHEAD = 1 / 8  # of the run
GAIN = 2.0
STEP = 4.0
RANGE = 1e4


class DensityControl:
    """lam per member, steered to one density; ``lams`` and ``before`` are all its state.

    Args:
        lams: each member's first lam.  starts: the density at beta_end of each member's initial scores.
    """

    def __init__(self, target: float, epochs: int, lams: Iterable[float], starts: Iterable[float]) -> None:
        self.target, self.epochs = target, epochs
        self.first = list(lams)
        self.lams, self.before = list(self.first), list(starts)

    def update(self, member: int, density: float) -> None:
        """Set the member's lam for the next epoch, given its density at beta_end after this one."""
        ahead = density + (density - self.before[member]) * self.epochs * LOOK_AHEAD
        factor = min(max(max(ahead, 0.0) / self.target, STEP ** (-1 / GAIN)), STEP ** (1 / GAIN)) ** GAIN
        first = self.first[member]
        self.lams[member] = min(max(self.lams[member] * factor, first / RANGE), first * RANGE)
        self.before[member] = density

    def state(self) -> dict[str, list[float]]:
        return {"lams": self.lams, "before": self.before}

    def restore(self, state: dict[str, list[float]]) -> None:
        self.lams, self.before = state["lams"], state["before"]


@torch.no_grad()
def density_at_end(masks: MaskSet, beta_end: float) -> float:
    """The mean of the mask over all masked weights that these scores give at beta_end."""
    layers = masks.layers.values()
    total = sum(float(la.kind.soft_value(la.scores, beta_end).double().sum()) * la.weights_per_score for la in layers)
    return total / max(sum(layer.weight.numel() for layer in layers), 1)


def density_control(config: DiscoveryConfig) -> DensityControl | None:
    """The control of all members of this config; None without target_density."""
    if config.target_density is None:
        return None
    members, kind = config.members(), as_kind(config.kind)
    inits = [torch.tensor(member.score_init, dtype=torch.float64) for member in members]
    starts = [float(kind.soft_value(init, config.beta_end)) for init in inits]
    return DensityControl(config.target_density, config.epochs, [member.lam for member in members], starts)
