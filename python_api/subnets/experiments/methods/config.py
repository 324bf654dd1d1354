"""Every knob of the comparison of methods: those of the arithmetic experiment, whose network it is, and a few more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from subnets.experiments import knobs
from subnets.experiments.arithmetic.config import PRESETS as ARITHMETIC
from subnets.experiments.arithmetic.config import ArithmeticConfig
from subnets.experiments.knobs import knob

MASK_METHODS = ("continuous_sparsification", "csordas", "hard_concrete", "edge_popup", "supermask", "piggyback")
WEIGHT_METHODS = ("magnitude_pruning", "sparse_finetuning")
UNTRAINED = ("clusters", "magnitude", "random")
METHODS = (*MASK_METHODS, *WEIGHT_METHODS, *UNTRAINED)
BASELINES = ("full_model", "random_init")  # transfer conditions without a subnet


@dataclass(frozen=True)
class MethodsConfig(ArithmeticConfig):
    """The arithmetic experiment's knobs, of which lam, score_init, beta_end and discovery_lr are those of continuous
    sparsification, and the other methods' own; rates default to their authors'."""

    known_conditions: ClassVar[tuple[str, ...]] = (*METHODS, *BASELINES)

    layers: tuple[int, ...] = knob((2,), "depth of the T1 network; one")
    conditions: tuple[str, ...] = knob((*METHODS, *BASELINES), "methods to compare, and baselines of the transfer")
    density: float = knob(0.2, "fraction of the masked weights at which subnets are compared")
    mask_seeds: int = knob(3, "runs of each method; subnets of the first are planted")
    csordas_lr: float = knob(1e-2, "rate of Csordas's masks (Adam)")
    csordas_samples: int = knob(4, "masks per batch of Csordas's; divides discovery_batch")
    hard_concrete_lr: float = knob(1e-3, "rate of hard-concrete masks (Adam)")
    edge_popup_lr: float = knob(0.1, "rate of edge-popup's scores (SGD)")
    supermask_lr: float = knob(100.0, "rate of supermasks (SGD)")
    piggyback_lr: float = knob(1e-4, "rate of Piggyback's masks (Adam)")
    finetune_lr: float = knob(5e-4, "rate of weights, where a method trains those on S1 (AdamW)")
    pruning_rounds: int = knob(3, "rounds of iterative magnitude pruning")
    num_clusters: int = knob(12, "spectral clusters of each block's MLP")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("layers", "base_seeds"):
            value = getattr(self, name)
            if value != 1 and (not isinstance(value, tuple) or len(value) != 1):
                raise ValueError(f"MethodsConfig: {name} must be one, got {value}: methods share one network")
        if not 0 < self.density < 1:
            raise ValueError(f"MethodsConfig: density must be in (0, 1), got {self.density}")
        for name in ("mask_seeds", "csordas_samples", "pruning_rounds", "num_clusters"):
            if getattr(self, name) < 1:
                raise ValueError(f"MethodsConfig: {name} must be at least 1, got {getattr(self, name)}")
        for name in (each for each in type(self).__dataclass_fields__ if each.endswith("_lr")):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"MethodsConfig: {name} must be positive, got {getattr(self, name)}")
        if self.discovery_pairs % self.discovery_batch or self.discovery_batch % self.csordas_samples:
            raise ValueError(
                "MethodsConfig: discovery_batch must divide discovery_pairs and be a multiple of csordas_samples, got "
                f"{self.discovery_batch}, {self.discovery_pairs} and {self.csordas_samples}"
            )
        if self.discovery_epochs < self.pruning_rounds + 1:
            raise ValueError(
                f"MethodsConfig: discovery_epochs must be at least pruning_rounds + 1 = {self.pruning_rounds + 1}, "
                f"got {self.discovery_epochs}: each round trains its share of them"
            )
        if not self.methods():
            raise ValueError(f"MethodsConfig: conditions must hold a method, one of {', '.join(METHODS)}")
        if "random" in self.conditions and self.methods()[0] == "random":
            raise ValueError("MethodsConfig: 'random' takes its layer sizes from the first method; list one before it")

    def methods(self) -> list[str]:
        """The methods that are compared."""
        return [name for name in self.conditions if name in METHODS]


# The network of `subnets run arithmetic --preset quick`, and 600 steps of 100 pairs for each method.
# Rates are raised so that so few steps move scores as far as the authors' many; each was tried at two or three values.
_QUICK: dict[str, Any] = {
    **{name: value for name, value in ARITHMETIC["quick"].items() if name not in ("conditions", "transfer_seeds")},
    "discovery_pairs": 5_000,
    "discovery_epochs": 12,
    "discovery_batch": 100,
    "discovery_lr": 5e-3,
    "csordas_lr": 0.1,
    "hard_concrete_lr": 0.1,
    "edge_popup_lr": 1.0,
    "supermask_lr": 2000.0,
    "piggyback_lr": 1e-3,
    "mask_seeds": 2,
    "sizes": (250, 640),
    "transfer_seeds": 1,
}

PRESETS: dict[str, dict[str, Any]] = {
    "quick": _QUICK,
    "standard": {
        "sizes": (100, 250, 640, 1000),
        "transfer_seeds": 3,
    },
}


def make_config(preset: str = "standard", overrides: dict[str, str] | None = None) -> MethodsConfig:
    """The preset with `overrides` (text as typed after --set) applied; see `knobs.make_config`."""
    return knobs.make_config(MethodsConfig, PRESETS, preset, overrides)
