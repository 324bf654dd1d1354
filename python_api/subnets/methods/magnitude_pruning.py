"""Iterative magnitude pruning: lottery tickets, with rewinding to the start or to a later step, and their controls.

    level 0: train the whole network from theta_k
    level i: drop the smallest of the trained weights that are left, put the others back to theta_k, train again
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..provenance import provenance_of
from ..subnet import Subnet
from ..subnet_file import listed, weights_hash
from ..subnet_fit import kept_values
from ..targets import Targets, find_targets
from ..transfer import release, transfer
from .rewinding import State, Train, borrowed, check_train, rewind, run, state_of

CALLER = "iterative_magnitude_pruning"
ROUNDINGS: dict[str, Callable[[float, int], int]] = {
    "nearest": lambda rate, n: round(rate * n),
    "nearest+1": lambda rate, n: round(rate * n) + 1,
    "ceil+1": lambda rate, n: math.ceil(rate * n) + 1,
}
PRESETS: dict[str, dict[str, Any]] = {
    "lottery_ticket": {"rate": 0.2, "output_rate": 0.1},
    "lottery_ticket_code": {"rate": 0.2, "output_rate": 0.1, "rounding": "nearest+1"},
    "open_lth": {"rate": 0.2, "scope": "global", "rounding": "ceil+1"},
    "open_lth_lenet": {"rate": 0.2, "output_rate": 0.0, "scope": "global", "rounding": "ceil+1"},
}
Control = Literal["reinit", "random"]


@dataclass(frozen=True)
class PruningConfig:
    """Settings of `iterative_magnitude_pruning`.

    Args:
        rounds: how often to prune; the network is trained once more than that.
        rate: p, the fraction of the weights left that a round drops, in (0, 1).
        output_rate: the same for the output layer, which is the last target in the model's order; 0 leaves it whole.
            None: ``rate``. With scope "global" only None and 0 have a meaning.
        scope: "layer" drops the smallest of each layer, "global" the smallest of all layers together.
        rounding: how many go of n that are left. "nearest": round(p n), halves to the even number. "nearest+1": one
            more, as in the code of Frankle & Carbin, whose cutoff falls itself. "ceil+1": ceil(p n) + 1, as in
            open_lth, which counts a whole output layer in n though it is not pruned.
        rewind_to: k, the step whose weights the survivors go back to: 0 is the start, more is late rewinding.
        targets, exclude: which parameters to prune, as for `subnets.mask_model`, whose names and defaults they share.

    Raises:
        TypeError, ValueError: a value out of range, or one that contradicts another.

    Source: Frankle, Carbin, "The Lottery Ticket Hypothesis" (arXiv 1803.03635); rewinding: Frankle, Dziugaite, Roy,
    Carbin, "Linear Mode Connectivity and the Lottery Ticket Hypothesis" (arXiv 1912.05671).
    """

    rounds: int
    rate: float = 0.2
    output_rate: float | None = None
    scope: Literal["layer", "global"] = "layer"
    rounding: Literal["nearest", "nearest+1", "ceil+1"] = "nearest"
    rewind_to: int = 0
    targets: Targets | None = None
    exclude: Targets = ()

    def __post_init__(self) -> None:
        for name, least in (("rounds", 1), ("rewind_to", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"PruningConfig: {name} must be an integer >= {least}, got {value!r}")
        if not _is_number(self.rate) or not 0 < self.rate < 1:
            raise ValueError(f"PruningConfig: rate must be in (0, 1), a fraction dropped per round, got {self.rate!r}")
        if self.output_rate is not None and (not _is_number(self.output_rate) or not 0 <= self.output_rate < 1):
            raise ValueError(f"PruningConfig: output_rate must be in [0, 1) or None, got {self.output_rate!r}")
        for name, choices in (("scope", ("layer", "global")), ("rounding", tuple(ROUNDINGS))):
            if getattr(self, name) not in choices:
                raise ValueError(f"PruningConfig: {name} must be one of {list(choices)}, got {getattr(self, name)!r}")
        if self.scope == "global" and self.output_rate:
            raise ValueError(
                "PruningConfig: scope 'global' ranks all layers together, so the output layer has no rate of its own, "
                f"got output_rate={self.output_rate}; use None, or 0 to leave that layer whole"
            )
        if isinstance(self.targets, Mapping):
            raise TypeError("PruningConfig: targets with options are mask_model's; name them in a list or by a regex")

    @classmethod
    def preset(cls, name: str, rounds: int, **changes: Any) -> PruningConfig:
        """Return the settings of published experiments, with ``changes``.

        | name | is |
        |---|---|
        | lottery_ticket | Frankle & Carbin's text, LeNet-300-100: 20 % of each layer, 10 % of the output layer |
        | lottery_ticket_code | the same as their code rounds it: one weight more per layer and round |
        | open_lth | 20 % of all layers together, as open_lth rounds it |
        | open_lth_lenet | the same without the output layer |

        Raises:
            ValueError: there is no such preset, or as the class.
        """
        if name not in PRESETS:
            raise ValueError(f"PruningConfig.preset: name must be one of {list(PRESETS)}, got {name!r}")
        return cls(rounds=rounds, **{**PRESETS[name], **changes})


@dataclass(frozen=True)
class Tickets:
    """What `iterative_magnitude_pruning` returns.

    Attributes:
        config: the settings.
        subnets: the subnet of each level; ``subnets[0]`` keeps everything, ``subnets[i]`` lies within
            ``subnets[i - 1]``. They carry the hash of the weights that survivors go back to, not the weights.
        history: a dict per level: level, kept, density, score (of ``evaluate``, after training; None without) and
            trained (what ``train`` returned).
        initial: parameters and buffers at the start.
        rewound: those at step ``config.rewind_to``; the same object where that is 0.
    """

    config: PruningConfig
    subnets: list[Subnet]
    history: list[dict[str, Any]]
    initial: State
    rewound: State

    @property
    def subnet(self) -> Subnet:
        """The last level's subnet with its values, theirs at step k: `subnets.transfer` can plant it as it is."""
        last = self.subnets[-1]
        values = {name: kept_values(mask, self.rewound[name]) for name, mask in last.masks.items()}
        return Subnet(last.masks, last.provenance, base_hash=last.base_hash, weights=values)

    def plant(
        self,
        model: nn.Module,
        level: int = -1,
        control: Control | nn.Module | None = None,
        generator: torch.Generator | None = None,
    ) -> nn.Module:
        """Return ``model`` as that level starts: parameters and buffers rewound, pruned weights zero and held there.

        They stay zero under any torch optimizer until `subnets.release` (see `subnets.transfer`).

        Args:
            model: of the same parameters; what is in them is lost.
            level: which ticket.
            control: "reinit": the same weights are pruned, but all parameters get fresh values by the modules' own
                initialisation and buffers those of the start; another model of the same parameters: the same with its
                values, for an initialisation of your own. Train both from step 0. "random": as many weights of each
                layer, drawn at random, from the rewound values. None: the ticket itself.
            generator: of "reinit" and "random", a CPU `torch.Generator`.

        Raises:
            ValueError: an unknown control, a model of other parameters, or one that cannot be initialised.
            TypeError: "reinit" or "random" without generator.
            IndexError: no such level.
        """
        subnet, state = self.subnets[level], self.rewound
        for its in (model, control):
            if isinstance(its, nn.Module) and _shapes(state_of(its)) != _shapes(state):
                raise ValueError("Tickets.plant: a model must have the parameters and buffers of the pruned one")
        if isinstance(control, nn.Module):
            state = state_of(control)
        elif control is not None:
            if control not in ("reinit", "random"):
                raise ValueError(f"Tickets.plant: control must be 'reinit', 'random', a model or None, got {control!r}")
            if not isinstance(generator, torch.Generator):
                raise TypeError(f"Tickets.plant: {control!r} needs generator=torch.Generator().manual_seed(seed)")
            if control == "random":
                subnet = subnet.sample_like(generator)
            else:
                nothing = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in model.named_parameters()}
                Subnet(nothing).apply_(release(model), fill="reinit", generator=generator)
                state = {**self.initial, **{name: p.detach() for name, p in model.named_parameters()}}
        _plant(model, state, subnet.masks)
        return model


