"""The whole experiment in one run folder: stages that skip what exists, then CSV files, figures and the report."""

from __future__ import annotations

import math
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from subnets.experiments.vision.config import VisionConfig
from subnets.experiments.vision.data import Data, open_data
from subnets.experiments.vision.models import Classifier, build, load_pretrained
from subnets.experiments.vision.report import write_report
from subnets.experiments.vision.results import VisionResults
from subnets.experiments.vision.stages import Replicate, base_stage, discovery_stage, replicates
from subnets.experiments.vision.transfers import TransferRun, planned_runs, transfer_stage
from subnets.subnet import Subnet
from subnets.training.files import load_tensors, read_json, write_csv
from subnets.training.processes import map_in_processes, num_cores
from subnets.training.run_folder import open_run_folder, read_config

EXPERIMENT = "vision"
RESULT_COLUMNS = (
    "condition", "architecture", "num_images", "seed", "base_seed", "natural", "mean_pooled", "shape_decisions",
    "texture_decisions", "shape_bias", "inherit", "norms", "epochs", "batch", "lr", "subnet_density",
    "images_per_second", "final_loss",
)  # fmt: skip
METRIC_COLUMNS = (
    "stage", "condition", "num_images", "seed", "base_seed", "epoch", "step", "loss", "score", "beta", "density",
    "undecided",
)  # fmt: skip


def run(config: VisionConfig, folder: Path, show: bool = False) -> str:
    """Runs what is missing in `folder` and writes CSV files, figures and report; returns the terminal text.

    Killed at any moment and started again, it goes on and ends in the same numbers. A folder made with another config
    is refused, with the keys that differ.
    """
    # a device that is not there and what can't be built or loaded are said before hours of decoding
    model = build(config.network(), 0).to(config.torch_device())
    if config.base_model is not None:
        load_pretrained(model, Path(config.base_model))
    open_run_folder(folder, EXPERIMENT, config.to_json())
    data = open_data(config, folder / "images", show)
    sizes = data.sizes()
    found = [_base_and_subnet(one, show) for one in replicates(config, data, folder)]
    missing = [one for one in planned_runs(config, sizes) if not one.facts(folder / "transfers").exists()]
    workers = min(num_workers(config), len(missing))
    if workers > 1:
        advice = "the same command goes on where it stopped, and needs less memory with --set workers=1 in a new folder"
        work = partial(_transfer_in_worker, folder)
        done = map_in_processes(work, missing, workers, name="subnets run vision", advice=advice)
        for _ in tqdm(done, f"transfer networks, {workers} at a time", len(missing), disable=not show):
            pass
    else:
        for one in missing:
            transfer_stage(one, *found[one.base_seed], folder / "transfers", show)
    return _report(config, data, folder)


def num_workers(config: VisionConfig) -> int:
    """How many transfer networks are trained side by side: one on a GPU, else the config's, or one per core."""
    return 1 if config.torch_device().type == "cuda" else config.workers or num_cores()


def _base_and_subnet(replicate: Replicate, show: bool) -> tuple[Replicate, Classifier, Subnet]:
    base = base_stage(replicate, show)
    return replicate, base, discovery_stage(replicate, base, show)


def _transfer_in_worker(folder: Path, one: TransferRun) -> None:
    """One network in a process of its own, from what lies in the run folder."""
    transfer_stage(one, *_opened(folder, one.base_seed), folder / "transfers", show=False)


@cache
def _opened(folder: Path, base_seed: int) -> tuple[Replicate, Classifier, Subnet]:
    config, data = _opened_data(folder)
    return _base_and_subnet(replicates(config, data, folder)[base_seed], show=False)


@cache
def _opened_data(folder: Path) -> tuple[VisionConfig, Data]:
    config = VisionConfig.from_json(read_config(folder, EXPERIMENT))
    return config, open_data(config, folder / "images", False)


def report(folder: Path) -> str:
    """Writes results.csv, metrics.csv, figures and report.html from the stages' files, of a run that is not finished
    from those that are there; returns the terminal text."""
    config = VisionConfig.from_json(read_config(folder, EXPERIMENT))
    return _report(config, open_data(config, folder / "images", False), folder)


def _report(config: VisionConfig, data: Data, folder: Path) -> str:
    results, rows = load_results(config, data.sizes(), folder)
    write_csv(folder / "results.csv", RESULT_COLUMNS, rows)
    write_csv(folder / "metrics.csv", METRIC_COLUMNS, _metrics(results, folder))
    return write_report(results, config, folder, data.tests, _filters(config, folder))


def load_results(
    config: VisionConfig, sizes: tuple[int, ...], folder: Path
) -> tuple[VisionResults, list[dict[str, Any]]]:
    """What there is of a run, and its rows of results.csv."""
    bases, discoveries = (
        {r: read_json(place / name) for r, place in enumerate(config.places(folder)) if (place / name).exists()}
        for name in ("base.json", "discovery.json")
    )
    planned = list(planned_runs(config, sizes))
    files = [one.facts(folder / "transfers") for one in planned]
    found = [read_json(path) for path in files if path.exists()]
    recipe = {
        "architecture": config.architecture, "inherit": config.inherit, "norms": config.norms,
        "epochs": config.transfer_epochs, "batch": config.transfer_batch, "lr": config.transfer_lr,
    }  # fmt: skip
    rows = [{**recipe, "subnet_density": round(discoveries[one["base_seed"]]["density"], 6), **one} for one in found]
    seconds = {
        "base": math.fsum(one["seconds"] for one in bases.values()),
        "discovery": math.fsum(one["seconds"] for one in discoveries.values()),
        "transfer": math.fsum(one["seconds"] for one in found),
    }
    real = folder / "real.json"
    return VisionResults(
        rows, bases, discoveries, seconds, read_json(real) if real.exists() else None, planned=len(planned)
    ), rows  # fmt: skip


def _metrics(results: VisionResults, folder: Path) -> list[dict[str, Any]]:
    """The training curves of every stage in one table."""
    metrics: list[dict[str, Any]] = []
    for r, base in results.bases.items():
        metrics += [{"stage": "base", "base_seed": r, **point} for point in base["curve"]]
    for r, discovery in results.discoveries.items():
        metrics += [{"stage": "discovery", "base_seed": r, **point} for point in discovery["history"]]
    for row in results.rows:
        labels = {key: row[key] for key in ("condition", "num_images", "seed", "base_seed")}
        metrics += [{"stage": "transfer", **labels, **point} for point in row["curve"]]
    return metrics


def _filters(config: VisionConfig, folder: Path) -> tuple[Tensor, Tensor] | None:
    """The first layer's weight in the (first) base network and its mask."""
    place = config.places(folder)[0]
    if not ((place / "base.safetensors").exists() and (place / "subnet.safetensors").exists()):
        return None
    masks = Subnet.load(place / "subnet.safetensors").masks
    name = next(name for name, mask in masks.items() if mask.dim() == 4)
    return load_tensors(place / "base.safetensors")[0][name], masks[name]
