"""subnets report DIR: writes a finished run's results.csv, metrics.csv, figures and report.html again."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from subnets.experiments.command import EXPERIMENTS
from subnets.training.files import read_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `subnets report`."""
    parser.add_argument("folder", type=Path, help="a run folder, as `subnets run` made it")


def main(args: argparse.Namespace) -> int:
    """Prints the short table and where the files are."""
    config = args.folder / "config.json"
    if not config.exists():
        raise ValueError(f"{args.folder} must be a run folder with a config.json, got none")
    experiment = read_json(config).get("experiment")
    if experiment not in EXPERIMENTS:
        raise ValueError(f"{config} must name one of {', '.join(EXPERIMENTS)}, got {experiment!r}")
    print(importlib.import_module(EXPERIMENTS[experiment]).write_report(args.folder))
    return 0
