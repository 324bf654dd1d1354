"""Spreads over seeds, and numbers read off curves of accuracy against the number of samples."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# The two kinds of spread: over transfer seeds on the first base network and its mask (the published error bars), and
# over replicates, each with a base network, a mask and a transfer seed of its own.
OVER_TRANSFER, OVER_REPLICATES = "transfer seeds, one base network and mask", "base networks, masks and transfer seeds"


@dataclass(frozen=True)
class Spread:
    """Mean, population standard deviation, extremes and count of some runs."""

    mean: float
    std: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        if not values:
            raise ValueError("Spread.of: values must hold at least one number, got none")
        return cls(statistics.fmean(values), statistics.pstdev(values), min(values), max(values), len(values))

    def is_above(self, other: Spread) -> bool:
        """Is this mean above the other's by more than the larger of both standard deviations?"""
        return self.mean - other.mean > max(self.std, other.std)

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.std:.3f}" if self.count > 1 else f"{self.mean:.3f}"


def values_of_kind(runs: Mapping[tuple[int, int], float], kind: str) -> list[float]:
    """The values of the runs, (base seed, transfer seed) -> value, that a spread of one kind is made of."""
    return [value for (base, seed), value in runs.items() if base == (0 if kind == OVER_TRANSFER else seed)]


def format_cell(spread: Spread | None, most: int) -> str:
    """The spread as a table shows it, with its count in brackets where other cells of the row have more runs ("[k]: of
    k so far"); "-" where there is none."""
    if spread is None:
        return "-"
    return str(spread) if spread.count == most else f"{spread} [{spread.count}]"


def samples_to_reach(curve: Mapping[int, float], accuracy: float) -> float | None:
    """The number of samples at which `curve` (samples -> accuracy) first reaches `accuracy`; None if it never does.

    Between two points the accuracy is taken to be linear in log(samples), with 0 samples standing at 1. A curve whose
    first point reaches the accuracy gives that point.
    """
    previous: tuple[int, float] | None = None
    for samples, value in sorted(curve.items()):
        if value >= accuracy:
            if previous is None:
                return float(samples)
            low, high = math.log(max(previous[0], 1)), math.log(max(samples, 1))
            share = (accuracy - previous[1]) / (value - previous[1])
            return math.exp(low + share * (high - low))
        previous = (samples, value)
    return None


def data_reduction(
    curve: Mapping[int, float], baseline: Mapping[int, float], accuracy: float
) -> tuple[float, bool] | None:
    """(baseline's samples / curve's samples at equal `accuracy`, exact?); None where `curve` does not reach it.

    Where the baseline never reaches the accuracy, the ratio of its largest count is a lower bound: (ratio, False).
    """
    ours = samples_to_reach(curve, accuracy)
    if ours is None or not baseline:
        return None
    theirs = samples_to_reach(baseline, accuracy)
    if theirs is None:
        return max(baseline) / max(ours, 1.0), False
    return max(theirs, 1.0) / max(ours, 1.0), True


@dataclass(frozen=True)
class Difference:
    """How far one curve lies from another over the sample counts that both have."""

    absolute: float  # mean of |curve - other|
    signed: float  # mean of curve - other
    count: int

    @classmethod
    def between(cls, curve: Mapping[int, float], other: Mapping[int, float]) -> Difference | None:
        """None where the curves have no sample count in common."""
        gaps = [curve[samples] - other[samples] for samples in curve if samples in other]
        if not gaps:
            return None
        return cls(statistics.fmean(abs(gap) for gap in gaps), statistics.fmean(gaps), len(gaps))

    def __str__(self) -> str:
        return f"{self.absolute:.3f} ({self.signed:+.3f}, {self.count})"


def mean_curve(curves: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """The mean of several curves at the sample counts that all of them have."""
    common = set.intersection(*(set(curve) for curve in curves)) if curves else set()
    return {samples: statistics.fmean(curve[samples] for curve in curves) for samples in sorted(common)}


def format_samples(samples: float | None) -> str:
    """`samples` without decimals, or "not reached"."""
    return "not reached" if samples is None else f"{samples:,.0f}"


def format_reduction(reduction: tuple[float, bool] | None) -> str:
    """ "2.3x", "> 15.2x" for a lower bound, "-" where the subnet does not reach the accuracy."""
    if reduction is None:
        return "-"
    ratio, is_exact = reduction
    return f"{ratio:.1f}x" if is_exact else f"> {ratio:.1f}x"