def iterative_magnitude_pruning(
    model: nn.Module,
    train: Train,
    config: PruningConfig,
    *,
    evaluate: Callable[[nn.Module], float] | None = None,
) -> Tickets:
    """Return the tickets of ``config.rounds`` rounds: the masks of the weights that are largest after training.

    Level 0 trains the whole network. Each further level drops the smallest ``|w|`` that are left, puts all other
    parameters and buffers back to their values at step k bit for bit, and trains again; dropped weights stay exactly
    zero under any torch optimizer. Of equal ``|w|`` the first go, so that counts are exact (the authors' codes drop all
    weights that equal the cutoff).

    Args:
        model: unmasked; comes back as it was, bit for bit.
        train: ``train(model)`` trains the model in place, with an optimizer made inside: it is called once per level.
            For late rewinding ``train(model, start=i, stop=j)`` takes the steps i, ..., j - 1 of its schedule (rates,
            order of the data), to the end where stop is None. It is called with ``start=0, stop=k`` once and with
            ``start=k, stop=None`` for each level. What it returns is kept in the history. Seed what it draws.
        config: `PruningConfig`.
        evaluate: a number for the trained model of each level, kept in the history.

    Raises:
        TypeError: an argument of the wrong type, or a ``train`` of another signature.
        ValueError: the model is masked or holds a transfer; train changed nothing, made a NaN or wrote pruned weights
            past the optimizer; a round would leave nothing of a layer.

    Source: as `PruningConfig`.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> def train(model):
    ...     optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ...     model(torch.ones(3, 4)).square().sum().backward()
    ...     optimizer.step()
    >>> tickets = iterative_magnitude_pruning(model, train, PruningConfig(rounds=2, rate=0.5))
    >>> [subnet.num_kept() for subnet in tickets.subnets]
    [48, 24, 12]
    """
    if not isinstance(config, PruningConfig):
        raise TypeError(f"{CALLER}: config must be a PruningConfig, got {type(config).__name__}")
    k = config.rewind_to
    schedule = {"start": k, "stop": None} if k else {}
    check_train(train, CALLER, "train(model, start=..., stop=...)" if k else "train(model)", model, **schedule)
    with borrowed(model, CALLER) as initial:
        names = list(find_targets(model, config.targets, config.exclude))
        rewound = initial
        if k:
            run(train, model, CALLER, start=0, stop=k)
            rewound = state_of(model)
        base_hash = weights_hash({name: rewound[name] for name in names})
        masks = {name: torch.ones_like(rewound[name], dtype=torch.bool) for name in names}
        subnets, history = [], []
        for level in range(config.rounds + 1):
            provenance = provenance_of(model, method="iterative magnitude pruning", level=level, config=_plain(config))
            subnets.append(Subnet(masks, provenance, base_hash=base_hash))
            _plant(model, rewound, masks)
            trained = run(train, model, CALLER, **schedule)
            _check_zero(model, masks)
            score = None if evaluate is None else float(evaluate(model))
            kept, density = subnets[-1].num_kept(), subnets[-1].density()
            history.append({"level": level, "kept": kept, "density": density, "score": score, "trained": trained})
            if level < config.rounds:
                masks = _pruned({name: model.get_parameter(name).detach() for name in names}, masks, config, level + 1)
    return Tickets(config, subnets, history, initial, rewound)


