"""Compare two subnet files: how much they share, per layer and in all."""

from __future__ import annotations

import argparse

from ..subnet import Subnet


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", help="a file that Subnet.save wrote")
    parser.add_argument("second", help="another, over the same parameters")


def main(args: argparse.Namespace) -> int:
    """Print the comparison; 0."""
    first, second = Subnet.load(args.first), Subnet.load(args.second)
    in_all = first.iou(second)
    print(f"{'layer':<40} {'first':>10} {'second':>10} {'both':>10} {'IoU':>7} {'by chance':>10}")
    for name, a in first.masks.items():
        b = second.masks[name]
        print(_line(name, int(a.sum()), int(b.sum()), int((a & b).sum()), a.numel()))
    total = sum(mask.numel() for mask in first.masks.values())
    print(_line("all", first.num_kept(), second.num_kept(), (first & second).num_kept(), total))
    print(f"intersection over union in all: {in_all:.4f}")
    return 0


def _line(name: str, a: int, b: int, both: int, size: int) -> str:
    expected = a * b / max(size, 1)  # of two independent masks of these sizes
    by_chance = expected / max(a + b - expected, 1e-12)
    return f"{name:<40} {a:>10,} {b:>10,} {both:>10,} {both / max(a + b - both, 1):>7.4f} {by_chance:>10.4f}"
