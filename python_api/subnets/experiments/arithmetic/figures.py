"""The figures of the arithmetic report as PNG and SVG; each names `inherit` and the reading of "sampled"."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from subnets.experiments.arithmetic.results import DepthResults, published_curve
from subnets.training.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {
    "subnet": "#0072b2",
    "subnet_trainable": "#56b4e9",
    "full_model": "#009e73",
    "sampled": "#e69f00",
    "sampled_complement": "#d55e00",
    "sampled_as_published": "#cc79a7",
    "sampled_complement_as_published": "#8e5ea2",
    "random_init": "#666666",
}
SAMPLED_READING = "sampled: |S| weights planted; ..._as_published: N - |S| planted"


def draw_all(results: Sequence[DepthResults], inherit: str, folder: Path) -> dict[int, dict[str, Path]]:
    """Draws every figure into `folder` and returns layers -> caption -> PNG."""
    drawn = {}
    for depth in results:
        title = f"{depth.layers} layers, inherit={inherit!r}"
        figures = {
            "accuracy": (_accuracy_figure, f"Accuracy on T2 against n. {title}. {SAMPLED_READING}."),
            "discovery": (_discovery_figure, f"Discovery of S1 and the density of each layer. {title}."),
            "training": (_training_figure, f"Training on T2 at the largest n. {title}. {SAMPLED_READING}."),
        }
        drawn[depth.layers] = {
            caption: _save(draw(depth, title), folder / f"layers{depth.layers}_{name}")
            for name, (draw, caption) in figures.items()
        }
    return drawn


def _new_figure(columns: int = 1) -> tuple[Figure, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2 if columns == 1 else 10.5, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _save(figure: Figure, stem: Path) -> Path:
    for suffix in ("png", "svg"):
        stream = io.BytesIO()
        metadata = {"Date": None} if suffix == "svg" else {"Software": None}
        figure.savefig(stream, format=suffix, dpi=130, metadata=metadata)
        write_bytes(stem.with_suffix(f".{suffix}"), stream.getvalue())
    return stem.with_suffix(".png")


def _accuracy_figure(depth: DepthResults, title: str) -> Figure:
    figure, (axes,) = _new_figure()
    for condition in depth.conditions():
        curve = depth.curve(condition)
        spreads = [depth.spread(condition, size) for size in curve]
        axes.errorbar(
            [max(size, 1) for size in curve],
            list(curve.values()),
            [s.std if s else 0.0 for s in spreads],
            label=condition, color=COLORS[condition], marker="o", markersize=4, capsize=3,
        )  # fmt: skip
        published = published_curve(depth.layers, condition)
        if published:
            axes.plot(
                [max(size, 1) for size in published], list(published.values()),
                color=COLORS[condition], linestyle="--", linewidth=1, label=f"{condition}, published",
            )  # fmt: skip
    published = published_curve(depth.layers, "sampled_as_published")
    if published and "sampled_as_published" not in depth.conditions():
        axes.plot(
            [max(size, 1) for size in published], list(published.values()),
            color=COLORS["sampled_as_published"], linestyle="--", linewidth=1, label="sampled_as_published, published",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("disambiguation pairs n (0 drawn at 1)")
    axes.set_ylabel("test accuracy on T2")
    axes.set_ylim(0.2, 1.02)
    axes.set_title(f"{title}\n{SAMPLED_READING}", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return figure


def _discovery_figure(depth: DepthResults, title: str) -> Figure:
    figure, (left, right) = _new_figure(2)
    history = [row for row in depth.discovery["history"] if row.get("score") is not None]
    for key, label in (("score", "S1 accuracy, hard mask"), ("density", "density"), ("undecided", "undecided share")):
        left.plot([row["epoch"] for row in history], [row.get(key) for row in history], label=label)
    left.set_xlabel("epoch of discovery")
    left.set_ylim(-0.02, 1.05)
    left.grid(alpha=0.3)
    left.legend(fontsize=8)
    left.set_title(title, fontsize=9)
    densities = depth.discovery["density_per_layer"]
    names = [name.removesuffix(".weight") for name in densities]
    right.barh(range(len(names)), list(densities.values()), color=COLORS["subnet"])
    right.set_yticks(range(len(names)), names, fontsize=6)
    right.invert_yaxis()
    right.set_xlabel("density (fraction of weights kept)")
    return figure


def _training_figure(depth: DepthResults, title: str) -> Figure:
    figure, (axes,) = _new_figure()
    largest = max(depth.sizes())
    for condition in depth.conditions():
        runs = [c for c in depth.curves if c["condition"] == condition and c["n_disambiguation"] == largest]
        for i, run in enumerate(runs):
            axes.plot(
                [point["epoch"] for point in run["curve"]],
                [point["validation_accuracy"] for point in run["curve"]],
                color=COLORS[condition], linewidth=1, alpha=0.8, label=condition if i == 0 else None,
            )  # fmt: skip
    axes.set_xlabel("epoch on T2")
    axes.set_ylabel("validation accuracy")
    axes.set_title(f"{title}, n = {largest}: one line per transfer seed\n{SAMPLED_READING}", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return figure
