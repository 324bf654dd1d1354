"""subnets run EXPERIMENT: trains what is missing in a run folder, then writes tables, figures and report.html.

A killed run goes on where it was when the same command is given again.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

EXPERIMENTS = {
    "addmul": "subnets.experiments.addmul.command",
    "arithmetic": "subnets.experiments.arithmetic.command",
    "arithmetic-sensitivity": "subnets.experiments.arithmetic.sensitivity",
    "arithmetic-stability": "subnets.experiments.arithmetic.stability",
    "digits": "subnets.experiments.digits.command",
    "methods": "subnets.experiments.methods.command",
    "vision": "subnets.experiments.vision.command",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `subnets run`."""
    parser.add_argument("experiment", choices=sorted(EXPERIMENTS))
    presets = (
        "quick (minutes), standard (default); arithmetic: paper (exact); vision: imagenet (exact), cue-conflict; "
        "addmul: quick (default), official (exact)"
    )
    parser.add_argument("--preset", default=None, help=presets)
    changes = "change one value of the config; may be repeated; `--set help` lists the keys"
    parser.add_argument("--set", dest="sets", metavar="KEY=VALUE", action="append", default=[], help=changes)
    parser.add_argument("--out", type=Path, default=None, help="run folder (default: runs/EXPERIMENT-PRESET)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def main(args: argparse.Namespace) -> int:
    """Runs the experiment; its module has `knobs()`, `main(preset, overrides, out, show)`, and DEFAULT_PRESET if that
    is not "standard"."""
    module = importlib.import_module(EXPERIMENTS[args.experiment])
    if "help" in args.sets:
        print(module.knobs())
        return 0
    preset = args.preset or getattr(module, "DEFAULT_PRESET", "standard")
    out = args.out or Path("runs") / f"{args.experiment}-{preset}"
    print(module.main(preset, parse_sets(args.sets), out, not args.quiet))
    sys.stdout.flush()
    return 0


def parse_sets(sets: list[str]) -> dict[str, str]:
    """["n=1", ...] -> {"n": "1"}; ValueError for text without `=` and for a key given twice."""
    values: dict[str, str] = {}
    for text in sets:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ValueError(f"--set must be KEY=VALUE, got {text!r}")
        if key in values:
            raise ValueError(f"--set must name each key once, got {key!r} twice")
        values[key] = value
    return values
