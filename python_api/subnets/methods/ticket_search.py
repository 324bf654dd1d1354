"""Continuous sparsification with weights that train along: finding a lottery ticket, its authors' use of the method.

    round r:  train weights and scores on w * sigmoid(beta*s), beta from 1 to 200; then s <- min(beta*s, s0), beta <- 1
    ticket:   {s > 0} after the last round, over the weights of an early epoch of the first
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..discovery.config import DiscoveryConfig
from ..discovery.data import Batches, EpochData
from ..discovery.passes import check_loss
from ..discovery.presets import ContinuousSparsification, RescaledSigmoid
from ..discovery.random_state import RandomState
from ..discovery.record import Evaluate, Record, lam_per_weight
from ..discovery.scores import ScoreOptimizer, mask_as_configured, reset_scores
from ..masking import MaskSet
from ..subnet import Subnet
from ..subnet_file import weights_hash
from ..subnet_fit import kept_values
from ..training.seeds import seed_for
from .magnitude_pruning import _plant
from .rewinding import State, borrowed

CALLER = "ticket_search"
Objective = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Ticket:
    """What `ticket_search` returns.

    Attributes:
        subnet: the ticket, with the values that it starts from; `subnets.transfer` can plant it as it is.
        history: a dict per epoch, as `subnets.Discovery` has them.
        rewound: parameters and buffers at the start of epoch ``rewind_to``; with rescale, masked weights are divided by
            sigmoid(s0) there.
        trained: those at the end of the search.
    """

    subnet: Subnet
    history: list[dict[str, Any]]
    rewound: State
    trained: State

    def plant(self, model: nn.Module) -> nn.Module:
        """Return ``model`` as the ticket starts: parameters and buffers rewound, the other weights zero and held there
        under any torch optimizer until `subnets.release`. Train it as usual, the rate's schedule from its start.

        Raises:
            KeyError: a model of other parameters.
        """
        _plant(model, self.rewound, self.subnet.masks)
        return model


def ticket_search(
    model: nn.Module, batches: Batches, objective: Objective, config: DiscoveryConfig | None = None, *,
    method: ContinuousSparsification | None = None, weight_lr: float = 0.1, weight_decay: float = 1e-4,
    rewind_to: int = 2, evaluate: Evaluate | None = None,
) -> Ticket:
    """Return the ticket that continuous sparsification finds while weights and scores train together.

    Args:
        model: unmasked, in the mode that it is to be trained in; comes back as it was, bit for bit. Parameters that do
            not require a gradient stay frozen.
        batches, objective: as for `subnets.discover`.
        config: epochs of a round, targets, seed and so on, as for ``discover(method=...)``; None: 85 epochs.
        method: a `ContinuousSparsification`; None: its defaults (3 rounds). The authors mask 3x3 convolutions alone.
        weight_lr, weight_decay: of the weights' SGD, with the momentum of the scores' (0.9 if those have Adam); its
            rate follows the scores' schedule.
        rewind_to: the epoch (of the first round) whose starting weights the ticket starts from.
        evaluate: as for `subnets.discover`, called with hard masks in eval mode; the masks of the last round's best
            epoch are kept, without it the last ones.

    Raises:
        ValueError: rewind_to is no epoch of a round; a rate or decay out of range; a setting of config that only
            `subnets.discover` has; a loss or score is not finite; what mask_model refuses.
        TypeError: method is another one.

    Source: Savarese, Silva, Maire, NeurIPS 2020 (arXiv 1912.04427).

    >>> model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.ones(3, 4)
    >>> ticket = ticket_search(model, [x], lambda model, x: model(x).square().sum(), DiscoveryConfig(epochs=4))
    >>> [row["round"] for row in ticket.history]
    [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    """
    method = ContinuousSparsification() if method is None else method
    if not isinstance(method, ContinuousSparsification):
        raise TypeError(f"{CALLER}: method must be a ContinuousSparsification, got {method!r}")
    config = method.config(config)
    _check(config, rewind_to)
    if not 0 < weight_lr < math.inf:
        raise ValueError(f"{CALLER}: weight_lr must be a finite number > 0, got {weight_lr!r}")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"{CALLER}: weight_decay must be a finite number >= 0, got {weight_decay!r}")
    data = EpochData(batches, config)
    with torch.inference_mode(False), torch.enable_grad(), borrowed(model, CALLER) as initial, \
            _masked(model, config) as masks:  # fmt: skip
        base = dict(model.named_parameters()) | dict(model.named_buffers())
        base = {name: base[name] for name in initial}
        trained = [parameter for parameter in base.values() if parameter.requires_grad]
        if not trained:
            raise ValueError(f"{CALLER}: no weight requires grad; use discover for masks over frozen ones")
        momentum = 0.9 if config.optimizer is None else config.optimizer.momentum
        weights = torch.optim.SGD(
            trained, weight_lr, momentum=momentum, nesterov=momentum > 0, weight_decay=weight_decay
        )
        scores = ScoreOptimizer(masks, config, lam_per_weight(masks, config, config.lam))
        record = Record(masks, config, evaluate, (), method=CALLER)
        random_state = RandomState({tensor.device for tensor in base.values()}, data.generators())
        rewound = initial
        for epoch in range(config.num_epochs):
            of_round = epoch % config.epochs
            if epoch == rewind_to:
                rewound = {name: tensor.detach().clone() for name, tensor in base.items()}
            if epoch and not of_round:
                reset_scores(masks, config)
                record.forget_best()
            scores.begin_epoch(of_round)
            weights.param_groups[0]["lr"] = weight_lr * config.lr_at(of_round) / config.lr
            with random_state.kept():
                random_state.seed(seed_for(config.seed, CALLER, epoch))
                losses = _train(masks, data, objective, config, epoch, (scores, weights))
                data.check_count(epoch, len(losses))
                with _eval_mode(model):
                    record.finish_epoch(epoch, torch.stack(losses), None, {}, None)
        found = record.result()
        names = list(masks.layers)
        state = {name: tensor.detach().clone() for name, tensor in base.items()}
    scale = method.kind.scale if isinstance(method.kind, RescaledSigmoid) else 1.0
    rewound = {name: tensor * scale if name in names else tensor for name, tensor in rewound.items()}
    values = {name: kept_values(mask, rewound[name]) for name, mask in found.subnet.masks.items()}
    base_hash = weights_hash({name: rewound[name] for name in names})
    subnet = Subnet(found.subnet.masks, found.subnet.provenance, base_hash=base_hash, weights=values)
    return Ticket(subnet, found.history, rewound, state)


def _check(config: DiscoveryConfig, rewind_to: int) -> None:
    if not isinstance(rewind_to, int) or not 0 <= rewind_to < config.epochs:
        raise ValueError(
            f"{CALLER}: rewind_to must be an epoch of the first round, 0 to {config.epochs - 1}, got {rewind_to!r}"
        )
    for name in ("checkpoint", "target_density", "cuda_graph", "keep_ranks", "seeds", "penalties", "score_inits"):
        if getattr(config, name):
            raise ValueError(f"{CALLER}: {name} is discover's, over frozen weights; leave it out of config")


def _train(
    masks: MaskSet, data: EpochData, objective: Objective, config: DiscoveryConfig, epoch: int,
    optimizers: tuple[ScoreOptimizer, torch.optim.Optimizer],
) -> list[Tensor]:
    """An epoch's losses."""
    scores, weights = optimizers
    of_round = epoch % config.epochs
    masks.beta = config.beta(of_round, config.epochs)
    losses = []
    for index, batch in enumerate(data.epoch(epoch)):
        if config.anneal == "step":
            masks.beta = data.beta(of_round, index)
        loss = objective(masks.model, batch)
        check_loss(loss)
        loss.backward()
        scores.step()
        weights.step()
        weights.zero_grad()
        losses.append(loss.detach())
    return losses


@contextmanager
def _masked(model: nn.Module, config: DiscoveryConfig) -> Iterator[MaskSet]:
    """``model`` masked, its weights as trainable as before."""
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    masks = mask_as_configured(model, config)
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags.get(name, True))  # scores are not among them
        yield masks
    finally:
        masks.unmask()


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, is_training in modes:
            module.training = is_training
