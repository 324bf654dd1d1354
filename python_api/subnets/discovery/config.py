"""What steers a discovery, checked where it is written down."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, fields
from typing import Any

from subnet_kernels.masks import MaskKind, as_kind

from ..nn.base import Unit
from ..targets import Targets

_CHOICES = {
    "reduction": ("sum", "mean"),
    "beta_schedule": ("after_epoch", "reach_end"),
    "anneal": ("epoch", "step"),
}


@dataclass(frozen=True)
class DiscoveryConfig:
    """Settings of :func:`subnets.discover`; the defaults are those of Subtask Induction.

    Args:
        epochs: E, number of epochs.
        steps_per_epoch: take exactly this many batches per epoch; None takes all that ``batches`` gives.
        lr, weight_decay: of AdamW on the scores, constant; the decay also decays scores.
        lam: weight of the mask penalty. reduction: "sum" adds ``lam * sum of the mask over all masked weights`` (the
            paper), "mean" ``lam * its mean``.
        score_init: the initial score.
        beta_start, beta_end: the inverse temperature at the start and at the end.
        beta_schedule: "after_epoch" (the paper) has epoch e at ``beta_start * (beta_end/beta_start)^(e/E)``, so that
            beta_end is reached only after the last epoch; "reach_end" has ``e/(E-1)`` there: the last epoch runs at
            beta_end (as does the only one, if E is 1).
        anneal: "epoch" changes beta between epochs; "step" between optimizer steps, with t/T (or t/(T-1)) in place of
            e/E for step t of T, which needs steps_per_epoch or batches with a length.
        targets, exclude, unit, kind: what to mask and how, as in :func:`subnets.mask_model`.
        seed: of every random number used by batches, objective and evaluate (torch, numpy, random).
        checkpoint: a file that is written after every epoch and from which a run that was killed goes on. None: none.
        cuda_graph: capture the step at the first batch as a CUDA graph (:class:`subnets.CapturedStep`) and replay it
            for all batches of the same structure and shapes; others, such as a smaller last one, run as usual. The
            objective then runs four times more on the first batch, sees batches on the model's device, must not wait
            for the device and draws random numbers from its default generator alone. Batches are tensors and plain
            values in tuples, lists and dicts.

    Raises:
        ValueError, TypeError: a value that is out of range or contradicts another.

    Source: arXiv 2310.10899; the penalty as a raw sum and "after_epoch" as in its authors' code.
    """

    epochs: int = 50
    steps_per_epoch: int | None = None
    lr: float = 1e-3
    weight_decay: float = 1e-2
    lam: float = 1e-7
    reduction: str = "sum"
    score_init: float = -0.1
    beta_start: float = 1.0
    beta_end: float = 100.0
    beta_schedule: str = "after_epoch"
    anneal: str = "epoch"
    targets: Targets | None = None
    exclude: Targets = ()
    unit: Unit = "weight"
    kind: str | MaskKind = "sigmoid"
    seed: int = 0
    checkpoint: str | os.PathLike[str] | None = None
    cuda_graph: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "steps_per_epoch"):
            self._check_count(name, may_be_none=name == "steps_per_epoch")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise TypeError(f"DiscoveryConfig: seed must be an int, got {self.seed!r}")
        for name in ("lr", "weight_decay", "lam", "score_init", "beta_start", "beta_end"):
            self._check_number(name)
        for name in ("lr", "beta_start", "beta_end"):
            if getattr(self, name) <= 0:
                raise ValueError(f"DiscoveryConfig: {name} must be > 0, got {getattr(self, name)}")
        for name in ("weight_decay", "lam"):
            if getattr(self, name) < 0:
                raise ValueError(f"DiscoveryConfig: {name} must be >= 0, got {getattr(self, name)}")
        if self.beta_end < self.beta_start:
            raise ValueError(
                f"DiscoveryConfig: beta_end must be >= beta_start, got {self.beta_end} and {self.beta_start}; a mask "
                "hardens as beta grows"
            )
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"DiscoveryConfig: {name} must be one of {list(choices)}, got {getattr(self, name)!r}")
        if not as_kind(self.kind).is_trainable:
            name = as_kind(self.kind).name
            raise ValueError(f"DiscoveryConfig: kind {name!r} gives scores no gradient; use 'sigmoid'")
        if self.checkpoint is not None and not isinstance(self.checkpoint, (str, os.PathLike)):
            raise TypeError(f"DiscoveryConfig: checkpoint must be a path or None, got {self.checkpoint!r}")
        if not isinstance(self.cuda_graph, bool):
            raise TypeError(f"DiscoveryConfig: cuda_graph must be True or False, got {self.cuda_graph!r}")

    def _check_count(self, name: str, may_be_none: bool) -> None:
        value = getattr(self, name)
        if value is None and may_be_none:
            return
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"DiscoveryConfig: {name} must be an int, got {value!r}")
        if value < 1:
            raise ValueError(f"DiscoveryConfig: {name} must be >= 1, got {value}")

    def _check_number(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise TypeError(f"DiscoveryConfig: {name} must be a number, got {value!r}")
        if not math.isfinite(value):
            raise ValueError(f"DiscoveryConfig: {name} must be finite, got {value}")

    def beta(self, done: int, total: int) -> float:
        """beta of the epoch (step) before which ``done`` of ``total`` were done."""
        if self.beta_schedule == "after_epoch":
            fraction = done / total
        else:
            fraction = done / (total - 1) if total > 1 else 1.0
        return self.beta_start * (self.beta_end / self.beta_start) ** fraction

    def record(self) -> dict[str, Any]:
        """Every setting that decides what is found, as json values: what a checkpoint and a subnet remember."""
        names = [field.name for field in fields(self) if field.name not in ("checkpoint", "cuda_graph")]
        values = {name: _plain(getattr(self, name)) for name in names}
        kind = as_kind(self.kind)
        values["kind"] = kind.name if not kind.params() else [kind.name, *kind.params()]
        return values


def _plain(value: Any) -> Any:
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, (set, frozenset)):
        return sorted(str(_plain(item)) for item in value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
