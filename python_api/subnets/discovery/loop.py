"""discover: find the subnet of a network that serves an objective, by continuous sparsification."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from subnet_kernels.packing import pack_mask, unpack_mask

from ..masking import MaskSet, mask_model
from ..subnet import Subnet
from ..subnet_file import weights_hash
from ..training.seeds import seed_for
from . import checkpoint
from .bar import Bar
from .checkpoint import Progress
from .config import DiscoveryConfig
from .data import Batches, EpochData
from .random_state import seeded
from .replay import ReplayedStep

Objective = Callable[[nn.Module, Any], Tensor]
Evaluate = Callable[[nn.Module], float]
Callback = Callable[[dict[str, Any], MaskSet], Any]

_DEFAULTS = DiscoveryConfig()


@dataclass(frozen=True)
class Discovery:
    """What :func:`discover` found.

    Attributes:
        subnet: the hard masks of the best epoch, with provenance and the hash of the network that they belong to.
        history: one dict per epoch: epoch (from 0), step (optimizer steps done after it), loss (the objective's mean
            over the epoch, without penalty), beta (of its last step), density ({s > 0}) and undecided (fraction of
            masks between .01 and .99) at its end, score (of ``evaluate`` with hard masks, or None).
        best: the best epoch's dict.
    """

    subnet: Subnet
    history: list[dict[str, Any]]
    best: dict[str, Any]


def discover(
    model: nn.Module, batches: Batches, objective: Objective, config: DiscoveryConfig = _DEFAULTS, *,
    evaluate: Evaluate | None = None, callbacks: Sequence[Callback] = (), progress: bool | None = None,
) -> Discovery:
    """The subnet {s > 0} of ``model`` that serves ``objective``: trains one score per weight through
    ``weight * sigmoid(beta*s)`` on ``objective + lam * sum of the mask``, with growing beta and everything else frozen.

    ``model`` runs in eval mode meanwhile. Afterwards, also after an exception, it is what it was, bit for bit: modules,
    parameters, buffers, training modes, requires_grad. The caller's random state does not change either.

    Args:
        model: an unmasked module.
        batches: something to iterate over once per epoch, or a function epoch -> iterable. An iterator that can be used
            only once is refused if epochs > 1. What it draws from torch, numpy, random, or its DataLoader's generator
            is seeded by (seed, epoch); a generator of its own that lives on from epoch to epoch can't be restored, so
            derive it from the epoch.
        objective: (model, batch) -> 0-d loss. objectives.kl_to_unmasked needs no labels.
        config: a :class:`DiscoveryConfig`.
        evaluate: model -> float, larger is better; called after every epoch without grad and with hard masks. The best
            epoch's masks are kept, the latest of equal ones; without it those of the last epoch.
        callbacks: each called as callback(row, masks) after every epoch, before the checkpoint is written; row is the
            epoch's entry of the history.
        progress: True shows a progress bar, False none, None one if stderr is a terminal.

    Returns:
        A :class:`Discovery`.

    Raises:
        ValueError: batches do not fit config; a loss, score or evaluation is not finite (checked once per epoch; the
            message names the layers, the checkpoint of the epoch before is kept); the checkpoint is damaged or of
            another discovery; what mask_model refuses.
        TypeError: an argument, or what objective returns, is of another form.

    With ``config.checkpoint`` a run that was killed at any moment goes on from the last whole epoch when called again
    with the same arguments, and ends in the same numbers (same machine, threads and versions). Objective and data are
    not part of what is compared: use another path for another task.

    Source: Savarese et al. 2020 (arXiv 1912.04427); Zhang et al. 2023 (arXiv 2310.10899).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(16, 4)
        >>> found = discover(model, [x], lambda model, x: model(x).pow(2).mean(), DiscoveryConfig(epochs=3))
        >>> [round(row["beta"], 2) for row in found.history]
        [1.0, 4.64, 21.54]
    """
    _check_arguments(model, objective, config, evaluate, callbacks)
    data = EpochData(batches, config)
    devices = {parameter.device for parameter in model.parameters()}
    with torch.inference_mode(False), torch.enable_grad(), _masked(model, config) as masks:
        run = _Run(masks, data, objective, config, evaluate, callbacks)
        first = len(run.progress.history)
        total = None if data.num_steps is None else data.num_steps * config.epochs
        bar = Bar(total, run.progress.history[-1]["step"] if first else 0, progress)
        try:
            for epoch in range(first, config.epochs):
                with seeded(seed_for(config.seed, "discover", epoch), devices, data.generators()):
                    run.epoch(epoch, bar)
        finally:
            bar.close()
            run.forget_step()
        return run.result()


def _check_arguments(
    model: nn.Module, objective: Objective, config: DiscoveryConfig, evaluate: Evaluate | None,
    callbacks: Sequence[Callback],
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"discover: model must be an nn.Module, got {type(model).__name__}")
    if not callable(objective):
        raise TypeError(f"discover: objective must be a function (model, batch) -> loss, got {objective!r}")
    if not isinstance(config, DiscoveryConfig):
        raise TypeError(f"discover: config must be a DiscoveryConfig, got {type(config).__name__}")
    if evaluate is not None and not callable(evaluate):
        raise TypeError(f"discover: evaluate must be a function model -> float, got {type(evaluate).__name__}")
    for callback in callbacks:
        if not callable(callback):
            raise TypeError(f"discover: callbacks must be functions (row, masks), got {type(callback).__name__}")
    elsewhere = {str(p.device) for p in model.parameters() if not p.is_cuda} if config.cuda_graph else set()
    if elsewhere:
        raise ValueError(
            f"discover: cuda_graph=True needs the model on a CUDA device, it is on {', '.join(sorted(elsewhere))}; "
            "move it there, or leave cuda_graph False"
        )
    if config.checkpoint is not None and Path(config.checkpoint).is_dir():
        raise ValueError(f"discover: checkpoint must be a file's path, {config.checkpoint} is a folder")
    if config.checkpoint is not None:
        try:
            Path(config.checkpoint).absolute().parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"discover: checkpoint {config.checkpoint} can't be written: {error.strerror}") from None


@contextlib.contextmanager
def _masked(model: nn.Module, config: DiscoveryConfig) -> Iterator[MaskSet]:
    """``model`` masked and in eval mode; what it was, after it."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    masks = mask_model(
        model, config.targets, config.exclude, score_init=config.score_init, kind=config.kind, unit=config.unit
    )
    try:
        model.eval()
        yield masks
    finally:
        masks.unmask()
        for module, is_training in modes:
            module.training = is_training
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):  # a buffer may be an expanded view, which can't be written
                    buffer.copy_(before)


