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
    parse_cue_conflict,
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
        self._transfer: dict[int, ImageSet] = {}

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
        """The first `num_images` of the natural training images of one transfer seed."""
        if transfer_seed not in self._transfer:  # runs of one seed follow each other: one set in memory is enough
            everything = self._scenes(max(self.config.sizes), f"transfer {transfer_seed}", Look())
            self._transfer = {transfer_seed: everything}
        return self._transfer[transfer_seed].take(range(num_images))

    def of_replicate(self, base_seed: int) -> GeneratedData:
        """The same images for every base network."""
        return self

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

    def of_replicate(self, base_seed: int) -> FolderData:
        """The same images for every base network."""
        return self

    def sizes(self) -> tuple[int, ...]:
        """Numbers of training images that are run: those of the config that there are, or all."""
        total = len(self.base)
        beyond = [n for n in self.config.sizes if n > total]
        if beyond:
            raise ValueError(f"VisionConfig: sizes must be at most the {total} natural training images, got {beyond}")
        return self.config.sizes or (total,)


class ConflictData:
    """Cue-conflict photographs alone, split so that nothing leaks.

    The images of Geirhos et al. pair 10 shape instances a class (airplane1 ... airplane10) with 3 texture instances a
    class. Fold f tests on the images whose instance numbers both leave the remainder f when divided by 3, and trains on
    those of which neither does; images that would share an instance with the other side are left out.

    The base learns the shape of the training images, discovery sees them mean-pooled. In transfer each training image
    is labelled by its shape or by its texture, drawn at random by the transfer seed: the labels leave open which cue
    counts. `tests` have shapes as classes throughout.
    """

    def __init__(self, config: VisionConfig, cache: Path, show: bool, fold: int = 0) -> None:
        assert config.conflict is not None
        self.config, self.cache, self.show, self.fold = config, cache, show, fold
        source, destination = Path(config.conflict), cache / "mean-pooled"
        entries = list_cue_conflict(source)
        masks = None if config.masks is None else Path(config.masks)
        pool_folder(source, destination, entries=entries, masks=masks, progress=show)
        pooled = [
            replace(one, path=(destination / one.path.relative_to(source)).with_suffix(".png")) for one in entries
        ]
        self.photographs = pack(entries, config.image_size, cache / "conflict", crop=1.0, progress=show)
        self.pooled = pack(pooled, config.image_size, cache / "conflict-pooled", crop=1.0, progress=show)
        cues = [parse_cue_conflict(one.path) for one in entries]
        number = [(_number(cue.shape_instance), _number(cue.texture_instance)) for cue in cues]
        in_fold = [(shape % 3 == fold % 3, texture % 3 == fold % 3) for shape, texture in number]
        self.test_rows = [i for i, (shape, texture) in enumerate(in_fold) if shape and texture]
        self.train_rows = [i for i, (shape, texture) in enumerate(in_fold) if not shape and not texture]
        if not self.test_rows or not self.train_rows:
            raise ValueError(
                f"VisionConfig: conflict={config.conflict} must hold instances that can be split, as airplane1-bear2, "
                f"airplane2-bear3; fold {fold % 3} leaves {len(self.train_rows)} images to train on and "
                f"{len(self.test_rows)} to test on"
            )

    def of_replicate(self, base_seed: int) -> ConflictData:
        """Another fold for another base network."""
        return self if base_seed == self.fold else ConflictData(self.config, self.cache, self.show, base_seed)

    @cached_property
    def base(self) -> ImageSet:
        """Training photographs, labelled by shape."""
        return self.photographs.take(self.train_rows)

    @cached_property
    def discovery(self) -> ImageSet:
        """The same, mean-pooled, but for every tenth."""
        return self.pooled.take([row for i, row in enumerate(self.train_rows) if i % 10])

    @cached_property
    def discovery_held_out(self) -> ImageSet:
        """Every tenth, mean-pooled: on them discovery chooses its best epoch."""
        return self.pooled.take(self.train_rows[::10])

    @cached_property
    def tests(self) -> dict[str, ImageSet]:
        """KINDS -> test photographs; "natural" and "conflict" are the same images here."""
        photographs = self.photographs.take(self.test_rows)
        return {
            "natural": photographs, "mean_pooled": self.pooled.take(self.test_rows), "conflict": photographs,
        }  # fmt: skip

    def transfer(self, num_images: int, transfer_seed: int) -> ImageSet:
        """Training photographs, each labelled by one of its two cues."""
        generator = torch_generator(self.config.seed, "images", "labels", transfer_seed)
        chosen = self.base.take(torch.randperm(len(self.base), generator=generator)[:num_images].sort().values)
        by_shape = torch.rand(len(chosen), generator=generator) < 0.5
        return replace(chosen, shape=torch.where(by_shape, chosen.shape, chosen.texture))

    def sizes(self) -> tuple[int, ...]:
        """Numbers of training images that are run; the smallest fold's number where the config has none."""
        return self.config.sizes or (len(self.base),)


Data = GeneratedData | FolderData | ConflictData


def open_data(config: VisionConfig, cache: Path, show: bool) -> Data:
    """The images of a config; with folders they are listed, checked and packed into `cache` here."""
    if config.images is not None:
        return FolderData(config, cache, show)
    return GeneratedData(config) if config.conflict is None else ConflictData(config, cache, show)


def _number(instance: str) -> int:
    """airplane10 -> 10"""
    return int("".join(letter for letter in instance if letter.isdigit()))


def _list(folder: Path) -> list[Entry]:
    """ImageNet's layout if the folder has synsets, else folders named by class."""
    lister: Callable[..., list[Entry]] = list_class_folders
    if any(one.name[:1] == "n" and one.name[1:].isdigit() for one in folder.iterdir()):
        lister = list_imagenet
    return lister(folder)
