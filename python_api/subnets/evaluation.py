"""`evaluate_subnet`: what a subnet can do, beside its complement, random subnets of its size and the full network."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .subnet import Subnet

Test = Callable[[nn.Module], float]


@dataclass(frozen=True)
class SubnetTable:
    """Scores of a subnet and its controls.

    Attributes:
        rows: one dict per condition and test: ``condition`` ("full_model", "subnet", "complement", "sampled",
            "sampled_complement"), ``test``, ``density`` (fraction of the masked weights kept), ``mean``, ``std``
            (population; 0 for a single run) and ``runs``.
        notes: what was left out and why.
    """

    rows: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)

    def value(self, condition: str, test: str) -> float:
        """Return the mean of one cell. Raises KeyError if there is none."""
        for row in self.rows:
            if row["condition"] == condition and row["test"] == test:
                return row["mean"]
        raise KeyError(f"SubnetTable.value: there is no row of condition {condition!r} and test {test!r}")

    def __str__(self) -> str:
        tests = list(dict.fromkeys(row["test"] for row in self.rows))
        lines = [["condition", "density", *tests]]
        for condition in dict.fromkeys(row["condition"] for row in self.rows):
            cells = {row["test"]: row for row in self.rows if row["condition"] == condition}
            density = next(iter(cells.values()))["density"]
            lines.append([condition, f"{density:.4f}", *(_cell(cells[test]) for test in tests)])
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        text = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        return "\n".join([*text, *self.notes])


def evaluate_subnet(
    model: nn.Module, subnet: Subnet, tests: Mapping[str, Test], *, controls: int = 5, seed: int = 0
) -> SubnetTable:
    """Return a table of ``test(model)`` with the subnet kept, removed, and replaced by random subnets of its size.

    Rows: "full_model" (the model as it is), "subnet" (everything masked outside it is zero), "complement" (the subnet
    is zero), "sampled" (`Subnet.sample_like`) and "sampled_complement" (`Subnet.complement_sample`), mean and spread
    over ``controls`` draws each. A subnet that implements a task is good at it, its complement is not, and no sampled
    one is either.

    Args:
        model: unmasked network that the subnet was found in; its weights are restored bit for bit. Its train or eval
            mode is the caller's business.
        subnet: fits the model.
        tests: name to function of the model that returns a float, for example an accuracy.
        controls: number of random subnets of each of the two kinds; 0 leaves them out.
        seed: decides the draws; control i uses a generator seeded by seed and i, so that more controls keep the first.

    Raises:
        TypeError: a test that is not callable or returns no number.
        ValueError: no test, a negative number of controls, or a subnet that does not fit.
    """
    if not isinstance(tests, Mapping) or not tests or not all(callable(test) for test in tests.values()):
        raise TypeError(f"evaluate_subnet: tests must map names to functions of the model, got {tests!r}")
    if not isinstance(controls, int) or isinstance(controls, bool) or controls < 0:
        raise ValueError(f"evaluate_subnet: controls must be an integer >= 0, got {controls!r}")
    subnet.parameters_in(model, "evaluate_subnet")
    rows = _rows("full_model", 1.0, tests, [scores_of(model, tests)])
    with subnet.applied(model):
        rows += _rows("subnet", subnet.density(), tests, [scores_of(model, tests)])
    with subnet.applied(model, mode="ablate"):
        rows += _rows("complement", 1 - subnet.density(), tests, [scores_of(model, tests)])
    notes = []
    for condition, draw in (("sampled", subnet.sample_like), ("sampled_complement", subnet.complement_sample)):
        try:
            samples = [draw(torch.Generator().manual_seed(seed + 1_000_003 * i)) for i in range(controls)]
        except ValueError as error:
            notes.append(f"{condition} is left out: {error}")
            continue
        scores = []
        for sample in samples:
            with sample.applied(model):
                scores.append(scores_of(model, tests))
        rows += _rows(condition, subnet.density(), tests, scores)
    return SubnetTable(rows, notes)


def scores_of(model: nn.Module, tests: Mapping[str, Test], caller: str = "evaluate_subnet") -> dict[str, float]:
    """Return what each test gives of the model; ``caller`` begins the TypeError about one that gives no number."""
    scores = {}
    for name, test in tests.items():
        score = test(model)
        try:
            scores[name] = float(score.detach() if isinstance(score, torch.Tensor) else score)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{caller}: test {name!r} must return a float, got {type(score).__name__}") from error
    return scores


def _rows(
    condition: str, density: float, tests: Mapping[str, Test], scores: list[dict[str, float]]
) -> list[dict[str, Any]]:
    rows = []
    for test in tests if scores else ():
        values = [score[test] for score in scores]
        mean = statistics.fmean(values)
        std = statistics.pstdev(values) if all(map(math.isfinite, values)) else math.nan
        rows.append(
            {"condition": condition, "test": test, "density": density, "mean": mean, "std": std, "runs": len(values)}
        )
    return rows


def _cell(row: dict[str, Any]) -> str:
    return f"{row['mean']:.4f}" + (f" +- {row['std']:.4f}" if row["runs"] > 1 else "")
