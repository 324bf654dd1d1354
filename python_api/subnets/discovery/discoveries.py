"""What a discovery in bulk found: every member's subnet, and how far they agree over seeds and penalties."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from subnet_kernels.masks import expand_scores, weights_per_score

from ..provenance import base_of
from ..subnet import Subnet
from ..training.files import load_tensors, read_json, save_tensors, write_json
from .record import Discovery

_FORMAT = "subnets.discoveries/1"
_SCORES = "scores.safetensors"


@dataclass(frozen=True)
class Discoveries(Sequence[Discovery]):
    """The members of one discovery in bulk, in the order of ``itertools.product(seeds, penalties, score_inits)``.

    A *group* is the members that differ in the seed alone: one lam and one score_init. Where a method asks for ``lam``
    or ``score_init``, it may be left out if there is but one.

    Attributes:
        runs: each member's :class:`Discovery`; its ``settings`` are seed, lam and score_init.
        scores: each member's scores at its best epoch by weight's name, on the CPU; None unless there were several
            penalties (:meth:`at_density` needs them) or ``keep_ranks``.
        shared: one dict per group where ``evaluate`` was given: lam, score_init, and ``evaluate`` of the network with
            the weights that all seeds keep ("core") and with those that any keeps ("union").
    """

    runs: list[Discovery]
    scores: list[dict[str, Tensor]] | None = None
    shared: list[dict[str, Any]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.runs)

    @overload
    def __getitem__(self, index: int) -> Discovery: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Discovery]: ...
    def __getitem__(self, index: int | slice) -> Discovery | Sequence[Discovery]:
        return self.runs[index]

    def __iter__(self) -> Iterator[Discovery]:
        return iter(self.runs)

    # --- groups ------------------------------------------------------------------------------------------------------

    @property
    def seeds(self) -> list[int]:
        """The members' seeds, each once, in the order of the runs."""
        return self._values("seed")

    @property
    def penalties(self) -> list[float]:
        """The members' lam, each once, in the order of the runs."""
        return self._values("lam")

    @property
    def score_inits(self) -> list[float]:
        """The members' initial scores, each once, in the order of the runs."""
        return self._values("score_init")

    def group(self, lam: float | None = None, score_init: float | None = None) -> list[Discovery]:
        """The members with this lam and this score_init: one per seed.

        Raises:
            ValueError: there is no such group, or one of several values has to be chosen.
        """
        return [self.runs[i] for i in self.indices(lam, score_init)]

    def indices(self, lam: float | None = None, score_init: float | None = None) -> list[int]:
        """Where :meth:`group`'s members stand among all: their rows of :meth:`iou`."""
        wanted = {"lam": self._one("lam", lam), "score_init": self._one("score_init", score_init)}
        return [i for i, run in enumerate(self.runs) if all(run.settings[k] == v for k, v in wanted.items())]

    def _values(self, name: str) -> list[Any]:
        return list(dict.fromkeys(run.settings[name] for run in self.runs))

    def _one(self, name: str, value: Any) -> Any:
        values = self._values(name)
        if value is None and len(values) > 1:
            raise ValueError(f"Discoveries: choose one {name} of {values}")
        if value is not None and value not in values:
            raise ValueError(f"Discoveries: {name} must be one of {values}, got {value!r}")
        return values[0] if value is None else value

    # --- statistics --------------------------------------------------------------------------------------------------

    def curve(self, score_init: float | None = None) -> list[dict[str, Any]]:
        """The path density against score: one dict per penalty, by rising lam, over the seeds' best epochs: lam, seeds
        (their number), density and density_std, score and score_std (None without ``evaluate``). Standard deviations
        are those of a sample (n - 1); 0 for one seed."""
        points = []
        for lam in sorted(self.penalties):
            rows = [run.best for run in self.group(lam, self._one("score_init", score_init))]
            point: dict[str, Any] = {"lam": lam, "seeds": len(rows)}
            for name in ("density", "score"):
                values = [row[name] for row in rows]
                known = None not in values
                point[name] = statistics.fmean(values) if known else None
                point[f"{name}_std"] = (statistics.stdev(values) if len(values) > 1 else 0.0) if known else None
            points.append(point)
        return points

    def keep_frequency(self, lam: float | None = None, score_init: float | None = None) -> dict[str, Tensor]:
        """Weight's name -> fp32 tensor of its shape: the fraction of a group's seeds that keep each weight."""
        masks = [run.subnet.masks for run in self.group(lam, score_init)]
        return {name: torch.stack([mask[name] for mask in masks]).float().mean(0) for name in masks[0]}

    def iou(self) -> Tensor:
        """fp64 [members, members]: |A & B| / |A | B| of every two subnets; 1 where both are empty."""
        return _iou(self._overlaps(lambda kept: kept @ kept.T), self._sizes())

    def expected_iou(self) -> Tensor:
        """fp64 [members, members]: what :meth:`iou` is about for random subnets with as many weights in each layer: the
        expected intersection, the sum of k_a k_b / n over layers, over the union that goes with it. The diagonal says
        what two random subnets of that size share."""
        return _iou(self._overlaps(lambda kept: torch.outer(kept.sum(1), kept.sum(1)) / max(kept.shape[1], 1)),
                    self._sizes())  # fmt: skip

    def _overlaps(self, of_layer: Callable[[Tensor], Tensor]) -> Tensor:
        """The sum over layers of a [members, members] matrix of their masks, fp64 [members, weights]."""
        total = torch.zeros(len(self), len(self), dtype=torch.float64)
        for name in self.runs[0].subnet.masks:
            total += of_layer(torch.stack([run.subnet.masks[name].flatten() for run in self.runs]).double())
        return total

    def _sizes(self) -> Tensor:
        return torch.tensor([run.subnet.num_kept() for run in self.runs], dtype=torch.float64)

    def core(self, lam: float | None = None, score_init: float | None = None) -> Subnet:
        """The weights that all seeds of a group keep; ``provenance["score"]`` is its score if there was an evaluate."""
        return self._combined("core", torch.all, lam, score_init)

    def union(self, lam: float | None = None, score_init: float | None = None) -> Subnet:
        """The weights that any seed of a group keeps; as :meth:`core`."""
        return self._combined("union", torch.any, lam, score_init)

    def expected_core_density(self, lam: float | None = None, score_init: float | None = None) -> float:
        """The density that :meth:`core` would have if each seed kept as many weights of each layer, at random."""
        subnets = [run.subnet for run in self.group(lam, score_init)]
        total = expected = 0.0
        for name, mask in subnets[0].masks.items():
            n = mask.numel()
            expected += n * math.prod(int(subnet.masks[name].sum()) / max(n, 1) for subnet in subnets)
            total += n
        return expected / max(total, 1.0)

    def _combined(self, name: str, combine: Any, lam: float | None, score_init: float | None) -> Subnet:
        members = self.group(lam, score_init)
        settings = members[0].settings
        group = {key: settings[key] for key in ("lam", "score_init")}
        row = next((r for r in self.shared if all(r[key] == group[key] for key in group)), {})
        masks = {
            weight: combine(torch.stack([run.subnet.masks[weight] for run in members]), dim=0)
            for weight in members[0].subnet.masks
        }
        provenance = {
            **base_of(*(run.subnet.provenance for run in members)), "method": f"{name} of discoveries",
            **group, "seeds": [run.settings["seed"] for run in members],
            "score": row.get(name),
        }  # fmt: skip
        return Subnet(masks, provenance, base_hash=members[0].subnet.base_hash)

    def at_density(
        self, density: float, *, seed: int | None = None, score_init: float | None = None
    ) -> Subnet:
        """The subnet of this density on one seed's path over penalties, by interpolation between its two neighbours.

        Let a and b be the path's members whose densities d_a <= density <= d_b lie nearest. Scores are mixed,
        ``s = (1 - t) * s_a + t * s_b`` with ``t = log(density/d_a) / log(d_b/d_a)`` (linear where d_a is 0), and the
        ``density * N`` largest of them over all N masked weights of all layers are kept (one beta serves all layers, so
        scores compare across them). At d_a and d_b this is a's and b's own subnet. Where one score governs several
        weights, whole units are kept, as many as come nearest. Equal scores go by their place.

        Args:
            density: the fraction of all masked weights to keep.
            seed, score_init: which path.

        Raises:
            ValueError: outside the densities that the path spans (nothing is extrapolated: add penalties), or only one
                penalty was trained.
        """
        seed = self._one("seed", seed)
        members = [
            i for i, run in enumerate(self.runs)
            if run.settings["seed"] == seed and run.settings["score_init"] == self._one("score_init", score_init)
        ]  # fmt: skip
        if self.scores is None or len(members) < 2:
            raise ValueError(
                "Discoveries.at_density: a path needs at least two penalties, there is one; set penalties=[...], or "
                "target_density="
            )
        path = sorted((self.runs[i].subnet.density(), i) for i in members)
        if not path[0][0] <= density <= path[-1][0]:
            raise ValueError(
                f"Discoveries.at_density: density must lie on the path, in [{path[0][0]:.4g}, {path[-1][0]:.4g}], got "
                f"{density}; add penalties"
            )
        below = max(pair for pair in path if pair[0] <= density)
        above = min(pair for pair in path if pair[0] >= density)
        t = _position(density, below[0], above[0])
        masks = self.runs[below[1]].subnet.masks
        low, high = self.scores[below[1]], self.scores[above[1]]
        mixed = {name: torch.lerp(low[name], high[name], t) for name in masks}
        kept = _keep_largest(mixed, {name: tuple(mask.shape) for name, mask in masks.items()}, density)
        of = [self.runs[i].settings for _, i in (below, above)]
        base = base_of(self.runs[below[1]].subnet.provenance)
        provenance = {**base, "method": "density on a path", "density": density, "between": of, "t": t}
        return Subnet(kept, provenance, base_hash=self.runs[below[1]].subnet.base_hash)

    # --- files -------------------------------------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write one subnet file per member, their scores and ``discoveries.json`` to a folder. Files of a result that
        was saved there before are replaced or removed, ``discoveries.json`` first and written last: a save that was
        killed is refused by :meth:`load`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for old in (folder / "discoveries.json", folder / _SCORES, *folder.glob("member_*.safetensors")):
            old.unlink(missing_ok=True)
        for i, run in enumerate(self.runs):
            run.subnet.save(folder / _file(i))
        if self.scores is not None:
            tensors = {f"{i}/{name}": s.contiguous() for i, its in enumerate(self.scores) for name, s in its.items()}
            save_tensors(folder / _SCORES, tensors)
        write_json(folder / "discoveries.json", {
            "format": _FORMAT, "histories": [run.history for run in self.runs], "best": [run.best for run in self.runs],
            "shared": self.shared, "has_scores": self.scores is not None,
        })  # fmt: skip

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Discoveries:
        """What :meth:`save` wrote.

        Raises:
            ValueError: a file is missing, damaged or of another format.
        """
        folder = Path(folder)
        facts = read_json(_existing(folder / "discoveries.json"))
        if not isinstance(facts, dict) or facts.get("format") != _FORMAT:
            raise ValueError(f"Discoveries.load: {folder / 'discoveries.json'} is not of format {_FORMAT!r}")
        runs = [
            Discovery(Subnet.load(_existing(folder / _file(i))), history, best)
            for i, (history, best) in enumerate(zip(facts["histories"], facts["best"], strict=True))
        ]
        scores = None
        if facts["has_scores"]:
            scores = [{} for _ in runs]
            for name, tensor in load_tensors(_existing(folder / _SCORES))[0].items():
                number, _, weight = name.partition("/")
                scores[int(number)][weight] = tensor
        return cls(runs, scores, facts["shared"])


