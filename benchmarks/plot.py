"""A picture of result rows: how many times faster ours is than each baseline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .rows import RATIOS, Row


def plot(rows: list[Row], env: dict[str, Any], path: Path) -> None:
    """Bars of ``x_<baseline>`` for every row of ours, 1 marked: beyond it ours is faster."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ours = [row for row in rows if row.contender == "ours"]
    names = [name for name in RATIOS if any(getattr(row, f"x_{name}") for row in ours)]
    height = 0.8 / max(len(names), 1)
    figure, axes = plt.subplots(figsize=(8, 1 + 0.32 * len(ours)), layout="constrained")
    for i, name in enumerate(names):
        values = [getattr(row, f"x_{name}") or 0.0 for row in ours]
        axes.barh([at + (i - (len(names) - 1) / 2) * height for at in range(len(ours))], values, height, label=name)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks(range(len(ours)), [f"{row.case}, {row.phase}" for row in ours], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("time of baseline / time of ours (median over interleaved rounds)")
    axes.set_title(f"{env['device']}, {env['num_threads']} threads, torch {env['torch']}", fontsize=9)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
