"""Sums and products of two-digit numbers mod 100: how they are shown to a network, and where it answers.

A number is its digits, lowest first, each one of ten: 37 is a 1 at 7 and a 1 at 10 + 3, of 20 places.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MODULUS = 100
PLACES = 20  # of a number: two digits, each one of ten
NUM_PAIRS = MODULUS * MODULUS

PROBLEMS = ("add_mul", "double_addition", "double_addition_copied")


def all_pairs() -> Tensor:
    """int64 [10000, 2]: every pair (a, b) with a, b in 0 .. 99."""
    return torch.cartesian_prod(torch.arange(MODULUS), torch.arange(MODULUS))


def digits(numbers: Tensor) -> Tensor:
    """int64 [..., 2]: both digits of numbers in 0 .. 99, the lower first."""
    return torch.stack([numbers % 10, numbers // 10], dim=-1)


def places(numbers: Tensor) -> Tensor:
    """fp32 [..., 20]: a number in 0 .. 99 as its digits, each one of ten."""
    return F.one_hot(digits(numbers), 10).flatten(-2).float()


@dataclass(frozen=True)
class Problem:
    """Functions that one network computes, each on all 10,000 pairs.

    Attributes:
        functions: their names.
        inputs: fp32 [functions, 10000, num_inputs].
        answers: int64 [functions, 10000, 2], the digits of the result.
        slots: of each function, at which group of 20 outputs its result is read.
    """

    functions: tuple[str, ...]
    inputs: Tensor
    answers: Tensor
    slots: tuple[int, ...]

    @property
    def num_inputs(self) -> int:
        """Inputs of the network."""
        return self.inputs.shape[-1]

    @property
    def num_outputs(self) -> int:
        """Outputs of the network."""
        return PLACES * (max(self.slots) + 1)

    def batch(self, functions: tuple[str, ...], size: int, generator: torch.Generator | None = None) -> Batch:
        """Random examples: a pair and one of these functions each, drawn with replacement."""
        numbers = torch.tensor([self.functions.index(name) for name in functions])
        which = numbers[torch.randint(len(numbers), (size,), generator=generator)]
        pairs = torch.randint(NUM_PAIRS, (size,), generator=generator)
        return Batch(self.inputs[which, pairs], self.answers[which, pairs], torch.tensor(self.slots)[which])

    def everything(self, function: str) -> Batch:
        """All 10,000 examples of a function."""
        i = self.functions.index(function)
        return Batch(self.inputs[i], self.answers[i], torch.full((NUM_PAIRS,), self.slots[i]))


@dataclass(frozen=True)
class Batch:
    """Examples: inputs [n, num_inputs], answers int64 [n, 2] and the slot int64 [n] of each."""

    inputs: Tensor
    answers: Tensor
    slots: Tensor


def make_problem(name: str) -> Problem:
    """The problem of that name.

    "add_mul": 42 inputs, the places of a and b and one of two for the operation; 20 outputs. "double_addition": two
    pairs and two results, 80 inputs and 40 outputs; a function is the sum of one pair, whose other pair's inputs are
    zero. "double_addition_copied" is the same; what differs is the network.

    Source: Csordas, van Steenkiste, Schmidhuber, ICLR 2021 (arXiv 2010.02066); tasks of RobertCsordas/modules.
    """
    if name not in PROBLEMS:
        raise ValueError(f"make_problem: name must be one of {', '.join(PROBLEMS)}, got {name!r}")
    a, b = all_pairs().unbind(1)
    shown = torch.cat([places(a), places(b)], dim=1)
    sums, products = digits((a + b) % MODULUS), digits(a * b % MODULUS)
    if name == "add_mul":
        operations = torch.eye(2).unsqueeze(1).expand(2, NUM_PAIRS, 2)
        inputs = torch.cat([shown.expand(2, -1, -1), operations], dim=2)
        return Problem(("add", "mul"), inputs, torch.stack([sums, products]), (0, 0))
    empty = torch.zeros_like(shown)
    inputs = torch.stack([torch.cat([shown, empty], dim=1), torch.cat([empty, shown], dim=1)])
    return Problem(("first", "second"), inputs, torch.stack([sums, sums]), (0, 1))


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """[n, 2, 10]: of each example's own slot, per digit."""
    all_slots = model(batch.inputs).unflatten(1, (-1, 2, 10))
    return all_slots[torch.arange(len(batch.slots)), batch.slots]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross entropy, averaged over examples and digits."""
    return F.cross_entropy(logits(model, batch).flatten(0, 1), batch.answers.flatten())


@torch.no_grad()
def answer(model: nn.Module, batch: Batch) -> Tensor:
    """int64 [n, 2]: the digits that the model gives."""
    return logits(model, batch).argmax(-1)


def accuracy(model: nn.Module, batch: Batch) -> float:
    """How often both digits are right."""
    return (answer(model, batch) == batch.answers).all(1).double().mean().item()


@torch.no_grad()
def copy_first_to_second(model: nn.Sequential) -> None:
    """Makes a network of double addition treat its second pair exactly as the first: the first layer's columns and
    the last layer's rows and biases of the first pair are copied to the second. Both sums then go through the very
    same hidden units."""
    first, last = model[0], model[-1]
    assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
    half = first.in_features // 2
    first.weight[:, half:] = first.weight[:, :half]
    for parameter in (last.weight, last.bias):
        parameter[PLACES:] = parameter[:PLACES]
