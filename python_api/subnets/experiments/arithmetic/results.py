"""What the results say: means and spreads, samples needed, published curves, and the known failure signatures."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from subnets.experiments.arithmetic.config import CONDITIONS
from subnets.report.curves import OVER_REPLICATES, OVER_TRANSFER, Spread, values_of_kind

Curve = dict[int, float]

ALWAYS_ZERO = 0.265  # what always answering 0 scores on every task here
BASE_LEARNED = 0.9  # below this there is no function to find a subnet of
GOOD_AT_S1 = 0.9  # below this the discovered subnet does not implement the subtask
COMPLEMENT_GOOD = 0.5  # above this the complement still does


Runs = dict[tuple[str, int], dict[tuple[int, int], float]]  # (condition, n) -> (base seed, transfer seed) -> accuracy


@dataclass
class DepthResults:
    """Everything the report says about one depth; of a run that is not finished, what is there."""

    layers: int
    bases: dict[int, dict[str, Any]]  # base seed -> facts of the T1 network
    discoveries: dict[int, dict[str, Any]]  # base seed -> facts of its subnet
    runs: Runs = field(default_factory=dict)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    curves: list[dict[str, Any]] = field(default_factory=list)
    base_seeds: int = 1
    planned: dict[int, int] = field(default_factory=dict)  # n -> transfer runs

    @property
    def kind(self) -> str:
        """The kind of spread that means and comparisons are made of."""
        return OVER_TRANSFER if self.base_seeds == 1 else OVER_REPLICATES

    def conditions(self) -> list[str]:
        """Conditions with results, in the order of CONDITIONS."""
        return [name for name in CONDITIONS if any(condition == name for condition, _ in self.runs)]

    def sizes(self) -> list[int]:
        """Numbers of disambiguation pairs with results."""
        return sorted({size for _, size in self.runs})

    def spread(self, condition: str, size: int, kind: str | None = None) -> Spread | None:
        """Mean and spread of one kind, `self.kind` by default; None where there are no such runs."""
        kind = kind or self.kind
        values = values_of_kind(self.runs.get((condition, size), {}), kind)
        return Spread.of(values) if values else None

    def curve(self, condition: str, kind: str | None = None) -> Curve:
        """n -> mean test accuracy."""
        spreads = {size: self.spread(condition, size, kind) for size in self.sizes()}
        return {size: spread.mean for size, spread in spreads.items() if spread}

    def missing(self) -> dict[int, int]:
        """n -> how many of its transfer runs are neither done nor skipped."""
        left = dict(self.planned)
        for (_, size), done in self.runs.items():
            left[size] = left.get(size, len(done)) - len(done)
        for row in self.skipped:
            left[row["n_disambiguation"]] = left.get(row["n_disambiguation"], 1) - 1
        return {size: count for size, count in left.items() if count > 0}

    def is_finished(self) -> bool:
        """Is every stage of every run there?"""
        return len(self.bases) == len(self.discoveries) == self.base_seeds and not self.missing()


def published_spread(condition: str) -> dict[int, Spread]:
    """n -> mean and population std of the five published runs at 12 layers (one base network and mask)."""
    rows = [row for row in _published_rows() if row["figure"] == "figure 2 right" and row["condition"] == condition]
    return {
        int(row["n_disambiguation"]): Spread(float(row["test_accuracy"]), float(row["std"] or 0), math.nan, math.nan, 5)
        for row in rows
    }


def published_curve(layers: int | str, condition: str) -> Curve:
    """n -> published test accuracy at a depth, or for "mean" over all depths; empty where nothing was published.

    Source: decoded from the vector figures of arXiv 2310.10899, exact to three decimals.
    """
    figure = "figure 2 left" if layers == "mean" else "per-depth figure"
    if condition == "subnet_trainable":
        figure = "frozen-vs-trainable figure"
    return {
        int(row["n_disambiguation"]): float(row["test_accuracy"])
        for row in _published_rows()
        if row["figure"] == figure and row["layers"] == str(layers) and row["condition"] == condition
    }


def _published_rows() -> list[dict[str, str]]:
    text = resources.files("subnets.experiments.arithmetic").joinpath("published.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(line for line in text.splitlines() if not line.startswith("#")))


def group_runs(rows: Iterable[Mapping[str, Any]]) -> Runs:
    """Test accuracies from rows of results.csv; rows without `base_seed` (older files) are of base 0."""
    runs: Runs = {}
    for row in rows:
        key = (str(row["condition"]), int(row["n_disambiguation"]))
        seeds = (int(row.get("base_seed", 0)), int(row["seed"]))
        runs.setdefault(key, {})[seeds] = float(row["test_accuracy"])
    return runs


def failure_signatures(results: DepthResults) -> list[str]:
    """The known signs that the method did not work, in words; empty if none holds (as far as the run has come)."""
    found = []
    for r, base in sorted(results.bases.items()):
        if base["test_accuracy"] < BASE_LEARNED:
            which = f"base network {r}" if results.base_seeds > 1 else "the base network"
            found.append(f"{which} has not learned T1 (accuracy {base['test_accuracy']:.3f})")
    for r, discovery in sorted(results.discoveries.items()):
        whose = f" of base network {r}" if results.base_seeds > 1 else ""
        table = discovery["table"]
        if table["subnet"]["S1"] < GOOD_AT_S1:
            found.append(f"the subnet{whose} is bad at S1 (accuracy {table['subnet']['S1']:.3f}, below {GOOD_AT_S1})")
        if table["complement"]["S1"] > COMPLEMENT_GOOD:
            found.append(
                f"the complement{whose} is still good at S1 (accuracy {table['complement']['S1']:.3f}, above "
                f"{COMPLEMENT_GOOD})"
            )
    compared = [size for size in results.sizes() if beats(results, "random_init", size) is not None]
    if compared and not any(beats(results, "random_init", size) for size in compared):
        found.append(f"the subnet is no better than random_init at any n, within the spread over {results.kind}")
    return found


def beats(results: DepthResults, baseline: str, size: int) -> bool | None:
    """Is the subnet's mean above the baseline's by more than the larger of both stds? None if either is missing, or of
    replicates stands on a single one, which has no spread."""
    ours, theirs = results.spread("subnet", size), results.spread(baseline, size)
    if ours is None or theirs is None or (results.base_seeds > 1 and min(ours.count, theirs.count) < 2):
        return None
    return ours.is_above(theirs)


def verdict(results: DepthResults) -> str:
    """The first line of the report for one depth."""
    signatures = failure_signatures(results)
    name = f"{results.layers} layers: "
    if signatures:
        return name + "FAILURE SIGNATURE: " + "; ".join(signatures) + "."
    if not results.discoveries:
        return name + "nothing to judge yet."
    tables = [discovery["table"] for discovery in results.discoveries.values()]
    subnet, complement = (Spread.of([table[row]["S1"] for table in tables]) for row in ("subnet", "complement"))
    above = [size for size in results.sizes() if beats(results, "random_init", size)]
    against = f", and it beats random_init by more than the spread at n = {', '.join(map(str, above))}" if above else ""
    return (
        f"{name}no known failure signature holds: the subnet does S1 (accuracy {subnet}) and its "
        f"complement does not ({complement}){against}."
    )


def density_per_layer(results: DepthResults) -> dict[str, float]:
    """The fraction of weights kept in each masked matrix, mean over the base networks' subnets."""
    each = [discovery["density_per_layer"] for discovery in results.discoveries.values()]
    return {name: Spread.of([one[name] for one in each]).mean for name in each[0]}
