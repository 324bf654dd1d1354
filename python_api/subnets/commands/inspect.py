"""Say what is in a subnet file: where it comes from, its size, the density of every layer, role and attention head.

With --out FOLDER the same as report.html with figures, and layers.csv, one row per parameter.
"""

from __future__ import annotations

import argparse
import html
import json
from pathlib import Path
from typing import Any

from ..report.page import page
from ..report.subnet_pages import facts, head_maps, heads_of, layer_rows, load_subnet, subnet_parts, subnet_tables
from ..subnet import Subnet
from ..training.files import write_csv, write_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="a file or folder that Subnet wrote")
    parser.add_argument("--heads", type=int, metavar="N", help="the model's number of attention heads")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write report.html, figures and layers.csv there")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables: one object, or a list")


def main(args: argparse.Namespace) -> int:
    """Print what the files hold; 0."""
    subnets = {file: load_subnet(file) for file in args.files}
    heads = {file: heads_of(subnet) if args.heads is None else args.heads for file, subnet in subnets.items()}
    if args.json:
        summaries = [_summary(subnet, heads[file]) for file, subnet in subnets.items()]
        print(json.dumps(summaries[0] if len(summaries) == 1 else summaries, indent=2))
    else:
        print("\n\n".join(_text(file, subnet, heads[file]) for file, subnet in subnets.items()))
    if args.out is not None:
        parts, rows = [], []
        for number, (file, subnet) in enumerate(subnets.items(), 1):
            prefix = f"{number}-" if len(subnets) > 1 else ""
            parts += [f"<h2>{html.escape(file)}</h2>", *subnet_parts(subnet, heads[file], args.out, prefix)]
            rows += [{"file": file, **row} for row in layer_rows(subnet)]
        write_csv(args.out / "layers.csv", ["file", *rows[0]], rows)
        write_text(args.out / "report.html", page("Subnetworks" if len(subnets) > 1 else "Subnetwork", parts))
        if not args.json:
            print(f"\nwritten: {args.out / 'report.html'}")
    return 0


def _summary(subnet: Subnet, heads: int | None) -> dict[str, Any]:
    by_head = {each.label: dict(zip(each.depths, each.rows(), strict=True)) for each in head_maps(subnet, heads)}
    return {
        "kept": subnet.num_kept(), "weights": sum(mask.numel() for mask in subnet.masks.values()),
        "density": subnet.density(), "provenance": subnet.provenance, "base_hash": subnet.base_hash,
        "has_values": subnet.weights is not None, "layers": layer_rows(subnet), "heads": by_head,
    }  # fmt: skip


def _text(file: str, subnet: Subnet, heads: int | None) -> str:
    lines = [f"{what:<12}{text}" for what, text in {"file": file, **facts(subnet, heads)}.items()]
    return "\n".join([*lines, *[f"\n{table.text()}" for table in subnet_tables(subnet, heads)]])
