"""What the comparison measured: one row per method and seed, overlaps of every two subnets, transfer curves."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from subnets.experiments.arithmetic.results import group_runs
from subnets.experiments.methods.config import MethodsConfig
from subnets.report.curves import OVER_TRANSFER, Spread, values_of_kind
from subnets.subnet import Subnet

RESULT_COLUMNS = (
    "method", "seed", "density", "s1_accuracy", "t1_accuracy", "complement_s1", "complement_t1", "own_density",
    "own_s1_accuracy", "undecided", "seconds",
)  # fmt: skip
IOU_COLUMNS = ("method", "seed", "other", "other_seed", "iou", "expected_iou")
TRANSFER_COLUMNS = ("condition", "n_disambiguation", "seed", "test_accuracy", "validation_accuracy", "best_epoch")
Key = tuple[str, int]  # method, seed


@dataclass(frozen=True)
class Results:
    """Everything the report says."""

    config: MethodsConfig
    base: dict[str, Any]
    facts: dict[Key, dict[str, Any]]
    subnets: dict[Key, Subnet]
    transfers: list[dict[str, Any]]

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows of results.csv."""
        for (method, seed), facts in self.facts.items():
            yield {"method": method, "seed": seed, **facts}

    def spread(self, method: str, fact: str) -> Spread | None:
        """Over the seeds; None where the fact is not known of this method."""
        values = [self.facts[method, seed][fact] for seed in range(self.config.mask_seeds)]
        return None if None in values else Spread.of(values)

    def iou(self, left: Key, right: Key) -> float:
        """Of two subnets; a weight that a method does not choose from is in none of its subnets."""
        return _on_same(self.subnets[left], self.subnets[right], Subnet.iou)

    def expected_iou(self, left: Key, right: Key) -> float:
        """As many random weights in each layer would have it, in expectation of counts."""
        return _on_same(self.subnets[left], self.subnets[right], _expected_iou)

    def iou_rows(self) -> Iterator[dict[str, Any]]:
        """The rows of iou.csv: every two subnets."""
        for left, right in itertools.combinations(self.subnets, 2):
            yield {
                "method": left[0], "seed": left[1], "other": right[0], "other_seed": right[1],
                "iou": round(self.iou(left, right), 6), "expected_iou": round(self.expected_iou(left, right), 6),
            }  # fmt: skip

    def stability(self, method: str) -> tuple[float, float] | None:
        """Mean IoU over pairs of a method's seeds, and of random subnets; None with one seed."""
        pairs = list(itertools.combinations([(method, seed) for seed in range(self.config.mask_seeds)], 2))
        if not pairs:
            return None
        means = [sum(measure(*pair) for pair in pairs) / len(pairs) for measure in (self.iou, self.expected_iou)]
        return means[0], means[1]

    def transfer(self, condition: str) -> dict[int, Spread]:
        """n -> T2 accuracy over transfer seeds."""
        runs = group_runs(self.transfers)
        sizes = sorted(size for name, size in runs if name == condition)
        return {size: Spread.of(values_of_kind(runs[condition, size], OVER_TRANSFER)) for size in sizes}


def _on_same(left: Subnet, right: Subnet, measure: Any) -> float:
    shapes = {name: mask.shape for its in (left, right) for name, mask in its.masks.items()}
    nothing = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in shapes.items()}
    return measure(Subnet({**nothing, **left.masks}), Subnet({**nothing, **right.masks}))


def _expected_iou(left: Subnet, right: Subnet) -> float:
    """E|A & B| / E|A | B| of random masks with these numbers of weights per layer."""
    sizes = [(int(a.sum()), int(right.masks[name].sum()), a.numel()) for name, a in left.masks.items()]
    both = sum(a * b / n for a, b, n in sizes)
    either = sum(a + b for a, b, _ in sizes) - both
    return both / either if either else 1.0


def mean_of(spreads: Sequence[Spread]) -> float:
    """The mean of means."""
    return sum(spread.mean for spread in spreads) / len(spreads)
