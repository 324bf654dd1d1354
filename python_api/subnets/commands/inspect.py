"""Say what is in a subnet file: where it comes from, its size, and the density of every layer."""

from __future__ import annotations

import argparse
import json

from ..subnet import Subnet


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="a file that Subnet.save wrote")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def main(args: argparse.Namespace) -> int:
    """Print what the file holds; 0."""
    subnet = Subnet.load(args.file)
    densities = subnet.density(per_layer=True)
    rows = [
        {"name": name, "shape": list(mask.shape), "kept": int(mask.sum()), "density": densities[name]}
        for name, mask in subnet.masks.items()
    ]
    total = sum(mask.numel() for mask in subnet.masks.values())
    summary = {
        "kept": subnet.num_kept(), "weights": total, "density": subnet.density(), "provenance": subnet.provenance,
        "base_hash": subnet.base_hash, "has_values": subnet.weights is not None, "layers": rows,
    }  # fmt: skip
    if args.json:
        print(json.dumps(summary, indent=2))
        return 0
    print(f"{args.file}: {subnet.num_kept():,} of {total:,} weights, density {subnet.density():.4f}")
    print(f"provenance  {json.dumps(subnet.provenance)}")
    print(f"base hash   {subnet.base_hash or 'not recorded'}")
    print(f"kept values {'in the file: it can be planted alone' if summary['has_values'] else 'not in the file'}")
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        print(f"  {row['name']:<{width}}  {row['shape']!s:<18} {row['kept']:>10,}  {row['density']:.4f}")
    return 0
