"""The whole experiment in one run folder: stages that skip what exists, then CSV files, figures and the report."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from subnets.experiments.arithmetic.config import ArithmeticConfig
from subnets.experiments.arithmetic.plan import all_runs, cost, num_steps, on_this_machine, transfer_stacks
from subnets.experiments.arithmetic.report import write_report
from subnets.experiments.arithmetic.results import DepthResults, group_runs
from subnets.experiments.arithmetic.stages import base_stages, discovery_stage, replicates
from subnets.experiments.arithmetic.timing import StageTime, Times, seconds_left
from subnets.experiments.arithmetic.transfers import build_members, stack_path, transfer_stage
from subnets.report.page import duration
from subnets.training.files import read_json, write_csv
from subnets.training.run_folder import open_run_folder, read_config

EXPERIMENT = "arithmetic"
RESULT_COLUMNS = (
    "condition", "layers", "n_disambiguation", "seed", "base_seed", "test_accuracy", "validation_accuracy",
    "best_epoch", "inherit", "epochs", "batch", "lr", "subnet_density", "subnet_s1_accuracy", "base_accuracy",
)  # fmt: skip
METRIC_COLUMNS = (
    "stage", "layers", "condition", "n_disambiguation", "seed", "base_seed", "epoch", "step", "loss",
    "validation_accuracy", "beta", "density", "undecided",
)  # fmt: skip
BATCH_COLUMNS = ("layers", "batch", "runs", "smallest_n", "largest_n", "member_steps", "seconds")


def run(config: ArithmeticConfig, folder: Path, show: bool = False) -> str:
    """Runs what is missing in `folder` and writes CSV files, figures and report; returns the terminal text.

    Killed at any moment and started again, it goes on and ends in the same numbers. A folder made with another config
    is refused, with the keys that differ.
    """
    config = on_this_machine(config)
    open_run_folder(folder, EXPERIMENT, config.to_json())
    for layers in config.layers:
        place = depth_folder(folder, layers)
        depths = replicates(config, layers, place)
        sources = base_stages(depths, place, show)
        bases = [(source, discovery_stage(depth, source, show)) for depth, source in zip(depths, sources, strict=True)]
        build = partial(build_members, config, layers, bases)
        transfer_stage(config, layers, place, build, lambda: time_left(config, folder), show)
    return report(folder)


def depth_folder(folder: Path, layers: int) -> Path:
    """Where one depth's files are."""
    return folder / f"layers{layers}"


def report(folder: Path) -> str:
    """Writes results.csv, metrics.csv, batches.csv, figures and report.html from the stages' files, of a run that is
    not finished from those that are there; returns the terminal text."""
    config = ArithmeticConfig.from_json(read_config(folder, EXPERIMENT))
    config = on_this_machine(config)  # folders from before `device` and `stack` were written as they ran
    rows: list[dict[str, Any]] = []
    metrics: list[dict[str, Any]] = []
    depths = []
    for layers in config.layers:
        results, depth_rows = load_depth(config, layers, folder)
        depths.append(results)
        rows += depth_rows
        metrics += _metrics(results)
    write_csv(folder / "results.csv", RESULT_COLUMNS, rows)
    write_csv(folder / "metrics.csv", METRIC_COLUMNS, metrics)
    write_csv(folder / "batches.csv", BATCH_COLUMNS, batches(config, folder))
    return write_report(depths, config, times(config, folder), folder)


def load_depth(config: ArithmeticConfig, layers: int, folder: Path) -> tuple[DepthResults, list[dict[str, Any]]]:
    """What there is of one depth's results, and its rows of results.csv."""
    place = depth_folder(folder, layers)
    bases, discoveries = (_facts(config, layers, place, name) for name in ("base.json", "discovery.json"))
    planned: dict[int, int] = {}
    for one in all_runs(config, layers):
        planned[one.num_disambiguation] = planned.get(one.num_disambiguation, 0) + 1
    recipe = {"epochs": config.transfer_epochs, "batch": config.transfer_batch, "lr": config.transfer_lr}
    stacks = [stack for _, stack in _stacks(config, layers, place)]
    rows = [{"base_seed": 0, **row, **recipe} for stack in stacks for row in stack["results"]]
    for row in rows:
        base, discovery = bases[row["base_seed"]], discoveries[row["base_seed"]]
        row["subnet_density"] = round(discovery["density"], 6)
        row["subnet_s1_accuracy"] = round(discovery["table"]["subnet"]["S1"], 6)
        row["base_accuracy"] = round(base["test_accuracy"], 6)
    skipped = [row for stack in stacks for row in stack["skipped"]]
    curves = [curve for stack in stacks for curve in stack["curves"]]
    runs = group_runs(rows)
    return DepthResults(layers, bases, discoveries, runs, skipped, curves, config.base_seeds, planned), rows


