"""How long it takes: seconds per unit of each stage where it was measured, and what that makes of the whole config.

A unit is one base network, one discovery, or one optimizer step of one transfer network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

STAGES = ("base", "discovery", "transfer")


@dataclass(frozen=True)
class StageTime:
    """Units planned and done, and the seconds that `timed` of the units done took."""

    planned: int
    done: int = 0
    timed: int = 0
    seconds: float = 0.0


Times = Mapping[int, Mapping[str, StageTime]]  # layers -> stage -> time


def seconds_per_unit(times: Times, stage: str, layers: int, cost: Mapping[int, float]) -> float | None:
    """Measured at this depth, or at the depth nearest in cost and scaled by it; None if measured nowhere.

    `cost[layers]` is anything proportional to the arithmetic of one unit.
    """
    measured = [depth for depth in times if times[depth][stage].timed]
    if not measured:
        return None
    nearest = min(measured, key=lambda depth: abs(cost[depth] - cost[layers]))
    return times[nearest][stage].seconds / times[nearest][stage].timed * (cost[layers] / cost[nearest])


def estimate(times: Times, cost: Mapping[int, float]) -> dict[int, float | None]:
    """Seconds that each depth takes from its start to its end; None where a stage was measured at no depth."""
    return {layers: _total(times, layers, cost, [times[layers][stage].planned for stage in STAGES]) for layers in times}


def seconds_left(times: Times, cost: Mapping[int, float]) -> tuple[float, bool]:
    """Seconds to the end of the whole config, and whether all that is left to do could be estimated."""
    parts = []
    for layers in times:
        for stage in STAGES:
            left = times[layers][stage].planned - times[layers][stage].done
            rate = seconds_per_unit(times, stage, layers, cost)
            parts.append(0.0 if left == 0 else None if rate is None else rate * left)
    known = [part for part in parts if part is not None]
    return sum(known), len(known) == len(parts)


def _total(times: Times, layers: int, cost: Mapping[int, float], units: Sequence[int]) -> float | None:
    total = 0.0
    for stage, count in zip(STAGES, units, strict=True):
        rate = seconds_per_unit(times, stage, layers, cost)
        if rate is None and count:
            return None
        total += (rate or 0.0) * count
    return total
