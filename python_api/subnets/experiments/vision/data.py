"""Which images each stage sees: generated ones, or folders of real ones."""

from __future__ import annotations

from collections.abc import Sequence
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
    refuse,
    split,
)
from subnets.experiments.vision.images import ImageSet
from subnets.experiments.vision.packing import pack
from subnets.experiments.vision.pooling import mean_pool, pool_folder
from subnets.experiments.vision.world import BOTH_CUES, Look, draw_scenes
from subnets.training.seeds import seed_for, torch_generator

KINDS = ("natural", "mean_pooled", "conflict")
_FOLDS = 3  # of cue-conflict photographs: as many as there are texture instances of a class


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
        source = Path(config.images)
        entries = _list(source)
        self.natural = _Listed(*split(entries, 0.9, config.seed))
        self.pooled = self._split_pooled(self._pooled_folder(source, entries))
        self._discovery = _Listed(*split(self.pooled.train, 0.95, config.seed + 1))
        _ = self.base, self.discovery, self.discovery_held_out, self.tests

    def _pooled_folder(self, source: Path, entries: list[Entry]) -> Path:
        """The user's mean-pooled folder, or one made now of at most `most_per_class` images a class."""
        if self.config.pooled is not None:
            return Path(self.config.pooled)
        train, held_out = split(entries, 0.9, self.config.seed, self.config.most_per_class)
        masks = None if self.config.masks is None else Path(self.config.masks)
        destination = self.cache / "mean-pooled"
        pool_folder(source, destination, entries=[*train, *held_out], masks=masks, progress=self.show)
        return destination

    def _split_pooled(self, folder: Path) -> _Listed:
        """Mean-pooled images, each on the side of its natural twin: same class, same name but for the suffix."""
        sides = {(one.shape, one.path.stem): "train" for one in self.natural.train}
        sides |= {(one.shape, one.path.stem): "held out" for one in self.natural.held_out}
        entries = _list(folder, complete=False)
        strangers = [one.name for one in entries if (one.shape, one.path.stem) not in sides]
        if strangers:
            twins = f"mean-pooled twins, by class and name, of the images in {self.config.images}"
            refuse("VisionConfig: pooled", folder, strangers, twins)
        chosen = [one for part in split(entries, 0.9, self.config.seed, self.config.most_per_class) for one in part]
        of_side = {side: [one for one in chosen if sides[one.shape, one.path.stem] == side] for side in sides.values()}
        return _Listed(of_side["train"], of_side["held out"])

    def _packed(self, entries: list[Entry], name: str, crop: float = 224 / 256) -> ImageSet:
        return pack(entries, self.config.image_size, self.cache / name, crop=crop, progress=self.show)

    @cached_property
    def base(self) -> ImageSet:
        """All natural training images."""
        return self._packed(self.natural.train, "natural-train")

    @cached_property
    def discovery(self) -> ImageSet:
        """Mean-pooled training images but those of `discovery_held_out`."""
        return self._packed(self._discovery.train, "pooled-train")

    @cached_property
    def discovery_held_out(self) -> ImageSet:
        """A twentieth of the mean-pooled training images, on which discovery chooses its best epoch."""
        return self._packed(self._discovery.held_out, "pooled-held-out")

    @cached_property
    def tests(self) -> dict[str, ImageSet]:
        """KINDS -> images that nothing was trained or chosen on."""
        return {
            "natural": self._packed(self.natural.held_out, "natural-test"),
            "mean_pooled": self._packed(self.pooled.held_out, "pooled-test"),
            "conflict": self._packed(self.conflicts, "conflict", crop=1.0),
        }

    def transfer(self, num_images: int, transfer_seed: int) -> ImageSet:
        """`num_images` of the natural training images, chosen by this transfer seed; fewer are a part of more."""
        if num_images >= len(self.base):  # no copy of what may be tens of GB
            return self.base
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


@dataclass(frozen=True)
class _Photographs:
    """A folder of cue-conflict photographs, packed, as they are and mean-pooled; the folds' rows to train and test."""

    images: ImageSet
    pooled: ImageSet
    folds: list[tuple[list[int], list[int]]]


