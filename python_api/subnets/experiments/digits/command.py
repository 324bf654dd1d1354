"""`subnets run digits`."""

from __future__ import annotations

from pathlib import Path

from subnets.experiments.digits.config import DigitsConfig, make_config
from subnets.experiments.digits.run import report, run
from subnets.experiments.knobs import help_text


def main(preset: str, overrides: dict[str, str], out: Path, show: bool) -> str:
    """Runs the experiment and returns the text for the terminal."""
    return run(make_config(preset, overrides), out, show)


def knobs() -> str:
    """Every key of the config with its default and what it does."""
    return help_text(DigitsConfig)


def write_report(folder: Path) -> str:
    """Writes the tables, figures and page of a finished run again; returns the text for the terminal."""
    return report(folder)
