"""What the results say: means and spreads, samples needed, published curves, and the known failure signatures."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from subnets.experiments.arithmetic.config import CONDITIONS
from subnets.report.curves import Spread

Curve = dict[int, float]

ALWAYS_ZERO = 0.265  # what always answering 0 scores on every task here
BASE_LEARNED = 0.9  # below this there is no function to find a subnet of
GOOD_AT_S1 = 0.9  # below this the discovered subnet does not implement the subtask
COMPLEMENT_GOOD = 0.5  # above this the complement still does


@dataclass
class DepthResults:
    """Everything the report says about one depth."""

    layers: int
    base: dict[str, Any]
    discovery: dict[str, Any]
    runs: dict[tuple[str, int], list[float]] = field(default_factory=dict)  # (condition, n) -> test accuracies
    skipped: list[dict[str, Any]] = field(default_factory=list)
    curves: list[dict[str, Any]] = field(default_factory=list)

    def conditions(self) -> list[str]:
        """Conditions with results, in the order of CONDITIONS."""
        return [name for name in CONDITIONS if any(condition == name for condition, _ in self.runs)]

    def sizes(self) -> list[int]:
        """Numbers of disambiguation pairs with results."""
        return sorted({size for _, size in self.runs})

    def spread(self, condition: str, size: int) -> Spread | None:
        """Mean and spread over transfer seeds; None where there are no runs."""
        values = self.runs.get((condition, size))
        return Spread.of(values) if values else None

    def curve(self, condition: str) -> Curve:
        """n -> mean test accuracy."""
        return {size: Spread.of(v).mean for (name, size), v in sorted(self.runs.items()) if name == condition}


def published_curve(layers: int | str, condition: str) -> Curve:
    """n -> published test accuracy at a depth, or for "mean" over all depths; empty where nothing was published.

    Source: decoded from the vector figures of arXiv 2310.10899, exact to three decimals.
    """
    figure = "figure 2 left" if layers == "mean" else "per-depth figure"
    return {
        int(row["n_disambiguation"]): float(row["test_accuracy"])
        for row in _published_rows()
        if row["figure"] == figure and row["layers"] == str(layers) and row["condition"] == condition
    }


def _published_rows() -> list[dict[str, str]]:
    text = resources.files("subnets.experiments.arithmetic").joinpath("published.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(line for line in text.splitlines() if not line.startswith("#")))


def group_runs(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, int], list[float]]:
    """(condition, n) -> test accuracies, from rows of results.csv."""
    runs: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        key = (str(row["condition"]), int(row["n_disambiguation"]))
        runs.setdefault(key, []).append(float(row["test_accuracy"]))
    return runs


def failure_signatures(results: DepthResults) -> list[str]:
    """The known signs that the method did not work, in words; empty if none holds."""
    found = []
    if results.base["test_accuracy"] < BASE_LEARNED:
        found.append(f"the base network has not learned T1 (accuracy {results.base['test_accuracy']:.3f})")
    table = results.discovery["table"]
    if table["subnet"]["S1"] < GOOD_AT_S1:
        found.append(f"the subnet is bad at S1 (accuracy {table['subnet']['S1']:.3f}, below {GOOD_AT_S1})")
    if table["complement"]["S1"] > COMPLEMENT_GOOD:
        found.append(
            f"the complement is still good at S1 (accuracy {table['complement']['S1']:.3f}, above {COMPLEMENT_GOOD})"
        )
    compared = [size for size in results.sizes() if beats(results, "random_init", size) is not None]
    if compared and not any(beats(results, "random_init", size) for size in compared):
        found.append("the subnet is no better than random_init at any n, within the spread over transfer seeds")
    return found


def beats(results: DepthResults, baseline: str, size: int) -> bool | None:
    """Is the subnet's mean above the baseline's by more than the larger of both stds? None if either is missing."""
    ours, theirs = results.spread("subnet", size), results.spread(baseline, size)
    if ours is None or theirs is None:
        return None
    return ours.mean - theirs.mean > max(ours.std, theirs.std)


def verdict(results: DepthResults) -> str:
    """The first line of the report for one depth."""
    signatures = failure_signatures(results)
    name = f"{results.layers} layers: "
    if signatures:
        return name + "FAILURE SIGNATURE: " + "; ".join(signatures) + "."
    table = results.discovery["table"]
    above = [size for size in results.sizes() if beats(results, "random_init", size)]
    against = f", and it beats random_init by more than the spread at n = {', '.join(map(str, above))}" if above else ""
    return (
        f"{name}no known failure signature holds: the subnet does S1 (accuracy {table['subnet']['S1']:.3f}) and its "
        f"complement does not ({table['complement']['S1']:.3f}){against}."
    )
