"""`subnets run arithmetic-sensitivity`: short discoveries on one T1 network over lambda, initial score, beta and rate.

Each row is one discovery: its settings, the density and hard S1 accuracy of the subnet, and the share of masks that
were still undecided (between .01 and .99) at the end. The base network is trained once; rows that exist are kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from subnets.discovery import discover
from subnets.experiments.arithmetic import data
from subnets.experiments.arithmetic.config import ArithmeticConfig, make_config
from subnets.experiments.arithmetic.stages import Depth, accuracy_on, base_stage, discovery_config, s1_batches
from subnets.report.page import Table
from subnets.training.files import read_json, write_csv, write_json, write_text
from subnets.training.gpt2 import lm_loss
from subnets.training.run_folder import open_run_folder, read_config

EXPERIMENT = "arithmetic-sensitivity"


@dataclass(frozen=True)
class Setting:
    """One row's settings."""

    lam: float
    score_init: float
    beta_end: float
    lr: float


START = Setting(lam=1e-7, score_init=-0.1, beta_end=100.0, lr=1e-3)  # the paper's
ONE_AT_A_TIME: dict[str, Sequence[float]] = {
    "lam": (0.0, 1e-8, 1e-6, 1e-5),
    "score_init": (-0.3, 0.0, 0.1, 0.3),
    "beta_end": (10.0, 30.0, 300.0),
    "lr": (3e-4, 3e-3, 1e-2),
}
COLUMNS = ("lam", "score_init", "beta_end", "lr", "steps", "density", "s1_accuracy", "undecided", "complement_s1")


def settings() -> list[Setting]:
    """The paper's setting, every change of one value, and the corners of lambda x rate."""
    rows = [START]
    for name, values in ONE_AT_A_TIME.items():
        rows += [replace(START, **{name: value}) for value in values]
    corners = itertools.product((1e-6, 1e-5), (3e-3,))
    return rows + [replace(START, lam=lam, lr=lr) for lam, lr in corners]


def main(preset: str, overrides: dict[str, str], out: Path, show: bool) -> str:
    """Runs what is missing and returns the table."""
    config = make_config(preset, {"layers": "2", **overrides})
    if len(config.layers) != 1:
        raise ValueError(f"arithmetic-sensitivity: layers must be one depth, got {config.layers}")
    open_run_folder(out, EXPERIMENT, config.to_json())
    depth = Depth(config, config.layers[0], out / f"layers{config.layers[0]}")
    source = base_stage(depth, show)
    for setting in settings():
        path = _path(out, setting)
        if not path.exists():
            write_json(path, run_setting(depth, source, setting, show))
    return write_report(out)


def run_setting(depth: Depth, source: dict[str, Any], setting: Setting, show: bool = False) -> dict[str, Any]:
    """One discovery with `setting` in place of the config's values."""
    config = replace(
        depth.config, lam=setting.lam, score_init=setting.score_init, beta_end=setting.beta_end, discovery_lr=setting.lr
    )
    model = depth.model(source)
    validation, test = (
        data.held_out_set(data.S1, split, config.seed, config.num_held_out) for split in ("validation", "test")
    )
    found = discover(
        model,
        s1_batches(config),
        lm_loss,
        discovery_config(config, depth.layers),
        evaluate=partial(accuracy_on, validation),
        progress=show,
    )
    with found.subnet.applied(model, mode="keep"):
        kept = accuracy_on(test, model)
    with found.subnet.applied(model, mode="ablate"):
        rest = accuracy_on(test, model)
    last = found.history[-1]
    return {
        **asdict(setting),
        "steps": last["step"],
        "density": round(found.subnet.density(), 4),
        "s1_accuracy": round(kept, 4),
        "undecided": round(last["undecided"], 4),
        "complement_s1": round(rest, 4),
    }


def write_report(folder: Path) -> str:
    """Writes sensitivity.csv and sensitivity.md from the rows that exist; returns the table as text."""
    config = ArithmeticConfig.from_json(read_config(folder, EXPERIMENT))
    paths = [_path(folder, setting) for setting in settings()]
    rows = [read_json(path) for path in paths if path.exists()]
    write_csv(folder / "sensitivity.csv", COLUMNS, rows)
    title = f"Discovery of S1 in one T1 network of {config.layers[0]} layers"
    table = Table(title, COLUMNS, [[f"{row[name]:g}" for name in COLUMNS] for row in rows])
    write_text(folder / "sensitivity.md", _markdown(table))
    return f"{table.text()}\n\ntable    {folder / 'sensitivity.csv'}"


def _markdown(table: Table) -> str:
    lines = [table.head, ["---"] * len(table.head), *table.rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def knobs() -> str:
    """The keys that matter here."""
    from subnets.experiments.arithmetic.command import knobs as all_knobs

    varied = ", ".join(knob.name for knob in fields(Setting))
    return f"{varied} are varied by the sweep; the others are those of `subnets run arithmetic`:\n{all_knobs()}"


def _path(folder: Path, setting: Setting) -> Path:
    name = "_".join(f"{key}{value:g}" for key, value in asdict(setting).items())
    return folder / "rows" / f"{name}.json"
