"""Pictures of result files: ``python -m benchmarks.plot results.csv [more.csv] --out folder``.

ratios.png: how many times faster ours is than each baseline. roofline.png: achieved FLOP/s against FLOP per byte, under
the ceilings measured in the same run (the .json beside the .csv holds them). linear_over_m.png: time of one layer over
its rows. Files alone are enough: nothing is run.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from .rows import RATIOS

Record = dict[str, Any]
TEXT = ("case", "commit", "torch", "subnet_kernels", "neurosurgeon", "triton", "python")


def read(path: Path) -> tuple[list[Record], dict[str, float]]:
    """(rows of a .csv, numbers as numbers; the ceilings in the .json of the same name, if it is there)"""
    records = []
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            record: Record = dict(line)
            for name, value in line.items():
                if name not in TEXT and re.fullmatch(r"-?\d+(\.\d*)?(e[+-]?\d+)?|inf|nan", value or ""):
                    record[name] = float(value)
            records.append(record)
    beside = path.with_suffix(".json")
    ceilings = json.loads(beside.read_text()).get("ceilings", {}) if beside.exists() else {}
    return records, ceilings


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    _pyplot().close(figure)


def _machine(records: list[Record]) -> str:
    first = records[0]
    return f"{first['device']}, torch {first['torch']}, commit {first['commit']}"


def plot_ratios(records: list[Record], path: Path) -> bool:
    """Bars of ``x_<baseline>`` for every row of ours, 1 marked: beyond it ours is faster."""
    ours = [r for r in records if r["contender"] == "ours" and any(r.get(f"x_{name}") for name in RATIOS)]
    names = [name for name in RATIOS if any(r.get(f"x_{name}") for r in ours)]
    if not ours:
        return False
    height = 0.8 / len(names)
    figure, axes = _pyplot().subplots(figsize=(8, 1 + 0.32 * len(ours)), layout="constrained")
    for i, name in enumerate(names):
        values = [r.get(f"x_{name}") or 0.0 for r in ours]
        axes.barh([at + (i - (len(names) - 1) / 2) * height for at in range(len(ours))], values, height, label=name)
    axes.axvline(1.0, color="black", linewidth=1)
    labels = [f"{r['case']}, {r['phase']}{' (graph)' if r['mode'] == 'graph' else ''}" for r in ours]
    axes.set_yticks(range(len(ours)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("time of baseline / time of ours (median over interleaved rounds)")
    axes.set_title(_machine(records), fontsize=9)
    axes.legend()
    _save(figure, path)
    return True


def plot_roofline(records: list[Record], ceilings: dict[str, float], path: Path) -> bool:
    """Achieved FLOP/s against FLOP per byte (fewest bytes), under the measured copy bandwidth and product rates."""
    rows = [r for r in records if r.get("gflop") and r.get("least_mb") and r.get("median_us")]
    if not rows:
        return False
    figure, axes = _pyplot().subplots(figsize=(8, 5), layout="constrained")
    by_contender: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for r in rows:
        intensity = r["gflop"] * 1e9 / (r["least_mb"] * 2**20)
        by_contender[r["contender"]].append((intensity, r["gflop"] * 1e9 / (r["median_us"] * 1e-6) / 1e12))
    for name, points in sorted(by_contender.items()):
        is_ours = name.startswith("ours")
        axes.scatter(*zip(*points), s=26 if is_ours else 12, marker="o" if is_ours else "x", label=name)
    at = [x for points in by_contender.values() for x, _ in points]
    span = (min(at) / 2, max(at) * 2)
    products = {k: v for k, v in ceilings.items() if k.startswith("matmul_")}
    copies = sorted((float(k.split("_")[1][:-2]), v) for k, v in ceilings.items() if k.startswith("copy_"))
    for name, rate in products.items():
        axes.axhline(rate, color="black", linewidth=0.8)
        axes.annotate(f"{name[7:-8]} product, {rate:.3g} TFLOP/s", (span[0], rate), fontsize=7, va="bottom")
    for size, rate in {copies[0], copies[-1]} if copies else ():
        axes.plot(span, [x * rate * 1e-3 for x in span], color="gray", linewidth=0.8)
        axes.annotate(f"copy of {size:g} MB, {rate:.4g} GB/s", (span[0], span[0] * rate * 1e-3), fontsize=7)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte that must move", ylabel="TFLOP/s achieved", xlim=span)
    axes.set_title(_machine(records), fontsize=9)
    axes.legend(fontsize=7)
    _save(figure, path)
    return True


def plot_linear_over_m(records: list[Record], path: Path) -> bool:
    """Time over the rows of x, a panel per weight shape and mode, for the largest phase that was measured."""
    panels: dict[tuple[str, str], dict[str, dict[float, float]]] = defaultdict(lambda: defaultdict(dict))
    phases = [p for p in ("step", "forward_backward", "forward") if any(r["phase"] == p for r in records)]
    for r in records:
        found = re.fullmatch(r"linear_(\d+x\d+)_m(\d+)_(\w+)", r["case"])
        if found and r["suite"] == "layers" and r["phase"] == phases[0] and r.get("median_us"):
            panels[f"{found[1]} {found[3]}", r["mode"]][r["contender"]][float(found[2])] = r["median_us"]
    panels = {key: lines for key, lines in panels.items() if any(len(line) > 1 for line in lines.values())}  # type: ignore[assignment]
    if not panels:
        return False
    figure, grid = _pyplot().subplots(
        1, len(panels), figsize=(4.5 * len(panels), 4), layout="constrained", squeeze=False
    )
    for axes, ((shape, mode), lines) in zip(grid[0], sorted(panels.items()), strict=True):
        for name, line in sorted(lines.items()):
            style = "-o" if name.startswith("ours") else "--x"
            axes.plot(*zip(*sorted(line.items())), style, label=name, markersize=4)
        axes.set(xscale="log", yscale="log", xlabel="rows of x", ylabel=f"{phases[0]}, microseconds")
        axes.set_title(f"{shape}, {'CUDA graph' if mode == 'graph' else 'launched'}", fontsize=9)
    grid[0][0].legend(fontsize=7)
    _save(figure, path)
    return True


def main(argv: list[str] | None = None) -> int:
    """Write the pictures; 0 if there was anything to draw, 1 if not, 2 if matplotlib is missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__.split("\n\n")[0])
    parser.add_argument("csv", type=Path, nargs="+", help="result files; each one's .json is looked for beside it")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the pictures")
    args = parser.parse_args(argv)
    records: list[Record] = []
    ceilings: dict[str, float] = {}
    for path in args.csv:
        more, measured = read(path)
        records += more
        ceilings |= measured
    try:
        done = {
            "ratios.png": bool(records) and plot_ratios(records, args.out / "ratios.png"),
            "roofline.png": bool(records) and plot_roofline(records, ceilings, args.out / "roofline.png"),
            "linear_over_m.png": bool(records) and plot_linear_over_m(records, args.out / "linear_over_m.png"),
        }
    except ImportError as error:
        print(f"benchmarks.plot: {error}; install matplotlib", file=sys.stderr)
        return 2
    for name, is_there in done.items():
        print(f"wrote {args.out / name}" if is_there else f"left out {name}: no rows for it")
    return 0 if any(done.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
