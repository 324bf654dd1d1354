"""The mask functions: one definition each of value, slope and penalty, in plain PyTorch.

With ``z = beta * s``:

=============  =======================  ==============================  ===================  ==================
kind           value m                  slope dm/ds                     penalty              penalty_slope
=============  =======================  ==============================  ===================  ==================
sigmoid        sigmoid(z)               beta * m * sigmoid(-z)          m                    slope
hard           1[s > 0]                 0                               m                    0
gumbel         1[draw < threshold(z)]   beta * y * (1-y) / tau          z                    beta
bernoulli      1[draw < threshold(z)]   beta * p * (1-p)                p                    slope
hard_concrete  clip(c)                  beta * (zeta-gamma) * y * (1-y) P(m != 0)            its derivative
                                        / tau inside (0, 1), else 0
topk           1[abs(s) among the top]  sign(s)                         m                    0
threshold      1[s > at]                1                               m                    0
=============  =======================  ==============================  ===================  ==================

The kinds with a ``draw`` are sampled: 16 random bits for each score, as random.py makes them from a key and the score's
place, so that a backward pass can make a mask again. With ``u = (draw + 1/2) / 2^16`` and ``n = -logit(u)``, which is
logistic noise: ``y = sigmoid((z + n) / tau)``, ``p = sigmoid(z)``, ``c = y * (zeta - gamma) + gamma``, and
``threshold(z) = ceil(2^16 * p - 1/2)``: ``draw < threshold`` says ``u < p``, ``y > 1/2`` and ``z + n > 0`` alike. Their
slope is that of a surrogate, taken straight through the decision.

Every kernel, in any language, is a translation of this page and is tested against it in fp64. ``1 - m`` is always
``sigmoid(-z)``: the subtraction would lose all digits where the mask is nearly one. A sigmoid below 2^-100, of z or of
-z, is 0: kept, it would make subnormal weights and gradients, which CPUs multiply a hundred times slower.

Sources: sigmoid: continuous sparsification (Savarese, Silva, Maire, NeurIPS 2020, arXiv 1912.04427); gumbel: Csordas,
van Steenkiste, Schmidhuber (ICLR 2021, arXiv 2010.02066); bernoulli: supermasks (Zhou, Lan, Liu, Yosinski, NeurIPS
2019); hard_concrete: Louizos, Welling, Kingma (ICLR 2018); topk: edge-popup (Ramanujan et al., CVPR 2020); threshold:
Piggyback (Mallya, Davis, Lazebnik, ECCV 2018).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

NEGLIGIBLE = 2.0**-100


def _sigmoid(z: Tensor) -> Tensor:
    m = torch.sigmoid(z)
    return torch.where(m < NEGLIGIBLE, torch.zeros_like(m), m)


KINDS: dict[str, type[MaskKind]] = {}  # by name; defining a subclass of MaskKind adds it


@dataclass(frozen=True)
class MaskKind:
    """How a score becomes a mask value. A subclass has a ``name`` and four functions of (scores, beta)."""

    name: ClassVar[str]
    is_trainable: ClassVar[bool] = True
    is_sampled: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        if "name" in vars(cls):
            KINDS[cls.name] = cls

    def params(self) -> list[float]:
        """The kind's numbers in field order, as op schemas carry them (``float[] params``)."""
        return [float(getattr(self, each.name)) for each in fields(self) if each.name != "key"]

    @property
    def hard(self) -> MaskKind:
        """The kind of the binary mask that is kept: Hard, 1[s > 0], unless a kind says otherwise."""
        return HARD

    def soft_value(self, scores: Tensor, beta: Tensor | float) -> Tensor:
        """How sure a mask is: its value, or, where that is sampled, the probability that it is not 0."""
        return self.value(scores, beta)

    def rank(self, scores: Tensor) -> Tensor:
        """What a subnet's weights are ranked by: the larger, the sooner it is kept."""
        return scores

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


HARD = Hard()


