"""What subnets of one network have in common, per parameter and in all: Csordas et al.'s measures.

    IoU     = |A & B| / |A | B|
    IoMin   = |A & B| / min(|A|, |B|)
    shared  = |A & (all others)| / |A|                 in all: sum(n * shared) / sum(n), n = |A| of each parameter

`shared_weights` gives all of them for any number of subnets. Source: Csordas, van Steenkiste, Schmidhuber, "Are neural
nets modular?" (ICLR 2021), and the scripts of its figures. (Its training code logs a number over all layers too, which
divides by the union instead.)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from .report.page import Table
from .subnet import Subnet
from .subnet_fit import check_same_parameters

ALL = "all"  # the row of all parameters together


@dataclass(frozen=True)
class Overlap:
    """How many weights of a parameter (or of several) two subnets keep: ``first``, ``second``, and ``both`` of them.

    ``expected`` is what ``both`` would be of random subnets with as many weights in each parameter: k_a * k_b / size.
    """

    first: int
    second: int
    both: int
    expected: float

    @classmethod
    def of(cls, first: Tensor, second: Tensor) -> Overlap:
        """The overlap of two bool masks of one shape."""
        kept = int(first.sum()), int(second.sum())
        return cls(*kept, int((first & second).sum()), kept[0] * kept[1] / max(first.numel(), 1))

    @classmethod
    def total(cls, overlaps: Iterable[Overlap]) -> Overlap:
        """Several parameters together."""
        every = list(overlaps)
        return cls(
            sum(o.first for o in every), sum(o.second for o in every), sum(o.both for o in every),
            sum(o.expected for o in every),
        )  # fmt: skip

    def iou(self) -> float:
        """Intersection over union; 1 where both are empty."""
        return _over_union(self.both, self.first + self.second)

    def iou_by_chance(self) -> float:
        """As :meth:`iou`, of the expected intersection."""
        return _over_union(self.expected, self.first + self.second)

    def io_min(self) -> float:
        """Intersection over the smaller of both; 1 exactly where one contains the other (all contain an empty one)."""
        smaller = min(self.first, self.second)
        return self.both / smaller if smaller else 1.0

    def shared(self) -> float:
        """The part of the first that is in the second too; NaN where the first is empty."""
        return self.both / self.first if self.first else math.nan

    def shared_by_chance(self) -> float:
        """As :meth:`shared`, of the expected intersection."""
        return self.expected / self.first if self.first else math.nan


@dataclass(frozen=True)
class Sharing:
    """What subnets share; `shared_weights` makes it.

    Attributes:
        with_others: subnet's name to parameter to its `Overlap` with the union of all other subnets (the "second").
        pairs: names of two subnets, in order, to parameter to their `Overlap`.
        sizes: parameter to its number of weights.
        full: parameter to the number of weights that the control mask keeps; None without one.
    """

    with_others: dict[str, dict[str, Overlap]]
    pairs: dict[tuple[str, str], dict[str, Overlap]]
    sizes: dict[str, int]
    full: dict[str, int] | None = None

    @property
    def names(self) -> list[str]:
        """The subnets' names."""
        return list(self.with_others)

    def overlap(self, name: str, parameter: str | None = None) -> Overlap:
        """Return the overlap of a subnet with the union of the others, in one parameter or (None) in all together."""
        own = self.with_others[name]
        return Overlap.total(own.values()) if parameter is None else own[parameter]

    def iou(self) -> Tensor:
        """Return fp64 ``[subnets, subnets]``: IoU of every two over all parameters together; 1 on the diagonal."""
        return self._matrix(Overlap.iou)

    def iou_by_chance(self) -> Tensor:
        """Return fp64 ``[subnets, subnets]``: as `iou`, for random subnets with as many weights in each parameter; the
        diagonal is 1 too."""
        return self._matrix(Overlap.iou_by_chance)

    def _matrix(self, measure: Any) -> Tensor:
        matrix = torch.eye(len(self.names), dtype=torch.float64)
        for (i, first), (j, second) in itertools.combinations(enumerate(self.names), 2):
            matrix[i, j] = matrix[j, i] = measure(Overlap.total(self.pairs[first, second].values()))
        return matrix

    def rows(self) -> list[dict[str, Any]]:
        """Return one dict per subnet and parameter, and per subnet for "all".

        Keys: subnet, parameter, weights (of the parameter), kept, density, of_full (kept / kept by the control mask;
        None without one, or where it keeps none), shared, shared_by_chance (None where nothing is kept).
        """
        rows = []
        total_full = None if self.full is None else {**self.full, ALL: sum(self.full.values())}
        for name, own in self.with_others.items():
            for parameter, o in {**own, ALL: self.overlap(name)}.items():
                size = sum(self.sizes.values()) if parameter == ALL else self.sizes[parameter]
                full = None if total_full is None else total_full[parameter]
                rows.append({
                    "subnet": name, "parameter": parameter, "weights": size, "kept": o.first,
                    "density": o.first / max(size, 1), "of_full": o.first / full if full else None,
                    "shared": o.shared() if o.first else None,
                    "shared_by_chance": o.shared_by_chance() if o.first else None,
                })  # fmt: skip
        return rows

    def pair_rows(self) -> list[dict[str, Any]]:
        """Return one dict per two subnets and parameter, and for "all": first, second, parameter, iou, iou_by_chance,
        io_min."""
        return [
            {"first": first, "second": second, "parameter": parameter, "iou": o.iou(),
             "iou_by_chance": o.iou_by_chance(), "io_min": o.io_min()}
            for (first, second), overlaps in self.pairs.items()
            for parameter, o in {**overlaps, ALL: Overlap.total(overlaps.values())}.items()
        ]  # fmt: skip

    def table(self) -> Table:
        """Return `rows` as a table."""
        rows = [
            [f"{r['subnet']}, {r['parameter']}", f"{r['kept']:,}", f"{r['density']:.4f}",
             *("-" if r[key] is None else f"{r[key]:.4f}" for key in ("of_full", "shared", "shared_by_chance"))]
            for r in self.rows()
        ]  # fmt: skip
        return Table("Weights shared", ["subnet", "kept", "density", "of full", "shared", "by chance"], rows)


