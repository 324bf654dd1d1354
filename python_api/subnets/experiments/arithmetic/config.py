"""Every knob of the arithmetic experiment in one place, and its three presets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from subnets.experiments import knobs
from subnets.experiments.arithmetic.data import DISAMBIGUATION_SIZES
from subnets.experiments.knobs import Experiment, knob
from subnets.training.gpt2 import GPT2Shape

CONDITIONS = (
    "subnet",
    "full_model",
    "sampled",
    "random_init",
    "subnet_trainable",
    "sampled_complement",
    "sampled_as_published",
    "sampled_complement_as_published",
)
# Seven: the five curves that the paper shows per depth, the trainable subnet of its appendix, and the control that
# "sampled" was meant to be. Left out: `sampled_complement`, which it does not show and a dense subnet has no room for.
PUBLISHED_CONDITIONS = tuple(name for name in CONDITIONS if name != "sampled_complement")
INHERIT = ("unmasked", "none")


@dataclass(frozen=True)
class ArithmeticConfig(Experiment):
    """The exact recipe of the paper where nothing is changed; see `preset`."""

    known_conditions: ClassVar[tuple[str, ...]] = CONDITIONS

    preset: str = knob("paper", "name of the preset these values started from")
    layers: tuple[int, ...] = knob((4,), "depths to run, e.g. 2,4,6")
    inherit: str = knob("unmasked", "'unmasked': embeddings, norms and biases come from T1; 'none': fresh everywhere")
    conditions: tuple[str, ...] = knob(CONDITIONS, "which transfer conditions to train")
    sizes: tuple[int, ...] = knob(DISAMBIGUATION_SIZES, "numbers of disambiguation pairs n")
    transfer_seeds: int = knob(5, "transfer runs per condition and n on the first base network and its mask")
    transfer_seeds_at: tuple[int, ...] | None = knob(
        None, "with base_seeds > 1: depths at which the first base has transfer_seeds runs, elsewhere one; None = all"
    )

    width: int = knob(128, "width of the network")
    heads: int = knob(4, "attention heads")
    dropout: float = knob(0.1, "dropout while training the base and the transfer networks")

    base_pairs: int = knob(200_000, "T1 training pairs")
    base_epochs: int = knob(50, "most epochs on T1; training stops earlier at base_stop_at")
    base_batch: int = knob(50, "T1 batch")
    base_lr: float = knob(5e-4, "T1 rate")
    base_decay: bool = knob(True, "T1 rate falls linearly to 0 over base_epochs")
    base_weight_decay: float = knob(0.0, "AdamW weight decay on T1")
    base_beta2: float = knob(0.999, "AdamW second beta on T1")
    base_warmup: int = knob(0, "steps of linear warm-up on T1")
    base_dropout: float | None = knob(None, "dropout on T1 if another than `dropout`")
    base_evaluate_every: int = knob(0, "steps between evaluations on T1; 0 = once an epoch")
    base_stop_at: float = knob(1.0, "held-out accuracy at which T1 training stops")
    base_patience: int = knob(10, "epochs without gain after which T1 training stops")

    discovery_pairs: int = knob(50_000, "S1 training pairs")
    discovery_epochs: int = knob(50, "epochs of discovery; beta grows once an epoch")
    discovery_batch: int = knob(500, "S1 batch")
    discovery_lr: float | None = knob(None, "rate of the scores; None = 1e-3, and 2e-3 at 8 layers as published")
    lam: float = knob(1e-7, "penalty per unit of mask (raw sum over all masked weights)")
    score_init: float = knob(-0.1, "initial score")
    beta_end: float = knob(100.0, "beta after the last epoch")

    transfer_epochs: int = knob(100, "epochs on T2")
    transfer_batch: int = knob(50, "T2 batch")
    transfer_lr: float = knob(2e-4, "T2 rate")
    num_ambiguous: int = knob(1000, "ambiguous T2 pairs (a = b)")
    num_held_out: int = knob(1000, "pairs in each validation and test set")

    subnet_controls: int = knob(5, "size-matched random subnetworks that the S1 table compares with")
    stack: int | None = knob(
        None, "most networks trained side by side (changes speed and rounding only); None = by device and its memory"
    )

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            values = getattr(self, name)
            given = () if values is None else values if isinstance(values, tuple) else (values,)
            if any(value < 1 for value in given):
                raise ValueError(f"ArithmeticConfig: {name} must be at least 1, got {values}")
        for name in ("layers", "conditions", "sizes"):
            if not getattr(self, name) or len(set(getattr(self, name))) != len(getattr(self, name)):
                raise ValueError(f"ArithmeticConfig: {name} must list different values, got {getattr(self, name)}")
        unknown = [name for name in self.conditions if name not in self.known_conditions]
        if unknown:
            known = ", ".join(self.known_conditions)
            raise ValueError(f"ArithmeticConfig: conditions must be among {known}, got {unknown}")
        if self.inherit not in INHERIT:
            raise ValueError(f"ArithmeticConfig: inherit must be 'unmasked' or 'none', got {self.inherit!r}")
        if self.device not in (None, "cpu", "cuda"):
            raise ValueError(f"ArithmeticConfig: device must be 'cpu', 'cuda' or None, got {self.device!r}")
        if not 0.0 < self.base_stop_at <= 1.0:
            raise ValueError(f"ArithmeticConfig: base_stop_at must be in (0, 1], got {self.base_stop_at}")
        if min(self.sizes) < 0:
            raise ValueError(f"ArithmeticConfig: sizes must be at least 0, got {self.sizes}")
        for name in ("base_lr", "transfer_lr", "beta_end"):
            if not getattr(self, name) > 0:
                raise ValueError(f"ArithmeticConfig: {name} must be positive, got {getattr(self, name)}")
        if self.discovery_lr is not None and not self.discovery_lr > 0:
            raise ValueError(f"ArithmeticConfig: discovery_lr must be positive or None, got {self.discovery_lr}")
        self.shape(1)

    def shape(self, layers: int, *, dropout: float | None = None) -> GPT2Shape:
        """The network at one depth; `dropout` other than the config's for the base."""
        rate = self.dropout if dropout is None else dropout
        return GPT2Shape(layers=layers, width=self.width, heads=self.heads, dropout=rate)

    def seed_pairs(self, layers: int) -> list[tuple[int, int]]:
        """(base seed, transfer seed) of the runs of one condition and n at one depth; see `pairs_of_seeds`."""
        depths = self.transfer_seeds_at
        on_first = self.transfer_seeds if self.base_seeds == 1 or depths is None or layers in depths else 1
        return self.pairs_of_seeds(on_first)

    def discovery_rate(self, layers: int) -> float:
        """The rate of the scores at one depth."""
        if self.discovery_lr is not None:
            return self.discovery_lr
        return 2e-3 if layers == 8 else 1e-3


