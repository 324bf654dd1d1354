"""What every report's figures share: an empty figure, its files, one colour per transfer condition, discoveries."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subnets.training.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

MOST_NUMBERED = 12  # rows and columns up to which a matrix has its numbers written in
COLORS = {
    "subnet": "#0072b2",
    "subnet_trainable": "#56b4e9",
    "full_model": "#009e73",
    "sampled": "#e69f00",
    "sampled_complement": "#d55e00",
    "sampled_as_published": "#cc79a7",
    "sampled_complement_as_published": "#8e5ea2",
    "random_init": "#666666",
    "pretrained": "#332288",
    "augmentation": "#a05a2c",
}


def new_figure(columns: int = 1, rows: int = 1, size: tuple[float, float] | None = None) -> tuple[Figure, list[Axes]]:
    """An empty figure for files, without a window, and its axes row by row; `size` is its width and height in inches
    (None: as wide as the report's page)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = size or (7.2 if columns == 1 else 10.5, 4.4 if rows == 1 else 3.4 * rows)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def save_figure(figure: Figure, path: Path, also: Sequence[str] = ()) -> Path:
    """Writes the figure as PNG to `path`, and beside it in each of the formats `also` ("svg"); returns `path`."""
    for suffix in ("png", *also):
        stream = io.BytesIO()
        metadata = {"Date": None} if suffix == "svg" else {"Software": None}
        figure.savefig(stream, format=suffix, dpi=130, metadata=metadata)
        write_bytes(path.with_suffix(f".{suffix}"), stream.getvalue())
    return path


def draw_matrix(axes: Axes, matrix: Tensor, rows: Sequence[str], columns: Sequence[str]) -> None:
    """Fractions [rows, columns] from 0 to 1 as colours, with labels, and numbers up to 12 rows and columns."""
    axes.imshow(matrix.numpy(), cmap="viridis", vmin=0, vmax=1)
    size = 8 if max(matrix.shape) < 8 else 6
    axes.set_xticks(range(len(columns)), columns, rotation=90 if max(map(len, columns)) > 8 else 0, fontsize=size)
    axes.set_yticks(range(len(rows)), rows, fontsize=size)
    if max(matrix.shape) <= MOST_NUMBERED:
        for row, column in itertools.product(*map(range, matrix.shape)):
            value = float(matrix[row, column])
            color = "black" if value > 0.6 else "white"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=size, color=color)


def iou_matrices(found: Tensor, by_chance: Tensor, labels: Sequence[str]) -> Figure:
    """IoU of every two subnets [n, n], beside that of random ones with as many weights in each parameter."""
    side = min(3.0 + 0.3 * len(labels), 8.0)
    figure, all_axes = new_figure(2, size=(2 * side, side + 0.6))
    for axes, matrix, title in zip(all_axes, (found, by_chance), ("found", "random, same sizes"), strict=True):
        draw_matrix(axes, matrix, labels, labels)
        axes.set_title(title, fontsize=9)
    return figure


def draw_history(axes: Axes, histories: Sequence[Sequence[Mapping[str, Any]]], score: str) -> None:
    """Score, density and undecided share by epoch of discovery, one line per history, the first one in full colour.

    Args:
        histories: `Discovery.history` of each base network; epochs that were not evaluated are left out.
        score: what the score is, for the legend.
    """
    keys = (("score", score), ("density", "density"), ("undecided", "undecided share"))
    for i, history in enumerate(histories):
        evaluated = [row for row in history if row.get("score") is not None]
        for color, (key, label) in enumerate(keys):
            epochs, values = [row["epoch"] for row in evaluated], [row.get(key, math.nan) for row in evaluated]
            axes.plot(epochs, values, color=f"C{color}", alpha=1.0 if i == 0 else 0.5, label=label if i == 0 else None)
    axes.set_xlabel("epoch of discovery")
    axes.set_ylim(-0.02, 1.05)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