def _file(number: int) -> str:
    return f"member_{number:03d}.safetensors"


def _existing(path: Path) -> Path:
    if not path.exists():
        raise ValueError(f"Discoveries.load: {path} is missing; pass a folder that Discoveries.save wrote")
    return path


def _iou(intersections: Tensor, sizes: Tensor) -> Tensor:
    unions = sizes[:, None] + sizes[None] - intersections
    return torch.where(unions > 0, intersections / unions.clamp(min=1e-300), 1.0)


def _position(density: float, low: float, high: float) -> float:
    if low == high:
        return 0.0
    if low == 0:
        return density / high
    return math.log(density / low) / math.log(high / low)


def _keep_largest(
    scores: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], density: float
) -> dict[str, Tensor]:
    """The units of largest score that together come nearest to ``density`` of all weights, expanded to weights."""
    flat = torch.cat([its.flatten() for its in scores.values()])
    weights = torch.cat(
        [torch.full((its.numel(),), weights_per_score(shapes[n], tuple(its.shape))) for n, its in scores.items()]
    )
    order = torch.argsort(flat, descending=True, stable=True)
    counts = torch.cat([torch.zeros(1), weights[order].double().cumsum(0)])
    num_units = int((counts - density * sum(map(math.prod, shapes.values()))).abs().argmin())
    kept = torch.zeros(len(flat), dtype=torch.bool)
    kept[order[:num_units]] = True
    parts = kept.split([its.numel() for its in scores.values()])
    return {
        name: expand_scores(part.view(its.shape), shapes[name])
        for (name, its), part in zip(scores.items(), parts, strict=True)
    }
