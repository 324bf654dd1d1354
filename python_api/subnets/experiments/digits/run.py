"""The whole experiment in one run folder: units of work that skip what exists, then CSV files, figures and report."""

from __future__ import annotations

import time
from pathlib import Path

from tqdm import tqdm

from subnets.experiments.digits import clusters, edge_popup, sparse_finetuning, tickets
from subnets.experiments.digits.config import DigitsConfig
from subnets.experiments.digits.parts import Facts, Part
from subnets.report.drawing import save_figure
from subnets.report.page import duration, image, page, paragraph
from subnets.training.files import read_json, write_csv, write_json, write_text
from subnets.training.run_folder import open_run_folder, read_config

EXPERIMENT = "digits"
PARTS: dict[str, Part] = {
    "tickets": tickets.PART,
    "edge_popup": edge_popup.PART,
    "sparse_finetuning": sparse_finetuning.PART,
    "clusters": clusters.PART,
}


def run(config: DigitsConfig, folder: Path, show: bool = False) -> str:
    """Runs what is missing in `folder` and writes CSV files, figures and report; returns the terminal text.

    Killed at any moment and started again, it goes on with the unit of work (one network) that it was at, and ends in
    the same numbers. A folder made with another config is refused, with the keys that differ.
    """
    open_run_folder(folder, EXPERIMENT, config.to_json())
    for name in config.parts:
        units = PARTS[name].units(config)
        missing = [unit for unit in units if not _path(folder, name, unit).exists()]
        for unit in tqdm(missing, desc=name, disable=not show or not missing):
            started = time.process_time()
            facts = units[unit]()
            write_json(_path(folder, name, unit), {**facts, "seconds": round(time.process_time() - started, 1)})
    return report(folder)


def _path(folder: Path, part: str, unit: str) -> Path:
    return folder / part / f"{unit}.json"


def report(folder: Path) -> str:
    """Writes a CSV file and a figure per part, and report.html, from the units' files; parts that are not finished are
    left out and named. Returns the terminal text."""
    config = DigitsConfig.from_json(read_config(folder, EXPERIMENT))
    parts, lines = [], []
    for name in config.parts:
        paths = {unit: _path(folder, name, unit) for unit in PARTS[name].units(config)}
        found: dict[str, Facts] = {unit: read_json(path) for unit, path in paths.items() if path.exists()}
        if len(found) < len(paths):
            text = f"{name}: NOT FINISHED, {len(found)} of {len(paths)} networks there."
            parts.append(paragraph(text, "verdict bad"))
            lines += [text, ""]
            continue
        seconds = sum(facts.pop("seconds") for facts in found.values())
        its = PARTS[name].summary(config, found)
        write_csv(folder / f"{name}.csv", list(its.rows[0]), its.rows)
        text = f"{name}: {'' if its.is_as_expected else 'NOT AS EXPECTED: '}{its.verdict} ({duration(seconds)})."
        parts += [paragraph(text, "verdict good" if its.is_as_expected else "verdict bad"), its.table.html()]
        if its.figure is not None:
            parts.append(image(save_figure(its.figure, folder / "figures" / f"{name}.png"), its.table.title))
        lines += [text, "", its.table.text(), ""]
    write_text(folder / "report.html", page(f"Digits: preset {config.preset}, {config.seeds} seeds", parts))
    return "\n".join([*lines, f"report   {folder / 'report.html'}"])
