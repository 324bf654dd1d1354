"""Pictures of what subnets of several functions say: shared weights, accuracies, confusion, differences.

Each function takes what `subnets.protocols` gave and returns a matplotlib figure; ``save_figure(figure, path)`` of
`subnets.report.drawing` writes it, and the ``rows()`` of what was drawn are its numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from subnets.protocols import Accuracies, Sharing
from subnets.report.drawing import draw_matrix, iou_matrices, new_figure
from subnets.sharing import ALL

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["accuracy_figure", "confusion_figure", "deltas_figure", "iou_figure", "sharing_figure"]


def sharing_figure(sharing: Sharing) -> Figure:
    """Return bars of the part of each subnet that others keep too, per parameter and in all; a black line in each bar's
    place is what random subnets of the same sizes would share.

    Args:
        sharing: of `subnets.sharing.shared_weights`.
    """
    parameters, width = [*sharing.sizes, ALL], 0.8 / len(sharing.names)
    rows = {(row["subnet"], row["parameter"]): row for row in sharing.rows()}
    figure, (axes,) = new_figure(size=(min(3.0 + 0.9 * len(parameters), 14.0), 3.6))
    for i, name in enumerate(sharing.names):
        x = [place + (i - (len(sharing.names) - 1) / 2) * width for place in range(len(parameters))]
        shares, chances = (
            [math.nan if rows[name, p][key] is None else rows[name, p][key] for p in parameters]
            for key in ("shared", "shared_by_chance")
        )
        axes.bar(x, shares, width, label=name, color=f"C{i}")
        left, right = [at - width / 2 for at in x], [at + width / 2 for at in x]
        axes.hlines(chances, left, right, color="black", linewidth=1.2, label="" if i else "by chance")
    axes.set_xticks(range(len(parameters)), parameters, rotation=20 if len(parameters) < 8 else 90, fontsize=8)
    axes.set(ylabel="part that others keep too", ylim=(0, 1.02))
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def iou_figure(sharing: Sharing) -> Figure:
    """Return two matrices over the subnets (of several functions, methods or seeds): IoU as found, and of random ones
    with as many weights in each parameter.

    Args:
        sharing: of `subnets.sharing.shared_weights`.
    """
    return iou_matrices(sharing.iou(), sharing.iou_by_chance(), sharing.names)


def accuracy_figure(accuracies: Accuracies) -> Figure:
    """Return a matrix: functions in rows; in columns the whole network, each mask, and each mask's inverse.

    Args:
        accuracies: of `subnets.protocols.function_accuracies`.
    """
    functions = list(accuracies.whole)
    columns = {"whole": accuracies.whole, **accuracies.subnet}
    columns |= {f"not {mask}": its for mask, its in accuracies.ablated.items()}
    matrix = torch.tensor([[its[f] for its in columns.values()] for f in functions], dtype=torch.float64)
    figure, (axes,) = new_figure(size=(2.0 + 0.7 * len(columns), 1.4 + 0.5 * len(functions)))
    draw_matrix(axes, matrix, functions, list(columns))
    axes.set(xlabel="weights kept", ylabel="accuracy on")
    return figure


def confusion_figure(rows: Mapping[str, Mapping[str, float]]) -> Figure:
    """Return the confusion matrix: what is asked for in rows, what the network does in columns.

    Args:
        rows: what is asked for (and with which mask, if you like) to its `subnets.protocols.confusion_row`.

    Raises:
        ValueError: no row, or rows of different columns.
    """
    columns = [list(row) for row in rows.values()]
    if not columns or any(its != columns[0] for its in columns):
        raise ValueError(f"confusion_figure: rows must be one or more, all of the same columns, got {columns}")
    matrix = torch.tensor([list(row.values()) for row in rows.values()], dtype=torch.float64)
    figure, (axes,) = new_figure(size=(2.2 + 0.9 * len(columns[0]), 1.4 + 0.5 * len(rows)))
    draw_matrix(axes, matrix, list(rows), columns[0])
    axes.set(xlabel="done", ylabel="asked for")
    return figure


def deltas_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Return both differences of Break It Down per subroutine, of trained and of random weights: a part of its own has
    delta_sub above and delta_abl below zero. Bars are one standard deviation, where there are several runs.

    Args:
        rows: of `subnets.protocols.BreakItDown.rows`, or of `subnets.protocols.over_runs`.
    """
    names = list(dict.fromkeys(row["subroutine"] for row in rows))
    bases = list(dict.fromkeys(row["base"] for row in rows))
    figure, all_axes = new_figure(2, size=(max(5.0, 3.0 + 1.6 * len(names)), 3.4))
    for axes, key, title in zip(
        all_axes, ("delta_sub", "delta_abl"), ("subnet: target - other", "ablated: target - other"), strict=True
    ):
        for i, base in enumerate(bases):
            its = {row["subroutine"]: row for row in rows if row["base"] == base}
            x = [names.index(name) + (i - (len(bases) - 1) / 2) * 0.4 for name in its]
            errors = [row.get(f"{key}_std", 0.0) for row in its.values()]
            axes.bar(x, [row[key] for row in its.values()], 0.4, yerr=errors if any(errors) else None, capsize=3,
                     label=f"{base} weights", color=("#0072b2", "#bbbbbb")[i % 2])  # fmt: skip
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xticks(range(len(names)), names, fontsize=8)
        axes.set(title=title, ylim=(-1.02, 1.02))
        axes.grid(axis="y", alpha=0.3)
    all_axes[0].legend(fontsize=8)
    return figure
