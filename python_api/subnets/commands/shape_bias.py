"""Shape bias of saved image classifiers on cue-conflict images, beside people's and published networks'.

A model is a network that `subnets run vision --preset imagenet` saved (.safetensors in transfers/), or the folder of a
transformers checkpoint with 16 outputs (the classes in alphabetical order) or ImageNet's 1,000. With --run the rows
become part of that run folder's report (`subnets report` shows them).
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `subnets shape-bias`."""
    parser.add_argument("models", nargs="+", type=Path, help=".safetensors of a vision run, or checkpoint folders")
    parser.add_argument(
        "--images", type=Path, required=True, help="folder of cue-conflict images, as airplane/a1-b2.png"
    )
    parser.add_argument("--cache", type=Path, default=Path("runs/cue-conflict"), help="where decoded images are kept")
    parser.add_argument("--run", type=Path, default=None, help="run folder whose report is to show the result")


def main(args: argparse.Namespace) -> int:
    """Prints the table; 0."""
    from ..experiments.vision.comparison import real_table
    from ..experiments.vision.real import evaluate_models, record
    from ..training.run_folder import read_config

    if args.run is not None:
        read_config(args.run, "vision")
    rows = evaluate_models(args.models, args.images, args.cache)
    if args.run is not None:
        record(args.run, rows)
    print(real_table(rows).text())
    return 0
