"""The arithmetic tasks modulo 7 and their token sequences: who sees which pairs (a, b), from which seed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from subnets.training.seeds import torch_generator

MODULUS = 7
NUM_INTEGERS = 1000  # a and b lie in 0 .. 999
SEPARATOR = 1000  # the token after a and b; the model answers there
VOCABULARY = 1001
CONTEXT = 4  # [a, b, SEPARATOR, answer]
LOSS_FLOOR = math.log(NUM_INTEGERS) / 3  # b can't be predicted from a; the separator and the answer can

DISAMBIGUATION_SIZES = (0, 10, 16, 25, 40, 64, 100, 160, 250, 400, 640, 1000, 1600, 2500, 4000, 6400, 10000)


@dataclass(frozen=True)
class Task:
    """One function of a pair, modulo 7: `answer(a, b)` works on int64 tensors."""

    name: str
    formula: str
    rule: Callable[[Tensor, Tensor], Tensor]

    def answer(self, pairs: Tensor) -> Tensor:
        """The answers [..] in 0 .. 6 for pairs int64 [.., 2]."""
        return self.rule(pairs[..., 0], pairs[..., 1]) % MODULUS


T1 = Task("T1", "(a + ab) mod 7", lambda a, b: a + a * b)  # what the base network is trained on
S1 = Task("S1", "ab mod 7", lambda a, b: a * b)  # the subtask that discovery looks for
T2 = Task("T2", "(a^2 + ab) mod 7", lambda a, b: a * a + a * b)  # what the fresh networks have to learn
TASKS = {task.name: task for task in (T1, S1, T2)}


def random_pairs(num_pairs: int, generator: torch.Generator) -> Tensor:
    """int64 [num_pairs, 2] drawn with replacement from 0 .. 999; in the first 1,000 rows a takes every integer once."""
    a = torch.randint(NUM_INTEGERS, (num_pairs,), generator=generator)
    num_covering = min(num_pairs, NUM_INTEGERS)
    a[:num_covering] = torch.randperm(NUM_INTEGERS, generator=generator)[:num_covering]
    b = torch.randint(NUM_INTEGERS, (num_pairs,), generator=generator)
    return torch.stack([a, b], dim=1)


def unambiguous_pairs(num_pairs: int, generator: torch.Generator) -> Tensor:
    """int64 [num_pairs, 2] with a != b, otherwise as `random_pairs`: b is uniform over the 999 other integers."""
    a = random_pairs(num_pairs, generator)[:, 0]
    shift = torch.randint(1, NUM_INTEGERS, (num_pairs,), generator=generator)
    return torch.stack([a, (a + shift) % NUM_INTEGERS], dim=1)


def ambiguous_pairs(num_pairs: int, generator: torch.Generator) -> Tensor:
    """int64 [num_pairs, 2] with a = b, drawn with replacement: there a^2 + ab = 2a^2 = 2b^2, so the rule stays open."""
    a = torch.randint(NUM_INTEGERS, (num_pairs,), generator=generator)
    return torch.stack([a, a], dim=1)


def sequences(pairs: Tensor, task: Task) -> Tensor:
    """Token sequences int64 [num_pairs, 4]: [a, b, SEPARATOR, answer]."""
    separator = torch.full_like(pairs[:, 0], SEPARATOR)
    return torch.stack([pairs[:, 0], pairs[:, 1], separator, task.answer(pairs)], dim=1)


def training_set(task: Task, num_pairs: int, seed: int) -> Tensor:
    """Sequences [num_pairs, 4] of random pairs for T1 or S1; the same (task, num_pairs, seed) gives the same rows."""
    return sequences(random_pairs(num_pairs, torch_generator(seed, task.name, "train")), task)


def held_out_set(task: Task, split: str, seed: int, num_pairs: int = 1000) -> Tensor:
    """Sequences [num_pairs, 4] of unambiguous pairs; `split` ("validation", "test") only chooses the random stream."""
    return sequences(unambiguous_pairs(num_pairs, torch_generator(seed, task.name, split)), task)


def transfer_set(num_disambiguation: int, seed: int, num_ambiguous: int = 1000) -> Tensor:
    """T2 sequences [num_ambiguous + num_disambiguation, 4]: pairs with a = b, then pairs with a != b.

    For one seed the sets are nested: the pairs of a smaller num_disambiguation are the first of a larger one, so that
    a curve over num_disambiguation shows the effect of more data and not of other data.
    """
    ambiguous = ambiguous_pairs(num_ambiguous, torch_generator(seed, "T2", "ambiguous"))
    most = max(num_disambiguation, DISAMBIGUATION_SIZES[-1])
    disambiguation = unambiguous_pairs(most, torch_generator(seed, "T2", "disambiguation"))[:num_disambiguation]
    return sequences(torch.cat([ambiguous, disambiguation]), T2)
