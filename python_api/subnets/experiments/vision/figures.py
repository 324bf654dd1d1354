"""The figures of the vision report as files; those of transfer runs name `inherit` and `norms`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from subnets.experiments.vision.images import ImageSet
from subnets.experiments.vision.results import (
    CHANCE,
    MEASURE_TITLES,
    PUBLISHED_SHAPE_BIAS,
    VisionResults,
    spread_of,
    stages,
)
from subnets.report.drawing import COLORS, draw_history, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHEET_COLUMNS = 12
MOST_FILTERS = 64
_FILTERS_ACROSS = 16


def draw_conditions(results: VisionResults, size: int, title: str, path: Path) -> Path:
    """Shape bias, natural and mean-pooled accuracy by condition at one size: bars of means with their std, single runs
    as dots; people and published networks as marks on the shape bias, chance on the accuracies."""
    figure, panels = new_figure(3, size=(12, 4.8))
    for axes, measure in zip(panels, ("shape_bias", "natural", "mean_pooled"), strict=True):
        for place, condition in enumerate(results.conditions()):
            spread = results.spread(condition, size, measure)
            if spread is None:
                continue
            axes.bar(place, spread.mean, 0.7, yerr=spread.std, capsize=4, color=COLORS[condition], alpha=0.75)
            values = results.values(condition, size, measure)
            shift = [0.3 * (i / (len(values) - 1) - 0.5) if len(values) > 1 else 0.0 for i in range(len(values))]
            axes.plot([place + s for s in shift], values, "o", color="black", markersize=3)
        names = results.conditions()
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
        axes.set_xlim(-0.6, len(names) + (1.4 if measure == "shape_bias" else -0.4))  # room for the marks' names
        axes.set_ylim(0, 1.02)
        axes.set_title(MEASURE_TITLES[measure], fontsize=9)
        axes.grid(alpha=0.3, axis="y")
    for name, value in PUBLISHED_SHAPE_BIAS.items():
        _mark(panels[0], value, name)
    for axes in panels[1:]:
        _mark(axes, CHANCE, "chance")
    figure.suptitle(f"n = {size:,} training images, {title}", fontsize=9)
    return save_figure(figure, path, also=["svg"])


def draw_sizes(results: VisionResults, title: str, path: Path) -> Path:
    """Natural accuracy, mean-pooled accuracy and shape bias against the number of training images, one line per
    condition: means, with bands of one standard deviation."""
    figure, panels = new_figure(3, size=(12, 4.6))
    for axes, measure in zip(panels, ("natural", "mean_pooled", "shape_bias"), strict=True):
        for condition in results.conditions():
            found = [(n, results.spread(condition, n, measure)) for n in results.sizes()]
            points = [(n, spread) for n, spread in found if spread]
            sizes, means = [n for n, _ in points], [s.mean for _, s in points]
            axes.plot(sizes, means, color=COLORS[condition], marker="o", markersize=4, label=condition)
            low, high = [s.mean - s.std for _, s in points], [s.mean + s.std for _, s in points]
            axes.fill_between(sizes, low, high, color=COLORS[condition], alpha=0.15, linewidth=0)
        axes.set_xscale("log")
        axes.set_xticks(results.sizes(), [f"{n:,}" for n in results.sizes()], fontsize=8)
        axes.minorticks_off()
        axes.set_xlabel("training images n")
        axes.set_title(MEASURE_TITLES[measure], fontsize=9)
        axes.grid(alpha=0.3)
    lines = panels[0].get_lines()
    figure.legend(handles=lines, loc="outside lower center", ncol=len(lines), fontsize=8)
    figure.suptitle(title, fontsize=9)
    return save_figure(figure, path, also=["svg"])


def draw_sheet(images: dict[str, ImageSet], path: Path) -> Path:
    """A row of SHEET_COLUMNS images per kind, of different classes first, under the names of shape and texture."""
    kinds = {kind: one.take(_sheet_indices(one)) for kind, one in images.items() if len(one)}
    if not kinds:
        raise ValueError("draw_sheet: images must hold a set with at least one image, got none")
    figure, axes = new_figure(SHEET_COLUMNS, len(kinds), (SHEET_COLUMNS, 1.5 * len(kinds)))
    for one in axes:
        one.set_xticks([])
        one.set_yticks([])
        one.set_frame_on(False)
    for row, (kind, shown) in enumerate(kinds.items()):
        line = axes[row * SHEET_COLUMNS :]
        line[0].set_ylabel(kind.replace("_", " "), fontsize=8)
        for i in range(len(shown)):
            line[i].imshow(shown.images[i].permute(1, 2, 0).numpy())
            line[i].set_title(
                cue_names(shown.classes[int(shown.shape[i])], shown.classes[int(shown.texture[i])]), fontsize=7
            )
    return save_figure(figure, path)


def cue_names(shape: str, texture: str) -> str:
    """The names of an image's two cues in two lines, given the classes they belong to; one name if it is one class.

    A generated class is named by its own two cues, "ring / dots".
    """
    if " / " not in shape + texture:
        return shape if shape == texture else f"{shape}\n{texture}"
    return f"{shape.split(' / ')[0]}\n{texture.split(' / ')[-1]}"


def _sheet_indices(images: ImageSet) -> list[int]:
    """The first image of each class, then others, in order."""
    first: dict[int, int] = {}
    for i, shape in enumerate(images.shape.tolist()):
        first.setdefault(shape, i)
    chosen = [first[shape] for shape in sorted(first)]
    others = [i for i in range(min(len(images), SHEET_COLUMNS + len(chosen))) if i not in set(chosen)]
    return (chosen + others)[:SHEET_COLUMNS]


def draw_filters(weight: Tensor, mask: Tensor, path: Path) -> Path:
    """The first layer's filters, and beneath them what the subnet keeps: `weight` [O, 3, k, k] and `weight * mask`, the
    first MOST_FILTERS outputs, mid-grey 0, each filter scaled by its own largest weight.

    Raises:
        ValueError: weight is not [O, 3, k, k], or mask has another shape or is not bool.
    """
    if weight.dim() != 4 or weight.shape[1] != 3 or mask.shape != weight.shape or mask.dtype != torch.bool:
        got = f"{list(weight.shape)} and {mask.dtype} {list(mask.shape)}"
        raise ValueError(f"draw_filters: weight must be [O, 3, k, k] and mask bool of the same shape, got {got}")
    density = mask.float().mean()
    weight, mask = weight[:MOST_FILTERS].detach().float().cpu(), mask[:MOST_FILTERS].cpu()
    scale = weight.abs().amax((1, 2, 3), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    lines = -(-len(weight) // _FILTERS_ACROSS)
    figure, panels = new_figure(1, 2, (8, 0.9 + 1.1 * lines))
    titles = (
        f"first {len(weight)} filters of the first layer",
        f"what the subnet keeps of them ({density:.1%} of the layer)",
    )
    for axes, shown, title in zip(panels, (weight, weight * mask), titles, strict=True):
        axes.imshow(_grid(0.5 + 0.5 * shown / scale).numpy(), interpolation="nearest")
        axes.set_title(title, fontsize=9)
        axes.set_axis_off()
    return save_figure(figure, path)


def _grid(pictures: Tensor) -> Tensor:
    """[O, 3, k, k] in [0, 1] -> one picture [H, W, 3] of them on white, _FILTERS_ACROSS in a line."""
    count, _, k, _ = pictures.shape
    lines = -(-count // _FILTERS_ACROSS)
    cells = torch.ones(lines * _FILTERS_ACROSS, 3, k + 1, k + 1)
    cells[:count, :, :k, :k] = pictures
    rows = cells.unflatten(0, (lines, _FILTERS_ACROSS)).permute(0, 3, 1, 4, 2)  # [lines, k + 1, across, k + 1, 3]
    return rows.reshape(lines * (k + 1), _FILTERS_ACROSS * (k + 1), 3)


def draw_discovery(results: VisionResults, path: Path) -> Path:
    """Left: what happened in discovery, epoch by epoch. Right: the fraction of weights that the subnet keeps in each
    layer, the layers grouped by the network's stages; bars of means over base networks, single networks as dots."""
    figure, (left, right) = new_figure(2, size=(12, 4.4))
    draw_history(left, [one["history"] for one in results.discoveries.values()], "mean-pooled accuracy, hard mask")
    _draw_density(right, results)
    return save_figure(figure, path, also=["svg"])


def _draw_density(axes: Axes, results: VisionResults) -> None:
    each = [discovery["density_per_layer"] for discovery in results.discoveries.values()]
    groups = stages(each[0])
    place, ticks, labels = 0.0, [], []
    for index, (stage, names) in enumerate(groups.items()):
        places = [place + i for i in range(len(names))]
        means = [spread.mean if (spread := spread_of([one[name] for one in each])) else 0.0 for name in names]
        axes.bar(places, means, 0.8, color=f"C{index % 10}", alpha=0.75)
        for one in each:
            axes.plot(places, [one[name] for name in names], "o", color="black", markersize=2)
        ticks.append((places[0] + places[-1]) / 2)
        labels.append(stage)
        place = places[-1] + 2
    axes.set_xticks(ticks, labels, fontsize=8)
    axes.set_ylabel("density (fraction of weights kept)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3, axis="y")


def _mark(axes: Axes, value: float, name: str) -> None:
    """A dashed line across the panel, named at its right end."""
    axes.axhline(value, color="#444444", linestyle="--", linewidth=0.8)
    right = axes.get_xlim()[1]
    axes.text(right, value, f"{name} {value:.2f} ", fontsize=6.5, ha="right", va="bottom", color="#222222")
