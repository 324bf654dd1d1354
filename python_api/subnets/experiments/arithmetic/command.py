"""`subnets run arithmetic`."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from subnets.experiments.arithmetic.config import ArithmeticConfig, make_config
from subnets.experiments.arithmetic.run import report, run


def main(preset: str, overrides: dict[str, str], out: Path, show: bool) -> str:
    """Runs the experiment and returns the text for the terminal."""
    return run(make_config(preset, overrides), out, show)


def knobs() -> str:
    """Every key of the config with its default in the paper's recipe and what it does."""
    lines = []
    for knob in fields(ArithmeticConfig):
        if knob.name != "preset":
            lines.append(f"{knob.name} = {knob.default}\n    {knob.metadata['help']}")
    return "\n".join(lines)


def write_report(folder: Path) -> str:
    """Writes the tables, figures and page of a finished run again; returns the text for the terminal."""
    return report(folder)
