"""Lesion tests: are the units of a cluster important, and do they serve some classes most (Casper, Hod et al. 2022)?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from subnets.report.page import Table

from .graphical import p_value
from .units import UnitClusters

NUM_CONTROLS, MIN_UNITS, MAX_SHARE = 19, 2, 0.99  # the authors'


@dataclass(frozen=True)
class Lesion:
    """What the lesion of one subcluster (the units of one layer in one cluster) does.

    Attributes:
        layer, cluster, num_units: which, and how large.
        change: mean over classes of the change in accuracy; control_changes of the random lesions ``[controls]``.
        spread: range over classes of the change, divided by the size of its mean (0 if nothing changes, infinite if the
            mean alone is 0); control_spreads of the random lesions ``[controls]``.
    """

    layer: str
    cluster: int
    num_units: int
    change: float
    control_changes: np.ndarray
    spread: float
    control_spreads: np.ndarray

    @property
    def importance_p(self) -> float:
        """``(random lesions that lower the accuracy as much or more + 1) / (controls + 1)``: small is important."""
        return p_value(self.change, self.control_changes, ties_count=True)

    @property
    def coherence_p(self) -> float:
        """``(random lesions that spread as much or more over the classes + 1) / (controls + 1)``: small is coherent."""
        return p_value(-self.spread, -self.control_spreads, ties_count=True)


@dataclass(frozen=True)
class LesionTest:
    """All lesions of a network's clusters, and both p values over them; `lesion_test` makes it."""

    lesions: list[Lesion]

    @property
    def importance_p(self) -> float:
        """Fisher's method over the lesions' `Lesion.importance_p`."""
        return combined_p([lesion.importance_p for lesion in self.lesions], self._controls)

    @property
    def coherence_p(self) -> float:
        """Fisher's method over the lesions' `Lesion.coherence_p`."""
        return combined_p([lesion.coherence_p for lesion in self.lesions], self._controls)

    @property
    def _controls(self) -> int:
        return self.lesions[0].control_changes.size

    def table(self) -> Table:
        """Return change, mean change of the controls and both p values of each lesion."""
        rows = [
            [lesion.layer, str(lesion.cluster), str(lesion.num_units), f"{lesion.change:+.4f}",
             f"{lesion.control_changes.mean():+.4f}", f"{lesion.importance_p:.3f}", f"{lesion.coherence_p:.3f}"]
            for lesion in self.lesions
        ]  # fmt: skip
        rows.append(["all (Fisher)", "", "", "", "", f"{self.importance_p:.3g}", f"{self.coherence_p:.3g}"])
        head = ["layer", "cluster", "units", "change", "random", "importance p", "coherence p"]
        return Table("Lesions", head, rows)


def lesion_test(
    model: nn.Module, clusters: UnitClusters, class_accuracies: Callable[[nn.Module], Any], *,
    controls: int = NUM_CONTROLS, seed: int = 0,
) -> LesionTest:  # fmt: skip
    """Return what becomes of each class's accuracy without the units of one layer in one cluster.

    A lesion sets the weights into these units and their biases to 0 (``clusters.chain.subnet(...)``, ablated), so that
    an activation function with f(0) = 0 gives 0. Controls are random lesions of as many units of that layer, among
    those that are in any cluster. Subclusters of at least two units and at most .99 of their layer's are lesioned;
    inputs and outputs are not.

    Args:
        model: unmasked network that the clusters were found in; restored bit for bit. Its train or eval mode is the
            caller's business.
        clusters: of `spectral_clusters`, or cut from a `unit_hierarchy`.
        class_accuracies: function of the model that returns the accuracy on each class, ``[classes]``.
        controls: random lesions per subcluster.
        seed: decides the draws.

    Raises:
        ValueError: no control, no subcluster of a size that can be lesioned, a class whose accuracy is not a number (it
            has no sample), or clusters of another network.

    Source: Casper, Hod et al. 2022, "Graphical clusterability and local specialization in deep neural networks".
    """
    if isinstance(controls, bool) or not isinstance(controls, int) or controls < 1:
        raise ValueError(f"lesion_test: controls must be an integer >= 1, got {controls!r}")
    chain, rng = clusters.chain, np.random.default_rng(seed)
    base = _accuracies(class_accuracies(model))

    def changes(layer: str, units: np.ndarray) -> np.ndarray:
        with chain.subnet({layer: units}).applied(model, mode="ablate"):
            return _accuracies(class_accuracies(model)) - base

    lesions = []
    for layer in chain.hidden:
        labels = clusters.labels[layer]
        clustered = np.flatnonzero(labels >= 0)
        for cluster in range(clusters.num_clusters):
            size = int((labels == cluster).sum())
            if not MIN_UNITS <= size <= MAX_SHARE * clustered.size:
                continue
            true, random = changes(layer, labels == cluster), []
            for _ in range(controls):
                units = np.zeros(labels.size, bool)
                units[rng.choice(clustered, size, replace=False)] = True
                random.append(changes(layer, units))
            lesions.append(Lesion(
                layer, cluster, size, float(true.mean()), np.array([c.mean() for c in random]),
                _spread(true), np.array([_spread(c) for c in random]),
            ))  # fmt: skip
    if not lesions:
        raise ValueError(
            f"lesion_test: no cluster has from {MIN_UNITS} to {MAX_SHARE:.0%} of the units of a hidden layer; take "
            f"fewer or more clusters than {clusters.num_clusters}"
        )
    return LesionTest(lesions)


def combined_p(p_values: Sequence[float], controls: int) -> float:
    """Return one p value of several rank-based ones, by Fisher's method.

    Args:
        p_values: each ``rank / (controls + 1)``; it is lowered by half a rank, so that its mean under chance is 1/2.
        controls: random cases that each was compared with.
    """
    from scipy.stats import combine_pvalues

    shifted = np.asarray(p_values) - 0.5 / (controls + 1)
    return float(np.asarray(combine_pvalues(shifted, method="fisher"))[1])


def mean_p(p_values: Sequence[float]) -> float:
    """Return the probability that the mean of as many uniform p values is as small: over networks, by Bates'
    distribution ``P = 1/n! sum_k (-1)^k C(n, k) (S - k)^n`` over k <= S, their sum.

    Args:
        p_values: one per network, from 0 to 1.

    Raises:
        ValueError: no number, or one out of range.

    >>> mean_p([0.5]), mean_p([0.25, 0.25])
    (0.5, 0.125)
    """
    from fractions import Fraction
    from math import comb, factorial

    n, total = len(p_values), sum(map(Fraction, p_values))  # exact: the terms cancel
    if not n or not all(0 <= p <= 1 for p in p_values):
        raise ValueError(f"mean_p: p values must be one or more numbers from 0 to 1, got {list(p_values)}")
    terms = ((-1) ** k * comb(n, k) * (total - k) ** n for k in range(int(total) + 1))
    return float(Fraction(sum(terms), factorial(n)))


def _accuracies(values: Any) -> np.ndarray:
    """Accuracies by class as fp64, checked."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or found.size < 2:
        raise ValueError(f"lesion_test: class_accuracies must return one number for each of two or more classes, got "
                         f"shape {found.shape}")  # fmt: skip
    if not np.isfinite(found).all():
        empty = np.flatnonzero(~np.isfinite(found)).tolist()
        raise ValueError(f"lesion_test: the accuracy of classes {empty} is not a number; does each have a sample?")
    return found


def _spread(changes: np.ndarray) -> float:
    width, mean = float(np.ptp(changes)), abs(float(changes.mean()))
    return width / mean if mean > 0 else (0.0 if width == 0 else float("inf"))
