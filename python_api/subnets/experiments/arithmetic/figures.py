"""The figures of the arithmetic report as PNG and SVG; each names `inherit` and the reading of "sampled"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subnets.experiments.arithmetic.comparison import depths_with, mean_over_depths, published_mean
from subnets.experiments.arithmetic.results import (
    Curve,
    DepthResults,
    density_per_layer,
    published_curve,
    published_spread,
)
from subnets.report.curves import OVER_TRANSFER, Spread
from subnets.report.drawing import COLORS, draw_history, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SAMPLED_READING = "sampled: |S| weights planted; ..._as_published: N - |S| planted"


def draw_all(results: Sequence[DepthResults], inherit: str, folder: Path) -> dict[int, dict[str, Path]]:
    """Draws every figure that there are results for into `folder`; returns layers -> caption -> PNG."""
    drawn = {}
    for depth in results:
        title = f"{depth.layers} layers, inherit={inherit!r}"
        figures = {}
        if depth.runs:
            caption = f"Accuracy on T2 against n. {title}. {SAMPLED_READING}. {bars_line(depth)}"
            figures["accuracy"] = (_accuracy_figure, caption)
        if depth.discoveries:
            figures["discovery"] = (_discovery_figure, f"Discovery of S1 and the density of each layer. {title}.")
        if depth.runs:
            caption = f"Training on T2 at the largest n. {title}. {SAMPLED_READING}."
            figures["training"] = (_training_figure, caption)
        drawn[depth.layers] = {
            caption: save_figure(draw(depth, title), folder / f"layers{depth.layers}_{name}.png", also=["svg"])
            for name, (draw, caption) in figures.items()
        }
    return drawn


def bars_line(depth: DepthResults) -> str:
    """What the error bars stand for."""
    line = f"Lines and their bars: mean ± population std over {depth.kind}."
    if _has_both(depth):
        line += f" Hollow squares, a little to the right: the same over {OVER_TRANSFER} (the published kind)."
    return line


def _has_both(depth: DepthResults) -> bool:
    """Are there several transfer seeds on the first base network beside the replicates?"""
    cells = [depth.spread(condition, size, OVER_TRANSFER) for condition, size in depth.runs]
    return depth.kind != OVER_TRANSFER and any(cell is not None and cell.count > 1 for cell in cells)


def draw_published(results: Sequence[DepthResults], inherit: str, folder: Path) -> tuple[str, Path] | None:
    """The mean over depths and every depth beside the published curves, as (caption, PNG); None for a single depth."""
    shown = [depth for depth in results if depth.runs]
    if len(shown) < 2:
        return None
    columns = 3
    figure, panels = new_figure(columns, -(-(len(shown) + 1) // columns))
    for axes in panels[len(shown) + 1 :]:
        axes.set_axis_off()
    for axes, depth in zip(panels[1:], shown, strict=False):
        for condition in depth.conditions():
            _draw_ours(axes, depth, condition, markersize=3)
            runs = published_spread(condition) if depth.layers == 12 else {}
            curve = {n: spread.mean for n, spread in runs.items()} or published_curve(depth.layers, condition)
            _draw_published(axes, curve, condition, runs)
        axes.set_title(f"{depth.layers} layers", fontsize=9)
    conditions = [name for name in COLORS if any(name in depth.conditions() for depth in shown)]
    for condition in conditions:
        curve = mean_over_depths(shown, condition)
        panels[0].plot(
            [max(size, 1) for size in curve], list(curve.values()),
            color=COLORS[condition], marker="o", markersize=3, label=condition,
        )  # fmt: skip
        _draw_published(panels[0], published_mean(depths_with(shown, condition), condition), condition)
    panels[0].set_title("mean over " + ", ".join(str(depth.layers) for depth in shown) + " layers", fontsize=9)
    ours = [line for line in panels[0].get_lines() if line.get_linestyle() == "-"]
    figure.legend(handles=ours, loc="outside lower center", ncol=4, fontsize=8)
    for axes in panels[: len(shown) + 1]:
        axes.set_xscale("log")
        axes.set_xlabel("n (0 drawn at 1)", fontsize=8)
        axes.set_ylim(0.2, 1.02)
        axes.grid(alpha=0.3)
    figure.supylabel("test accuracy on T2", fontsize=9)
    figure.suptitle(f"ours solid, published dashed; inherit={inherit!r}\n{SAMPLED_READING}", fontsize=9)
    caption = (
        f"Ours (solid) beside the published curves (dashed; at 12 layers means and bars of five transfer runs). "
        f"inherit={inherit!r}; {SAMPLED_READING}. {bars_line(shown[0])} The mean over depths holds the sizes that all "
        "of them have; published: mean of the same depths' curves."
    )
    return caption, save_figure(figure, folder / "published.png", also=["svg"])


def _accuracy_figure(depth: DepthResults, title: str) -> Figure:
    figure, (axes,) = new_figure()
    for condition in depth.conditions():
        _draw_ours(axes, depth, condition)
        _draw_published(axes, published_curve(depth.layers, condition), condition)
    if "sampled_as_published" not in depth.conditions():
        _draw_published(axes, published_curve(depth.layers, "sampled_as_published"), "sampled_as_published")
    axes.set_xscale("log")
    axes.set_xlabel("disambiguation pairs n (0 drawn at 1)")
    axes.set_ylabel("test accuracy on T2")
    axes.set_ylim(0.2, 1.02)
    axes.set_title(f"{title}\n{SAMPLED_READING}", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return figure


def _draw_ours(axes: Axes, depth: DepthResults, condition: str, markersize: float = 4) -> None:
    """Means with their bars, and beside them the other kind of bars where there are both."""
    for kind in (depth.kind, OVER_TRANSFER) if _has_both(depth) else (depth.kind,):
        is_main = kind == depth.kind
        curve = depth.curve(condition, kind)
        spreads = [depth.spread(condition, size, kind) for size in curve]
        axes.errorbar(
            [max(size, 1) * (1.0 if is_main else 1.07) for size in curve],
            list(curve.values()),
            [s.std if s else 0.0 for s in spreads],
            label=condition if is_main else None,
            color=COLORS[condition],
            linestyle="-" if is_main else "none",
            marker="o" if is_main else "s",
            markerfacecolor=COLORS[condition] if is_main else "none",
            markersize=markersize,
            capsize=3,
        )


def _draw_published(axes: Axes, curve: Curve, condition: str, spreads: Mapping[int, Spread] | None = None) -> None:
    """A dashed curve, with bars where `spreads` is given."""
    if not curve:
        return
    style: dict[str, Any] = {
        "color": COLORS[condition], "linestyle": "--", "linewidth": 1, "label": f"{condition}, published"
    }  # fmt: skip
    sizes, values = [max(size, 1) for size in curve], list(curve.values())
    if spreads:
        axes.errorbar(sizes, values, [spreads[size].std for size in curve], capsize=2, **style)
    else:
        axes.plot(sizes, values, **style)


def _discovery_figure(depth: DepthResults, title: str) -> Figure:
    figure, (left, right) = new_figure(2)
    draw_history(left, [one["history"] for one in depth.discoveries.values()], "S1 accuracy, hard mask")
    left.set_title(title, fontsize=9)
    densities = density_per_layer(depth)
    names = [name.removesuffix(".weight") for name in densities]
    right.barh(range(len(names)), list(densities.values()), color=COLORS["subnet"])
    right.set_yticks(range(len(names)), names, fontsize=6)
    right.invert_yaxis()
    right.set_xlabel("density (fraction of weights kept)")
    return figure


def _training_figure(depth: DepthResults, title: str) -> Figure:
    figure, (axes,) = new_figure()
    largest = max(depth.sizes())
    runs_are = "transfer seed" if depth.base_seeds == 1 else "run"
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
    axes.set_title(f"{title}, n = {largest}: one line per {runs_are}\n{SAMPLED_READING}", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return figure
