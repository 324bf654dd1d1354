"""What a discovery has found so far, epoch by epoch: history, best masks, result. One per member in bulk."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from subnet_kernels.packing import pack_mask, unpack_mask

from ..masking import MaskSet
from ..provenance import provenance_of
from ..subnet import Subnet
from ..subnet_file import weights_hash
from .config import MEMBER_FIELDS, DiscoveryConfig

Evaluate = Callable[[nn.Module], float]
_METRICS = ("score", "loss", "density", "undecided")  # of the best epoch's row
Callback = Callable[[dict[str, Any], MaskSet], Any]


@dataclass(frozen=True)
class Discovery:
    """What :func:`discover` found.

    Attributes:
        subnet: the hard masks of the best epoch, with provenance and the hash of the network that they belong to.
        history: one dict per epoch: epoch (from 0), step (optimizer steps done after it), loss (the objective's mean
            over the epoch, without penalty), beta (of its last step), density ({s > 0}) and undecided (fraction of
            masks between .01 and .99) at its end, score (of ``evaluate`` with hard masks, or None); with
            target_density also lam, the epoch's; with rounds also round (from 0).
        best: the best epoch's dict.
    """

    subnet: Subnet
    history: list[dict[str, Any]]
    best: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """What may differ between the members of a discovery in bulk: seed, lam and score_init."""
        config = self.subnet.provenance["config"]
        return {name: config[name] for name in MEMBER_FIELDS.values()}


class Record:
    """Bookkeeping of one discovery; ``masks`` hold its scores whenever a method reads them.

    Attributes:
        method: what a subnet's provenance says found it.
        history: finished epochs.  best: the best one's row.  best_masks: its packed masks by weight's name,
            on the CPU.
        best_scores: its scores by weight's name, where ``keeps_scores`` or the config's ``keep_ranks``.
    """

    def __init__(
        self, masks: MaskSet, config: DiscoveryConfig, evaluate: Evaluate | None, callbacks: Sequence[Callback],
        keeps_scores: bool = False, method: str = "discover",
    ) -> None:
        self.masks, self.config, self.evaluate, self.callbacks = masks, config, evaluate, callbacks
        self.keeps_scores = keeps_scores or config.keep_ranks
        self.method = method
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        self.best_masks: dict[str, Tensor] = {}
        self.best_scores: dict[str, Tensor] = {}

    @property
    def steps_done(self) -> int:
        """Optimizer steps of all finished epochs."""
        return self.history[-1]["step"] if self.history else 0

    def finish_epoch(
        self, epoch: int, losses: Tensor, lam: float | None, label: dict[str, Any], path: Path | None
    ) -> None:
        """Check, evaluate and note an epoch with these losses [steps]. Callbacks get the row and what ``label`` has
        besides: lam is the epoch's where it is steered."""
        loss = float(losses.double().mean())
        self._check_finite(epoch, loss, label, path)
        row = {
            "epoch": epoch, "step": self.steps_done + len(losses), "loss": loss, "beta": self.masks.beta,
            "density": self.masks.density(), "undecided": self.masks.undecided(), "score": self._score(epoch),
        }  # fmt: skip
        if self.config.target_density is not None:
            row["lam"] = lam
        if self.config.rounds > 1:
            row["round"] = epoch // self.config.epochs
        self.history.append(row)
        self._keep_if_best(row)
        for callback in self.callbacks:
            callback({**label, **row}, self.masks)

    def _check_finite(self, epoch: int, loss: float, label: dict[str, Any], path: Path | None) -> None:
        bad = [name for name, scores in self.masks.scores().items() if not bool(torch.isfinite(scores).all())]
        if math.isfinite(loss) and not bad:
            return
        where = f"scores are not finite in {', '.join(bad)}" if bad else "all scores are finite"
        who = "".join(f", {name} {value}" for name, value in label.items())
        kept = f"; the checkpoint {path} holds epoch {epoch - 1}" if path is not None and epoch else ""
        raise ValueError(
            f"discover: stopped after epoch {epoch}{who}: its mean loss is {loss}, {where}; lower lr or lam, or look "
            f"at the objective{kept}"
        )

    def _score(self, epoch: int) -> float | None:
        if self.evaluate is None:
            return None
        with torch.no_grad(), self.masks.hard():
            score = self.evaluate(self.masks.model)
        return check_score(score, f"after epoch {epoch}")

    def forget_best(self) -> None:
        """A new round begins: the best epoch is to be one of its own."""
        self.best = None

    def _keep_if_best(self, row: dict[str, Any]) -> None:
        if self.best is None or row["score"] is None or row["score"] >= self.best["score"]:
            self.best = dict(row)
            self.best_masks = {name: pack_mask(kept).cpu() for name, kept in self.masks.kept().items()}
            if self.keeps_scores:
                layers = self.masks.layers.items()
                self.best_scores = {name: layer.scores.detach().to("cpu", copy=True) for name, layer in layers}

    def result(self) -> Discovery:
        """The best epoch's subnet with its provenance."""
        assert self.best is not None
        weights = {name: layer.weight for name, layer in self.masks.layers.items()}
        kept = {name: unpack_mask(packed, tuple(weights[name].shape)) for name, packed in self.best_masks.items()}
        provenance = provenance_of(
            self.masks.model, method=self.method, beta=self.best["beta"], lam=self.best.get("lam", self.config.lam),
            seed=self.config.seed, metrics={key: self.best[key] for key in _METRICS if self.best[key] is not None},
            config=self.config.record(), best=self.best,
        )  # fmt: skip
        subnet = Subnet(kept, provenance, base_hash=weights_hash(weights))
        if self.config.keep_ranks:
            kinds = {name: layer.kind for name, layer in self.masks.layers.items()}
            ranked = {name: kinds[name].rank(its) for name, its in self.best_scores.items()}
            subnet = subnet.with_ranks(ranked)
        return Discovery(subnet, self.history, dict(self.best))


def check_score(score: Any, when: str) -> float:
    """What ``evaluate`` returned as a float; refused in words where it is none or not finite."""
    try:
        score = float(score)
    except (TypeError, ValueError):
        raise TypeError(f"discover: evaluate must return a number, got {type(score).__name__}") from None
    if not math.isfinite(score):
        raise ValueError(f"discover: evaluate returned {score} {when}; it must return a finite number")
    return score


def lam_per_weight(masks: MaskSet, config: DiscoveryConfig, lam: float) -> float:
    """The factor of the raw sum of the mask: lam, or lam over the number of masked weights with reduction "mean"."""
    num_masked = sum(layer.weight.numel() for layer in masks.layers.values())
    return lam if config.reduction == "sum" else lam / max(num_masked, 1)
