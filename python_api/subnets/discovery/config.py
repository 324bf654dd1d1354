"""What steers a discovery, checked where it is written down."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from subnet_kernels.masks import MaskKind, as_kind

from ..nn.base import Unit
from ..targets import Targets

_CHOICES = {
    "reduction": ("sum", "mean"),
    "beta_schedule": ("after_epoch", "reach_end"),
    "anneal": ("epoch", "step"),
}

MEMBER_FIELDS = {"seeds": "seed", "penalties": "lam", "score_inits": "score_init"}  # several values of one setting


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
        seeds, penalties, score_inits: values of seed, lam and score_init: every combination of what is given is trained
            in one run, a *member* each, and :func:`subnets.discover` returns ``Discoveries``. None: the one value
            above. Members are in the order of ``itertools.product(seeds, penalties, score_inits)``.
        members_at_once: at most so many members share one forward and backward pass. None chooses: on a GPU as many as
            fit in its free memory, on a CPU one, or all if a pass is small. It changes speed and rounding alone. An
            objective's own ``stacked`` pass is given so many members a call (None: all), and how many of them run at a
            time is its own affair; its rounding differs from that of a member alone even with 1. Only with seeds,
            penalties or score_inits.
        target_density: steer lam (each member's, from its ``lam`` on) after every epoch so that the density ends
            there: :mod:`subnets.discovery.control`. Rows of the history then have the epoch's "lam".
        keep_ranks: give the subnet the ranks of its weights by score, so that fractions of it can be planted
            (:meth:`subnets.Subnet.top`): a byte per kept weight, and meanwhile a copy of the best epoch's scores.

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
    seeds: Sequence[int] | None = None
    penalties: Sequence[float] | None = None
    score_inits: Sequence[float] | None = None
    members_at_once: int | None = None
    target_density: float | None = None
    keep_ranks: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "steps_per_epoch", "members_at_once"):
            self._check_count(name, may_be_none=name != "epochs")
        _check_seed("seed", self.seed)
        for name in ("lr", "weight_decay", "lam", "score_init", "beta_start", "beta_end"):
            _check_number(name, getattr(self, name))
        self._check_members()
        self._check_target()
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
        for name in ("cuda_graph", "keep_ranks"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"DiscoveryConfig: {name} must be True or False, got {getattr(self, name)!r}")

    def _check_count(self, name: str, may_be_none: bool) -> None:
        value = getattr(self, name)
        if value is None and may_be_none:
            return
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"DiscoveryConfig: {name} must be an int, got {value!r}")
        if value < 1:
            raise ValueError(f"DiscoveryConfig: {name} must be >= 1, got {value}")

    def _check_members(self) -> None:
        """Each list of members' values is a tuple of different values, each fit for the field it stands for."""
        for name, field in MEMBER_FIELDS.items():
            values = getattr(self, name)
            if values is None:
                continue
            if isinstance(values, str) or not isinstance(values, Sequence):
                raise TypeError(f"DiscoveryConfig: {name} must be a list of values of {field} or None, got {values!r}")
            for value in values:
                _check_seed(name, value) if field == "seed" else _check_number(name, value)
            if len(values) == 0 or len(set(values)) < len(values):
                raise ValueError(f"DiscoveryConfig: {name} must list one or more different values, got {values!r}")
            if field == "lam" and min(values) < 0:
                raise ValueError(f"DiscoveryConfig: penalties must be >= 0, got {values!r}")
            object.__setattr__(self, name, tuple(values))
        if self.members_at_once is not None and not self.is_bulk:
            raise ValueError(
                f"DiscoveryConfig: members_at_once={self.members_at_once} is for several members; give seeds, "
                "penalties or score_inits, or leave it None"
            )
        if self.is_bulk and self.cuda_graph:
            raise ValueError(
                "DiscoveryConfig: cuda_graph=True captures the step of one discovery; leave it False with seeds, "
                "penalties or score_inits"
            )

    def _check_target(self) -> None:
        if self.target_density is None:
            return
        _check_number("target_density", self.target_density)
        if not 0 < self.target_density < 1:
            raise ValueError(f"DiscoveryConfig: target_density must be in (0, 1), got {self.target_density}")
        if min(self.penalties or (self.lam,)) <= 0:
            raise ValueError(
                "DiscoveryConfig: target_density multiplies lam up and down, so lam and penalties must be > 0, got 0"
            )
        if self.cuda_graph:
            raise ValueError("DiscoveryConfig: cuda_graph=True keeps lam as captured; leave out target_density")

    @property
    def is_bulk(self) -> bool:
        """Whether several members are asked for, so that discover returns ``Discoveries``."""
        return any(getattr(self, name) is not None for name in MEMBER_FIELDS)

    def members(self) -> list[DiscoveryConfig]:
        """Each member's settings as those of a discovery alone."""
        values = [getattr(self, n) or (getattr(self, field),) for n, field in MEMBER_FIELDS.items()]
        alone = dict.fromkeys((*MEMBER_FIELDS, "members_at_once", "checkpoint"))
        return [
            replace(self, **alone, **dict(zip(MEMBER_FIELDS.values(), combination, strict=True)))
            for combination in itertools.product(*values)
        ]

    def beta(self, done: int, total: int) -> float:
        """beta of the epoch (step) before which ``done`` of ``total`` were done."""
        if self.beta_schedule == "after_epoch":
            fraction = done / total
        else:
            fraction = done / (total - 1) if total > 1 else 1.0
        return self.beta_start * (self.beta_end / self.beta_start) ** fraction

    def record(self) -> dict[str, Any]:
        """Every setting that decides what is found, as json values: what a checkpoint and a subnet remember."""
        without = ("checkpoint", "cuda_graph", "members_at_once")
        names = [field.name for field in fields(self) if field.name not in without]
        values = {name: _plain(getattr(self, name)) for name in names}
        kind = as_kind(self.kind)
        values["kind"] = kind.name if not kind.params() else [kind.name, *kind.params()]
        if not self.keep_ranks:  # as if there were no such setting: checkpoints from before it go on
            del values["keep_ranks"]
        return values


def _check_seed(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"DiscoveryConfig: {name} must be {'an int' if name == 'seed' else 'ints'}, got {value!r}")


def _check_number(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"DiscoveryConfig: {name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"DiscoveryConfig: {name} must be finite, got {value}")


def _plain(value: Any) -> Any:
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, (set, frozenset)):
        return sorted(str(_plain(item)) for item in value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
