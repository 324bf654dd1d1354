"""`subnets run arithmetic-stability`: how much of the S1 subnet depends on the seed, and which lambda to take.

One T1 network; S1 is discovered in it for every seed and penalty in one run (discovery in bulk), each seed with its own
order of the same data. The page shows density against accuracy, what the seeds agree on, and what their intersection
and union can do, on S1 pairs that selected nothing.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from subnets.discovery import Discoveries, DiscoveryConfig, discover
from subnets.experiments.arithmetic import data
from subnets.experiments.arithmetic.config import ArithmeticConfig, make_config
from subnets.experiments.arithmetic.plan import on_this_machine
from subnets.experiments.arithmetic.stages import Depth, accuracy_on, base_stage, discovery_config
from subnets.report.page import page, paragraph
from subnets.report.stability import agreement, agreement_table, path_table, stability_parts
from subnets.training.files import read_json, write_csv, write_json, write_text
from subnets.training.gpt2 import lm_loss
from subnets.training.run_folder import open_run_folder, read_config

EXPERIMENT = "arithmetic-stability"


@dataclass(frozen=True)
class StabilityConfig:
    """What is varied; everything else is the arithmetic experiment's."""

    seeds: tuple[int, ...]
    penalties: tuple[float, ...]


PRESETS = {
    "quick": StabilityConfig((0, 1, 2), (1e-8, 1e-7, 1e-6)),
    "standard": StabilityConfig((0, 1, 2, 3, 4), (0.0, 1e-8, 3e-8, 1e-7, 3e-7, 1e-6)),
}
RUN_COLUMNS = (
    "seed", "lam", "score_init", "best_epoch", "density", "undecided", "s1_validation", "s1_test", "complement_s1_test"
)  # fmt: skip
GROUP_COLUMNS = (
    "lam", "score_init", "seeds", "density", "density_std", "score", "score_std", "iou", "expected_iou", "shared",
    "core", "expected_core", "core_score", "union", "union_score",
)  # fmt: skip


def main(preset: str, overrides: dict[str, str], out: Path, show: bool) -> str:
    """Runs what is missing in `out` and returns the tables."""
    varied, config = configs(preset, overrides)
    config = on_this_machine(config)
    open_run_folder(out, EXPERIMENT, {**config.to_json(), **{k: list(v) for k, v in asdict(varied).items()}})
    depth = Depth(config, config.layers[0], out / f"layers{config.layers[0]}")
    source = base_stage(depth, show)
    if not (out / "runs.json").exists():
        found = discover_all(depth, source, varied, show)
        found.save(out / "discoveries")
        write_json(out / "runs.json", [_row(depth, source, found, i) for i in range(len(found))])
        (out / "discovery.checkpoint.safetensors").unlink(missing_ok=True)
    return write_report(out)


