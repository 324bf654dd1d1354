"""Every knob of the experiment on additions and multiplications, and its presets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from subnets.experiments import knobs
from subnets.experiments.addmul.data import PROBLEMS
from subnets.experiments.knobs import Knobs, knob

METHODS = ("csordas", "continuous_sparsification")
FULL = "full"  # the control mask, trained on all functions


@dataclass(frozen=True)
class AddMulConfig(Knobs):
    """The authors' numbers where nothing is changed; see `preset`."""

    preset: str = knob("official", "name of the preset these values started from")
    seed: int = knob(0, "seed of the base network, of the masks and of all data")
    problems: tuple[str, ...] = knob(PROBLEMS, f"which networks: {', '.join(PROBLEMS)}")
    methods: tuple[str, ...] = knob(METHODS, f"how masks are trained: {', '.join(METHODS)}")
    full_mask: bool = knob(False, "also train a control mask on all functions at once, with each method")
    hidden: tuple[int, ...] = knob((400, 400, 200), "hidden units per layer")
    batch: int = knob(128, "examples per step, of base and masks; 4 masks are drawn per batch")

    base_steps: int = knob(20_000, "steps of the base network")
    base_lr: float = knob(1e-3, "Adam's rate of the base network")

    mask_steps: int = knob(20_000, "steps of a mask by csordas")
    mask_epoch: int = knob(500, "of those between two rows of the history and checkpoints")
    mask_loss_weight: float | None = knob(
        None, "weight of the sum of the logits, before the division by the batch; None: 1e-4, 4e-4 for double addition"
    )
    cs_epochs: int = knob(90, "epochs of a mask by continuous sparsification, over which beta grows to 200")
    cs_steps: int = knob(100, "steps in each of them")
    cs_lam: float = knob(1e-8, "weight of the sum of the mask in continuous sparsification")
    cs_score_init: float = knob(0.0, "initial score in continuous sparsification")

    def __post_init__(self) -> None:
        for name in ("hidden", "batch", "base_steps", "mask_steps", "mask_epoch", "cs_epochs", "cs_steps"):
            value = getattr(self, name)
            if min(value if isinstance(value, tuple) else (value,), default=0) < 1:
                raise ValueError(f"AddMulConfig: {name} must be at least 1, got {value}")
        for name, known in (("problems", PROBLEMS), ("methods", METHODS)):
            given = getattr(self, name)
            if not given or len(set(given)) < len(given) or set(given) - set(known):
                raise ValueError(f"AddMulConfig: {name} must list different ones of {', '.join(known)}, got {given}")
        if self.batch % 4:
            raise ValueError(f"AddMulConfig: batch must be divisible by 4, one part per mask drawn, got {self.batch}")
        if self.mask_steps % self.mask_epoch:
            raise ValueError(
                f"AddMulConfig: mask_steps must be a multiple of mask_epoch, got {self.mask_steps} and "
                f"{self.mask_epoch}"
            )
        if not self.base_lr > 0:
            raise ValueError(f"AddMulConfig: base_lr must be positive, got {self.base_lr}")

    def penalty(self, problem: str) -> float:
        """mask_loss_weight of a problem."""
        if self.mask_loss_weight is not None:
            return self.mask_loss_weight
        return 1e-4 if problem == "add_mul" else 4e-4


PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"base_steps": 8_000, "mask_steps": 3_000, "cs_epochs": 60, "cs_steps": 50},
    "official": {},
}


def make_config(preset: str = "quick", overrides: dict[str, str] | None = None) -> AddMulConfig:
    """The preset with `overrides` (text as typed after --set) applied; see `knobs.make_config`."""
    return knobs.make_config(AddMulConfig, PRESETS, preset, overrides)
