"""Break It Down over several runs: means, spreads, and an exact test of the differences."""

from __future__ import annotations

import statistics
from collections.abc import Hashable, Sequence
from typing import Any

import torch

from ..report.curves import Spread
from ..report.page import Table
from .break_it_down import BreakItDown

MOST = 20  # independent groups whose 2^n sign assignments are all counted


def sign_flip_p(differences: Sequence[float], groups: Sequence[Hashable] | None = None) -> float:
    """Return the one-sided p value of a paired permutation test: are these differences above 0 on the whole?

    If neither side of a pair were favoured, each difference would as likely have had the other sign: p is the share of
    all 2^n sign assignments whose mean is at least the observed one, itself included, so at least 1/2^n.

    Args:
        differences: one per run; pass their negatives to ask whether they are below 0.
        groups: one label per run. Runs of one label (mask seeds on one base network) are not independent: their mean
            counts as one difference. None: every run by itself.

    Raises:
        ValueError: no difference or more than 20 independent ones, one that is not finite, or labels of another number.

    >>> sign_flip_p([0.5, 0.3, 0.2])
    0.125
    """
    labels = list(range(len(differences))) if groups is None else list(groups)
    if len(labels) != len(differences):
        raise ValueError(f"sign_flip_p: groups must have one label per run, got {len(labels)} for {len(differences)}")
    of_group: dict[Hashable, list[float]] = {}
    for label, difference in zip(labels, differences, strict=True):
        of_group.setdefault(label, []).append(float(difference))
    values = torch.tensor([statistics.fmean(its) for its in of_group.values()], dtype=torch.float64)
    if not 0 < len(values) <= MOST or not bool(values.isfinite().all()):
        raise ValueError(
            f"sign_flip_p: differences must be finite, of 1 to {MOST} independent runs or groups, got "
            f"{values.tolist()}; for more, scipy.stats.permutation_test(permutation_type='samples') draws at random"
        )
    sums = torch.zeros(1, dtype=torch.float64)
    for value in values:
        sums = torch.cat([sums + value, sums - value])
    tie = 1e-12 * float(values.abs().sum())  # rounding
    return int((sums >= values.sum() - tie).sum()) / sums.numel()


def over_runs(runs: Sequence[BreakItDown], groups: Sequence[Hashable] | None = None) -> list[dict[str, Any]]:
    """Return one dict per subroutine: what several runs of the protocol say together.

    Keys: subroutine, base ("trained"; "random" for the control), runs, delta_sub, delta_sub_std, delta_abl,
    delta_abl_std, quality (means; standard deviations as `statistics.pstdev`), p_sub and p_abl (`sign_flip_p` of
    delta_sub > 0 and delta_abl < 0), and, where every run has a control, p_sub_control and p_abl_control: is delta_sub
    above the control's of the same run, delta_abl below it? None otherwise.

    Args:
        runs: results of the same subroutines, of several base networks and mask seeds.
        groups: the base network of each run, as for `sign_flip_p`.

    Raises:
        ValueError: no run, runs of different subroutines, or labels of another number.
    """
    names = list(runs[0].subroutines) if runs else []
    if not names or any(set(run.subroutines) != set(names) for run in runs):
        got = [list(run.subroutines) for run in runs]
        raise ValueError(f"over_runs: runs must be one or more, all of the same subroutines, got {got}")
    controls = [run.control for run in runs if run.control is not None]
    has_controls = len(controls) == len(runs)
    rows = []
    for base, its in (("trained", list(runs)), ("random", controls if has_controls else [])):
        for name in names if its else ():
            sub, abl = ([getattr(run[name], delta) for run in its] for delta in ("delta_sub", "delta_abl"))
            row = {"subroutine": name, "base": base, "runs": len(its)}
            for key, values in (("delta_sub", sub), ("delta_abl", abl)):
                spread = Spread.of(values)
                row |= {key: spread.mean, f"{key}_std": spread.std}
            row |= {"quality": statistics.fmean(run[name].quality for run in its)}
            row |= {"p_sub": sign_flip_p(sub, groups), "p_abl": sign_flip_p([-d for d in abl], groups)}
            row |= {"p_sub_control": None, "p_abl_control": None}
            if has_controls and base == "trained":
                random = [control[name] for control in controls]
                row["p_sub_control"] = sign_flip_p([d - r.delta_sub for d, r in zip(sub, random, strict=True)], groups)
                row["p_abl_control"] = sign_flip_p([r.delta_abl - d for d, r in zip(abl, random, strict=True)], groups)
            rows.append(row)
    return rows


def runs_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return `over_runs` as a table: mean ± standard deviation, and p values (those beside a control last).

    Args:
        rows: of `over_runs`.
    """
    lines = [
        [f"{r['subroutine']}, {r['base']}", str(r["runs"]),
         *(f"{r[key]:+.3f} ± {r[key + '_std']:.3f}" for key in ("delta_sub", "delta_abl")), f"{r['quality']:.3f}",
         *("-" if r[key] is None else f"{r[key]:.4f}" for key in ("p_sub", "p_abl", "p_sub_control", "p_abl_control"))]
        for r in rows
    ]  # fmt: skip
    head = ["subroutine", "runs", "delta_sub", "delta_abl", "Q", "p sub", "p abl", "p sub, control", "p abl, control"]
    return Table("Break It Down over runs", head, lines)
