"""The pictures show the numbers that they are given: bar heights, colours and labels are read back off the figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from subnets.protocols import Accuracies, over_runs, shared_weights
from subnets.report.drawing import save_figure
from subnets.report.protocols import accuracy_figure, confusion_figure, deltas_figure, iou_figure, sharing_figure

from tests.protocols.test_runs import run_of
from tests.protocols.test_sharing import add_and_mul


def numbers(axes):
    shown, columns = [float(text.get_text()) for text in axes.texts], axes.images[0].get_array().shape[1]
    return [shown[i : i + columns] for i in range(0, len(shown), columns)]


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def labels(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def test_bars_of_shared_weights_stand_beside_chance(tmp_path: Path):
    sharing = shared_weights(add_and_mul())
    figure = sharing_figure(sharing)
    (axes,) = figure.axes
    assert labels(axes.xaxis) == [*sharing.sizes, "all"]
    add, mul = axes.containers
    assert [round(bar.get_height(), 3) for bar in add] == [0.834, 0.524, 0.571, 0.825, 0.647]
    assert round(mul[-1].get_height(), 3) == 0.240
    of_add: Any = axes.collections[0]
    of_add = of_add.get_segments()
    assert [round(float(line[0][1]), 3) for line in of_add] == [0.661, 0.174, 0.169, 0.457, 0.335]
    assert legend(axes) == ["by chance", "add", "mul"]
    # each line of chance lies in its bar
    assert all(float(line[0][0]) == pytest.approx(bar.get_x()) for line, bar in zip(of_add, add, strict=True))
    assert save_figure(figure, tmp_path / "sharing.png").stat().st_size > 5000


def test_iou_of_subnets_of_several_methods():
    subnets = add_and_mul()
    sharing = shared_weights({"first": subnets["add"], "second": subnets["mul"], "third": subnets["add"]})
    found, by_chance = iou_figure(sharing).axes
    assert labels(found.xaxis) == labels(found.yaxis) == ["first", "second", "third"]
    iou = round(subnets["add"].iou(subnets["mul"]), 2)
    assert numbers(found) == [[1, iou, 1], [iou, 1, iou], [1, iou, 1]]
    assert numbers(by_chance)[0][2] == round(sharing.iou_by_chance()[0, 2].item(), 2) == 0.09


def test_functions_are_rows_and_masks_and_their_inverses_columns():
    found = Accuracies(
        {"add": 1.0, "mul": 0.98}, {"a": {"add": 0.97, "mul": 0.01}, "m": {"add": 0.02, "mul": 0.96}},
        {"a": {"add": 0.03, "mul": 0.04}, "m": {"add": 0.05, "mul": 0.06}},
    )  # fmt: skip
    (axes,) = accuracy_figure(found).axes
    assert labels(axes.yaxis) == ["add", "mul"] and labels(axes.xaxis) == ["whole", "a", "m", "not a", "not m"]
    assert numbers(axes) == [[1, 0.97, 0.02, 0.03, 0.05], [0.98, 0.01, 0.96, 0.04, 0.06]]


def test_confusion_is_asked_for_by_done():
    rows = {"add": {"add": 0.9, "mul": 0.02, "neither": 0.08}, "mul": {"add": 0.1, "mul": 0.85, "neither": 0.05}}
    (axes,) = confusion_figure(rows).axes
    assert labels(axes.yaxis) == ["add", "mul"] and labels(axes.xaxis) == ["add", "mul", "neither"]
    assert numbers(axes) == [[0.9, 0.02, 0.08], [0.1, 0.85, 0.05]]
    with pytest.raises(ValueError, match="all of the same columns"):
        confusion_figure({"add": {"add": 1.0}, "mul": {"mul": 1.0}})


def test_differences_of_trained_and_random_weights():
    runs = [run_of(s, a, run_of(0.5, b)) for s, a, b in ((0.5, 0.25, 0.0), (0.25, 0.5, 0.25))]
    expected = [(0.5, 0.5), (-0.25, 0)], [(0.375, 0.5), (-0.375, -0.125)]
    for rows, heights in zip((runs[0].rows(), over_runs(runs)), expected, strict=True):
        figure = deltas_figure(rows)
        for axes, (trained, random) in zip(figure.axes, heights, strict=True):
            bars = [c for c in axes.containers if hasattr(c, "patches")]
            assert [bar[0].get_height() for bar in bars] == [trained, random]
        assert legend(figure.axes[0]) == ["trained weights", "random weights"]
