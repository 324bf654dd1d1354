"""The whole experiment in one run folder: stages that skip what exists, then CSV files, figures and the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from subnets.experiments.arithmetic.config import ArithmeticConfig
from subnets.experiments.arithmetic.report import write_report
from subnets.experiments.arithmetic.results import DepthResults, group_runs
from subnets.experiments.arithmetic.stages import (
    Depth,
    base_stage,
    discovery_stage,
    stack_path,
    transfer_stacks,
    transfer_stage,
)
from subnets.training.files import read_json, write_csv
from subnets.training.run_folder import open_run_folder, read_config

EXPERIMENT = "arithmetic"
RESULT_COLUMNS = (
    "condition", "layers", "n_disambiguation", "seed", "test_accuracy", "validation_accuracy", "best_epoch", "inherit",
    "epochs", "batch", "lr", "subnet_density", "subnet_s1_accuracy", "base_accuracy",
)  # fmt: skip
METRIC_COLUMNS = (
    "stage", "layers", "condition", "n_disambiguation", "seed", "epoch", "step", "loss", "validation_accuracy", "beta",
    "density", "undecided",
)  # fmt: skip


def run(config: ArithmeticConfig, folder: Path, show: bool = False) -> str:
    """Runs what is missing in `folder` and writes CSV files, figures and report; returns the terminal text.

    Killed at any moment and started again, it goes on and ends in the same numbers. A folder made with another config
    is refused, with the keys that differ.
    """
    open_run_folder(folder, EXPERIMENT, config.to_json())
    for layers in config.layers:
        depth = Depth(config, layers, folder / f"layers{layers}")
        source = base_stage(depth, show)
        subnet = discovery_stage(depth, source, show)
        transfer_stage(depth, source, subnet, show)
    return report(folder)


def report(folder: Path) -> str:
    """Writes results.csv, metrics.csv, figures and report.html from the stages' files; returns the terminal text."""
    config = ArithmeticConfig.from_json(read_config(folder, EXPERIMENT))
    rows: list[dict[str, Any]] = []
    metrics: list[dict[str, Any]] = []
    depths = []
    for layers in config.layers:
        depth = Depth(config, layers, folder / f"layers{layers}")
        results, depth_rows = load_depth(depth)
        depths.append(results)
        rows += depth_rows
        metrics += list(_metrics(results))
    write_csv(folder / "results.csv", RESULT_COLUMNS, rows)
    write_csv(folder / "metrics.csv", METRIC_COLUMNS, metrics)
    return write_report(depths, config, folder)


def load_depth(depth: Depth) -> tuple[DepthResults, list[dict[str, Any]]]:
    """One depth's results and its rows of results.csv; ValueError naming the first stage that is not finished."""
    paths = [stack_path(depth, i, runs) for i, runs in enumerate(transfer_stacks(depth.config))]
    for path in (depth.folder / "base.json", depth.folder / "discovery.json", *paths):
        if not path.exists():
            raise ValueError(f"report: {path} is missing: the run is not finished; `subnets run` with --out goes on")
    base, discovery = read_json(depth.folder / "base.json"), read_json(depth.folder / "discovery.json")
    stacks = [read_json(path) for path in paths]
    facts = {
        "epochs": depth.config.transfer_epochs,
        "batch": depth.config.transfer_batch,
        "lr": depth.config.transfer_lr,
        "subnet_density": round(discovery["density"], 6),
        "subnet_s1_accuracy": round(discovery["table"]["subnet"]["S1"], 6),
        "base_accuracy": round(base["test_accuracy"], 6),
    }
    rows = [{**row, **facts} for stack in stacks for row in stack["results"]]
    results = DepthResults(
        depth.layers,
        base,
        discovery,
        group_runs(rows),
        [row for stack in stacks for row in stack["skipped"]],
        [curve for stack in stacks for curve in stack["curves"]],
    )
    return results, rows


def _metrics(results: DepthResults) -> Sequence[dict[str, Any]]:
    """The training curves of every stage in one table."""
    rows = [{"stage": "base", "layers": results.layers, **point} for point in results.base["curve"]]
    for point in results.discovery["history"]:
        known = {key: point.get(key) for key in ("epoch", "step", "loss", "beta", "density", "undecided")}
        rows.append({
            "stage": "discovery", "layers": results.layers, **known, "validation_accuracy": point.get("score")
        })  # fmt: skip
    for run_curve in results.curves:
        labels = {key: run_curve[key] for key in ("condition", "n_disambiguation", "seed")}
        rows += [{"stage": "transfer", "layers": results.layers, **labels, **point} for point in run_curve["curve"]]
    return rows
