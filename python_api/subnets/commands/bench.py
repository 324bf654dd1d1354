"""Run the benchmarks: ours against eager PyTorch, torch.compile, nn.Linear and NeuroSurgeon, side by side.

Everything after ``subnets bench`` goes to ``python -m benchmarks``; ``subnets bench -- --help`` lists it. Needs the
project's source folder: benchmarks are not part of the installed package."""

from __future__ import annotations

import argparse
import importlib

PASSES_ARGUMENTS_ON = True  # also those that begin with a dash


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="for python -m benchmarks")


def main(args: argparse.Namespace) -> int:
    """Run them; their exit status.

    Raises:
        ValueError: the benchmarks folder is not importable from here.
    """
    try:
        benchmarks = importlib.import_module("benchmarks.__main__")
    except ImportError as error:
        raise ValueError(
            f"the benchmarks folder can't be imported ({error}); run this in the project's source folder"
        ) from None
    return int(benchmarks.main([word for word in args.arguments if word != "--"]) or 0)