def _facts(config: ArithmeticConfig, layers: int, place: Path, name: str) -> dict[int, dict[str, Any]]:
    """Base seed -> content of a stage's JSON file, where it is there."""
    paths = [depth.folder / name for depth in replicates(config, layers, place)]
    return {r: read_json(path) for r, path in enumerate(paths) if path.exists()}


def _stacks(config: ArithmeticConfig, layers: int, place: Path) -> list[tuple[int, dict[str, Any]]]:
    """(index, file content) of the stacks that are done."""
    paths = [stack_path(place, i, runs) for i, runs in enumerate(transfer_stacks(config, layers))]
    return [(i, read_json(path)) for i, path in enumerate(paths) if path.exists()]


def _metrics(results: DepthResults) -> Iterator[dict[str, Any]]:
    """The training curves of every stage in one table."""
    layers = results.layers
    for r, base in results.bases.items():
        yield from ({"stage": "base", "layers": layers, "base_seed": r, **point} for point in base["curve"])
    for r, discovery in results.discoveries.items():
        for point in discovery["history"]:
            known = {key: point.get(key) for key in ("epoch", "step", "loss", "beta", "density", "undecided")}
            score = {"validation_accuracy": point.get("score")}
            yield {"stage": "discovery", "layers": layers, "base_seed": r, **known, **score}
    for curve in results.curves:
        labels = {key: curve.get(key, 0) for key in ("condition", "n_disambiguation", "seed", "base_seed")}
        yield from ({"stage": "transfer", "layers": layers, **labels, **point} for point in curve["curve"])


# ------------------------------------------------------------------------------- time


def batches(config: ArithmeticConfig, folder: Path) -> list[dict[str, Any]]:
    """One row per stack that is done: its runs, sizes, optimizer steps of all its members together, and seconds."""
    rows = []
    for layers in config.layers:
        planned = transfer_stacks(config, layers)
        for index, stack in _stacks(config, layers, depth_folder(folder, layers)):
            sizes = [one.num_disambiguation for one in planned[index]]
            trained = [row["n_disambiguation"] for row in stack["results"]]
            rows.append({
                "layers": layers, "batch": index + 1, "runs": len(trained),
                "smallest_n": min(sizes), "largest_n": max(sizes),
                "member_steps": sum(num_steps(config, size) for size in trained), "seconds": stack["seconds"],
                "planned_steps": sum(num_steps(config, size) for size in sizes),
            })  # fmt: skip
    return rows


def times(config: ArithmeticConfig, folder: Path) -> Times:
    """What was planned, what is done and how long it took, per depth and stage."""
    rows = batches(config, folder)
    found = {}
    for layers in config.layers:
        place = depth_folder(folder, layers)
        planned = sum(num_steps(config, one.num_disambiguation) for one in all_runs(config, layers))
        stacks = [row for row in rows if row["layers"] == layers]
        done = sum(row["planned_steps"] for row in stacks)
        found[layers] = {"transfer": _stage_time(planned, done, [(row["member_steps"], row) for row in stacks])}
        for stage in ("base", "discovery"):
            facts = _facts(config, layers, place, f"{stage}.json").values()
            found[layers][stage] = _stage_time(config.base_seeds, len(facts), [(1, one) for one in facts])
    return found


def _stage_time(planned: int, done: int, units: list[tuple[int, dict[str, Any]]]) -> StageTime:
    timed = [(count, file["seconds"]) for count, file in units if file["seconds"] is not None]
    return StageTime(planned, done, sum(count for count, _ in timed), sum(seconds for _, seconds in timed))


def time_left(config: ArithmeticConfig, folder: Path) -> str:
    """How long the whole config will take from here, from what was measured in this folder."""
    seconds, is_all = seconds_left(times(config, folder), {layers: cost(config, layers) for layers in config.layers})
    if not seconds:
        return "no batch timed yet"
    return f"{'' if is_all else 'more than '}{duration(seconds)} left for the whole run"