@dataclass(frozen=True)
class Threshold(MaskKind):
    """m = 1[s > at], trained straight through: dm/ds = 1. Piggyback's mask; its scores begin at 1e-2.

    Args:
        at: above it a score is in.

    Raises:
        ValueError: ``at`` is not finite.
    """

    name: ClassVar[str] = "threshold"
    at: float = 5e-3

    def __post_init__(self) -> None:
        if not -math.inf < self.at < math.inf:
            raise ValueError(f"kind threshold: at must be finite, got {self.at}")

    @property
    def hard(self) -> MaskKind:
        return self

    def value(self, scores: Tensor, beta: Tensor | float) -> Tensor:
        return (scores > self.at).to(scores.dtype)

    def slope(self, scores: Tensor, beta: Tensor | float) -> Tensor:
        return torch.ones_like(scores)

    def penalty_slope(self, scores: Tensor, beta: Tensor | float) -> Tensor:
        return torch.zeros_like(scores)


def is_among_highest(values: Tensor, kept: float) -> Tensor:
    """Bool of values' shape: all but the ``int((1 - kept) * n)`` lowest; of equal ones the first go first."""
    flat = values.flatten()
    num_dropped = int((1 - kept) * flat.numel())
    if num_dropped == 0:
        return torch.ones_like(values, dtype=torch.bool)
    last = flat.kthvalue(num_dropped).values  # a selection: a sort takes ten times as long
    is_last = flat == last
    is_kept = (flat > last) | (is_last & (is_last.cumsum(0) > num_dropped - (flat < last).sum()))
    return is_kept.view(values.shape)


@dataclass(frozen=True)
class TopK(MaskKind):
    """m = 1 for the scores that are largest in size: all of a tensor but the ``int((1 - kept) * n)`` smallest; dm/ds =
    sign(s). Edge-popup's mask; of equal scores those that come first go first.

    Args:
        kept: the fraction of each tensor that stays.

    Raises:
        ValueError: ``kept`` is not in (0, 1].
    """

    name: ClassVar[str] = "topk"
    kept: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.kept <= 1:
            raise ValueError(f"kind topk: kept, the fraction of weights that stay, must be in (0, 1], got {self.kept}")

    @property
    def hard(self) -> MaskKind:
        return self

    def rank(self, scores: Tensor) -> Tensor:
        return scores.abs()

    def value(self, scores: Tensor, beta: Tensor | float) -> Tensor:
        return is_among_highest(scores.detach().abs(), self.kept).to(scores.dtype)

    def slope(self, scores: Tensor, beta: Tensor | float) -> Tensor:
        return scores.sign()

    def penalty_slope(self, scores: Tensor, beta: Tensor | float) -> Tensor:
        return torch.zeros_like(scores)


# --- sampled kinds ---------------------------------------------------------------------------------------------------

NUM_DRAWS = 2**16
MOST_SAMPLES = 4096  # of one layer; the samples of a model's layers lie that far apart


def keep_thresholds(scores: Tensor, beta: Tensor | float) -> Tensor:
    """``ceil(2^16 * sigmoid(beta*s) - 1/2)``, at most 2^16 - 1, as uint16 of scores' shape: a weight is kept where its
    draw is smaller. Kernels decide by comparing these integers, so that equal thresholds mean equal masks everywhere.
    """
    thresholds = torch.ceil(NUM_DRAWS * torch.sigmoid(beta * scores) - 0.5)
    return thresholds.clamp_(0, NUM_DRAWS - 1).to(torch.int32).to(torch.uint16)


def logistic_noise(draws: Tensor, dtype: torch.dtype) -> Tensor:
    """``n = -logit(u)`` of ``u = (draw + 1/2) / 2^16``: logistic(0, 1), rounded once from fp64."""
    u = (draws.to(torch.float64) + 0.5) / NUM_DRAWS
    return (torch.log1p(-u) - torch.log(u)).to(dtype)


