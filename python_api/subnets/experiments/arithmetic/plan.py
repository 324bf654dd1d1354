"""Which transfer runs there are, and which of them train side by side: pure functions of the config."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from subnets.experiments.arithmetic.config import ArithmeticConfig
from subnets.experiments.arithmetic.data import VOCABULARY
from subnets.training.gpt2 import GPT2Shape

Config = TypeVar("Config", bound=ArithmeticConfig)

CPU_STACK = 12  # more members leave the caches: no faster per member
GPU_STACK = 128  # by arithmetic enough to fill a GPU, and a checkpoint of 12 layers stays at some 5 GB
_INPUT_TOKENS = 3  # rows of a batch per sequence


@dataclass(frozen=True)
class Run:
    """One transfer run: a condition, n disambiguation pairs, a transfer seed, and which base network it starts from."""

    condition: str
    num_disambiguation: int
    seed: int
    base_seed: int = 0

    def label(self) -> dict[str, int | float | str]:
        """Its columns in results.csv."""
        return {
            "condition": self.condition, "n_disambiguation": self.num_disambiguation,
            "seed": self.seed, "base_seed": self.base_seed,
        }  # fmt: skip


def on_this_machine(config: Config) -> Config:
    """`config` with device and stack filled in, so that the run folder's config says what ran and plans alike anywhere.

    On a GPU a stack is bounded by half of its memory at the deepest network.
    """
    device = config.torch_device().type
    stack = config.stack
    if stack is None and device == "cpu":
        stack = CPU_STACK
    elif stack is None:
        memory = torch.cuda.get_device_properties(0).total_memory
        fits = memory // 2 // member_bytes(config.shape(max(config.layers)), config.transfer_batch)
        stack = max(1, min(GPU_STACK, fits))
    return dataclasses.replace(config, device=device, stack=stack)


def member_bytes(shape: GPT2Shape, batch: int) -> int:
    """About what one member of a stack takes: fp32 weights, gradients, two moments, best weights, planted values with
    their mask, and the activations that a backward pass needs."""
    weights = 12 * shape.layers * shape.width**2 + VOCABULARY * shape.width
    activations = batch * _INPUT_TOKENS * (30 * shape.layers * shape.width + 4 * VOCABULARY)
    return weights * (5 * 4 + 4 + 1) + activations * 4


def all_runs(config: ArithmeticConfig, layers: int) -> list[Run]:
    """Every transfer run of one depth, n ascending."""
    return [
        Run(condition, size, seed, base_seed)
        for size in sorted(config.sizes)
        for base_seed, seed in config.seed_pairs(layers)
        for condition in config.conditions
    ]


def transfer_stacks(config: ArithmeticConfig, layers: int) -> list[list[Run]]:
    """The runs of one depth in stacks that train side by side; every run is in exactly one.

    Members of a stack should finish close together, and the time of a run grows with n. So neighbouring sizes share a
    stack as long as all their runs fit in one, and a size with more runs than that has as few stacks as possible, of
    equal length. Needs a config with a number for `stack` (`on_this_machine`).
    """
    if config.stack is None:
        raise ValueError("transfer_stacks: config.stack must be a number, got None; call on_this_machine first")
    groups: list[list[Run]] = []
    per_size = len(config.seed_pairs(layers)) * len(config.conditions)
    runs = all_runs(config, layers)
    for start in range(0, len(runs), per_size):
        size = runs[start : start + per_size]
        if groups and len(groups[-1]) + per_size <= config.stack:
            groups[-1] += size
        else:
            groups.append(size)
    return [part for group in groups for part in _split(group, -(-len(group) // config.stack))]


def _split(runs: Sequence[Run], parts: int) -> list[list[Run]]:
    """`runs` in `parts` pieces in order, lengths as equal as they can be."""
    return [list(runs[len(runs) * i // parts : len(runs) * (i + 1) // parts]) for i in range(parts)]


def sizes_of(runs: Sequence[Run]) -> str:
    """The n of a stack for file names and titles: "640", or "10-40" where sizes are mixed."""
    low, high = (choose(run.num_disambiguation for run in runs) for choose in (min, max))
    return f"{low}" if low == high else f"{low}-{high}"


def num_steps(config: ArithmeticConfig, num_disambiguation: int) -> int:
    """Optimizer steps of one transfer run."""
    return config.transfer_epochs * -(-(config.num_ambiguous + num_disambiguation) // config.transfer_batch)


def cost(config: ArithmeticConfig, layers: int) -> int:
    """Multiply-adds per token of a forward pass: how the time of a step is scaled to a depth that was not measured."""
    return 12 * layers * config.width**2 + VOCABULARY * config.width
