"""Methods that train masks over frozen weights, each with its authors' numbers: what ``discover(method=...)`` takes.

A method is a frozen dataclass of the numbers that make it, and gives a DiscoveryConfig; :data:`METHODS` has them by
name. docs/mask_methods.md has all of them in one table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

from torch import Tensor

from subnet_kernels.masks import Bernoulli, Gumbel, Hard, HardConcrete, MaskKind, Sigmoid, Threshold, TopK

from .config import SGD, DiscoveryConfig


@dataclass(frozen=True)
class Method:
    """How masks are trained. A subclass says it by :meth:`settings`.

    Attributes:
        name: what a subnet's provenance calls it.
        epochs: how long its authors train, for :func:`subnets.discover` without config.
    """

    name: ClassVar[str]
    epochs: ClassVar[int] = 50

    def settings(self) -> dict[str, Any]:
        """The fields of a DiscoveryConfig that make the method."""
        raise NotImplementedError

    def config(self, base: DiscoveryConfig | None = None, **changes: Any) -> DiscoveryConfig:
        """``base`` (None: defaults, and the authors' epochs) with the method's settings, and ``changes`` of the rest.

        Raises:
            ValueError: base or changes set what the method sets.
        """
        settings = self.settings()
        defaults = DiscoveryConfig()
        asked = {} if base is None else {name: getattr(base, name) for name in settings}
        set_twice = [
            name for name, value in settings.items()
            if name in changes or (name in asked and asked[name] not in (getattr(defaults, name), value))
        ]  # fmt: skip
        if set_twice:
            raise ValueError(
                f"{type(self).__name__}: {', '.join(set_twice)} of the config are the method's to set; leave them out "
                f"there and change the method's own numbers ({', '.join(its.name for its in fields(self))})"
            )
        base = replace(defaults, epochs=self.epochs) if base is None else base
        return replace(base, **{**settings, **changes})

    def _check_positive(self, *names: str, or_zero: bool = False) -> None:
        for name in names:
            value = getattr(self, name)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not is_number or value < 0 or (value == 0 and not or_zero):
                least = ">= 0" if or_zero else "> 0"
                raise ValueError(f"{type(self).__name__}: {name} must be finite and {least}, got {value!r}")


@dataclass(frozen=True)
class RescaledSigmoid(Sigmoid):
    """m = scale * sigmoid(beta*s), hard scale * 1[s > 0]: with scale = 1/sigmoid(s0) the network at beta 1 is the one
    without mask, and kept weights are multiplied by scale in the hard one too. So is the penalty.

    Raises:
        ValueError: scale is not finite and > 0.
    """

    name: ClassVar[str] = "rescaled_sigmoid"
    scale: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise ValueError(f"kind rescaled_sigmoid: scale must be finite and > 0, got {self.scale}")

    @property
    def hard(self) -> MaskKind:
        return RescaledHard(self.scale)

    def soft_value(self, scores: Tensor, beta: Tensor | float) -> Tensor:
        return Sigmoid().value(scores, beta)

    def value(self, scores: Tensor, beta: Tensor | float) -> Tensor:
        return self.scale * super().value(scores, beta)

    def slope(self, scores: Tensor, beta: Tensor | float) -> Tensor:
        return self.scale * super().slope(scores, beta)


@dataclass(frozen=True)
class RescaledHard(Hard):
    """m = scale * 1[s > 0]."""

    name: ClassVar[str] = "rescaled_hard"
    scale: float = 2.0

    def value(self, scores: Tensor, beta: Tensor | float) -> Tensor:
        return self.scale * super().value(scores, beta)


@dataclass(frozen=True)
class ContinuousSparsification(Method):
    """m = sigmoid(beta*s), beta grows from 1 to 200 in each round; s is reset between rounds; the subnet is {s > 0}.

    ``beta_e = beta_end^(e/(epochs-1))`` in epoch e of a round. The authors train the weights along, which is
    :func:`subnets.methods.ticket_search`; here, as in Lepori et al., they are frozen.

    Args:
        rounds, reset: see DiscoveryConfig; the authors' paper and code differ in the reset.
        score_init: s0. A larger one keeps more.
        optimizer, lr, lr_schedule: of the scores.
        lam: weight of the sum of the mask.
        beta_end, beta_schedule: the end of beta, and whether the last epoch runs at it ("reach_end").
        rescale: w_eff = w * m / sigmoid(s0), as the authors' code has it: at the start the network is the unmasked one.
            Kept weights stay multiplied by 1/sigmoid(s0), so a Subnet found so fits the scaled network.

    Raises:
        ValueError: rounds below 1, or a number out of range.

    Source: Savarese, Silva, Maire, NeurIPS 2020 (arXiv 1912.04427); lolemacs/continuous-sparsification, main.py.
    """

    name: ClassVar[str] = "continuous_sparsification"
    epochs: ClassVar[int] = 85
    rounds: int = 3
    reset: str = "paper"
    score_init: float = 0.0
    optimizer: SGD | None = field(default_factory=lambda: SGD(0.9, nesterov=True))
    lr: float = 0.1
    lr_schedule: str | tuple[float, ...] = (56 / 85, 71 / 85)
    lam: float = 1e-8
    beta_end: float = 200.0
    beta_schedule: str = "reach_end"
    rescale: bool = False

    def __post_init__(self) -> None:
        self.config()

    @property
    def kind(self) -> MaskKind:
        """Of its masks."""
        return RescaledSigmoid(1 + math.exp(-self.score_init)) if self.rescale else Sigmoid()

    def settings(self) -> dict[str, Any]:
        names = ("rounds", "reset", "score_init", "optimizer", "lr", "lr_schedule", "lam", "beta_end", "beta_schedule")
        return {
            "kind": self.kind if self.rescale else "sigmoid", "weight_decay": 0.0, "beta_start": 1.0,
            **{name: getattr(self, name) for name in names},
        }  # fmt: skip


@dataclass(frozen=True)
class Lepori(ContinuousSparsification):
    """Continuous sparsification over frozen weights as in Break It Down: one round, Adam, beta_e = 200^((e+1)/epochs).

    The authors raise beta once before training starts, so that epoch e runs at 200^((e+1)/90). They choose lr from
    {1e-2, 1e-4} and score_init from {.1, .05, 0, -.05} on validation data.

    Source: Lepori, Serre, Pavlick, NeurIPS 2023; mlepori1/Compositional_Subnetworks.
    """

    name: ClassVar[str] = "lepori"
    epochs: ClassVar[int] = 90
    rounds: int = 1
    optimizer: SGD | None = None
    lr: float = 1e-2
    lr_schedule: str | tuple[float, ...] = "constant"
    beta_schedule: str = "before_epoch"


@dataclass(frozen=True)
class Csordas(Method):
    """Differentiable weight masks: binary samples m = 1[l + logistic noise > 0], gradient of sigmoid((l + noise)/tau)
    straight through, ``samples`` masks per batch, penalty = sum of the logits l; the subnet is {l > 0}.

    Args:
        mask_loss_weight, batch_size: the penalty's weight is their quotient, as in the authors' code. They take 1e-4
            for addition and multiplication, 2e-5 to 1.28e-3 elsewhere, and batches of 128 or 256.
        score_init: the initial logit; sigmoid(2) = .88 is the probability to be kept.
        tau, samples: temperature, and masks per batch, each of which serves a contiguous part of it.
        lr, clip_norm: Adam's rate, and the largest norm of its gradient.

    They train for 20,000 steps per mask.

    Raises:
        ValueError: tau <= 0, samples below 1, or another number out of range.

    Source: Csordas, van Steenkiste, Schmidhuber, ICLR 2021 (arXiv 2010.02066); RobertCsordas/modules.
    """

    name: ClassVar[str] = "csordas"
    mask_loss_weight: float = 1e-4
    batch_size: int = 128
    score_init: float = 2.0
    tau: float = 1.0
    samples: int = 4
    lr: float = 1e-2
    clip_norm: float | None = 1.0

    def __post_init__(self) -> None:
        self._check_positive("mask_loss_weight", or_zero=True)
        self._check_positive("batch_size")
        self.config()

    def settings(self) -> dict[str, Any]:
        return {
            "kind": Gumbel(tau=self.tau, samples=self.samples), "score_init": self.score_init, "lr": self.lr,
            "weight_decay": 0.0, "lam": self.mask_loss_weight / self.batch_size, "clip_norm": self.clip_norm,
            "beta_start": 1.0, "beta_end": 1.0,
        }  # fmt: skip


@dataclass(frozen=True)
class HardConcreteGates(Method):
    """L0: gates z = clip(stretched concrete sample, 0, 1) over input units or filters, penalty = sum of P(z != 0); what
    is kept is {log alpha > 0}, where the gate without noise is above 1/2.

    Args:
        drop_rate: p; log alpha begins at N(ln((1-p)/p), init_std^2).
        score_range: what log alpha is clamped to.
        l0: lambda of each weight.  num_examples: N, by which the authors divide it. lam = l0 / N.
        unit: "gates" is one gate per input unit of a linear layer and one per filter of a convolution; or any unit of
            mask_model.
        tau, lr: temperature, and Adam's rate.

    The authors add 5e-4/2 * w^2 to a gate's penalty, which weighs trained weights; frozen ones are left out of it. At
    test time they multiply by the gate without noise; a Subnet is binary.

    Raises:
        ValueError: tau <= 0, drop_rate outside (0, 1), or another number out of range.

    Source: Louizos, Welling, Kingma, ICLR 2018 (arXiv 1712.01312); AMLab-Amsterdam/L0_regularization, train_lenet5.py.
    """

    name: ClassVar[str] = "hard_concrete"
    epochs: ClassVar[int] = 200
    drop_rate: float = 0.5
    init_std: float = 0.01
    score_range: tuple[float, float] = (math.log(0.01), math.log(100))
    l0: float = 1.0
    num_examples: int = 60_000
    unit: str | tuple[int, ...] = "gates"
    tau: float = 2 / 3
    lr: float = 1e-3

    def __post_init__(self) -> None:
        self._check_positive("l0", or_zero=True)
        self._check_positive("num_examples")
        if not 0 < self.drop_rate < 1:
            raise ValueError(f"HardConcreteGates: drop_rate must be in (0, 1), got {self.drop_rate}")
        self.config()

    def settings(self) -> dict[str, Any]:
        return {
            "kind": HardConcrete(tau=self.tau), "unit": self.unit, "lr": self.lr, "weight_decay": 0.0,
            "score_init": math.log((1 - self.drop_rate) / self.drop_rate), "score_init_std": self.init_std,
            "score_range": self.score_range, "lam": self.l0 / self.num_examples, "beta_start": 1.0, "beta_end": 1.0,
        }  # fmt: skip


@dataclass(frozen=True)
class EdgePopup(Method):
    """m = 1 for the fraction ``kept`` of each layer's scores that is largest in size, dm/ds = sign(s); no penalty. Over
    random weights: kaiming normal, or of one size per layer, see :func:`subnets.methods.signed_constant_`.

    Args:
        kept: k, the fraction of each layer that is kept.
        lr, momentum, weight_decay: of SGD; the rate falls along a cosine, epoch by epoch.

    Raises:
        ValueError: kept outside (0, 1], or another number out of range.

    Source: Ramanujan et al., CVPR 2020; allenai/hidden-networks, whose ``prune_rate`` is the fraction kept.
    """

    name: ClassVar[str] = "edge_popup"
    epochs: ClassVar[int] = 100
    kept: float = 0.5
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        self.config()

    def settings(self) -> dict[str, Any]:
        return {
            "kind": TopK(kept=self.kept), "init": "kaiming_uniform", "score_init": 0.0, "lam": 0.0,
            "optimizer": SGD(self.momentum), "lr": self.lr, "lr_schedule": "cosine", "weight_decay": self.weight_decay,
            "beta_start": 1.0, "beta_end": 1.0,
        }  # fmt: skip


@dataclass(frozen=True)
class LearnedSupermask(Method):
    """m = 1 with probability sigmoid(v), gradient of sigmoid straight through; no penalty; the subnet is {v > 0}. The
    authors draw a mask at test time too. Masks without training: :func:`subnets.methods.supermask`.

    Args:
        score_init: v at the start.  lr, momentum: of SGD.  samples: masks per batch.

    Raises:
        ValueError: a number out of range.

    Source: Zhou, Lan, Liu, Yosinski, NeurIPS 2019 (arXiv 1905.01067); uber-research/deconstructing-lottery-tickets.
    """

    name: ClassVar[str] = "supermask"
    epochs: ClassVar[int] = 2000
    score_init: float = 0.0
    lr: float = 100.0
    momentum: float = 0.9
    samples: int = 1

    def __post_init__(self) -> None:
        self.config()

    def settings(self) -> dict[str, Any]:
        return {
            "kind": Bernoulli(samples=self.samples), "score_init": self.score_init, "optimizer": SGD(self.momentum),
            "lr": self.lr, "weight_decay": 0.0, "lam": 0.0, "beta_start": 1.0, "beta_end": 1.0,
        }  # fmt: skip


@dataclass(frozen=True)
class Piggyback(Method):
    """m = 1[r > threshold], dm/dr = 1; no penalty: at the start the network is the pretrained one, and a weight goes
    once its r has fallen by score_init - threshold, which takes Adam 50 steps or more.

    Args:
        threshold, score_init: of r.  lr, lr_schedule: of Adam; a tenth of the rate after half of the run.

    Raises:
        ValueError: a number out of range.

    Source: Mallya, Davis, Lazebnik, ECCV 2018 (arXiv 1801.06519); arunmallya/piggyback.
    """

    name: ClassVar[str] = "piggyback"
    epochs: ClassVar[int] = 30
    threshold: float = 5e-3
    score_init: float = 1e-2
    lr: float = 1e-4
    lr_schedule: str | tuple[float, ...] = (0.5,)

    def __post_init__(self) -> None:
        self.config()

    def settings(self) -> dict[str, Any]:
        return {
            "kind": Threshold(self.threshold), "score_init": self.score_init, "lr": self.lr,
            "lr_schedule": self.lr_schedule, "weight_decay": 0.0, "lam": 0.0, "beta_start": 1.0, "beta_end": 1.0,
        }  # fmt: skip


METHODS: dict[str, Method] = {
    "continuous_sparsification": ContinuousSparsification(),
    "continuous_sparsification_code": ContinuousSparsification(reset="code", rescale=True),
    "lepori": Lepori(),
    "csordas": Csordas(),
    "hard_concrete": HardConcreteGates(),
    "edge_popup": EdgePopup(),
    "supermask": LearnedSupermask(),
    "piggyback": Piggyback(),
}


def method_of(method: str | Method) -> Method:
    """The method of that name, or the object itself.

    Raises:
        ValueError: no method has that name; the message lists those there are.
        TypeError: neither a string nor a Method.
    """
    if isinstance(method, Method):
        return method
    if not isinstance(method, str):
        raise TypeError(f"discover: method must be a method's name or a Method, got {method!r}")
    if method not in METHODS:
        raise ValueError(f"discover: method must be one of {sorted(METHODS)} or a Method, got {method!r}")
    return METHODS[method]
