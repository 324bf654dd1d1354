"""Every knob of the experiments on digits, and their presets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from subnets.experiments import knobs
from subnets.experiments.knobs import Knobs, knob

PARTS = ("tickets", "edge_popup", "sparse_finetuning", "clusters")


@dataclass(frozen=True)
class DigitsConfig(Knobs):
    """See `preset`."""

    preset: str = knob("standard", "name of the preset these values started from")
    parts: tuple[str, ...] = knob(PARTS, f"which of {', '.join(PARTS)}")
    seeds: int = knob(3, "networks per part, with seeds 0, 1, ...")

    ticket_levels: tuple[int, ...] = knob((7, 9, 15), "levels at which the ticket meets its control; the last ends it")
    ticket_steps: int = knob(2_000, "steps of each training")
    ticket_batch: int = knob(60, "batch")
    ticket_lr: float = knob(1.2e-3, "Adam's rate")
    ticket_every: int = knob(50, "steps between validations, of which the best is where training would have stopped")

    kept: tuple[float, ...] = knob((0.1, 0.3, 0.5, 0.7, 0.9), "edge-popup: the fractions k of each layer that are kept")
    popup_epochs: int = knob(60, "edge-popup: epochs")
    popup_batch: int = knob(128, "edge-popup: batch")

    language_k: float = knob(0.3, "share of the trunk's weights that a variant's difference may change")
    task_k: float = knob(0.1, "the same for the task's difference")
    tuning_epochs: int = knob(40, "epochs of the pretraining, and of each of the two phases of a fine-tuning")

    cluster_epochs: int = knob(60, "epochs of the networks that are clustered")
    num_clusters: int = knob(12, "clusters")
    shuffles: int = knob(50, "shuffled networks that each is compared with")

    def __post_init__(self) -> None:
        if not self.parts or len(set(self.parts)) < len(self.parts) or set(self.parts) - set(PARTS):
            raise ValueError(f"DigitsConfig: parts must list different ones of {', '.join(PARTS)}, got {self.parts}")
        for name in _POSITIVE:
            value = getattr(self, name)
            if min(value if isinstance(value, tuple) else (value,), default=0) < 1:
                raise ValueError(f"DigitsConfig: {name} must be at least 1, got {value}")
        if any(not 0 < k < 1 for k in self.kept) or len(set(self.kept)) < max(len(self.kept), 2):
            raise ValueError(f"DigitsConfig: kept must list two or more different fractions in (0, 1), got {self.kept}")
        if list(self.ticket_levels) != sorted(set(self.ticket_levels)):
            raise ValueError(f"DigitsConfig: ticket_levels must rise, got {self.ticket_levels}")
        if self.ticket_steps % self.ticket_every:
            raise ValueError(
                f"DigitsConfig: ticket_steps must be a multiple of ticket_every, got {self.ticket_steps} and "
                f"{self.ticket_every}"
            )
        for name in ("language_k", "task_k"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"DigitsConfig: {name} must be in (0, 1], got {getattr(self, name)}")


_POSITIVE = (
    "seeds", "ticket_levels", "ticket_steps", "ticket_batch", "ticket_every", "popup_epochs", "popup_batch",
    "tuning_epochs", "cluster_epochs", "num_clusters", "shuffles",
)  # fmt: skip

PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"seeds": 1, "ticket_levels": (7,), "kept": (0.1, 0.5, 0.9), "popup_epochs": 30, "shuffles": 19},
    "standard": {},
}


def make_config(preset: str = "standard", overrides: dict[str, str] | None = None) -> DigitsConfig:
    """The preset with `overrides` (text as typed after --set) applied; see `knobs.make_config`."""
    return knobs.make_config(DigitsConfig, PRESETS, preset, overrides)
