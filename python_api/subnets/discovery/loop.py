"""discover: find the subnet of a network that serves an objective, by continuous sparsification."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import check_one_process
from ..masking import MaskSet
from ..training.seeds import seed_for
from .bar import Bar
from .bulk import BulkRun
from .checkpoint import CheckpointFile
from .config import DiscoveryConfig
from .control import density_at_end, density_control
from .data import Batches, EpochData
from .passes import check_loss
from .presets import Method, method_of
from .random_state import RandomState
from .record import Callback, Discovery, Evaluate, Record, lam_per_weight
from .replay import ReplayedStep
from .scores import ScoreOptimizer, mask_as_configured, reset_scores

Objective = Callable[[nn.Module, Any], Tensor]


def discover(
    model: nn.Module, batches: Batches, objective: Objective, config: DiscoveryConfig | None = None, *,
    method: str | Method | None = None, evaluate: Evaluate | None = None, callbacks: Sequence[Callback] = (),
    progress: bool | None = None,
) -> Discovery | Any:  # Any: Discoveries where config.is_bulk, without a cast at every call that is not
    """The subnet {s > 0} of ``model`` that serves ``objective``: trains one score per weight through
    ``weight * sigmoid(beta*s)`` on ``objective + lam * sum of the mask``, with growing beta and everything else frozen.
    Other ways to train masks are had by ``method``; the subnet is then the final binary mask of its kind.

    ``model`` runs in eval mode meanwhile. Afterwards, also after an exception, it is what it was, bit for bit: modules,
    parameters, buffers, training modes, requires_grad. The caller's random state does not change either. Every step
    moves all scores; those of a layer that the batch did not run have a gradient of zeros, so that momentum and decay
    go on there, whatever lam is.

    Args:
        model: an unmasked module.
        batches: something to iterate over once per epoch, or a function epoch -> iterable. An iterator that can be used
            only once is refused if epochs > 1. What it draws from torch, numpy, random, or its DataLoader's generator
            is seeded by (seed, epoch); a generator of its own that lives on from epoch to epoch can't be restored, so
            derive it from the epoch.
        objective: (model, batch) -> 0-d loss. objectives.kl_to_unmasked needs no labels.
        config: a :class:`DiscoveryConfig`; None is its defaults, or with a method its authors' run.
        method: how to train masks: a name of :data:`subnets.discovery.METHODS` ("csordas", "edge_popup", ...) or a
            :class:`Method` with numbers of your own. It sets kind, initial scores, optimizer, penalty and beta; config
            then says how long to train and what to mask, and leaves those alone. None: config says all.
        evaluate: model -> float, larger is better; called after every epoch without grad and with hard masks. The best
            epoch's masks are kept, the latest of equal ones; without it those of the last epoch.
        callbacks: each called as callback(row, masks) after every epoch, before the checkpoint is written; row is the
            epoch's entry of the history; in bulk called for each member, whose seed, lam and score_init row then names.
        progress: True shows a progress bar, False none, None one if stderr is a terminal.

    Returns:
        A :class:`Discovery`; :class:`Discoveries` if config lists seeds, penalties or score_inits. Then the objective
        is called for several members at once, under torch.func.vmap (docs/discovery.md), and must not write into its
        batch; each member ends as alone.

    Raises:
        ValueError: batches do not fit config; a loss, score or evaluation is not finite (checked once per epoch; the
            message names the layers, the checkpoint of the epoch before is kept); the checkpoint is damaged or of
            another discovery; what mask_model refuses.
        TypeError: an argument, or what objective returns, is of another form.
        RuntimeError: torch.distributed has several processes here (docs/distributed.md).

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
    name = "discover"
    if method is not None:
        chosen = method_of(method)
        config, name = chosen.config(_checked(config)), chosen.name
    config = _checked(config) or DiscoveryConfig()
    _check_arguments(model, objective, config, evaluate, callbacks)
    data = EpochData(batches, config)
    devices = {parameter.device for parameter in model.parameters()}
    with torch.inference_mode(False), torch.enable_grad(), _masked(model, config) as masks:
        state = RandomState(devices, data.generators())
        kind = BulkRun if config.is_bulk else _Run
        run = kind(masks, data, objective, config, evaluate, callbacks, state, name)
        total = None if data.num_steps is None else data.num_steps * config.num_epochs
        bar = Bar(total, run.steps_done, progress)
        try:
            for epoch in range(run.epochs_done, config.num_epochs):
                run.epoch(epoch, bar)
        finally:
            bar.close()
            run.forget_step()
        return run.result()


