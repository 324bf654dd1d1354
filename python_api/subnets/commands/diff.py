"""Compare two subnet files: how much they share, per parameter and in all, and how much random ones would.

Only parameters that both mask in the same shape are compared; others are named. With --out FOLDER the same as
report.html with a figure.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..report.comparison import Comparison, comparison_facts
from ..report.drawing import save_figure
from ..report.page import image, page, paragraph
from ..report.subnet_pages import load_subnet
from ..training.files import write_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", help="a file or folder that Subnet wrote")
    parser.add_argument("second", help="another, with parameters of the same names")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write report.html and iou.png there")


def main(args: argparse.Namespace) -> int:
    """Print the comparison; 0."""
    first, second = load_subnet(args.first), load_subnet(args.second)
    comparison = Comparison.of(first, second)
    said = {"compared": f"{args.first} and {args.second}", **comparison_facts(first, second, comparison)}
    print(comparison.table().text())
    print("\n".join(f"{what}: {text}" for what, text in said.items()))
    if args.out is not None:
        figure = save_figure(comparison.figure(), args.out / "iou.png")
        parts = [
            *[paragraph(f"{what}: {text}") for what, text in said.items()],
            image(figure, "Intersection over union by role and depth (dashed: random subnets); densities in both."),
            comparison.table().html(),
        ]
        write_text(args.out / "report.html", page("Two subnetworks", parts))
        print(f"written: {args.out / 'report.html'}")
    return 0
