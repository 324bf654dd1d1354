"""Real images, decoded once into a cache and mapped into memory ever after.

A cache is a folder: images.npy (uint8 [N, 3, size, size]), keys.npy (per row the digest of the file it was made from,
zeros where it is yet to be made) and index.json (the list of files), written last. A row counts only if its key is that
of the file as it is now, so packing can be killed at any moment and goes on with the rows that are missing.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from subnets.experiments.vision.classes import CLASSES
from subnets.experiments.vision.decoding import EXPECTED, BadImage, centre_square, read_rgb
from subnets.experiments.vision.folders import Entry, refuse
from subnets.experiments.vision.images import ImageSet
from subnets.training.files import read_json, write_text
from subnets.training.processes import num_cores

FORMAT = 1  # of the cache; another one when decoding changes pixels
_ROWS_AT_ONCE = 256  # rows between two notes in keys.npy: what a kill can cost


def pack(
    entries: Sequence[Entry],
    size: int,
    cache: str | Path,
    *,
    crop: float = 224 / 256,
    progress: bool | None = None,
    workers: int | None = None,
) -> ImageSet:
    """The images of `entries` as an ImageSet over a file mapped into memory: uint8 [N, 3, size, size], in their order.

    Each image is converted to RGB and turned upright (`decoding.read_rgb`), its shorter side brought to size / crop
    pixels and the centre cut out (bicubic, antialiased). The first call decodes into `cache`; later ones map what is
    there. Where files have come or changed (size or time of change), it says so and decodes these alone.

    Args:
        entries: at least one; from `list_imagenet`, `list_class_folders`, `list_cue_conflict` or `split`.
        size: pixels a side.
        cache: a folder for this set of images alone; made if missing.
        crop: share of the shorter side that is kept; 224/256 is the usual one for photographs. 1 for images that were
            cut already, such as cue-conflict ones and mean-pooled ones of such.
        progress: a bar; None: on a terminal only.
        workers: threads; None: one per core.

    Returns:
        ImageSet whose `images` are read-only memory (writing to them ends the process: copy first, as indexing with a
        tensor does), `names` as ``Entry.name``.

    Raises:
        ValueError: no entries, size or crop out of range, not enough room on the disk; or files that can't be used,
            all of them by name with what is wrong, once the others are packed (they stay, and are not decoded again).
    """
    cache = Path(cache)
    if not entries:
        raise ValueError("pack: entries must hold at least one image, got none")
    if size < 1 or not 0 < crop <= 1:
        raise ValueError(f"pack: size must be 1 or more and crop above 0 and at most 1, got {size} and {crop}")
    if cache.exists() and not cache.is_dir():
        raise ValueError(f"pack: cache must be a folder, got the file {cache}")
    index = _index(entries, size, crop)
    if _read_index(cache) != index or _open(cache, len(entries), size, "r") is None:
        _fill(entries, index, cache, progress, workers)
    ids = torch.tensor([[entry.shape, entry.texture] for entry in entries], dtype=torch.int64)
    names = tuple(entry.name for entry in entries)
    return ImageSet(_mapped(cache / "images.npy"), ids[:, 0].clone(), ids[:, 1].clone(), CLASSES, names)


def _index(entries: Sequence[Entry], size: int, crop: float) -> dict[str, Any]:
    """What index.json holds once the cache is whole: per file its path, class ids, bytes and time of change."""
    files, problems = [], []
    for entry in entries:
        try:
            stat = entry.path.stat()
            path = os.path.abspath(entry.path)
            files.append([path, CLASSES[entry.shape], CLASSES[entry.texture], stat.st_size, stat.st_mtime_ns])
        except OSError as error:
            problems.append(f"{entry.name}: {error.strerror}")
    if problems:
        refuse("pack", "entries", problems, "files that are there")
    return {"format": FORMAT, "size": size, "crop": crop, "files": files}


def _read_index(cache: Path) -> Any:
    try:
        return read_json(cache / "index.json")
    except (OSError, ValueError):  # none, or damaged: the keys say which rows can stay
        return None


def _keys(index: dict[str, Any]) -> np.ndarray:
    """uint8 [N, 16]: digests of all that a row's pixels depend on."""
    how = f"{index['format']}|{index['size']}|{index['crop']!r}"
    texts = [f"{how}|{path}|{num_bytes}|{changed}" for path, _, _, num_bytes, changed in index["files"]]
    digests = b"".join(blake2b(text.encode(), digest_size=16).digest() for text in texts)
    return np.frombuffer(digests, np.uint8).reshape(-1, 16)


