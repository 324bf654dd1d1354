"""``python -m benchmarks.transfer --layers 2 --runs 16``: transfer runs of the arithmetic experiment side by side.

Three ways to train the same networks (batch 50, dropout, AdamW), taking turns: one at a time in eager PyTorch (fused
AdamW, nothing planted), one at a time as a stack of one, and all in one stack (half of them planted). Steps per second
and run, the ratios (median over the rounds of the time per run) and the peak of a step's memory. Before the clock
starts, the losses of all three are compared at the first steps, without dropout.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from subnets.experiments.arithmetic import data
from subnets.training.files import write_csv
from subnets.training.gpt2 import GPT2Shape, LeanGPT2, lm_loss
from subnets.training.member_training import Member, Recipe, StackTrainer
from subnets.training.seeds import torch_generator
from torch import Tensor

from .memory import peak_of
from .rows import aligned, environment

BATCH, LR = 50, 1e-3
COLUMNS = ["contender", "runs", "layers", "ms_per_step_of_a_run", "steps_per_second", "p20_ms", "p80_ms", "x_eager",
           "x_one", "peak_mb", "kept_mb"]  # fmt: skip


def make_member(shape: GPT2Shape, index: int, rows: int) -> Member:
    """A run of T2; every second one has 30 % of its projections planted."""
    state = LeanGPT2(shape, torch_generator("init", index)).state_dict()
    generator, frozen = torch_generator("mask", index), {}
    if index % 2:
        frozen = {name: torch.rand(state[name].shape, generator=generator) < 0.3 for name in shape.masked_names()}
    sequences = data.training_set(data.T2, rows, index)
    return Member({"run": index}, state, sequences, sequences[:50], sequences[:50], ("bench", index), frozen)


class Eager:
    """One network: LeanGPT2 under autograd."""

    name, runs = "eager, one at a time", 1

    def __init__(self, shape: GPT2Shape, members: Sequence[Member], device: str) -> None:
        self.model = LeanGPT2(shape).to(device).train()
        self.model.load_state_dict(members[0].state)
        self.data = members[0].train.to(device)
        capturable = device == "cuda"
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LR, weight_decay=0.01, fused=True, capturable=capturable
        )

    def begin(self) -> None:
        """Back to the first row."""
        self.rows = iter(self.data.split(BATCH))

    def step(self) -> Tensor:
        """One training step; its loss."""
        loss = lm_loss(self.model, next(self.rows))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()[None]

    def kept(self) -> int:
        """Bytes that live from step to step: weights, gradients, moments."""
        return sum(16 * parameter.numel() for parameter in self.model.parameters())


class Stacked:
    """A stack as `train_stack` steps it."""

    def __init__(self, shape: GPT2Shape, members: Sequence[Member], device: str) -> None:
        self.runs = len(members)
        self.name = "stack of one" if self.runs == 1 else f"stack of {self.runs}"
        self.trainer = StackTrainer(shape, members, Recipe(10**4, BATCH, LR), device=device)

    def begin(self) -> None:
        """Back to the first row."""
        for i, member in enumerate(self.trainer.members):
            self.trainer.step.set_order(i, torch.arange(len(member.train)), int(self.trainer.step.count))

    def step(self) -> Tensor:
        """One training step of all; their losses."""
        self.trainer.step(BATCH)
        return self.trainer.step.losses

    def kept(self) -> int:
        """Bytes that live from step to step: weights, gradients, moments and planted entries."""
        step = self.trainer.step
        planted = sum(8 * free.numel() for free, _ in step.planted.values())
        return sum(16 * value.numel() for value in self.trainer.net.params.values()) + planted


def check(shape: GPT2Shape, device: str) -> None:
    """The first losses of all ways are the same without dropout; raises AssertionError otherwise."""
    plain = GPT2Shape(layers=shape.layers, dropout=0.0)
    members = [make_member(plain, 2 * i, 3 * BATCH) for i in range(2)]  # nothing planted: eager plants nothing
    ways = [Eager(plain, members, device), Stacked(plain, members[:1], device), Stacked(plain, members, device)]
    for way in ways:
        way.begin()
    for _ in range(3):
        eager, one, many = (way.step()[0].item() for way in ways)
        assert abs(one - eager) < 1e-5 * eager and abs(many - eager) < 1e-5 * eager, (eager, one, many)


def run(layers: int, runs: int, rounds: int, steps: int, device: str) -> list[dict[str, object]]:
    """One row per contender."""
    shape = GPT2Shape(layers=layers)
    check(shape, device)
    members = [make_member(shape, i, steps * BATCH) for i in range(runs)]
    ways = [Eager(shape, members, device), Stacked(shape, members[:1], device), Stacked(shape, members, device)]
    seconds: list[list[float]] = [[] for _ in ways]
    for turn in range(rounds + 1):
        for way, times in zip(ways, seconds, strict=True):
            way.begin()
            torch.cuda.synchronize() if device == "cuda" else None
            begin = time.perf_counter()
            for _ in range(steps):
                way.step()
            torch.cuda.synchronize() if device == "cuda" else None
            if turn:  # the first warms up
                times.append((time.perf_counter() - begin) / steps / way.runs)
    rows = []
    for way, times in zip(ways, seconds, strict=True):
        way.begin()
        ratios = [statistics.median(a / b for a, b in zip(seconds[i], times, strict=True)) for i in (0, 1)]
        rows.append({
            "contender": way.name, "runs": way.runs, "layers": layers,
            "ms_per_step_of_a_run": f"{1e3 * statistics.median(times):.3f}",
            "steps_per_second": f"{1 / statistics.median(times):.1f}",
            "p20_ms": f"{1e3 * sorted(times)[len(times) // 5]:.3f}",
            "p80_ms": f"{1e3 * sorted(times)[-1 - len(times) // 5]:.3f}",
            "x_eager": f"{ratios[0]:.2f}", "x_one": f"{ratios[1]:.2f}",
            "peak_mb": f"{peak_of(way.step, device) / 1e6:.1f}", "kept_mb": f"{way.kept() / 1e6:.1f}",
        })  # fmt: skip
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transfer", description=__doc__)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--runs", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=4, help="steps of a contender's turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--csv", type=Path, help="write the rows here too, with device, versions and commit")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    rows = run(args.layers, args.runs, args.rounds, args.steps, args.device)
    print(aligned([tuple(COLUMNS), *(tuple(str(row[column]) for column in COLUMNS) for row in rows)], 1))
    if args.csv is not None:
        env = environment(args.device, args.threads, "perf_counter")
        write_csv(args.csv, [*COLUMNS, *env], [{**row, **env} for row in rows])


if __name__ == "__main__":
    main()
