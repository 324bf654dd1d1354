"""The whole experiment in one run folder: stages that skip what exists, then CSV files, figures and the report."""

from __future__ import annotations

from pathlib import Path

from subnets.experiments.addmul.config import AddMulConfig
from subnets.experiments.addmul.report import Found, write_report
from subnets.experiments.addmul.stages import Task, base_stage, mask_stage, measure_stage
from subnets.subnet import Subnet
from subnets.training.files import read_json
from subnets.training.run_folder import open_run_folder, read_config

EXPERIMENT = "addmul"


def run(config: AddMulConfig, folder: Path, show: bool = False) -> str:
    """Runs what is missing in `folder` and writes CSV files, figures and report; returns the terminal text.

    Killed at any moment and started again, it goes on (masks from their last checkpoint, a base network from its
    start) and ends in the same numbers. A folder made with another config is refused, with the keys that differ.
    """
    open_run_folder(folder, EXPERIMENT, config.to_json())
    for name in config.problems:
        task = Task.of(config, name, folder)
        base_stage(task)
        for method in config.methods:
            subnets = {mask: mask_stage(task, method, mask, show) for mask in task.masked_functions()}
            measure_stage(task, method, subnets)
    return report(folder)


def report(folder: Path) -> str:
    """Writes accuracies.csv, weights.csv, overlaps.csv, figures and report.html from the stages' files, of a run that
    is not finished from those that are there; returns the terminal text."""
    config = AddMulConfig.from_json(read_config(folder, EXPERIMENT))
    found = []
    for name in config.problems:
        task = Task.of(config, name, folder)
        found += [load(task, method) for method in config.methods if (task.folder / method / "measures.json").exists()]
    return write_report(config, found, folder)


def load(task: Task, method: str) -> Found:
    """What one method found in one network."""
    masks = list(task.masked_functions())
    return Found(
        problem=task.name,
        method=method,
        subnets={mask: Subnet.load(task.path(method, mask, "safetensors")) for mask in masks},
        facts={mask: read_json(task.path(method, mask, "json")) for mask in masks},
        measures=read_json(task.folder / method / "measures.json"),
    )
