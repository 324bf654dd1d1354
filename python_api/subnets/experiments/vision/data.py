"""Which images each stage sees: generated ones, or folders of real ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from subnets.experiments.vision.config import VisionConfig
from subnets.experiments.vision.folders import (
    Entry,
    list_class_folders,
    list_cue_conflict,
    list_imagenet,
    split,
)
from subnets.experiments.vision.images import ImageSet
from subnets.experiments.vision.packing import pack
from subnets.experiments.vision.pooling import mean_pool, pool_folder
from subnets.experiments.vision.world import BOTH_CUES, Look, draw_scenes
from subnets.training.seeds import seed_for, torch_generator

KINDS = ("natural", "mean_pooled", "conflict")


class GeneratedData:
    """Scenes drawn when they are first asked for, every set from a seed of its own.

    Test sets show every object whole and textured, so that both cues are there to be judged; training images include
    plain objects and close-ups.
    """

    def __init__(self, config: VisionConfig) -> None:
        self.config = config

    @cached_property
    def base(self) -> ImageSet:
        """Natural images, for the base network."""
        return self._scenes(self.config.base_images, "base", Look())

    @cached_property
    def discovery(self) -> ImageSet:
        """Mean-pooled images, for discovery: no close-ups, whose shape can't be seen."""
        return self._pooled(self.config.discovery_images, "discovery", replace(Look(), close_up=0.0))

    @cached_property
    def discovery_held_out(self) -> ImageSet:
        """Mean-pooled images on which discovery chooses its best epoch."""
        return self._pooled(self.config.num_held_out, "held out", replace(Look(), **BOTH_CUES))

    @cached_property
    def tests(self) -> dict[str, ImageSet]:
        """KINDS -> images that nothing was trained or chosen on."""
        both, count = replace(Look(), **BOTH_CUES), self.config.num_held_out
        return {
            "natural": self._scenes(count, "test natural", both),
            "mean_pooled": self._pooled(count, "test pooled", both),
            "conflict": self._scenes(count, "test conflict", both, "conflict"),
        }

    def transfer(self, num_images: int, transfer_seed: int) -> ImageSet:
        """The natural training images of one transfer seed; fewer are the first of more, in whole chunks."""
        return self._scenes(num_images, f"transfer {transfer_seed}", Look())

    def sizes(self) -> tuple[int, ...]:
        """Numbers of training images that are run."""
        return self.config.sizes

    def _scenes(self, count: int, name: str, look: Look, cues: str = "natural") -> ImageSet:
        return self._draw(count, name, look, cues).images

    def _pooled(self, count: int, name: str, look: Look) -> ImageSet:
        scenes = self._draw(count, name, look, "natural")
        return replace(scenes.images, images=mean_pool(scenes.images.images, scenes.segments))

    def _draw(self, count: int, name: str, look: Look, cues: str):
        seed = seed_for(self.config.seed, "images", name)
        return draw_scenes(count, seed, cues, self.config.image_size, look)


@dataclass(frozen=True)
class _Listed:
    train: list[Entry]
    held_out: list[Entry]


class FolderData:
    """Real images: natural ones by synset or class, their mean-pooled twins, and a cue-conflict folder.

    Everything is listed and decoded once into `cache` before any training, so that a bad file is named at the start.
    Evaluation images are those of the 90/10 split by file name, the same for natural and mean-pooled ones; no training
    image of any stage is among them.
    """

    def __init__(self, config: VisionConfig, cache: Path, show: bool) -> None:
        assert config.images is not None and config.conflict is not None
        self.config, self.cache, self.show = config, cache, show
        self.conflicts = list_cue_conflict(Path(config.conflict))
        self.natural = _Listed(*split(_list(Path(config.images)), 0.9, config.seed))
        pooled = self._pooled_folder(Path(config.images))
        parts = split(_list(pooled), 0.9, config.seed, config.most_per_class)
        self.pooled = _Listed(*parts)
        _ = self.base, self.discovery, self.tests

    def _pooled_folder(self, source: Path) -> Path:
        """The user's mean-pooled folder, or one made now of at most `most_per_class` images a class."""
        if self.config.pooled is not None:
            return Path(self.config.pooled)
        train, held_out = split(_list(source), 0.9, self.config.seed, self.config.most_per_class)
        masks = None if self.config.masks is None else Path(self.config.masks)
        destination = self.cache / "mean-pooled"
        pool_folder(source, destination, entries=[*train, *held_out], masks=masks, progress=self.show)
        return destination

    def _packed(self, entries: list[Entry], name: str, crop: float = 224 / 256) -> ImageSet:
        return pack(entries, self.config.image_size, self.cache / name, crop=crop, progress=self.show)

    @cached_property
    def base(self) -> ImageSet:
        """All natural training images."""
        return self._packed(self.natural.train, "natural-train")

    @cached_property
    def discovery(self) -> ImageSet:
        """Mean-pooled training images but those of `discovery_held_out`."""
        return self._packed(split(self.pooled.train, 0.95, self.config.seed + 1)[0], "pooled-train")

    @cached_property
    def discovery_held_out(self) -> ImageSet:
        """A twentieth of the mean-pooled training images, on which discovery chooses its best epoch."""
        return self._packed(split(self.pooled.train, 0.95, self.config.seed + 1)[1], "pooled-held-out")

    @cached_property
    def tests(self) -> dict[str, ImageSet]:
        """KINDS -> images that nothing was trained or chosen on."""
        held_out = [entry for entry in self.natural.held_out]
        return {
            "natural": self._packed(held_out, "natural-test"),
            "mean_pooled": self._packed(self.pooled.held_out, "pooled-test"),
            "conflict": self._packed(self.conflicts, "conflict", crop=1.0),
        }

    def transfer(self, num_images: int, transfer_seed: int) -> ImageSet:
        """`num_images` of the natural training images in an order of this transfer seed; fewer are a part of more."""
        generator = torch_generator(self.config.seed, "images", "transfer", transfer_seed)
        return self.base.take(torch.randperm(len(self.base), generator=generator)[:num_images].sort().values)

    def sizes(self) -> tuple[int, ...]:
        """Numbers of training images that are run: those of the config that there are, or all."""
        total = len(self.base)
        beyond = [n for n in self.config.sizes if n > total]
        if beyond:
            raise ValueError(f"VisionConfig: sizes must be at most the {total} natural training images, got {beyond}")
        return self.config.sizes or (total,)


Data = GeneratedData | FolderData


def open_data(config: VisionConfig, cache: Path, show: bool) -> Data:
    """The images of a config; with folders they are listed, checked and packed into `cache` here."""
    return GeneratedData(config) if config.images is None else FolderData(config, cache, show)


def _list(folder: Path) -> list[Entry]:
    """ImageNet's layout if the folder has synsets, else folders named by class."""
    lister: Callable[..., list[Entry]] = list_class_folders
    if any(one.name[:1] == "n" and one.name[1:].isdigit() for one in folder.iterdir()):
        lister = list_imagenet
    return lister(folder)
