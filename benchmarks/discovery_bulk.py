"""``python -m benchmarks.discovery_bulk``: K discoveries in one run against one alone, on the arithmetic network.

Steps of one discovery alone and of K in bulk (two seeds times K/2 penalties, 4 layers, batch 500) in turn, in fp32 and
under bf16 autocast; K members share 1, 2, 4 or all K a pass, or the objective's own stacked pass where it offers one.
Seconds per step, how many times the one's, and the most memory that a step takes beyond what lives from step to step.
The weights do not matter to the time and are those of a fresh network.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from subnets.discovery.bulk import BulkRun
from subnets.discovery.config import DiscoveryConfig
from subnets.discovery.data import EpochData
from subnets.discovery.loop import _masked, _Run
from subnets.discovery.random_state import RandomState, Streams
from subnets.experiments.arithmetic import data
from subnets.training.gpt2 import GPT2Shape, LeanGPT2, lm_loss
from torch import Tensor, nn

from .memory import peak_of
from .rows import aligned, environment

COLUMNS = (
    "case", "dtype", "members", "members_at_once", "num_steps", "median_s", "p20_s", "p80_s", "x_one", "peak_mb",
    "device", "num_threads", "commit", "torch", "python",
)  # fmt: skip


def objective(dtype: torch.dtype, device: str, has_stacked: bool) -> Callable[[nn.Module, Tensor], Tensor]:
    """lm_loss, under bf16 autocast if asked, with its stacked pass or without."""

    def cast() -> torch.autocast:
        return torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        with cast():
            return lm_loss(model, batch)

    def stacked(model: nn.Module) -> Callable[..., Any]:
        run = lm_loss.stacked(model)  # pyright: ignore

        def under_autocast(weights: dict[str, Tensor], batch: Tensor) -> Any:
            with cast():
                return run(weights, batch)

        return under_autocast

    if has_stacked:
        loss.stacked = stacked  # pyright: ignore
    return loss


class Contender:
    """Discoveries that go on step by step; ``members_at_once`` None is one alone, 0 the objective's own pass."""

    def __init__(
        self, scope: contextlib.ExitStack, layers: int, members: int, members_at_once: int | None, dtype: torch.dtype,
        device: str,
    ) -> None:
        self.members_at_once, self.dtype, self.device = members_at_once, dtype, device
        self.members = 1 if members_at_once is None else members
        self.seconds: list[float] = []
        model = LeanGPT2(GPT2Shape(layers=layers), torch.Generator().manual_seed(0)).eval().to(device)
        loss = objective(dtype, device, members_at_once == 0)
        config = DiscoveryConfig()
        if members_at_once is not None:
            penalties = [1e-8 * 3**i for i in range(members // 2)]
            config = replace(config, seeds=(0, 1), penalties=penalties, members_at_once=members_at_once or members)
        masks = scope.enter_context(_masked(model, config))
        everything: Any = EpochData([None], config)
        state = RandomState([torch.device(device)])
        if members_at_once is None:
            alone = _Run(masks, everything, loss, config, None, (), state)
            self._step: Callable[[list[Tensor]], Any] = lambda batches: alone.step(batches[0])
        else:
            bulk = BulkRun(masks, everything, loss, config, None, (), state)
            streams = Streams(state, (0, 1))
            self._step = lambda batches: bulk.step(batches, streams)

    def step(self, batches: list[Tensor]) -> None:
        begin = time.perf_counter()
        self._step(batches)
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - begin)

    def peak_mb(self, batches: list[Tensor]) -> float:
        return peak_of(lambda: self._step(batches), self.device) / 2**20


def batches(batch: int, device: str) -> Iterator[list[Tensor]]:
    """One batch per seed, again and again."""
    rows = data.training_set(data.S1, 50 * batch, 0).to(device)
    while True:
        yield [rows[torch.randperm(len(rows), device=device)[:batch]] for _ in range(2)]


def run(layers: int, batch: int, members: int, steps: int, device: str, at_once: list[int]) -> list[dict[str, Any]]:
    """One row per contender."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        with contextlib.ExitStack() as scope:
            kinds: list[int | None] = [None, *at_once, 0]
            contenders = [Contender(scope, layers, members, kind, dtype, device) for kind in kinds]
            source = batches(batch, device)
            for step, drawn in zip(range(steps + 1), source, strict=False):
                for contender in contenders:
                    contender.step(drawn)
                    if step == 0:
                        contender.seconds.clear()  # kernels and buffers are made in the first
            one = contenders[0].seconds
            for contender in contenders:
                ratios = [ours / alone for ours, alone in zip(contender.seconds, one, strict=True)]
                low, median, high = (sorted(contender.seconds)[int(q * (steps - 1))] for q in (0.2, 0.5, 0.8))
                kind = contender.members_at_once
                rows.append({
                    "case": f"gpt2_{layers}layers_b{batch}",
                    "dtype": "fp32" if dtype == torch.float32 else "bf16 autocast",
                    "members": contender.members,
                    "members_at_once": {None: "alone", 0: "stacked"}.get(kind, kind),
                    "num_steps": steps, "median_s": round(median, 5), "p20_s": round(low, 5), "p80_s": round(high, 5),
                    "x_one": round(statistics.median(ratios), 3), "peak_mb": round(contender.peak_mb(next(source)), 1),
                })  # fmt: skip
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.discovery_bulk", description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--members", type=int, default=8, help="K, an even number")
    parser.add_argument("--at-once", default="1,2,4,8", help="how many members share a pass, several to compare")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--csv", type=Path, default=None, help="write the rows here too")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    warnings.simplefilter("error", RuntimeWarning)  # one member after the other instead of what was asked for
    at_once = [int(part) for part in args.at_once.split(",")]
    rows = run(args.layers, args.batch, args.members, args.steps, args.device, at_once)
    env = environment(args.device, args.threads, "wall")
    rows = [{**row, **{name: env[name] for name in COLUMNS if name in env}} for row in rows]
    shown = COLUMNS[:10]
    print(aligned([shown, *[tuple(str(row[name]) for name in shown) for row in rows]], 2))
    if args.csv is not None:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
