"""How stable a discovery in bulk is: tables and figures of :class:`subnets.Discoveries`, as parts of a page.

Groups of one seed have no spread and share everything with themselves: three seeds or more say something.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from subnets.discovery import Discoveries
from subnets.report.drawing import iou_matrices, new_figure, save_figure
from subnets.report.page import Table, image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["stability_parts"]  # what the guide uses; the tables are for the experiments
MOST_MAPS = 16  # layers whose keep frequency is shown weight by weight


def agreement(found: Discoveries) -> list[dict[str, Any]]:
    """One dict per group (lam, score_init), by rising lam: what its seeds agree on.

    lam, score_init, seeds (their number); density, density_std, score, score_std: of the seeds' subnets; iou,
    expected_iou: mean over pairs of seeds, and for random subnets with as many weights in each layer; core, union,
    expected_core: densities of what all seeds keep, what any keeps, and what random ones would all keep; shared: the
    core's share of a subnet (core / density); core_score, union_score. None where it is not known: no evaluate, or one
    seed.
    """
    rows = []
    iou, expected = found.iou(), found.expected_iou()
    for score_init in found.score_inits:
        for point in found.curve(score_init):
            lam = point["lam"]
            pairs = list(itertools.combinations(found.indices(lam, score_init), 2))
            core, union = found.core(lam, score_init), found.union(lam, score_init)
            rows.append({
                **point, "score_init": score_init,
                "iou": _mean([float(iou[pair]) for pair in pairs]),
                "expected_iou": _mean([float(expected[pair]) for pair in pairs]),
                "core": core.density(), "union": union.density(),
                "expected_core": found.expected_core_density(lam, score_init),
                "shared": core.density() / point["density"] if point["density"] else None,
                "core_score": core.provenance["score"], "union_score": union.provenance["score"],
            })  # fmt: skip
    return sorted(rows, key=lambda row: row["lam"])


def path_table(found: Discoveries) -> Table:
    """Density and score per penalty, mean and standard deviation over seeds."""
    rows = [
        [*_name(row), str(row["seeds"]), _spread(row, "density"), _spread(row, "score")] for row in agreement(found)
    ]
    return Table(
        "The path: density and score of the seeds' subnets (mean ± standard deviation)",
        ["lambda", "initial score", "seeds", "density", "score"],
        rows,
    )


def agreement_table(found: Discoveries) -> Table:
    """What the seeds share, and beside it what random subnets of the same size in each layer would share."""
    rows = [
        [
            *_name(row), _text(row["iou"]), _text(row["expected_iou"]), _text(row["shared"]),
            _text(row["expected_core"] / row["density"] if row["density"] else None), _text(row["core"]),
            _text(row["core_score"]), _text(row["union"]), _text(row["union_score"]),
        ]
        for row in agreement(found)
    ]  # fmt: skip
    head = [
        "lambda", "initial score", "IoU of two seeds", "of random ones", "share of a subnet in all seeds",
        "of random ones", "intersection: density", "score", "union: density", "score",
    ]  # fmt: skip
    return Table("What all seeds share", head, rows)


def layer_table(found: Discoveries, lam: float | None = None, score_init: float | None = None) -> Table:
    """Per layer of one group: mean density, what all seeds keep of it, and what they would at random."""
    masks = [run.subnet.masks for run in found.group(lam, score_init)]
    frequencies = found.keep_frequency(lam, score_init)
    rows = []
    for name, frequency in frequencies.items():
        shares = [float(mask[name].float().mean()) for mask in masks]
        core = float((frequency == 1).float().mean())
        rows.append([name, _text(sum(shares) / len(shares)), _text(core), _text(math.prod(shares))])
    return Table(
        f"Per layer{_of_group(found, lam, score_init)}",
        ["weight", "density", "kept by all seeds", "at random"],
        rows,
    )


def keep_counts(found: Discoveries, lam: float | None = None, score_init: float | None = None) -> tuple[Tensor, Tensor]:
    """(observed, expected): fp64 [seeds + 1], the share of all masked weights that exactly k of a group's seeds keep;
    expected if each seed kept as many weights of each layer at random (independent draws: Poisson-binomial)."""
    masks = [run.subnet.masks for run in found.group(lam, score_init)]
    observed = torch.zeros(len(masks) + 1, dtype=torch.float64)
    expected = torch.zeros_like(observed)
    for name in masks[0]:
        kept = torch.stack([mask[name].flatten() for mask in masks])
        observed += torch.bincount(kept.sum(0), minlength=len(masks) + 1).double()
        chances = torch.zeros_like(expected)
        chances[0] = 1.0
        for share in kept.double().mean(1):
            chances = chances * (1 - share) + torch.cat([chances.new_zeros(1), chances[:-1]]) * share
        expected += chances * kept.shape[1]
    return observed / observed.sum(), expected / expected.sum()


def stability_parts(found: Discoveries, figures: Path) -> list[str]:
    """Tables and figures of the whole result as parts of a page (:func:`subnets.report.page.page`). Per-layer parts
    show the group with the middle penalty.

    Args:
        found: of :func:`subnets.discover`.
        figures: folder to which the figures are written as PNG too.
    """
    middle = sorted(found.penalties)[len(found.penalties) // 2], found.score_inits[0]
    drawn = {
        "path": (_path_figure(found), "Density against score: one point per penalty, bars are one standard deviation."),
        "keep_frequency": (
            _histogram(found), "How many seeds keep a weight, and how many would if each kept as many at random."
        ),
        "keep_maps": (
            _keep_maps(found, *middle),
            f"Keep frequency of each weight{_of_group(found, *middle)}: white no seed, dark all; a row is an output.",
        ),
        "iou": (_iou_figure(found), "IoU of every two subnets; right: of random ones with as many weights per layer."),
    }  # fmt: skip
    parts = [path_table(found).html(), agreement_table(found).html()]
    for name, (figure, caption) in drawn.items():
        parts.append(image(save_figure(figure, figures / f"{name}.png"), caption))
    return [*parts, layer_table(found, *middle).html()]


# --- figures ---------------------------------------------------------------------------------------------------------


def _path_figure(found: Discoveries) -> Figure:
    figure, (axes,) = new_figure(size=(6.4, 4.2))
    for score_init in found.score_inits:
        points = found.curve(score_init)
        has_score = all(point["score"] is not None for point in points)
        x = [point["density"] if has_score else point["lam"] for point in points]
        y = [point["score"] if has_score else point["density"] for point in points]
        x_error = [point["density_std"] for point in points] if has_score else None
        y_error = [point["score_std" if has_score else "density_std"] for point in points]
        label = f"initial score {score_init:g}"
        axes.errorbar(x, y, y_error, x_error, marker="o", markersize=4, capsize=3, label=label)
        for point, x_at, y_at in zip(points, x, y, strict=True):
            axes.annotate(f"λ={point['lam']:g}", (x_at, y_at), textcoords="offset points", xytext=(5, 5), fontsize=7)
        axes.set_xlabel("density" if has_score else "lambda")
        axes.set_ylabel("score (evaluate)" if has_score else "density")
        if min(x) > 0:
            axes.set_xscale("log")
    axes.grid(alpha=0.3)
    if len(found.score_inits) > 1:
        axes.legend(fontsize=8)
    return figure


def _histogram(found: Discoveries) -> Figure:
    groups = list(itertools.product(sorted(found.penalties), found.score_inits))
    figure, all_axes = new_figure(len(groups), size=(3.2 * len(groups), 3.2))
    for axes, group in zip(all_axes, groups, strict=True):
        observed, expected = keep_counts(found, *group)
        places = torch.arange(len(observed)).double()
        axes.bar((places - 0.2).tolist(), observed.tolist(), 0.4, label="found", color="#0072b2")
        axes.bar((places + 0.2).tolist(), expected.tolist(), 0.4, label="at random", color="#bbbbbb")
        axes.set_yscale("log")
        axes.set_ylim(1e-6, 1.5)
        axes.set_xlabel("seeds that keep a weight")
        axes.set_title(f"λ={group[0]:g}" + (f", init {group[1]:g}" if len(found.score_inits) > 1 else ""), fontsize=9)
    all_axes[0].set_ylabel("share of all weights")
    all_axes[0].legend(fontsize=7, loc="upper center")
    return figure


def _keep_maps(found: Discoveries, lam: float, score_init: float) -> Figure:
    frequencies = list(found.keep_frequency(lam, score_init).items())[:MOST_MAPS]
    columns = min(len(frequencies), 4)
    rows = -(-len(frequencies) // columns)
    figure, all_axes = new_figure(columns, rows, (2.6 * columns, 2.2 * rows))
    for axes in all_axes:
        axes.set_axis_off()
    for axes, (name, frequency) in zip(all_axes, frequencies, strict=False):
        axes.imshow(frequency.reshape(len(frequency), -1).numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axes.set_title(name, fontsize=7)
    return figure


def _iou_figure(found: Discoveries) -> Figure:
    order = sorted(range(len(found)), key=lambda i: [found[i].settings[n] for n in ("score_init", "lam", "seed")])
    labels = [_label(found, found[i].settings) for i in order]
    return iou_matrices(found.iou()[order][:, order], found.expected_iou()[order][:, order], labels)


# --- text ------------------------------------------------------------------------------------------------------------


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _name(row: dict[str, Any]) -> list[str]:
    return [f"{row['lam']:g}", f"{row['score_init']:g}"]


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _spread(row: dict[str, Any], name: str) -> str:
    return "-" if row[name] is None else f"{row[name]:.4f} ± {row[f'{name}_std']:.4f}"


def _of_group(found: Discoveries, lam: float | None, score_init: float | None) -> str:
    settings = found.group(lam, score_init)[0].settings
    return f", lambda {settings['lam']:g}, initial score {settings['score_init']:g}"


def _label(found: Discoveries, settings: dict[str, Any]) -> str:
    """What tells this member from the others."""
    shown = {"seed": found.seeds, "lam": found.penalties, "score_init": found.score_inits}
    parts = [f"{name} {settings[name]:g}" for name, values in shown.items() if len(values) > 1]
    return ", ".join(parts) or "alone"