def _checked(config: DiscoveryConfig | None) -> DiscoveryConfig | None:
    if config is not None and not isinstance(config, DiscoveryConfig):
        raise TypeError(f"discover: config must be a DiscoveryConfig, got {type(config).__name__}")
    return config


def _check_arguments(
    model: nn.Module, objective: Objective, config: DiscoveryConfig, evaluate: Evaluate | None,
    callbacks: Sequence[Callback],
) -> None:
    check_one_process(
        "discover", "for one discovery on many devices write the loop (docs/distributed.md), and run many discoveries "
        "as tasks of their own, without torch.distributed",
    )  # fmt: skip
    if not isinstance(model, nn.Module):
        raise TypeError(f"discover: model must be an nn.Module, got {type(model).__name__}")
    if not callable(objective):
        raise TypeError(f"discover: objective must be a function (model, batch) -> loss, got {objective!r}")
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
    masks = mask_as_configured(model, config)
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
        callbacks: Sequence[Callback], random_state: RandomState, method: str,
    ) -> None:
        self.masks, self.data, self.objective, self.config = masks, data, objective, config
        self.random_state = random_state
        self.control = density_control(config)
        self.optimizer = ScoreOptimizer(masks, config, lam_per_weight(masks, config, config.lam))
        self.step = ReplayedStep(self._step, masks, self.optimizer.torch) if config.cuda_graph else self._step
        self.record = Record(masks, config, evaluate, callbacks, method=method)
        scores = {name: layer.scores for name, layer in masks.layers.items()}
        self.file = CheckpointFile(config, evaluate, masks, scores, self.optimizer.torch, [self.record], self.control)
        self.file.load()

    @property
    def epochs_done(self) -> int:
        return len(self.record.history)

    @property
    def steps_done(self) -> int:
        return self.record.steps_done

    def epoch(self, epoch: int, bar: Bar) -> None:
        """Train for an epoch, evaluate it, and write the checkpoint."""
        with self.random_state.kept():
            self.random_state.seed(seed_for(self.config.seed, "discover", epoch))
            lam = None if self.control is None else self.control.lams[0]
            if lam is not None:
                self.optimizer.lam = lam_per_weight(self.masks, self.config, lam)
            losses = self._train(epoch, bar)
            self.data.check_count(epoch, len(losses))
            self.record.finish_epoch(epoch, torch.stack(losses), lam, {}, self.file.path)
            if self.control is not None:
                self.control.update(0, density_at_end(self.masks, self.config.beta_end))
            self.file.save()

    def _train(self, epoch: int, bar: Bar) -> list[Tensor]:
        config, masks = self.config, self.masks
        masks.model.eval()  # evaluate and callbacks may have left another mode
        of_round = epoch % config.epochs
        if epoch and not of_round:
            reset_scores(masks, config)
            self.record.forget_best()
        self.optimizer.begin_epoch(of_round)
        beta = masks.beta = config.beta(of_round, config.epochs)
        losses: list[Tensor] = []
        for index, batch in enumerate(self.data.epoch(epoch)):
            if config.anneal == "step":
                beta = masks.beta = self.data.beta(of_round, index)
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
        check_loss(loss)
        with masks.batch_score_gradients() if masks.is_on_gpu else contextlib.nullcontext():
            loss.backward()
        self.optimizer.step()
        return loss.detach()

    def result(self) -> Discovery:
        return self.record.result()
