"""Mean-pooled images: every segment painted with its mean colour, which leaves shape and takes texture away.

Source: Zhang, Lepori, Pavlick (arXiv 2310.10899), who segment with SAM; here scikit-image does, or masks from files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from subnets.experiments.vision.decoding import EXPECTED, BadImage, read_rgb
from subnets.experiments.vision.folders import Entry, images_in, refuse
from subnets.training.files import read_json, write_json
from subnets.training.processes import map_in_processes, num_cores

FORMAT = 1  # of a mean-pooled folder; another one when pooling changes pixels

SEGMENTERS: dict[str, dict[str, float]] = {
    "felzenszwalb": {"side": 224, "scale": 300.0, "sigma": 0.8, "min_size": 50},
    "slic": {"side": 224, "n_segments": 100, "compactness": 10.0, "sigma": 1.0},
}
"""Segmenters by name, with their parameters: those of scikit-image's function, for an image whose shorter side has
`side` pixels. Larger images are brought to that size for the segmentation alone, so that parameters mean the same for
all sizes."""


def mean_pool(images: Tensor, segments: Tensor) -> Tensor:
    """The images with every segment painted in its mean colour: ``out[p] = mean of images over segment(p)``.

    Sums are exact (int64), means rounded to the nearest, halves up.

    Args:
        images: uint8 [N, 3, H, W], or [3, H, W] for one.
        segments: integers [N, H, W], or [H, W]: pixels of one image with the same number are one segment, connected or
            not. Any numbers; images share none.

    Returns:
        uint8, images' shape, on their device.

    Raises:
        TypeError, ValueError: other dtypes or shapes.
    """
    if images.dtype != torch.uint8 or segments.is_floating_point() or segments.dtype == torch.bool:
        raise TypeError(
            f"mean_pool: images must be torch.uint8 and segments integers, got {images.dtype} and {segments.dtype}"
        )
    expected = [*images.shape[:-3], *images.shape[-2:]]
    if images.dim() not in (3, 4) or images.shape[-3] != 3 or list(segments.shape) != expected:
        raise ValueError(
            f"mean_pool: images must be [N, 3, H, W] or [3, H, W] and segments the same without the channels, got "
            f"{list(images.shape)} and {list(segments.shape)}"
        )
    if images.numel() == 0:
        return images.clone()
    if images.dim() == 3:
        return mean_pool(images[None], segments[None])[0]
    segment, num_segments = _numbered(segments)
    pixels = images.movedim(1, 0).reshape(3, -1)
    segment = segment.reshape(1, -1).expand(3, -1)
    sums = torch.zeros(3, num_segments, dtype=torch.int64, device=images.device)
    sums.scatter_add_(1, segment, pixels.long())
    counts = torch.bincount(segment[0], minlength=num_segments).clamp(min=1)
    means = ((2 * sums + counts) // (2 * counts)).to(torch.uint8)
    return means.gather(1, segment).reshape(3, len(images), *images.shape[-2:]).movedim(0, 1).contiguous()


def _numbered(segments: Tensor) -> tuple[Tensor, int]:
    """Segments of all images numbered apart, from 0, and how many numbers there are (some may be unused)."""
    segments = segments.long()
    lowest = int(segments.min())
    span = int(segments.max()) - lowest + 1
    if span > segments[0].numel():  # far-apart numbers: a table over them would be larger than the images
        segments, lowest = torch.unique(segments, return_inverse=True)[1], 0
        span = int(segments.max()) + 1
    start = span * torch.arange(len(segments), device=segments.device)
    return segments - lowest + start[:, None, None], span * len(segments)


def segments_from_masks(masks: Tensor) -> Tensor:
    """int64 [H, W]: segments from masks that overlap; smaller ones are painted over larger ones.

    Pixels that no mask covers are one segment, number 0; that of mask k (in `masks`) is k + 1. Of two masks of the same
    area the later one is on top.

    Args:
        masks: bool [K, H, W], such as SAM's; K may be 0.

    Raises:
        TypeError, ValueError: another dtype or shape.

    Source: the paper's way (masks sorted by area; what is left over gets its common mean).
    """
    if masks.dtype != torch.bool:
        raise TypeError(f"segments_from_masks: masks must be torch.bool, got {masks.dtype}")
    if masks.dim() != 3:
        raise ValueError(f"segments_from_masks: masks must be [K, H, W], got {list(masks.shape)}")
    segments = torch.zeros(masks.shape[1:], dtype=torch.int64, device=masks.device)
    areas = masks.flatten(1).sum(1)
    for k in areas.sort(descending=True, stable=True).indices.tolist():
        segments[masks[k]] = k + 1
    return segments


def segment(image: Tensor, segmenter: str = "felzenszwalb", **parameters: float) -> Tensor:
    """int64 [H, W]: the segments that scikit-image finds in an image.

    Args:
        image: uint8 [3, H, W], on the CPU.
        segmenter: a name in `SEGMENTERS`.
        parameters: in place of those in `SEGMENTERS`.

    Raises:
        ImportError: scikit-image is not installed.
        ValueError, TypeError: an unknown segmenter or parameter, another shape or dtype.

    Source: Felzenszwalb and Huttenlocher, Efficient Graph-Based Image Segmentation (IJCV 2004); Achanta et al., SLIC
    Superpixels (PAMI 2012).
    """
    if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] != 3:
        raise ValueError(f"segment: image must be torch.uint8 [3, H, W], got {image.dtype} {list(image.shape)}")
    settings = _settings(segmenter, parameters)
    functions = _skimage()
    height, width = image.shape[1:]
    side = int(settings.pop("side"))
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    if min(height, width) > side:
        size = (round(width * side / min(height, width)), round(height * side / min(height, width)))
        pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
    if segmenter == "felzenszwalb":
        found = functions.felzenszwalb(pixels, **settings)
    else:
        found = functions.slic(pixels, start_label=0, channel_axis=-1, **settings)
    rows = np.arange(height) * found.shape[0] // height
    columns = np.arange(width) * found.shape[1] // width
    return torch.from_numpy(np.asarray(found, np.int64)[rows[:, None], columns[None, :]])


def _settings(segmenter: str, parameters: dict[str, float]) -> dict[str, Any]:
    if segmenter not in SEGMENTERS:
        raise ValueError(f"segment: segmenter must be one of {', '.join(SEGMENTERS)}, got {segmenter!r}")
    settings = SEGMENTERS[segmenter]
    unknown = [name for name in parameters if name not in settings]
    if unknown:
        raise ValueError(f"segment: parameters of {segmenter} are {', '.join(settings)}, got {', '.join(unknown)}")
    for name, value in parameters.items():
        kind = type(settings[name])
        fits = isinstance(value, (int, kind)) and not isinstance(value, bool)
        if not fits or value < 0 or (value == 0 and name != "sigma"):
            wanted = "a whole number" if kind is int else "a number"
            raise ValueError(f"segment: {name} must be {wanted} above 0, got {value!r}")
    return {**settings, **parameters}


def _skimage() -> Any:
    try:
        from skimage import segmentation
    except ImportError as error:
        raise ImportError(
            f"segmenting images needs scikit-image, which can't be imported ({error}): pip install "
            '"subnet-kernels[vision]", or give masks from files'
        ) from None
    return segmentation


@dataclass(frozen=True)
class _Job:
    """One image to pool: its name in messages, where it comes from and goes to, and what gives its segments."""

    name: str
    source: Path
    destination: Path
    masks: Path | None
    segmenter: str
    parameters: dict[str, float]

    def is_done(self) -> bool:
        if not self.destination.exists():
            return False
        made = self.destination.stat().st_mtime_ns
        return all(made >= path.stat().st_mtime_ns for path in (self.source, self.masks) if path is not None)


def pool_folder(
    source: str | Path,
    destination: str | Path,
    *,
    entries: Sequence[Entry] | None = None,
    segmenter: str = "felzenszwalb",
    masks: str | Path | None = None,
    progress: bool | None = None,
    workers: int | None = None,
    **parameters: float,
) -> int:
    """Mean-pools every image below `source` into the same tree of PNGs below `destination`; returns how many it made.

    Images that are there already, and not older than their originals, are left as they are, so that a killed call goes
    on where it was. destination/pooling.json says how the images were made.

    Args:
        source: any tree of images, such as class folders or ImageNet's; hidden files and folders are passed over.
        destination: a folder of its own, outside of `source`.
        entries: images below `source`, such as those of `folders.split`: only these are made; None: all of them.
        segmenter, parameters: as in `segment`.
        masks: a folder with the segments of every image instead, under the image's relative name: ``.npz`` with an
            array ``masks``, bool [K, H, W] (`segments_from_masks`), or ``.png`` with one channel of segment numbers.
            H and W are those of the image, upright.
        progress: a bar; None: on a terminal only.
        workers: processes; None: one per core, for few images one; 1: in this process. More than one are started
            afresh, so a script of your own needs the usual ``if __name__ == "__main__":``.

    Raises:
        ImportError: scikit-image is not installed, and no masks are given.
        ValueError: no images, empty files, missing masks, a destination made in another way or from another source, all
            before any work; files that can't be used and masks of another shape, by name, once the others are made.
        RuntimeError: a worker process was killed.
    """
    source, destination = Path(source), Path(destination)
    masks = None if masks is None else Path(masks)
    if masks is None:
        parameters = _settings(segmenter, parameters)
        _skimage()
    elif parameters:
        raise ValueError(f"pool_folder: parameters must be left out where masks are given, got {', '.join(parameters)}")
    for name, folder in (("source", source), ("masks", masks)):
        if folder is not None and not folder.is_dir():
            got = "a file" if folder.exists() else "nothing there"
            raise ValueError(f"pool_folder: {name} must be a folder, got {got}: {folder}")
    real, target = source.resolve(), destination.resolve()
    if real == target or real in target.parents or target in real.parents:
        raise ValueError(f"pool_folder: source and destination must lie apart, got {source} and {destination}")
    problems: list[str] = []
    files = _images_below(source, problems) if entries is None else [entry.path for entry in entries]
    jobs = _jobs(files, source, destination, segmenter, masks, parameters, problems)
    how = {
        "format": FORMAT,
        "source": os.path.abspath(source),
        "segmenter": "masks" if masks is not None else segmenter,
        "masks": None if masks is None else os.path.abspath(masks),
        "parameters": parameters,
    }
    _claim(destination, how, source)
    todo = [job for job in jobs if not job.is_done()]
    if workers is None:
        workers = min(num_cores(), 1 + len(todo) // 200)  # one takes seconds to start
    bar = tqdm(
        total=len(jobs), initial=len(jobs) - len(todo), desc=f"mean-pooling {source.name}", unit="image",
        disable=None if progress is None else not progress, mininterval=0.2,
    )  # fmt: skip
    with bar:
        for job, problem in zip(todo, _pool_all(todo, workers), strict=True):
            bar.update()
            if problem is not None:
                problems.append(f"{job.name}: {problem}")
    if problems:
        beside = "" if masks is None else ", and masks of their size"
        refuse("pool_folder", source, problems, EXPECTED + beside)
    return len(todo)


def _jobs(
    files: list[Path],
    source: Path,
    destination: Path,
    segmenter: str,
    masks: Path | None,
    parameters: dict[str, float],
    problems: list[str],
) -> list[_Job]:
    jobs = []
    for path in files:
        if not path.is_relative_to(source):
            raise ValueError(f"pool_folder: entries must lie below source {source}, got {path}")
        relative = path.relative_to(source)
        of_image = None
        if masks is not None:
            names = [masks / relative.with_suffix(suffix) for suffix in (".npz", ".png")]
            of_image = next((name for name in names if name.exists()), None)
            if of_image is None:
                problems.append(f"{relative}: no {names[0]} (or .png)")
        target = destination / relative.with_suffix(".png")
        jobs.append(_Job(str(relative), path, target, of_image, segmenter, parameters))
    if problems:
        refuse("pool_folder", source, problems, EXPECTED + (", each with its masks" if masks is not None else ""))
    if not jobs:
        raise ValueError(f"pool_folder: {source} must hold images, got none")
    return jobs


def _images_below(folder: Path, problems: list[str]) -> list[Path]:
    found = []
    for path, subfolders, _ in os.walk(folder, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        found += images_in(Path(path), problems, is_leaf=False)
    return found


def _claim(destination: Path, how: dict[str, Any], source: Path) -> None:
    """Makes the destination, or checks that it was made this way and holds no image that the source lacks."""
    if destination.exists() and not destination.is_dir():
        raise ValueError(f"pool_folder: destination must be a folder, got the file {destination}")
    record = destination / "pooling.json"
    others = "choose another destination, or delete it"
    if record.exists():
        there, now = read_json(record), json.loads(json.dumps(how))
        if there != now:
            keys = [key for key in now if not isinstance(there, dict) or there.get(key) != now[key]]
            old = there if isinstance(there, dict) else {}
            shown = "; ".join(f"{key}: {old.get(key)} there, {now[key]} now" for key in keys)
            raise ValueError(f"pool_folder: {destination} was made in another way ({shown}); {others}")
    elif destination.exists() and any(not path.name.startswith(".") for path in destination.iterdir()):
        raise ValueError(f"pool_folder: {destination} must be empty or hold a pooling.json, got other files; {others}")
    strangers = []
    for folder, images in groupby(
        _images_below(destination, []), key=lambda path: path.parent.relative_to(destination)
    ):
        original = source / folder
        stems = {path.stem for path in images_in(original, [], is_leaf=False)} if original.is_dir() else set()
        strangers += [f"{folder / path.name}: no such image in the source" for path in images if path.stem not in stems]
    if strangers:
        refuse("pool_folder", destination, strangers, "images of its source alone (delete the others)")
    if not record.exists():
        write_json(record, how)


def _pool_all(jobs: list[_Job], workers: int) -> Iterable[str | None]:
    """Per job what was wrong, or None, in their order."""
    if workers == 1 or len(jobs) < 2:
        return map(_pool, jobs)
    advice = "the same call goes on where it stopped, fewer workers need less memory"
    return map_in_processes(_pool, jobs, workers, name="pool_folder", advice=advice, chunk=4)


def _pool(job: _Job) -> str | None:
    """Makes one image; returns what is wrong with the file or its masks."""
    try:
        pixels = torch.from_numpy(np.array(read_rgb(job.source))).permute(2, 0, 1)
        if job.masks is not None:
            segments = _read_segments(job.masks, pixels.shape[1], pixels.shape[2])
        else:
            segments = segment(pixels, job.segmenter, **job.parameters)
    except BadImage as error:
        return str(error)
    except Exception as error:  # one image that a segmenter can't take must not end hours of work on the others
        return f"{job.segmenter} failed ({type(error).__name__}: {error})"
    pooled = Image.fromarray(mean_pool(pixels, segments).permute(1, 2, 0).contiguous().numpy())
    job.destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = job.destination.with_name(f".{job.destination.name}.tmp")
    pooled.save(temporary, format="PNG")
    os.replace(temporary, job.destination)
    return None


def _read_segments(path: Path, height: int, width: int) -> Tensor:
    """Segments [H, W] from a file of masks; BadImage, naming the file, if it does not fit."""
    try:
        if path.suffix == ".png":
            with Image.open(path) as image:
                if len(image.getbands()) != 1:
                    raise BadImage(f"{path.name} must have one channel of segment numbers, got mode {image.mode}")
                segments = torch.from_numpy(np.asarray(image).astype(np.int64))
        else:
            with np.load(path, allow_pickle=False) as file:
                if "masks" not in file:
                    raise BadImage(f"{path.name} must hold an array 'masks', got {', '.join(file) or 'none'}")
                masks = torch.from_numpy(file["masks"])
            if masks.dtype != torch.bool or masks.dim() != 3:
                raise BadImage(f"{path.name} must hold masks as bool [K, H, W], got {masks.dtype} {list(masks.shape)}")
            segments = segments_from_masks(masks)
    except BadImage:
        raise
    except Exception as error:  # BadZipFile, OSError, ValueError, ...: as the damage happens to lie
        raise BadImage(f"{path.name} is unreadable ({type(error).__name__}: {error})") from None
    if list(segments.shape) != [height, width]:
        raise BadImage(f"{path.name} must have the image's size {[height, width]}, got {list(segments.shape)}")
    return segments
