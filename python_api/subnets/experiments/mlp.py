"""The small fully connected networks of the experiments on digits: made from a seed, trained by batches from a seed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from subnets.training.seeds import seed_for, torch_generator

Batch = TypeVar("Batch")


def mlp(sizes: Sequence[int], *seed: int | str, dropout: float = 0.0) -> nn.Sequential:
    """Linear layers of these sizes (inputs, hidden ..., outputs) with ReLU, and dropout if any, between them.

    Weights and biases are nn.Linear's own: both uniform in +-1/sqrt(inputs). The same ``seed`` parts give the same
    network; the caller's random state stays.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(*seed))
        parts: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(sizes):
            parts += [nn.Linear(inputs, outputs), nn.ReLU(), *([nn.Dropout(dropout)] if dropout else [])]
    return nn.Sequential(*parts[: -2 if dropout else -1])


def shuffled(num_rows: int, batch: int, steps: int, *seed: int | str) -> Iterator[Tensor]:
    """`steps` batches of row numbers: epochs in a new order each, whose last, smaller batch is left out."""
    generator = torch_generator(*seed)
    done = 0
    while done < steps:
        order = torch.randperm(num_rows, generator=generator)
        for start in range(0, max(num_rows - batch, 0) + 1, batch):
            if done == steps:
                return
            yield order[start : start + batch]
            done += 1


def train_steps(
    model: nn.Module, loss: Callable[[Batch], Tensor], batches: Iterable[Batch], optimizer: torch.optim.Optimizer
) -> Iterator[int]:
    """Takes an optimizer step on ``loss(batch)`` for each batch; yields the number of steps done after each."""
    for step, batch in enumerate(batches, 1):
        model.train()
        optimizer.zero_grad()
        loss(batch).backward()
        optimizer.step()
        yield step