@dataclass(frozen=True, kw_only=True)
class SampledKind(MaskKind):
    """A kind whose masks are drawn.

    Args:
        samples: masks that serve a batch, each a part of it: mask g the g-th 1/samples.
        sample: number of the first, by which draws with one key are told apart.
        key: int64 [seed, step], a tensor on the scores' device; ops and layers give it.
    """

    is_sampled: ClassVar[bool] = True
    samples: int = 1
    sample: int = 0
    key: Tensor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("samples", "sample"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or value != int(value):
                raise ValueError(f"kind {self.name}: {name} must be an int, got {value!r}")
            object.__setattr__(self, name, int(value))  # op schemas carry floats
        if not 1 <= self.samples <= MOST_SAMPLES:
            raise ValueError(f"kind {self.name}: samples must be from 1 to {MOST_SAMPLES}, got {self.samples}")
        if self.sample < 0:
            raise ValueError(f"kind {self.name}: sample must be at least 0, got {self.sample}")

    def at(self, key: Tensor, sample: int | None = None) -> Any:
        """The same with this key and, if given, first sample."""
        return replace(self, key=key, sample=self.sample if sample is None else sample)

    def each(self) -> list[Any]:
        """A kind of one sample for each of its samples."""
        return [replace(self, samples=1, sample=self.sample + g) for g in range(self.samples)]

    def draws(self, scores: Tensor) -> Tensor:
        """The 16 bits of each score, int32 of scores' shape."""
        from .random import random_bits  # which imports the backends, and they this

        if self.key is None:
            raise ValueError(f"kind {self.name} is sampled and needs a key: int64 [seed, step] on the scores' device")
        seed, step = self.key.unbind()
        bits = random_bits(seed, step, tuple(scores.shape), first_sample=self.sample)
        return bits[0].to(torch.int32)

    def noise(self, scores: Tensor) -> Tensor:
        """Logistic noise for each score."""
        return logistic_noise(self.draws(scores), scores.dtype)

    def soft_value(self, scores: Tensor, beta: Tensor | float) -> Tensor:
        return _sigmoid(beta * scores)

    def decided(self, scores: Tensor, beta: Tensor | float) -> Tensor:
        """1 where the draw says that the weight stays."""
        return (self.draws(scores) < keep_thresholds(scores, beta).to(torch.int32)).to(scores.dtype)


def _check_tau(name: str, tau: float) -> None:
    # math.isfinite would break a compiled graph
    if not isinstance(tau, (int, float)) or not 1e-6 <= tau < math.inf:
        raise ValueError(f"kind {name}: tau, the temperature, must be finite and > 0 (1e-6 at least), got {tau!r}")


@dataclass(frozen=True)
class Gumbel(SampledKind):
    """m = 1[z + n > 0] with logistic noise n; its slope is that of sigmoid((z + n)/tau), straight through. P(m = 1) =
    sigmoid(z) for every tau. The penalty is the sum of the logits z, which has no lower bound: with Adam it drives
    every logit that the loss does not hold down by one rate per step, for ever. Csordas's weight masks.

    Args:
        tau: the temperature of the slope.  samples, sample, key: see SampledKind.

    Raises:
        ValueError: tau is not finite and > 0; samples below 1.
    """

    name: ClassVar[str] = "gumbel"
    tau: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_tau(self.name, self.tau)

    def value(self, scores: Tensor, beta: Tensor | float) -> Tensor:
        return self.decided(scores, beta)

    def slope(self, scores: Tensor, beta: Tensor | float) -> Tensor:
        y = (beta * scores + self.noise(scores)) / self.tau
        return beta * (_sigmoid(y) * _sigmoid(-y)) / self.tau

    def penalty(self, scores: Tensor, beta: Tensor | float) -> Tensor:
        return beta * scores

    def penalty_slope(self, scores: Tensor, beta: Tensor | float) -> Tensor:
        return torch.ones_like(scores) * beta


@dataclass(frozen=True)
class Bernoulli(SampledKind):
    """m = 1 with probability p = sigmoid(z); its slope is that of p. Zhou's supermasks.

    Args:
        samples, sample, key: see SampledKind.

    Raises:
        ValueError: samples below 1.
    """

    name: ClassVar[str] = "bernoulli"

    def value(self, scores: Tensor, beta: Tensor | float) -> Tensor:
        return self.decided(scores, beta)

    def slope(self, scores: Tensor, beta: Tensor | float) -> Tensor:
        z = beta * scores
        return beta * (_sigmoid(z) * _sigmoid(-z))

    def penalty(self, scores: Tensor, beta: Tensor | float) -> Tensor:
        return _sigmoid(beta * scores)


@dataclass(frozen=True)
class HardConcrete(SampledKind):
    """m = clip(y * (zeta - gamma) + gamma, 0, 1) with y = sigmoid((z + n)/tau): 0 and 1 have probabilities of their
    own. The penalty is P(m != 0) = sigmoid(z - tau * ln(-gamma/zeta)), the expected L0 norm. What is kept is z > 0,
    where the mask without noise is above 1/2. Louizos's gates.

    Args:
        tau: the temperature.  gamma, zeta: to what the mask is stretched before it is clipped.
        samples, sample, key: see SampledKind.

    Raises:
        ValueError: tau is not finite and > 0; gamma is not below 0 or zeta not above 1.
    """

    name: ClassVar[str] = "hard_concrete"
    tau: float = 2 / 3
    gamma: float = -0.1
    zeta: float = 1.1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_tau(self.name, self.tau)
        if not (-math.inf < self.gamma < 0 and 1 < self.zeta < math.inf):
            raise ValueError(
                f"kind hard_concrete: needs gamma < 0 and zeta > 1, got {self.gamma} and {self.zeta}; else 0 or 1 is "
                "never reached"
            )

    def _stretched(self, y: Tensor) -> Tensor:
        return y * (self.zeta - self.gamma) + self.gamma

    def _noisy(self, scores: Tensor, beta: Tensor | float) -> Tensor:
        return (beta * scores + self.noise(scores)) / self.tau

    def _nonzero_logit(self, scores: Tensor, beta: Tensor | float) -> Tensor:
        return beta * scores - self.tau * math.log(-self.gamma / self.zeta)

    def value(self, scores: Tensor, beta: Tensor | float) -> Tensor:
        return self._stretched(_sigmoid(self._noisy(scores, beta))).clamp(0, 1)

    def slope(self, scores: Tensor, beta: Tensor | float) -> Tensor:
        y = self._noisy(scores, beta)
        stretched = self._stretched(_sigmoid(y))
        inside = (stretched > 0) & (stretched < 1)
        return inside * (beta * (self.zeta - self.gamma) / self.tau) * (_sigmoid(y) * _sigmoid(-y))

    def penalty(self, scores: Tensor, beta: Tensor | float) -> Tensor:
        return _sigmoid(self._nonzero_logit(scores, beta))

    def penalty_slope(self, scores: Tensor, beta: Tensor | float) -> Tensor:
        z = self._nonzero_logit(scores, beta)
        return beta * (_sigmoid(z) * _sigmoid(-z))

    def mean_value(self, scores: Tensor, beta: Tensor | float) -> Tensor:
        """The mask without noise, the authors' at test time: clip(sigmoid(z) * (zeta - gamma) + gamma, 0, 1)."""
        return self._stretched(_sigmoid(beta * scores)).clamp(0, 1)


def as_kind(kind: str | MaskKind, params: list[float] | None = None, key: Tensor | None = None) -> MaskKind:
    """The mask kind of that name (a bare string stands for its defaults) or the object itself; a sampled one with the
    key, if there is one.

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
    cls = KINDS[kind]
    if params:
        names = [each.name for each in fields(cls) if each.name != "key"]
        made = cls(**dict(zip(names, params)))
    else:  # torch.compile can't look at a class's fields
        made = cls()
    return made if key is None or not isinstance(made, SampledKind) else made.at(key)


def is_sampled(kind: str) -> bool:
    """Whether the kind of that name is drawn."""
    return KINDS[kind].is_sampled


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