def _open(cache: Path, count: int | None, size: int, mode: Literal["r", "r+"]) -> tuple[np.ndarray, np.ndarray] | None:
    """images.npy and keys.npy, mapped; None if either is missing, damaged or of another number or size."""
    maps = []
    for name, row in (("images.npy", (3, size, size)), ("keys.npy", (16,))):
        try:
            np.load(cache / name, mmap_mode="r", allow_pickle=False)  # refuses a short file, which "r+" would fill up
            array = np.load(cache / name, mmap_mode=mode, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        count = len(array) if count is None else count
        if array.dtype != np.uint8 or array.shape != (count, *row):
            return None
        maps.append(array)
    return maps[0], maps[1]


def _fill(
    entries: Sequence[Entry], index: dict[str, Any], cache: Path, progress: bool | None, workers: int | None
) -> None:
    """Makes the rows that are missing, from an older state of the cache or from the files, and writes the index."""
    was_whole = (cache / "index.json").exists()
    (cache / "index.json").unlink(missing_ok=True)
    keys, size = _keys(index), index["size"]
    images, made, older = _rows(cache, keys, size)
    missing = np.flatnonzero((made != keys).any(1))
    places = {} if older is None else {key.tobytes(): row for row, key in enumerate(older[1]) if key.any()}
    num_new = sum(keys[row].tobytes() not in places for row in missing)
    if progress is not False and num_new and (was_whole or num_new < len(entries)):
        why = "have come or changed since they were packed" if was_whole else "are still to be packed"
        print(f"{cache}: {num_new} of {len(entries)} images {why}", file=sys.stderr)
    made[missing] = 0  # what a kill leaves half-written is nobody's
    problems: dict[int, str] = {}

    def make(row: int) -> None:
        try:
            place = places.get(keys[row].tobytes())
            if place is not None and older is not None:
                images[row] = older[0][place]
            else:
                images[row] = centre_square(read_rgb(entries[row].path), size, index["crop"])
        except BadImage as error:
            problems[row] = f"{entries[row].name}: {error}"

    bar = tqdm(
        total=len(entries), initial=len(entries) - len(missing), desc=f"packing {cache.name}", unit="image",
        disable=None if progress is None else not progress, mininterval=0.2,
    )  # fmt: skip
    with bar, ThreadPoolExecutor(workers or num_cores()) as pool:
        for start in range(0, len(missing), _ROWS_AT_ONCE):
            rows = missing[start : start + _ROWS_AT_ONCE].tolist()
            for _ in pool.map(make, rows):
                bar.update()
            images.flush()  # the pixels first: a key promises them
            good = [row for row in rows if row not in problems]
            made[good] = keys[good]
            made.flush()
    shutil.rmtree(cache / "older", ignore_errors=True)
    if problems:
        refuse("pack", f"entries ({len(entries)})", [problems[row] for row in sorted(problems)], EXPECTED)
    write_text(cache / "index.json", json.dumps(index))


def _rows(
    cache: Path, keys: np.ndarray, size: int
) -> tuple[np.memmap, np.memmap, tuple[np.ndarray, np.ndarray] | None]:
    """images.npy and keys.npy to write to, and those of an older state whose rows can be copied.

    What is there stays in place if only some of its files have changed. If files have come, gone or moved, it goes to
    the folder "older" until the new state is whole.
    """
    there = _open(cache, None, size, "r+")
    if there is not None and (len(there[1]) != len(keys) or _moved(there[1], keys)):
        shutil.rmtree(cache / "older", ignore_errors=True)
        (cache / "older").mkdir()
        for name in ("keys.npy", "images.npy"):
            os.replace(cache / name, cache / "older" / name)
        there = None
    if there is None:
        cache.mkdir(parents=True, exist_ok=True)
        for name in ("keys.npy", "images.npy"):
            (cache / name).unlink(missing_ok=True)
        needed, free = len(keys) * (3 * size * size + 16), shutil.disk_usage(cache).free
        if free < needed:
            raise ValueError(f"pack: {cache} needs {needed / 1e9:.1f} GB, got {free / 1e9:.1f} GB free on its disk")
        there = (
            np.lib.format.open_memmap(cache / "images.npy", "w+", np.uint8, (len(keys), 3, size, size)),
            np.lib.format.open_memmap(cache / "keys.npy", "w+", np.uint8, (len(keys), 16)),
        )
        if hasattr(os, "posix_fallocate"):  # a disk that fills up later would end the process by a signal
            with open(cache / "images.npy", "r+b") as stream:
                os.posix_fallocate(stream.fileno(), 0, os.fstat(stream.fileno()).st_size)
    return *there, _open(cache / "older", None, size, "r")  # pyright: ignore[reportReturnType]


def _moved(made: np.ndarray, keys: np.ndarray) -> bool:
    """Whether a row that is missing in its place lies in another."""
    missing = (made != keys).any(1)
    there = {key.tobytes() for key in made}
    return any(key.tobytes() in there for key in keys[missing])


def _mapped(path: Path) -> Tensor:
    """The array in a .npy file as a tensor that shares the mapped memory."""
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # as said in pack
        return torch.from_numpy(array)
