"""The mask functions: one definition each of value, slope and penalty, in plain PyTorch.

With ``z = beta * s``:

========  =================  ==========================  ============  ==================
kind      value m            slope dm/ds                 penalty       penalty_slope
========  =================  ==========================  ============  ==================
sigmoid   sigmoid(z)         beta * m * sigmoid(-z)      m             slope
hard      1[s > 0]           0                           m             0
========  =================  ==========================  ============  ==================

Every kernel, in any language, is a translation of this page and is tested against it in fp64. ``1 - m`` is always
``sigmoid(-z)``: the subtraction would lose all digits where the mask is nearly one. A sigmoid below 2^-100, of z or of
-z, is 0: kept, it would make subnormal weights and gradients, which CPUs multiply a hundred times slower.

Source: continuous sparsification (Savarese, Silva, Maire, NeurIPS 2020, arXiv 1912.04427).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

NEGLIGIBLE = 2.0**-100


def _sigmoid(z: Tensor) -> Tensor:
    m = torch.sigmoid(z)
    return torch.where(m < NEGLIGIBLE, torch.zeros_like(m), m)


KINDS: dict[str, type[MaskKind]] = {}  # by name; defining a subclass of MaskKind adds it


@dataclass(frozen=True)
class MaskKind:
    """How a score becomes a mask value. A subclass has a ``name`` and four elementwise functions of (scores, beta)."""

    name: ClassVar[str]
    is_trainable: ClassVar[bool] = True

    def __init_subclass__(cls) -> None:
        KINDS[cls.name] = cls

    def params(self) -> list[float]:
        """The kind's numbers in field order, as op schemas carry them (``float[] params``)."""
        return [float(getattr(self, field.name)) for field in fields(self)]

    def value(self, scores: Tensor, beta: Tensor | float) -> Tensor:
        """The mask m of each score: scores' shape and dtype."""
        raise NotImplementedError

    def slope(self, scores: Tensor, beta: Tensor | float) -> Tensor:
        """dm/ds of each score."""
        raise NotImplementedError

    def penalty(self, scores: Tensor, beta: Tensor | float) -> Tensor:
        """What each score adds to the penalty for every weight that it governs; m, unless a kind says otherwise."""
        return self.value(scores, beta)

    def penalty_slope(self, scores: Tensor, beta: Tensor | float) -> Tensor:
        """The derivative of :meth:`penalty` in the score."""
        return self.slope(scores, beta)


@dataclass(frozen=True)
class Sigmoid(MaskKind):
    """m = sigmoid(beta * s): the soft mask of continuous sparsification."""

    name: ClassVar[str] = "sigmoid"

    def value(self, scores: Tensor, beta: Tensor | float) -> Tensor:
        return _sigmoid(beta * scores)

    def slope(self, scores: Tensor, beta: Tensor | float) -> Tensor:
        z = beta * scores
        return beta * (_sigmoid(z) * _sigmoid(-z))


@dataclass(frozen=True)
class Hard(MaskKind):
    """m = 1[s > 0]: the mask that is kept. A score of exactly 0 is out. Scores get no gradient."""

    name: ClassVar[str] = "hard"
    is_trainable: ClassVar[bool] = False

    def value(self, scores: Tensor, beta: Tensor | float) -> Tensor:
        return (scores > 0).to(scores.dtype)

    def slope(self, scores: Tensor, beta: Tensor | float) -> Tensor:
        return torch.zeros_like(scores)


def as_kind(kind: str | MaskKind, params: list[float] | None = None) -> MaskKind:
    """The mask kind of that name (a bare string stands for its defaults) or the object itself.

    Raises:
        ValueError: no kind has that name; the message lists those there are.
        TypeError: neither a string nor a MaskKind.
    """
    if isinstance(kind, MaskKind):
        return kind
    if not isinstance(kind, str):
        raise TypeError(f"kind must be a mask kind's name or a MaskKind, got {type(kind).__name__}")
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {sorted(KINDS)}, got {kind!r}")
    return KINDS[kind](*params or ())


# --- one score for several weights -----------------------------------------------------------------------------------


def group_sizes(weight_shape: tuple[int, ...], scores_shape: tuple[int, ...]) -> list[int]:
    """How many neighbouring weights one score governs along each dimension."""
    return [w // s if s else 1 for w, s in zip(weight_shape, scores_shape, strict=True)]


def weights_per_score(weight_shape: tuple[int, ...], scores_shape: tuple[int, ...]) -> int:
    """How many weights one score governs."""
    count = 1
    for size in group_sizes(weight_shape, scores_shape):
        count *= size
    return count


def split_groups(weight: Tensor, scores_shape: tuple[int, ...]) -> Tensor:
    """View of ``weight`` [W0, W1, ...] as [S0, W0/S0, S1, W1/S1, ...]; copies nothing."""
    groups = group_sizes(tuple(weight.shape), scores_shape)
    for dim in reversed(range(weight.dim())):
        weight = weight.unflatten(dim, (scores_shape[dim], groups[dim]))
    return weight


def join_groups(split: Tensor) -> Tensor:
    """Inverse of :func:`split_groups`."""
    for dim in range(split.dim() // 2):
        split = split.flatten(dim, dim + 1)
    return split


def expand_scores(per_score: Tensor, weight_shape: tuple[int, ...]) -> Tensor:
    """Repeat each entry of a scores-shaped tensor over the weights that it governs: [S...] -> [W...]."""
    if tuple(per_score.shape) == tuple(weight_shape):
        return per_score
    for dim, size in enumerate(group_sizes(tuple(weight_shape), tuple(per_score.shape))):
        if size != 1:
            per_score = per_score.repeat_interleave(size, dim)
    return per_score


def sum_to_scores(per_weight: Tensor, scores_shape: tuple[int, ...]) -> Tensor:
    """Sum a weight-shaped tensor over the weights of each score: [W...] -> [S...], the transpose of expand_scores."""
    if tuple(per_weight.shape) == tuple(scores_shape):
        return per_weight
    return split_groups(per_weight, scores_shape).sum(dim=tuple(range(1, 2 * per_weight.dim(), 2)))