class _Run:
    """One discovery on its way."""

    def __init__(
        self, masks: MaskSet, data: EpochData, objective: Objective, config: DiscoveryConfig, evaluate: Evaluate | None,
        callbacks: Sequence[Callback],
    ) -> None:
        self.masks, self.data, self.objective, self.config = masks, data, objective, config
        self.evaluate, self.callbacks = evaluate, callbacks
        num_masked = sum(layer.weight.numel() for layer in masks.layers.values())
        lam = config.lam if config.reduction == "sum" else config.lam / max(num_masked, 1)
        self.optimizer = masks.adamw(
            config.lr, weight_decay=config.weight_decay, lam=lam, capturable=config.cuda_graph
        )
        self.step = ReplayedStep(self._step, masks, self.optimizer) if config.cuda_graph else self._step
        self.path = None if config.checkpoint is None else Path(config.checkpoint)
        self.progress = Progress()
        self.identity: dict[str, Any] = {}
        if self.path is not None:
            self.identity = checkpoint.identity(masks, {**config.record(), "has_evaluate": evaluate is not None})
            if self.path.exists():
                self.progress = checkpoint.load(self.path, self.identity, masks, self.optimizer)

    def epoch(self, epoch: int, bar: Bar) -> None:
        """Train for an epoch, evaluate it, and write the checkpoint."""
        losses = self._train(epoch, bar)
        self.data.check_count(epoch, len(losses))
        loss = float(torch.stack(losses).double().mean())
        self._check_finite(epoch, loss)
        done = self.progress.history[-1]["step"] if self.progress.history else 0
        row = {
            "epoch": epoch, "step": done + len(losses), "loss": loss, "beta": self.masks.beta,
            "density": self.masks.density(), "undecided": self.masks.undecided(), "score": self._score(epoch),
        }  # fmt: skip
        self.progress.history.append(row)
        self._keep_if_best(row)
        for callback in self.callbacks:
            callback(dict(row), self.masks)
        if self.path is not None:
            checkpoint.save(self.path, self.identity, self.masks, self.optimizer, self.progress)

    def _train(self, epoch: int, bar: Bar) -> list[Tensor]:
        config, masks = self.config, self.masks
        masks.model.eval()  # evaluate and callbacks may have left another mode
        beta = masks.beta = config.beta(epoch, config.epochs)
        losses: list[Tensor] = []
        for index, batch in enumerate(self.data.epoch(epoch)):
            if config.anneal == "step":
                assert self.data.num_steps is not None
                num_steps = self.data.num_steps
                beta = masks.beta = config.beta(epoch * num_steps + index, config.epochs * num_steps)
            losses.append(self.step(batch))
            bar.step(losses[-1], beta, masks)
        return losses

    def forget_step(self) -> None:
        """Let go of the captured graph and its memory now: it is part of a cycle of references."""
        self.step = self._step

    def _step(self, batch: Any) -> Tensor:
        """The loss; all that it does on the device can be captured. beta is written before, by the loop."""
        masks = self.masks
        if masks.is_on_gpu:
            masks.refresh()  # one launch for all layers
        loss = self.objective(masks.model, batch)
        _check_loss(loss)
        with masks.batch_score_gradients() if masks.is_on_gpu else contextlib.nullcontext():
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def _check_finite(self, epoch: int, loss: float) -> None:
        bad = [name for name, scores in self.masks.scores().items() if not bool(torch.isfinite(scores).all())]
        if math.isfinite(loss) and not bad:
            return
        where = f"scores are not finite in {', '.join(bad)}" if bad else "all scores are finite"
        kept = f"; the checkpoint {self.path} holds epoch {epoch - 1}" if self.path is not None and epoch else ""
        raise ValueError(
            f"discover: stopped after epoch {epoch}: its mean loss is {loss}, {where}; lower lr or lam, or look at the "
            f"objective{kept}"
        )

    def _score(self, epoch: int) -> float | None:
        if self.evaluate is None:
            return None
        with torch.no_grad(), self.masks.hard():
            score = self.evaluate(self.masks.model)
        try:
            score = float(score)
        except (TypeError, ValueError):
            raise TypeError(f"discover: evaluate must return a number, got {type(score).__name__}") from None
        if not math.isfinite(score):
            raise ValueError(f"discover: evaluate returned {score} after epoch {epoch}; it must return a finite number")
        return score

    def _keep_if_best(self, row: dict[str, Any]) -> None:
        best = self.progress.best
        if best is None or row["score"] is None or row["score"] >= best["score"]:
            self.progress.best = dict(row)
            self.progress.best_masks = {name: pack_mask(kept) for name, kept in self.masks.kept().items()}

    def result(self) -> Discovery:
        best = self.progress.best
        assert best is not None
        weights = {name: layer.weight for name, layer in self.masks.layers.items()}
        kept = {
            name: unpack_mask(packed, tuple(weights[name].shape)) for name, packed in self.progress.best_masks.items()
        }
        provenance = {"method": "discover", "config": self.config.record(), "best": best}
        subnet = Subnet(kept, provenance, base_hash=weights_hash(weights))
        return Discovery(subnet, self.progress.history, dict(best))


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        got = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"discover: objective must return a 0-d tensor, got {got}; reduce it, e.g. with .mean()")
    if not loss.requires_grad:
        raise ValueError(
            "discover: the objective's loss does not depend on the scores; compute it with the model it is given, "
            "without no_grad, detach or argmax"
        )