def _plant(model: nn.Module, state: State, masks: Mapping[str, Tensor]) -> None:
    """Rewind the model to ``state`` and hold what lies outside ``masks`` at zero, and nothing else."""
    rewind(release(model), state)
    pruned = {name: ~mask for name, mask in masks.items() if not bool(mask.all())}
    if pruned:
        zeros = {name: torch.zeros(int(mask.sum()), dtype=state[name].dtype) for name, mask in pruned.items()}
        transfer(Subnet(pruned, weights=zeros), None, model)


def _pruned(weights: State, masks: State, config: PruningConfig, level: int) -> State:
    """Return the next level's masks."""
    names = list(masks)
    output = names[-1]
    rates = {name: config.rate for name in names}
    if config.output_rate is not None:
        rates[output] = config.output_rate
    prunable = [name for name in names if rates[name] > 0]
    groups = [prunable] if config.scope == "global" else [[name] for name in prunable]
    masks = dict(masks)
    for group in groups:
        left = sum(int(masks[name].sum()) for name in group)
        counts_all = config.scope == "global" and config.rounding == "ceil+1"
        counted = sum(int(mask.sum()) for mask in masks.values()) if counts_all else left
        num = ROUNDINGS[config.rounding](rates[group[0]], counted)
        if num >= left:
            what = f"round {level} would drop {num} of the {left} weights left in {listed(group)}"
            raise ValueError(f"{CALLER}: {what}; take fewer rounds or a smaller rate, or exclude the layer")
        masks.update(_without_smallest(weights, {name: masks[name] for name in group}, num))
    return masks


def _without_smallest(weights: State, masks: State, num: int) -> State:
    """Return the masks without the ``num`` smallest ``|w|`` among all that they keep; of equal ones the first go."""
    if num == 0:
        return masks
    sizes = torch.cat([weights[name][mask].abs() for name, mask in masks.items()])
    cutoff = sizes.kthvalue(num).values
    keep = sizes >= cutoff
    equal = (sizes == cutoff).nonzero().view(-1)
    keep[equal[: num - int((~keep).sum())]] = False
    parts = keep.split([int(mask.sum()) for mask in masks.values()])
    return {
        name: torch.zeros_like(mask).masked_scatter_(mask, part)
        for (name, mask), part in zip(masks.items(), parts, strict=True)
    }


def _check_zero(model: nn.Module, masks: State) -> None:
    written = [name for name, mask in masks.items() if bool(model.get_parameter(name)[~mask].any())]
    if written:
        what = f"pruned weights of {listed(written)} are no longer zero after train"
        raise ValueError(f"{CALLER}: {what}; it must change weights by an optimizer's step, not by writing them")


def _shapes(state: State) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


def _plain(config: PruningConfig) -> dict[str, Any]:
    return {name: value if isinstance(value, (int, float, str, type(None))) else str(value)
            for name, value in asdict(config).items()}  # fmt: skip


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
