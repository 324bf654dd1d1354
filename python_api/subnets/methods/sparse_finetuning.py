"""Lottery-ticket sparse fine-tuning: train everything, keep the K weights that moved most, start over and train those.

    theta_0 -> theta_1   full fine-tuning
    mu = the K largest |theta_1 - theta_0|
    theta_0 -> theta_2   training where mu = 1 alone
    phi = theta_2 - theta_0
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..provenance import provenance_of
from ..subnet import Subnet
from ..subnet_file import listed, weights_hash
from ..transfer import release, transfer
from .rewinding import State, Train, borrowed, check_train, rewind, run, state_of
from .sparse_difference import SparseDifference, difference

CALLER = "lottery_ticket_sparse_finetuning"
PRESETS: dict[str, dict[str, Any]] = {
    "composable_sft": {"k": 0.01},
    "composable_sft_language": {"k": 7_667_712, "l1": 0.1},
    "composable_sft_task": {"k": 14_155_776},
}


@dataclass(frozen=True)
class SparseFinetuning:
    """What `lottery_ticket_sparse_finetuning` returns.

    Attributes:
        difference: phi, with the dense parameters.
        subnet: the chosen weights, {mu = 1}: K of them, more where changes are equal.
        history: a dict per training: iteration, phase ("full" or "sparse"), score (of ``evaluate``; None without) and
            trained (what ``train`` returned).
    """

    difference: SparseDifference
    subnet: Subnet
    history: list[dict[str, Any]]


def lottery_ticket_sparse_finetuning(
    model: nn.Module,
    train: Train,
    k: int | float,
    *,
    train_sparse: Train | None = None,
    l1: float = 0.0,
    iterations: int = 1,
    dense: Sequence[str] = (),
    evaluate: Callable[[nn.Module], float] | None = None,
) -> SparseFinetuning:
    """Return phi = theta_2 - theta_0, nonzero in about k weights: those that full fine-tuning changed most.

    Eligible are all parameters that require a gradient (biases and embeddings too), except ``dense``. Weights that were
    not chosen stay theta_0 to the bit in the second phase, under any torch optimizer, weight decay included. The
    threshold is the k-th largest change, and all that reach it are chosen: more than k where changes are equal.

    Args:
        model: unmasked; comes back as it was, bit for bit: ``result.difference.apply_to(model)`` fine-tunes it.
        train: ``train(model)`` trains the model in place with an optimizer made inside; called for the full phase, and
            for the sparse one if there is no ``train_sparse``. With ``l1`` it is ``train(model, penalty)``: add
            ``penalty()`` to the loss once per optimizer step.
        k: how many weights to choose; a float in (0, 1] is a share of the eligible ones.
        train_sparse: the same for the sparse phase, where it needs other epochs.
        l1: lambda; ``penalty()`` is ``lambda / N * sum |theta - theta_0|`` over all parameters that require a gradient,
            the dense ones too, with N the number of all the model's weights.
        iterations: repeat both phases, choosing ``k // iterations`` more weights each time; each starts from the last
            one's theta_2.
        dense: names of modules or parameters, such as a new output layer, that train in both phases and are kept whole.
        evaluate: a number for the model after each training, kept in the history.

    `PRESETS` holds the authors' k and l1, for ``**PRESETS["composable_sft_language"]``: 1 % of the weights by default;
    7,667,712 with l1 for a language and 14,155,776 for a task, of multilingual BERT or XLM-R base.

    Raises:
        TypeError: an argument of the wrong type, or a ``train`` of another signature.
        ValueError: k is larger than the number of eligible weights or not in (0, 1]; nothing is eligible; a name in
            ``dense`` is none of the model's; train changed nothing, made a NaN, did not use the penalty or wrote frozen
            weights past the optimizer.

    Source: Ansell, Ponti, Korhonen, Vulic, "Composable Sparse Fine-Tuning for Cross-Lingual Transfer", ACL 2022, and
    the authors' composable-sft.
    """
    phases = {"full": train, "sparse": train if train_sparse is None else train_sparse}
    if not _is_number(l1) or not 0 <= l1 < math.inf:
        raise ValueError(f"{CALLER}: l1 must be a finite number >= 0, got {l1!r}")
    for its in phases.values():
        call = "train(model, penalty)" if l1 else "train(model)"
        check_train(its, CALLER, call, model, *([_zero] if l1 else []))
    history: list[dict[str, Any]] = []
    with borrowed(model, CALLER) as start:
        sparse, whole = _eligible(model, dense)
        num = _number(k, sum(start[name].numel() for name in sparse), iterations)
        chosen = {name: torch.zeros_like(start[name], dtype=torch.bool) for name in sparse}
        penalty = _Penalty(model, start, l1)

        def phase(name: str, iteration: int) -> None:
            trained = run(phases[name], model, CALLER, *([penalty] if l1 else []))
            penalty.check_used(name)
            score = None if evaluate is None else float(evaluate(model))
            history.append({"iteration": iteration, "phase": name, "score": score, "trained": trained})

        for iteration in range(iterations):
            before = state_of(model)
            phase("full", iteration)
            chosen = _with_most_changed(model, start, chosen, num)
            rewind(model, before)
            if num or whole:
                _freeze_others(model, chosen)
                phase("sparse", iteration)
                _check_frozen(model, start, chosen)
                release(model)
        after = {name: parameter.detach() for name, parameter in model.named_parameters()}
        provenance = provenance_of(model, method="lottery-ticket sparse fine-tuning", k=k, l1=l1, iterations=iterations)
        phi = SparseDifference.between(
            {name: start[name] for name in sparse}, after, dense={name: after[name] for name in whole},
            provenance=provenance,
        )  # fmt: skip
        subnet = Subnet(chosen, provenance, base_hash=weights_hash({name: start[name] for name in sparse}))
    return SparseFinetuning(phi, subnet, history)


class _Penalty:
    """``lambda / N * sum |theta - theta_0|``, and whether it was asked for since the last check."""

    def __init__(self, model: nn.Module, start: State, l1: float) -> None:
        self.model, self.start, self.l1, self.is_used = model, start, l1, False
        self.num_weights = sum(parameter.numel() for parameter in model.parameters())

    def __call__(self) -> Tensor:
        self.is_used = True
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        moved = torch.stack([(p - self.start[name].to(p.device)).abs().sum() for name, p in trained])
        return self.l1 / self.num_weights * moved.sum()

    def check_used(self, phase: str) -> None:
        if self.l1 and not self.is_used:
            raise ValueError(
                f"{CALLER}: l1={self.l1}, but train of the {phase} phase never called penalty(); add it to the loss"
            )
        self.is_used = False


def _zero() -> None:
    """Stands for a penalty where a signature is checked."""


def _eligible(model: nn.Module, dense: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the names of the parameters to choose from and of the dense ones."""
    if isinstance(dense, str) or not all(isinstance(name, str) for name in dense):
        raise TypeError(f"{CALLER}: dense must be a list of names of modules or parameters, got {dense!r}")
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    idle = [part for part in dense if not any(_is_in(name, part) for name in names)]
    if idle:
        raise ValueError(f"{CALLER}: dense {idle} must name modules or parameters that require a gradient, and do not")
    whole = [name for name in names if any(_is_in(name, part) for part in dense)]
    sparse = [name for name in names if name not in whole]
    if not sparse:
        raise ValueError(f"{CALLER}: some parameter outside dense must require a gradient, there is none")
    return sparse, whole


