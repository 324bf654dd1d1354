"""The whole comparison in one run folder: base network, subnets, transfer; then tables, figures and the page."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from subnets.experiments.arithmetic.plan import on_this_machine, transfer_stacks
from subnets.experiments.arithmetic.stages import Depth, base_stage
from subnets.experiments.arithmetic.transfers import stack_path, transfer_stage
from subnets.experiments.methods.config import MethodsConfig
from subnets.experiments.methods.finders import Setting
from subnets.experiments.methods.report import write_report
from subnets.experiments.methods.results import IOU_COLUMNS, RESULT_COLUMNS, TRANSFER_COLUMNS, Results
from subnets.experiments.methods.stages import build_members, facts_of, find_stage, subnet_path
from subnets.subnet import Subnet
from subnets.training.files import load_tensors, read_json, write_csv
from subnets.training.run_folder import open_run_folder, read_config

EXPERIMENT = "methods"


def run(config: MethodsConfig, folder: Path, show: bool = False) -> str:
    """Runs what is missing in `folder` and writes CSV files, figures and report; returns the terminal text.

    Killed at any moment and started again, it goes on and ends in the same numbers, but for seconds. A folder made with
    another config is refused, with the keys that differ.

    Raises:
        ValueError: the method "clusters" without scikit-learn.
    """
    config = on_this_machine(config)
    if "clusters" in config.conditions:
        _check_scikit_learn()
    open_run_folder(folder, EXPERIMENT, config.to_json())
    depth = Depth(config, config.layers[0], folder / f"layers{config.layers[0]}")
    setting = Setting(config, depth, base_stage(depth, show))
    for name in config.methods():
        for seed in range(config.mask_seeds):
            find_stage(setting, name, seed, show)
    transfer_stage(config, depth.layers, depth.folder, partial(build_members, setting), lambda: "last stage", show)
    return report(folder)


def report(folder: Path) -> str:
    """Writes results.csv, iou.csv, transfer.csv, figures and report.html of a finished run; returns the terminal
    text."""
    config = on_this_machine(MethodsConfig.from_json(read_config(folder, EXPERIMENT)))
    depth = Depth(config, config.layers[0], folder / f"layers{config.layers[0]}")
    paths = [stack_path(depth.folder, i, runs) for i, runs in enumerate(transfer_stacks(config, depth.layers))]
    missing = [path for path in paths if not path.exists()]
    if missing:
        raise ValueError(f"report: {missing[0]} is missing: the run is not finished; `subnets run` goes on")
    setting = Setting(config, depth, load_tensors(depth.folder / "base.safetensors")[0])
    keys = [(name, seed) for name in config.methods() for seed in range(config.mask_seeds)]
    stacks: list[dict[str, Any]] = [read_json(path) for path in paths]
    results = Results(
        config,
        read_json(depth.folder / "base.json"),
        {key: facts_of(setting, *key) for key in keys},
        {key: Subnet.load(subnet_path(setting, *key)) for key in keys},
        [row for stack in stacks for row in stack["results"]],
    )
    write_csv(folder / "results.csv", RESULT_COLUMNS, results.rows())
    write_csv(folder / "iou.csv", IOU_COLUMNS, results.iou_rows())
    write_csv(folder / "transfer.csv", TRANSFER_COLUMNS, results.transfers)
    return write_report(results, folder)


def _check_scikit_learn() -> None:
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise ValueError(
            "methods: the method 'clusters' needs scikit-learn; pip install scikit-learn, or leave it out of conditions"
        ) from None
