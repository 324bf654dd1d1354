"""The transfer stage: plants every run's weights and trains the runs of one depth stack by stack."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from subnets.experiments.arithmetic import data
from subnets.experiments.arithmetic.conditions import FROZEN, Masks, planted_masks, starting_state
from subnets.experiments.arithmetic.config import ArithmeticConfig
from subnets.experiments.arithmetic.plan import Run, sizes_of, transfer_stacks
from subnets.experiments.arithmetic.stages import State, train
from subnets.subnet import Subnet
from subnets.training.files import write_json
from subnets.training.member_training import Member, MemberResult, Recipe
from subnets.training.seeds import seed_for, torch_generator

Built = tuple[list[Member], list[dict[str, Any]]]  # members, and the runs that can't be done with the reason


def stack_path(folder: Path, index: int, runs: Sequence[Run]) -> Path:
    """The file of one stack's results; `folder` is the depth's."""
    return folder / f"transfer_{index:03d}_n{sizes_of(runs)}.json"


def transfer_stage(
    config: ArithmeticConfig,
    layers: int,
    folder: Path,
    build: Callable[[Sequence[Run]], Built],
    time_left: Callable[[], str],
    show: bool = False,
) -> None:
    """Trains every stack of one depth whose file is missing; `build` makes the members of a stack's runs.

    `time_left()` says how long the whole config will take from here; it is shown before each stack.
    """
    recipe = Recipe(config.transfer_epochs, config.transfer_batch, config.transfer_lr, weight_decay=0.01)
    stacks = transfer_stacks(config, layers)
    for index, runs in enumerate(stacks):
        path = stack_path(folder, index, runs)
        if path.exists():
            continue
        title = f"T2, {layers} layers, batch {index + 1} of {len(stacks)}: n={sizes_of(runs)}, {len(runs)} runs"
        if show:
            print(f"{title}; {time_left()}", file=sys.stderr)
        members, skipped = build(runs)
        results: list[MemberResult] = []
        seconds: float | None = 0.0
        checkpoint = path.with_suffix(".checkpoint.safetensors")
        if members:
            results, seconds = train(title, config.shape(layers), members, recipe, checkpoint, config.device, show)
        write_json(path, {
            "results": [_row(config, layers, result) for result in results],
            "curves": [{**result.label, "curve": result.curve} for result in results],
            "skipped": skipped,
            "seconds": seconds,
        })  # fmt: skip
        checkpoint.unlink(missing_ok=True)


def build_members(
    config: ArithmeticConfig, layers: int, bases: Sequence[tuple[State, Subnet]], runs: Sequence[Run]
) -> Built:
    """The members of a stack, and the runs that can't be done with the reason (complement of a dense subnet);
    `bases[r]` are the weights and the subnet of replicate r."""
    members, skipped = [], []
    for run in runs:
        try:
            members.append(_member(config, layers, *bases[run.base_seed], run))
        except ValueError as error:
            if "complement" not in run.condition:
                raise
            skipped.append({**run.label(), "reason": str(error)})
    return members, skipped


def _member(config: ArithmeticConfig, layers: int, source: State, subnet: Subnet, run: Run) -> Member:
    sampler = torch_generator(config.seed, "T2", run.seed, "sample", layers)
    planted = planted_masks(run.condition, subnet, sampler)
    return member(config, layers, source, planted, run, is_frozen=run.condition in FROZEN)


def member(
    config: ArithmeticConfig, layers: int, source: State, planted: Masks, run: Run, *, is_frozen: bool
) -> Member:
    """A network with the `planted` weights of `source`. All conditions of one transfer seed share data, its order,
    dropout and fresh weights: they differ in planting."""
    stream = (config.seed, "T2", run.seed)
    stream_seed = seed_for(*stream)
    init = torch_generator(*stream, "init", layers)
    shape = config.shape(layers)
    return Member(
        run.label(),
        starting_state(run.condition, planted, source, shape, config.inherit, init),
        data.transfer_set(run.num_disambiguation, stream_seed, config.num_ambiguous),
        data.held_out_set(data.T2, "validation", stream_seed, config.num_held_out),
        data.held_out_set(data.T2, "test", stream_seed, config.num_held_out),
        stream,
        planted if is_frozen else {},
    )


def _row(config: ArithmeticConfig, layers: int, result: MemberResult) -> dict[str, Any]:
    return {
        **result.label,
        "layers": layers,
        "test_accuracy": round(result.test_accuracy, 6),
        "validation_accuracy": round(result.validation_accuracy, 6),
        "best_epoch": result.best_epoch,
        "inherit": config.inherit,
    }