def _is_in(name: str, part: str) -> bool:
    return name == part or name.startswith(part + ".")


def _number(k: int | float, eligible: int, iterations: int) -> int:
    """Return how many weights each iteration chooses."""
    if not isinstance(iterations, int) or isinstance(iterations, bool) or iterations < 1:
        raise ValueError(f"{CALLER}: iterations must be an integer >= 1, got {iterations!r}")
    if not _is_number(k):
        raise TypeError(f"{CALLER}: k must be an integer, or a float in (0, 1], got {k!r}")
    if isinstance(k, float) and not 0 < k <= 1:
        raise ValueError(f"{CALLER}: k as a float is a share in (0, 1], got {k}; pass an int for a number of weights")
    if not 0 <= k <= eligible:
        raise ValueError(f"{CALLER}: k must be at most the {eligible} weights to choose from, got {k}")
    num = int(k * eligible) if isinstance(k, float) else k
    if k and num < iterations:
        raise ValueError(f"{CALLER}: k={k} of {eligible} weights leaves none for each of {iterations} iterations")
    return num // iterations


def _with_most_changed(model: nn.Module, start: State, chosen: State, num: int) -> State:
    """Return ``chosen`` with all other weights whose ``|theta - theta_0|`` is at least the num-th largest of theirs."""
    if num == 0:
        return chosen
    moved = {name: difference(model.get_parameter(name), start[name]).abs() for name in chosen}
    candidates = torch.cat([moved[name][~mask] for name, mask in chosen.items()])
    threshold = candidates.kthvalue(len(candidates) - num + 1).values if num <= len(candidates) else 0.0
    return {name: mask | (moved[name] >= threshold) & ~mask for name, mask in chosen.items()}


def _freeze_others(model: nn.Module, chosen: State) -> None:
    frozen = {name: ~mask for name, mask in chosen.items() if not bool(mask.all())}
    if frozen:
        transfer(Subnet(frozen), model, model)


def _check_frozen(model: nn.Module, start: State, chosen: State) -> None:
    written = [n for n, mask in chosen.items() if not torch.equal(model.get_parameter(n)[~mask], start[n][~mask])]
    if written:
        what = f"weights of {listed(written)} that were not chosen changed in the sparse phase"
        raise ValueError(f"{CALLER}: {what}; train must change weights by an optimizer's step, not by writing them")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