_POSITIVE = (
    "layers", "base_seeds", "transfer_seeds", "transfer_seeds_at", "width", "heads", "base_pairs", "base_epochs",
    "base_batch", "base_patience",
    "discovery_pairs", "discovery_epochs", "discovery_batch", "transfer_epochs", "transfer_batch", "num_ambiguous",
    "num_held_out", "subnet_controls", "stack",
)  # fmt: skip

# T1 without dropout and without decay of the rate: near accuracy 1 after 2,500 to 4,000 steps of 100 pairs instead of
# 12,000 to 36,000 of 50. Weight decay and a shorter second moment are faster still, but their networks transfer worse
# (docs/arithmetic.md).
_FAST_BASE: dict[str, Any] = {
    "base_epochs": 5,
    "base_batch": 100,
    "base_stop_at": 0.99,
    "base_decay": False,
    "base_warmup": 50,
    "base_dropout": 0.0,
    "base_evaluate_every": 100,
}

PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        **_FAST_BASE,
        "layers": (2,),
        "conditions": ("subnet", "full_model", "sampled", "random_init"),
        "sizes": (640, 1000),
        "transfer_seeds": 3,
        "discovery_pairs": 12_500,
        "discovery_epochs": 20,
        "discovery_batch": 250,
        "discovery_lr": 2e-3,
        "dropout": 0.0,
        "transfer_epochs": 15,
    },
    "standard": {
        "layers": (4,),
        "conditions": ("subnet", "full_model", "sampled", "random_init", "sampled_as_published"),
        "sizes": (100, 250, 640, 1000),
        "transfer_seeds": 3,
    },
    "paper": {
        "layers": (2, 4, 6, 8, 10, 12),
        "conditions": PUBLISHED_CONDITIONS,
        "base_seeds": 5,
        "transfer_seeds_at": (2, 12),
    },
}


def make_config(preset: str = "standard", overrides: dict[str, str] | None = None) -> ArithmeticConfig:
    """The preset with `overrides` (text as typed after --set) applied; see `knobs.make_config`."""
    return knobs.make_config(ArithmeticConfig, PRESETS, preset, overrides)
