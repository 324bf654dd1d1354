"""The scores of a discovery: how they begin, how they are stepped, and what becomes of them between rounds."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..masking import MaskSet, mask_model
from ..targets import TargetsWithOptions, find_targets
from ..training.seeds import seed_for, torch_generator
from .config import GATES, DiscoveryConfig


class ScoreOptimizer:
    """Steps the scores as the config says: (penalty's gradient, clipping,) AdamW or SGD, (limits,) beta's schedule.

    A plain config leaves all of it to MaskAdamW. Elsewhere the penalty's gradient is added to the scores' before it is
    clipped, as if the penalty were part of the loss.

    Attributes:
        torch: the optimizer.  lam: weight of the penalty per masked weight; may be changed between steps.
    """

    def __init__(self, masks: MaskSet, config: DiscoveryConfig, lam: float) -> None:
        self._masks, self._config = masks, config
        self._scores = list({id(layer.scores): layer.scores for layer in masks.layers.values()}.values())
        self.torch: torch.optim.Optimizer
        if config.optimizer is None:
            self.torch = masks.adamw(
                config.lr, weight_decay=config.weight_decay, lam=0.0, capturable=config.cuda_graph
            )
        else:
            self.torch = torch.optim.SGD(
                self._scores, config.lr, momentum=config.optimizer.momentum, nesterov=config.optimizer.nesterov,
                weight_decay=config.weight_decay,
            )  # fmt: skip
        self.lam = lam

    @property
    def lam(self) -> float:
        return self._lam

    @lam.setter
    def lam(self, lam: float) -> None:
        self._lam = lam
        if self._config.is_plain:
            self.torch.param_groups[0]["lam"] = lam

    def begin_epoch(self, epoch: int) -> None:
        """Set the rate of this epoch of a round."""
        if not self._config.is_plain:
            self.torch.param_groups[0]["lr"] = self._config.lr_at(epoch)

    def step(self) -> None:
        """Step all scores; those without gradient have one of zeros, so that whether their momentum and decay go on
        hangs neither on lam nor on who else is trained."""
        for scores in self._scores:
            if scores.grad is None:
                scores.grad = torch.zeros_like(scores)
        if not self._config.is_plain:
            self._add_penalty_gradients()
        if self._config.clip_norm is not None:
            nn.utils.clip_grad_norm_(self._scores, self._config.clip_norm)
        self.torch.step()
        if self._config.optimizer is not None:  # MaskAdamW does it itself
            self._masks.step()
        if self._config.score_range is not None:
            with torch.no_grad():
                for scores in self._scores:
                    scores.clamp_(*self._config.score_range)
        self.torch.zero_grad()

    @torch.no_grad()
    def _add_penalty_gradients(self) -> None:
        if not self._lam:
            return
        added: set[int] = set()
        for layer in self._masks.layers.values():
            if id(layer.scores) not in added:
                added.add(id(layer.scores))
                slope = layer.kind.penalty_slope(layer.scores, layer.beta.to(layer.scores.dtype))
                layer.scores.grad.add_(slope, alpha=self._lam * layer.weights_per_score)


def mask_as_configured(model: nn.Module, config: DiscoveryConfig) -> MaskSet:
    """mask_model with the config's targets, unit, kind, initial scores and seed."""
    targets: TargetsWithOptions | None = config.targets
    unit = config.unit
    if unit == GATES:
        found = find_targets(model, targets, config.exclude)
        targets = {re.escape(name): {"unit": _gate_unit(its.module), **its.options} for name, its in found.items()}
        unit = "weight"
    masks = mask_model(
        model, targets, config.exclude, score_init=config.score_init, kind=config.kind, unit=unit,
        seed=seed_for(config.seed, "discover", "masks"),
    )  # fmt: skip
    try:
        _draw_scores(masks, config)
    except ValueError:
        masks.unmask()
        raise
    return masks


def _gate_unit(module: nn.Module) -> str:
    return "row" if isinstance(module, _ConvNd) else "column"


@torch.no_grad()
def _draw_scores(masks: MaskSet, config: DiscoveryConfig) -> None:
    """Add what of the initial scores is drawn, on the CPU, from the config's seed and each weight's name.

    Raises:
        ValueError: "kaiming_uniform" for a weight without inputs (one dimension).
    """
    if config.init == "constant" and not config.score_init_std:
        return
    for name, layer in masks.layers.items():
        generator = torch_generator(config.seed, "discover", "scores", name)
        drawn = layer.scores.detach().to("cpu", torch.float64, copy=True)  # a target may have a start of its own
        if config.init == "kaiming_uniform":
            inputs = inputs_of_a_unit(name, layer.weight, layer.passes_transposed)
            bound = 1 / math.sqrt(max(inputs, 1))
            drawn += bound * (2 * torch.rand(drawn.shape, dtype=drawn.dtype, generator=generator) - 1)
        if config.score_init_std:
            drawn += config.score_init_std * torch.randn(drawn.shape, dtype=drawn.dtype, generator=generator)
        if config.score_range is not None:
            drawn.clamp_(*config.score_range)
        layer.scores.copy_(drawn)


def inputs_of_a_unit(name: str, weight: Tensor, inputs_first: bool) -> int:
    """How many inputs a unit of this weight has: [N, K, ...], or with ``inputs_first`` [K, N].

    Raises:
        ValueError: a weight of one dimension has none.
    """
    if weight.dim() < 2:
        raise ValueError(
            f"{name} of shape {list(weight.shape)} has no inputs per unit, which a kaiming initialisation needs; "
            "exclude it"
        )
    return weight.numel() // max(weight.shape[1 if inputs_first else 0], 1)


@torch.no_grad()
def reset_scores(masks: MaskSet, config: DiscoveryConfig) -> None:
    """What scores become between rounds: min(beta_end*s, s0) by the paper, min(s, s0) by its authors' code."""
    factor = config.beta_end if config.reset == "paper" else 1.0
    for scores in {id(layer.scores): layer.scores for layer in masks.layers.values()}.values():
        scores.mul_(factor).clamp_(max=config.score_init)