class ConflictData:
    """Cue-conflict photographs alone, split so that nothing leaks.

    The images of Geirhos et al. pair 10 shape instances a class (airplane1 ... airplane10) with 3 texture instances a
    class. Fold f tests on the images whose instance numbers both leave the remainder f when divided by 3, and trains on
    those of which neither does; images that would share an instance with the other side are left out.

    The base learns the shape of the training images, discovery sees them mean-pooled. In transfer each training image
    is labelled by its shape or by its texture, drawn at random by the transfer seed: the labels leave open which cue
    counts. `tests` have shapes as classes throughout.
    """

    def __init__(self, config: VisionConfig, photographs: _Photographs, fold: int = 0) -> None:
        self.config, self.photographs = config, photographs
        self.train_rows, self.test_rows = photographs.folds[fold % _FOLDS]

    def of_replicate(self, base_seed: int) -> ConflictData:
        """Another fold for another base network."""
        return ConflictData(self.config, self.photographs, base_seed)

    @cached_property
    def base(self) -> ImageSet:
        """Training photographs, labelled by shape."""
        return self.photographs.images.take(self.train_rows)

    @cached_property
    def discovery(self) -> ImageSet:
        """The same, mean-pooled, but for every tenth."""
        return self.photographs.pooled.take([row for i, row in enumerate(self.train_rows) if i % 10])

    @cached_property
    def discovery_held_out(self) -> ImageSet:
        """Every tenth, mean-pooled: on them discovery chooses its best epoch."""
        return self.photographs.pooled.take(self.train_rows[::10])

    @cached_property
    def tests(self) -> dict[str, ImageSet]:
        """KINDS -> test photographs; "natural" and "conflict" are the same images here."""
        images = self.photographs.images.take(self.test_rows)
        return {"natural": images, "mean_pooled": self.photographs.pooled.take(self.test_rows), "conflict": images}

    def transfer(self, num_images: int, transfer_seed: int) -> ImageSet:
        """Training photographs, each labelled by one of its two cues."""
        generator = torch_generator(self.config.seed, "images", "labels", transfer_seed)
        chosen = self.base.take(torch.randperm(len(self.base), generator=generator)[:num_images].sort().values)
        by_shape = torch.rand(len(chosen), generator=generator) < 0.5
        return replace(chosen, shape=torch.where(by_shape, chosen.shape, chosen.texture))

    def sizes(self) -> tuple[int, ...]:
        """Numbers of training images that are run; the smallest fold's where the config has none."""
        smallest = min(len(train) for train, _ in self.photographs.folds)
        beyond = [n for n in self.config.sizes if n > smallest]
        if beyond:
            least = f"the {smallest} training images of the smallest fold"
            raise ValueError(f"VisionConfig: sizes must be at most {least}, got {beyond}")
        return self.config.sizes or (smallest,)


Data = GeneratedData | FolderData | ConflictData


def open_data(config: VisionConfig, cache: Path, show: bool) -> Data:
    """The images of a config; with folders they are listed, checked and packed into `cache` here."""
    if config.images is not None:
        return FolderData(config, cache, show)
    if config.conflict is None:
        return GeneratedData(config)
    return ConflictData(config, _open_photographs(config, Path(config.conflict), cache, show))


def _open_photographs(config: VisionConfig, source: Path, cache: Path, show: bool) -> _Photographs:
    """Lists, mean-pools and packs a folder of cue-conflict photographs; ValueError if a fold would be empty."""
    entries, destination = list_cue_conflict(source), cache / "mean-pooled"
    masks = None if config.masks is None else Path(config.masks)
    pool_folder(source, destination, entries=entries, masks=masks, progress=show)
    pooled = [replace(one, path=(destination / one.path.relative_to(source)).with_suffix(".png")) for one in entries]
    cues = [parse_cue_conflict(one.path) for one in entries]
    numbers = [(_number(cue.shape_instance), _number(cue.texture_instance)) for cue in cues]
    folds = [_rows_of_fold(numbers, one) for one in range(_FOLDS)]
    if not all(train and test for train, test in folds):
        counts = ", ".join(f"{len(train)} and {len(test)}" for train, test in folds)
        raise ValueError(
            f"VisionConfig: conflict={source} must hold instances that can be split, as airplane1-bear2, "
            f"airplane2-bear3; its folds have {counts} images to train and to test on"
        )
    size = config.image_size
    return _Photographs(
        pack(entries, size, cache / "conflict", crop=1.0, progress=show),
        pack(pooled, size, cache / "conflict-pooled", crop=1.0, progress=show),
        folds,
    )


def _rows_of_fold(numbers: Sequence[tuple[int, int]], fold: int) -> tuple[list[int], list[int]]:
    """Rows to train and to test on, from each image's numbers of shape and texture instance."""
    inside = [(shape % _FOLDS == fold, texture % _FOLDS == fold) for shape, texture in numbers]
    train = [i for i, (shape, texture) in enumerate(inside) if not shape and not texture]
    return train, [i for i, (shape, texture) in enumerate(inside) if shape and texture]


def _number(instance: str) -> int:
    """airplane10 -> 10"""
    return int("".join(letter for letter in instance if letter.isdigit()))


def _list(folder: Path, complete: bool = True) -> list[Entry]:
    """ImageNet's layout if the folder has synsets (`complete`: all 202 of them), else folders named by class."""
    names = [one.name for one in folder.iterdir()]
    if "train" in names or any(name[:1] == "n" and name[1:].isdigit() for name in names):
        return list_imagenet(folder, complete=complete)
    return list_class_folders(folder)
