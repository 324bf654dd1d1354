"""Every knob of the vision experiment in one place, and its presets."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from subnets.experiments import knobs
from subnets.experiments.knobs import Experiment, knob
from subnets.experiments.vision.classifier_training import OPTIMIZERS
from subnets.experiments.vision.conditions import CONDITIONS, INHERIT
from subnets.experiments.vision.models import ARCHITECTURES, NetworkShape, colours_of

NORMS = ("frozen", "trained")
_COUNTS = (
    "base_seeds", "transfer_seeds", "base_epochs", "base_batch", "discovery_epochs", "discovery_batch",
    "transfer_epochs", "transfer_batch", "num_held_out", "most_per_class", "subnet_controls", "width", "patch", "depth",
    "heads",
)  # fmt: skip
_FOLDERS = ("images", "pooled", "masks", "conflict", "base_model")


@dataclass(frozen=True)
class VisionConfig(Experiment):
    """The paper's recipe where nothing is changed; see `preset`."""

    preset: str = knob("imagenet", "name of the preset these values started from")
    architecture: str = knob("resnet18", f"one of {', '.join(ARCHITECTURES)}")
    width: int = knob(64, "channels of the first ResNet stage (64: ResNet-18), or hidden size of the ViT")
    patch: int = knob(8, "of the ViT: pixels of a patch's side")
    depth: int = knob(6, "of the ViT: layers")
    heads: int = knob(4, "of the ViT: attention heads")
    image_size: int = knob(64, "pixels of an image's side")
    conditions: tuple[str, ...] = knob(CONDITIONS, "which transfer conditions to train")
    sizes: tuple[int, ...] = knob((), "numbers of natural training images n; empty (sizes=) = all there are")
    transfer_seeds: int = knob(3, "transfer runs per condition and n on the first base network and its mask")
    inherit: str = knob(
        "unmasked", "what a fresh network takes from the base beside the planted weights: 'unmasked' (as published): "
        "all that discovery does not mask; 'norms': norm layers, CLS and position embeddings; 'none'"
    )  # fmt: skip
    norms: str = knob("frozen", "'frozen' (as published): norm layers keep statistics and parameters; 'trained'")
    fresh_scale: float = knob(1.0, "fresh masked weights are transformers' own initial ones times this, everywhere")

    images: str | None = knob(None, "folder of natural images by synset or class; None = generated images")
    pooled: str | None = knob(None, "folder of their mean-pooled twins; None = made in the run folder")
    masks: str | None = knob(None, "folder of segment masks (SAM) for mean pooling; None = scikit-image")
    conflict: str | None = knob(
        None, "folder of cue-conflict images of the 16 classes: for evaluation, or (without images) all there is"
    )
    most_per_class: int = knob(1000, "with `images`: most mean-pooled images per class, as published")
    base_model: str | None = knob(None, "folder of a transformers checkpoint that is the base; its head is replaced")

    base_images: int = knob(0, "generated images that the base is trained on (with `images`: all)")
    base_epochs: int = knob(20, "epochs of the base; with base_model, of its new head alone")
    base_batch: int = knob(128, "batch of the base")
    base_lr: float = knob(1e-3, "rate of the base, AdamW, falling to 0 along a cosine")

    discovery_images: int = knob(0, "generated mean-pooled images for discovery (with `images`: most_per_class)")
    discovery_epochs: int = knob(100, "epochs of discovery; beta grows once an epoch")
    discovery_batch: int = knob(32, "batch of discovery")
    discovery_lr: float = knob(1e-3, "rate of the scores")
    lam: float = knob(1e-8, "penalty per unit of mask (raw sum over all masked weights)")
    score_init: float = knob(-0.1, "initial score")
    beta_end: float = knob(100.0, "beta after the last epoch")

    transfer_epochs: int = knob(20, "epochs on natural images (published: 20 for ResNet-18, 40 for ViT)")
    transfer_batch: int = knob(128, "batch on natural images")
    transfer_lr: float = knob(1e-3, "rate on natural images")
    transfer_optimizer: str = knob("sgd", "'sgd' with momentum .9 and weight decay 1e-4 (as published) or 'adamw'")
    transfer_decay: bool = knob(False, "the rate falls to 0 along a cosine")
    style: float = knob(0.5, "of `augmentation`: probability that an image gets style noise")
    num_held_out: int = knob(1024, "generated images in each validation and test set")
    subnet_controls: int = knob(3, "size-matched random subnetworks that the table of the base compares with")
    bf16: bool = knob(True, "forward passes under bf16 autocast")
    workers: int | None = knob(
        None, "on a CPU: processes that train transfer networks side by side, one thread each; None = one per core"
    )

    def __post_init__(self) -> None:
        for name in _COUNTS:
            self._check(name, getattr(self, name) >= 1, "at least 1")
        self._check("workers", self.workers is None or self.workers >= 1, "at least 1, or None")
        for name in ("base_lr", "discovery_lr", "transfer_lr", "fresh_scale"):
            self._check(name, getattr(self, name) > 0, "positive")
        self._check("beta_end", self.beta_end >= 1, "at least 1")
        self._check("lam", 0 <= self.lam < math.inf, "finite and at least 0")
        self._check("score_init", math.isfinite(self.score_init), "finite")
        self._check("style", 0 <= self.style <= 1, "in [0, 1]")
        self._check("sizes", len(set(self.sizes)) == len(self.sizes) and all(n >= 16 for n in self.sizes),
                    "different numbers of at least 16 images")  # fmt: skip
        unknown = [name for name in self.conditions if name not in CONDITIONS]
        self._check("conditions", bool(self.conditions) and not unknown, f"among {', '.join(CONDITIONS)}")
        for name, choices in (("inherit", INHERIT), ("norms", NORMS), ("transfer_optimizer", OPTIMIZERS)):
            self._check(name, getattr(self, name) in choices, f"one of {', '.join(choices)}")
        self._check("device", self.device in (None, "cpu", "cuda"), "'cpu', 'cuda' or None")
        if self.source == "generated":
            self._check("sizes", bool(self.sizes), "given where images are generated")
            for name in ("base_images", "discovery_images"):
                self._check(name, getattr(self, name) >= 16, "at least 16 where images are generated")
        elif self.source == "folders":
            self._check("conflict", self.conflict is not None, "a folder of cue-conflict images where images is given")
        needs_images = ("pooled", "base_model") if self.source == "conflict" else _FOLDERS[1:]
        for name in needs_images if self.source != "folders" else ():
            self._check(name, getattr(self, name) is None, "left out where images is not given")
        for name in _FOLDERS:
            folder = getattr(self, name)
            self._check(name, folder is None or Path(folder).is_dir(), "a folder that exists")
        frozen_fresh = self.norms == "frozen" and self.inherit == "none"
        self._check("norms", not frozen_fresh, "'trained' where inherit is 'none': fresh norms can't stay as they are")
        self.network()

    def _check(self, name: str, is_good: bool, expected: str) -> None:
        if not is_good:
            raise ValueError(f"VisionConfig: {name} must be {expected}, got {getattr(self, name)!r}")

    @property
    def source(self) -> str:
        """Where images come from: "generated", "folders" (`images` is given), "conflict" (`conflict` alone is)."""
        if self.images is not None:
            return "folders"
        return "generated" if self.conflict is None else "conflict"

    def network(self) -> NetworkShape:
        """The network that is trained and searched."""
        shape = NetworkShape(
            self.architecture, self.width, self.image_size, patch=self.patch, depth=self.depth, heads=self.heads
        )
        if self.base_model is None:
            return shape
        mean, std = colours_of(Path(self.base_model))
        return dataclasses.replace(shape, mean=mean, std=std)

    def seed_pairs(self) -> list[tuple[int, int]]:
        """(base seed, transfer seed) of the runs of one condition and n; see `pairs_of_seeds`."""
        return self.pairs_of_seeds(self.transfer_seeds)