def shared_weights(subnets: Mapping[str, Subnet], full: Subnet | None = None) -> Sharing:
    """Return how much of each subnet is in any of the others, and IoU and IoMin of every two, per parameter.

    "By chance" is what random subnets with as many weights in each parameter would share: functions that are kept apart
    share less than that, and a large subnet shares much whatever it does.

    Args:
        subnets: name to subnet, two or more, all over the same parameters.
        full: a control mask, trained on everything that the network does; kept weights are then also counted in
            relation to it (``of_full``).

    Raises:
        TypeError: something that is no `Subnet`.
        ValueError: fewer than two subnets, or masks of different names or shapes.

    >>> a, b = (Subnet({"w": torch.tensor(mask)}) for mask in ([True, True, False, False], [True, False, True, True]))
    >>> sharing = shared_weights({"a": a, "b": b})
    >>> sharing.overlap("a").shared(), sharing.overlap("a").io_min(), sharing.iou()[0, 1].item()
    (0.5, 0.5, 0.25)
    """
    caller = "shared_weights"
    if not isinstance(subnets, Mapping) or len(subnets) < 2:
        what = f"{len(subnets)}" if isinstance(subnets, Mapping) else type(subnets).__name__
        raise ValueError(f"{caller}: subnets must map names to two or more subnets, got {what}")
    named = {**subnets, "full": full} if full is not None else dict(subnets)
    check_subnets(named, caller)
    masks = {name: subnet.masks for name, subnet in subnets.items()}
    parameters = list(next(iter(masks.values())))
    with_others = {
        name: {p: Overlap.of(own[p], reduce(torch.logical_or, (m[p] for n, m in masks.items() if n != name)))
               for p in parameters}
        for name, own in masks.items()
    }  # fmt: skip
    pairs = {
        (a, b): {p: Overlap.of(masks[a][p], masks[b][p]) for p in parameters}
        for a, b in itertools.combinations(masks, 2)
    }
    kept_by_full = None if full is None else {p: int(full.masks[p].sum()) for p in parameters}
    return Sharing(with_others, pairs, {p: masks[next(iter(masks))][p].numel() for p in parameters}, kept_by_full)


def check_subnets(subnets: Mapping[str, Subnet], caller: str) -> None:
    """Raise TypeError for what is no `Subnet`, ValueError where masks differ in names or shapes."""
    for name, subnet in subnets.items():
        if not isinstance(subnet, Subnet):
            raise TypeError(f"{caller}: {name!r} must be a Subnet, got {type(subnet).__name__}")
    first, *others = subnets
    for other in others:
        check_same_parameters(subnets[first].masks, subnets[other].masks, f"{caller}: {first!r} and {other!r}")


def _over_union(both: float, sizes: float) -> float:
    return both / (sizes - both) if sizes > both else 1.0