def configs(preset: str, overrides: dict[str, str]) -> tuple[StabilityConfig, ArithmeticConfig]:
    """The two configs of a preset with `overrides` (text as typed after --set) applied.

    Raises ValueError for unknown presets and keys, text of another type, empty or repeated values, and more than one
    depth or base network.
    """
    if preset not in PRESETS:
        raise ValueError(f"arithmetic-stability: preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    own = {key: overrides[key] for key in ("seeds", "penalties") if key in overrides}
    others = {key: text for key, text in overrides.items() if key not in own}
    varied = PRESETS[preset]
    for key, text in own.items():
        number = int if key == "seeds" else float
        try:
            values = tuple(number(part) for part in text.split(",") if part.strip())
        except ValueError:
            raise ValueError(
                f"arithmetic-stability: {key} must be {number.__name__}s separated by commas, got {text!r}"
            ) from None
        varied = replace(varied, **{key: values})
    DiscoveryConfig(**asdict(varied))  # refuses empty, repeated and impossible values before anything is trained
    config = make_config(preset, others)
    if len(config.layers) != 1:
        raise ValueError(f"arithmetic-stability: layers must be one depth, got {config.layers}")
    if config.base_seeds != 1:
        raise ValueError(
            f"arithmetic-stability: base_seeds must be 1, got {config.base_seeds}; it is about one network: for "
            "several run it once per seed"
        )
    return varied, config


def discover_all(depth: Depth, source: dict[str, Tensor], varied: StabilityConfig, show: bool = False) -> Discoveries:
    """Every seed and penalty in one run; goes on from its checkpoint."""
    config = depth.config
    settings = replace(
        discovery_config(config, depth.layers, depth.folder.parent / "discovery.checkpoint.safetensors"),
        seeds=varied.seeds, penalties=varied.penalties, cuda_graph=False,
    )  # fmt: skip
    validation = data.held_out_set(data.S1, "validation", config.seed, config.num_held_out)
    evaluate = partial(accuracy_on, validation)
    found = discover(depth.model(source), batches(config), lm_loss, settings, evaluate=evaluate, progress=show)
    assert isinstance(found, Discoveries)
    return found


def batches(config: ArithmeticConfig) -> Callable[[int], Iterator[Tensor]]:
    """epoch -> batches of S1 sequences on the config's device, in an order from torch's random numbers, which discovery
    seeds by its seed."""
    rows = data.training_set(data.S1, config.discovery_pairs, config.seed).to(config.device or "cpu")

    def batches(epoch: int) -> Iterator[Tensor]:
        order = torch.randperm(len(rows)).to(rows.device)  # drawn on the CPU: the same on every device
        return (rows[part] for part in order.split(config.discovery_batch))

    return batches


def write_report(folder: Path) -> str:
    """Writes runs.csv, groups.csv, figures and report.html of a finished run; returns the tables as text."""
    values = read_config(folder, EXPERIMENT)
    varied = {field.name: values.pop(field.name) for field in fields(StabilityConfig)}
    config = ArithmeticConfig.from_json(values)
    if not (folder / "runs.json").exists():
        raise ValueError(f"report: {folder / 'runs.json'} is missing: the run is not finished; `subnets run` goes on")
    found = Discoveries.load(folder / "discoveries")
    rows = read_json(folder / "runs.json")
    write_csv(folder / "runs.csv", RUN_COLUMNS, rows)
    write_csv(folder / "groups.csv", GROUP_COLUMNS, agreement(found))
    parts = [paragraph(_recipe(config, varied)), *stability_parts(found, folder / "figures")]
    title = f"Stability of the S1 subnet in one T1 network of {config.layers[0]} layers"
    write_text(folder / "report.html", page(title, parts))
    files = "\n".join(f"{name:8} {folder / file}" for name, file in (
        ("report", "report.html"), ("runs", "runs.csv"), ("groups", "groups.csv")
    ))  # fmt: skip
    return f"{path_table(found).text()}\n\n{agreement_table(found).text()}\n\n{files}"


def knobs() -> str:
    """The keys that matter here."""
    from subnets.experiments.arithmetic.command import knobs as all_knobs

    own = "\n".join(
        f"{name} = " + "; ".join(f"{preset}: {','.join(map(str, getattr(c, name)))}" for preset, c in PRESETS.items())
        for name in typing.get_type_hints(StabilityConfig)
    )
    others = "every combination is discovered; the others are those of `subnets run arithmetic`:"
    return f"{own}\n    {others}\n{all_knobs()}"


def _row(depth: Depth, source: dict[str, Tensor], found: Discoveries, number: int) -> dict[str, Any]:
    run, config = found[number], depth.config
    test = data.held_out_set(data.S1, "test", config.seed, config.num_held_out)
    scores = {}
    for mode in ("keep", "ablate"):
        model = depth.model(source)
        with run.subnet.applied(model, mode=mode):
            scores[mode] = accuracy_on(test, model)
    return {
        **run.settings, "best_epoch": run.best["epoch"], "density": round(run.best["density"], 6),
        "undecided": round(run.best["undecided"], 6), "s1_validation": round(run.best["score"], 6),
        "s1_test": round(scores["keep"], 6), "complement_s1_test": round(scores["ablate"], 6),
    }  # fmt: skip


def _recipe(config: ArithmeticConfig, varied: dict[str, Any]) -> str:
    return (
        f"Preset {config.preset}: one T1 network; {len(varied['seeds'])} seeds (order of the data) x penalties "
        f"{', '.join(f'{lam:g}' for lam in varied['penalties'])}; {config.discovery_epochs} epochs of "
        f"{config.discovery_pairs:,} pairs of S1, batch {config.discovery_batch}, initial score {config.score_init:g}, "
        f"beta to {config.beta_end:g}. Scores are accuracies on {config.num_held_out:,} S1 validation pairs, which "
        "chose the best epoch; runs.csv has those on as many test pairs."
    )