# Generated images: networks with fresh norms, so that nothing but what is planted comes from the base.
_BUNDLED: dict[str, Any] = {
    "inherit": "none",
    "norms": "trained",
    "base_lr": 2e-3,
    "base_batch": 64,
    "discovery_batch": 64,
    "discovery_lr": 1e-2,
    "lam": 1e-7,
    "transfer_batch": 64,
    "transfer_optimizer": "adamw",
    "transfer_lr": 2e-3,
    "transfer_decay": True,
}

PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        **_BUNDLED,
        "width": 16,
        "conditions": ("subnet", "full_model", "sampled", "random_init"),
        "sizes": (512, 4096),
        "base_images": 8192,
        "base_epochs": 10,
        "discovery_images": 6144,
        "discovery_epochs": 8,
        "transfer_epochs": 6,
    },
    "standard": {
        **_BUNDLED,
        "width": 32,
        "sizes": (1024, 2048, 4096),
        "base_seeds": 3,
        "transfer_seeds": 1,
        "base_images": 8192,
        "base_epochs": 10,
        "discovery_images": 6144,
        "discovery_epochs": 8,
        "transfer_epochs": 6,
    },
    "imagenet": {"image_size": 224},
    "cue-conflict": {
        **_BUNDLED,
        "width": 16,
        "image_size": 96,
        "base_seeds": 3,
        "transfer_seeds": 1,
        "base_epochs": 30,
        "base_batch": 32,
        "discovery_epochs": 20,
        "discovery_batch": 32,
        "transfer_epochs": 20,
        "transfer_batch": 32,
    },
}


_NEEDED = {"imagenet": ("images", "conflict"), "cue-conflict": ("conflict",)}


def make_config(preset: str = "standard", overrides: dict[str, str] | None = None) -> VisionConfig:
    """The preset with `overrides` (text as typed after --set) applied; see `knobs.make_config`."""
    for name, folders in _NEEDED.items():
        missing = [f"--set {folder}=FOLDER" for folder in folders if folder not in (overrides or {})]
        if preset == name and missing:
            raise ValueError(f"make_config: preset {name!r} needs {' '.join(missing)}")
    config = knobs.make_config(VisionConfig, PRESETS, preset, overrides)
    folders = {name: getattr(config, name) for name in _FOLDERS}
    return dataclasses.replace(config, **{name: str(Path(at).resolve()) for name, at in folders.items() if at})
