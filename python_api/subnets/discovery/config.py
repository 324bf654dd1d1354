"""What steers a discovery, checked where it is written down."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from typing import Any

from subnet_kernels.masks import MaskKind, as_kind

from ..nn.base import Unit
from ..targets import Targets, TargetsWithOptions

_CHOICES = {
    "reduction": ("sum", "mean"),
    "beta_schedule": ("after_epoch", "reach_end", "before_epoch"),
    "anneal": ("epoch", "step"),
    "reset": ("paper", "code"),
    "init": ("constant", "kaiming_uniform"),
}
LR_SCHEDULES = ("constant", "cosine")
GATES = "gates"
STEEPLESS = ("topk", "threshold")  # kinds whose penalty has no slope

MEMBER_FIELDS = {"seeds": "seed", "penalties": "lam", "score_inits": "score_init"}  # several values of one setting


@dataclass(frozen=True)
class SGD:
    """SGD in AdamW's place, for ``DiscoveryConfig.optimizer``: torch.optim.SGD with the config's rate and decay (which
    is then coupled: ``weight_decay * s`` is added to the gradient).

    Raises:
        ValueError: momentum outside [0, 1), or nesterov without momentum.
    """

    momentum: float = 0.9
    nesterov: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"SGD: momentum must be in [0, 1), got {self.momentum}")
        if self.nesterov and not self.momentum:
            raise ValueError("SGD: nesterov needs momentum > 0, got 0")


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
            beta_end (as does the only one, if E is 1); "before_epoch" has ``(e+1)/E`` (Lepori et al.'s code).
        anneal: "epoch" changes beta between epochs; "step" between optimizer steps, with t/T (or t/(T-1), (t+1)/T) in
            place of e/E for step t of T, which needs steps_per_epoch or batches with a length.
        targets, exclude, unit, kind: what to mask and how, as in :func:`subnets.mask_model`. unit may also be "gates":
            columns (input units) of linear layers and others, rows (filters) of convolutions.
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
        init: "constant": all scores begin at score_init; "kaiming_uniform": uniformly drawn around it, by at most
            1/sqrt(inputs of a unit), as torch draws a linear layer's weight.
        score_init_std: standard deviation of normal noise on the initial scores.
        score_range: (low, high) that scores are clamped to after every step. None: no limits.
        optimizer: an :class:`SGD`; None is AdamW, which with weight_decay=0 is Adam.
        lr_schedule: "constant"; "cosine", ``lr * (1 + cos(pi*e/E)) / 2`` in epoch e; or fractions of the run, after
            each of which the rate is a tenth of what it was.
        clip_norm: clip the norm of all scores' gradient, the penalty's included, to this. None: no clipping.
        rounds: train so many rounds of ``epochs`` epochs; between them beta and rate start anew and scores are reset,
            momentum stays. The best epoch is one of the last round.
        reset: what a score s becomes between rounds, with s0 = score_init: "paper" min(beta_end*s, s0), by which
            weights that were suppressed stay so; "code" min(s, s0), as the authors' code does because it sets beta to 1
            before: they get a second chance.

    The settings from init on are what other methods need; :mod:`subnets.discovery.presets` sets them. One discovery
    alone has them, without cuda_graph: members side by side (seeds, penalties, score_inits) are of the kind "sigmoid"
    and use none.

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
    targets: TargetsWithOptions | None = None
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
    init: str = "constant"
    score_init_std: float = 0.0
    score_range: tuple[float, float] | None = None
    optimizer: SGD | None = None
    lr_schedule: str | Sequence[float] = "constant"
    clip_norm: float | None = None
    rounds: int = 1
    reset: str = "paper"

    def __post_init__(self) -> None:
        for name in ("epochs", "steps_per_epoch", "members_at_once", "rounds"):
            self._check_count(name, may_be_none=name not in ("epochs", "rounds"))
        _check_seed("seed", self.seed)
        for name in ("lr", "weight_decay", "lam", "score_init", "beta_start", "beta_end", "score_init_std"):
            _check_number(name, getattr(self, name))
        self._check_members()
        self._check_target()
        for name in ("lr", "beta_start", "beta_end"):
            if getattr(self, name) <= 0:
                raise ValueError(f"DiscoveryConfig: {name} must be > 0, got {getattr(self, name)}")
        for name in ("weight_decay", "lam", "score_init_std"):
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
        self._check_method()
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

    def _check_method(self) -> None:
        """The settings of other methods."""
        options = self.targets.values() if isinstance(self.targets, dict) else ()
        if self.rounds > 1 and any("score_init" in each for each in options if isinstance(each, dict)):
            raise ValueError(
                "DiscoveryConfig: with several rounds scores go back to the one score_init; leave it out of targets"
            )
        if self.score_range is not None:
            object.__setattr__(self, "score_range", _check_range(self.score_range))
        if self.optimizer is not None and not isinstance(self.optimizer, SGD):
            raise TypeError(f"DiscoveryConfig: optimizer must be an SGD(...) or None (AdamW), got {self.optimizer!r}")
        if self.lr_schedule not in LR_SCHEDULES:
            object.__setattr__(self, "lr_schedule", _check_drops(self.lr_schedule))
        if self.clip_norm is not None:
            _check_number("clip_norm", self.clip_norm)
            if self.clip_norm <= 0:
                raise ValueError(f"DiscoveryConfig: clip_norm must be > 0 or None, got {self.clip_norm}")
        changed = [name for name in METHOD_FIELDS if getattr(self, name) != _default(name)]
        kind = as_kind(self.kind)
        if changed and self.cuda_graph:
            raise ValueError(f"DiscoveryConfig: cuda_graph=True can't be had with {', '.join(changed)}; leave it False")
        if self.is_bulk and (changed or kind.name != "sigmoid"):
            raise ValueError(
                "DiscoveryConfig: seeds, penalties and score_inits train members side by side, which can't be had with "
                f"{', '.join(changed) or f'kind {kind.name!r}'}; call discover once for each member"
            )
        if self.target_density is not None and (kind.name in STEEPLESS or self.rounds > 1):
            raise ValueError(
                f"DiscoveryConfig: target_density steers lam, which does not set the density of kind {kind.name!r} "
                f"over {self.rounds} round(s); leave it out"
            )

    @property
    def num_epochs(self) -> int:
        """Epochs of all rounds."""
        return self.rounds * self.epochs

    @property
    def is_plain(self) -> bool:
        """Whether MaskAdamW alone takes the steps, with the penalty and at one rate."""
        names = ("score_range", "optimizer", "lr_schedule", "clip_norm", "rounds")
        return all(getattr(self, name) == _default(name) for name in names)

    def lr_at(self, epoch: int) -> float:
        """The rate of this epoch of a round."""
        if self.lr_schedule == "constant":
            return self.lr
        if self.lr_schedule == "cosine":
            return self.lr * (1 + math.cos(math.pi * epoch / self.epochs)) / 2
        return self.lr * 0.1 ** sum(epoch >= max(1, round(float(part) * self.epochs)) for part in self.lr_schedule)

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
        elif self.beta_schedule == "before_epoch":
            fraction = (done + 1) / total
        else:
            fraction = done / (total - 1) if total > 1 else 1.0
        return self.beta_start * (self.beta_end / self.beta_start) ** fraction

    def record(self) -> dict[str, Any]:
        """Every setting that decides what is found, as json values: what a checkpoint and a subnet remember."""
        without = ("checkpoint", "cuda_graph", "members_at_once")
        names = [field.name for field in fields(self) if field.name not in without]
        values = {name: _plain(getattr(self, name)) for name in names}
        kind = as_kind(self.kind)
        values["kind"] = _plain(kind) if kind.params() else kind.name
        for name in ("keep_ranks", *METHOD_FIELDS):  # as if there were none: checkpoints from before them go on
            if getattr(self, name) == _default(name):
                del values[name]
        return values


METHOD_FIELDS = (
    "init", "score_init_std", "score_range", "optimizer", "lr_schedule", "clip_norm", "rounds", "reset",
)  # fmt: skip


def _default(name: str) -> Any:
    return DiscoveryConfig.__dataclass_fields__[name].default


def _check_seed(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"DiscoveryConfig: {name} must be {'an int' if name == 'seed' else 'ints'}, got {value!r}")


def _check_number(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"DiscoveryConfig: {name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"DiscoveryConfig: {name} must be finite, got {value}")


def _is_numbers(values: Any) -> bool:
    return isinstance(values, Sequence) and all(isinstance(v, (int, float)) and math.isfinite(v) for v in values)


def _check_range(limits: Any) -> tuple[float, float]:
    if not _is_numbers(limits) or len(limits) != 2 or not limits[0] < limits[1]:
        raise ValueError(f"DiscoveryConfig: score_range must be two numbers (low, high) or None, got {limits!r}")
    return float(limits[0]), float(limits[1])


def _check_drops(schedule: Any) -> tuple[float, ...]:
    if not _is_numbers(schedule) or not schedule or not all(0 < fraction < 1 for fraction in schedule):
        raise ValueError(
            f"DiscoveryConfig: lr_schedule must be one of {list(LR_SCHEDULES)} or fractions of the run in (0, 1), got "
            f"{schedule!r}"
        )
    return tuple(float(fraction) for fraction in schedule)


def _plain(value: Any) -> Any:
    if isinstance(value, MaskKind):
        return [value.name, *value.params()]
    if is_dataclass(value) and not isinstance(value, type):
        return {"name": type(value).__name__, **asdict(value)}
    if isinstance(value, Mapping):
        return {str(_plain(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, (set, frozenset)):
        return sorted(str(_plain(item)) for item in value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
