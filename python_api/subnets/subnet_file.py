"""The file of a subnet: safetensors with one packed mask per parameter, checked in full before anything is returned.

Tensors: ``<parameter name>`` uint8 ``[ceil(n / 8)]`` (layout: `subnet_kernels.packing`) and, where they were saved too,
``values:<parameter name>`` ``[kept]``, the kept values in the C order of the mask, in the parameter's dtype, and
``ranks:<parameter name>`` uint8 ``[kept]`` (see `subnet_ranks`).
Metadata (text): ``format``, ``format_version`` ("2" with ranks, "1" without: files say the oldest version that holds
them), ``shapes`` (JSON, in the subnet's order), ``provenance`` (JSON), ``base_hash`` (see `weights_hash`, or empty) and
``checksum``, the SHA-256 of everything else.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from subnet_kernels.packing import pack_mask, unpack_mask

from .training.files import write_bytes

FORMAT = "subnets.Subnet"
FORMAT_VERSIONS = ("1", "2")
_VALUES = "values:"
_RANKS = "ranks:"
_T = TypeVar("_T")
_METADATA_KEYS = {"format", "format_version", "shapes", "provenance", "base_hash", "checksum"}


class Contents(NamedTuple):
    """What a file holds: masks and provenance; kept values, ranks and the base's hash where they were saved."""

    masks: dict[str, Tensor]
    provenance: dict[str, Any]
    weights: dict[str, Tensor] | None
    base_hash: str | None
    ranks: dict[str, Tensor] | None = None


def weights_hash(weights: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 (hex) over name, dtype, shape and bytes (C order) of each tensor, in the order of the names.

    Two networks have the same hash exactly if these parameters agree to the bit; strides and device play no role.
    """
    digest = hashlib.sha256()
    _update(digest, weights)
    return digest.hexdigest()


def write(path: str | os.PathLike[str], contents: Contents) -> None:
    """Write the file under a temporary name in the same folder and rename it, so ``path`` is never half written."""
    path = Path(path)
    tensors = {name: pack_mask(mask) for name, mask in contents.masks.items()}
    extras = ((_VALUES, contents.weights or {}), (_RANKS, contents.ranks or {}))
    for prefix, its in extras:
        tensors.update({prefix + name: tensor for name, tensor in its.items()})
    if len(tensors) != len(contents.masks) + sum(len(its) for _, its in extras):
        raise ValueError(f"Subnet.save: no parameter may be named '{_VALUES}...' or '{_RANKS}...', the file uses these")
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSIONS[1 if contents.ranks else 0],
        "shapes": json.dumps({name: list(mask.shape) for name, mask in contents.masks.items()}),
        "provenance": json.dumps(contents.provenance, allow_nan=False),
        "base_hash": contents.base_hash or "",
    }
    metadata["checksum"] = _checksum(metadata, tensors)
    try:
        if not path.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        write_bytes(path, save(tensors, metadata))
    except OSError as error:
        raise OSError(f"Subnet.save: {path} can't be written: {error.strerror}; its folder must exist") from None


def read(path: str | os.PathLike[str]) -> Contents:
    """Return the contents of a subnet file, or raise ValueError (FileNotFoundError) saying what is wrong with it."""
    path = Path(path)
    if not path.is_file():
        mend = "check the path, or save a subnet there first"
        mend = "it is a folder; Subnet.from_pretrained reads one" if path.is_dir() else mend
        raise FileNotFoundError(f"Subnet.load: there is no file {path}; {mend}")
    metadata = _reading(path, lambda file: dict(file.metadata() or {}))
    if metadata.get("format") != FORMAT:  # before its tensors are read, which may be gigabytes
        raise _bad(path, "it is a safetensors file of something else", "pass a file written by Subnet.save")
    if metadata.get("format_version") not in FORMAT_VERSIONS:
        version = _short(repr(metadata.get("format_version")))
        what = f"its format_version is {version}, this version reads {' and '.join(map(repr, FORMAT_VERSIONS))}"
        raise _bad(path, what, "update subnets")
    # Clones: what safe_open returns may look into the mapped file, which somebody may overwrite later.
    tensors = _reading(path, lambda file: {name: file.get_tensor(name).clone() for name in list(file.keys())})
    stored = metadata.get("checksum")
    if set(metadata) != _METADATA_KEYS or stored != _checksum(metadata, tensors):
        raise _bad(path, "its checksum does not match its contents, so the file is damaged")
    try:
        return _decode(metadata, tensors)
    # What a right checksum over wrong contents may raise; RuntimeError: JSON too deep, sizes beyond 64 bits.
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, OverflowError) as error:
        raise contradicting(path, error) from error


def _reading(path: Path, read: Callable[[Any], _T]) -> _T:
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            return read(file)
    except Exception as error:  # safetensors raises its own type, and OSError, ValueError, RuntimeError from below
        what = f"it is not a readable safetensors file ({_short(error)}), so it is damaged, cut or foreign"
        if path.suffix in (".bin", ".pt", ".pth"):
            raise _bad(path, what, "other people's checkpoints are read by read_neurosurgeon or read_masks") from None
        raise _bad(path, what) from error


def _decode(metadata: dict[str, str], tensors: dict[str, Tensor]) -> Contents:
    """Turn checked metadata and tensors into masks, values and ranks; any contradiction raises."""
    shapes = json.loads(metadata["shapes"])
    masks = {name: unpack_mask(tensors[name], tuple(shape)) for name, shape in shapes.items()}
    provenance = json.loads(metadata["provenance"])
    if not masks or not isinstance(provenance, dict):
        raise ValueError("it holds no mask, or a provenance that is no dict")
    rest = {name: tensor for name, tensor in tensors.items() if name not in masks}
    weights, ranks = ({name: rest.pop(p + name) for name in masks if p + name in rest} for p in (_VALUES, _RANKS))
    if rest or len(weights) not in (0, len(masks)) or len(ranks) not in (0, len(masks)):
        raise ValueError("it holds kept values or ranks for other parameters than masks")
    for name, values in weights.items():
        check_values(name, masks[name], values)
    for name, its in ranks.items():
        check_ranks(name, masks[name], its)
    return Contents(masks, provenance, weights or None, metadata["base_hash"] or None, ranks or None)


def check_values(name: str, mask: Tensor, values: Tensor) -> None:
    """Raise ValueError unless ``values`` are 1-D, floating, and as many as ``mask`` keeps."""
    kept = int(mask.sum())
    if values.ndim != 1 or values.numel() != kept or not values.is_floating_point():
        raise ValueError(
            f"Subnet: the values kept of {name!r} must be {kept} floating-point numbers in one dimension, "
            f"got {values.dtype} {list(values.shape)}"
        )


def check_ranks(name: str, mask: Tensor, ranks: Tensor) -> None:
    """Raise ValueError unless ``ranks`` are uint8, 1-D, and as many as ``mask`` keeps."""
    kept = int(mask.sum())
    if ranks.ndim != 1 or ranks.numel() != kept or ranks.dtype != torch.uint8:
        raise ValueError(
            f"Subnet: the ranks of {name!r} must be {kept} uint8 numbers in one dimension, "
            f"got {ranks.dtype} {list(ranks.shape)}"
        )


def _short(error: object, limit: int = 300) -> str:
    """The text of an error on one line, however long the names are that it quotes."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[:limit] + " ..."


def contradicting(path: str | os.PathLike[str], error: Exception) -> ValueError:
    """The error of a file whose parts are whole and make no subnet."""
    return _bad(Path(path), f"its contents contradict each other ({_short(error)})")


def _bad(path: Path, what: str, mend: str = "restore it from a copy or save the subnet again") -> ValueError:
    return ValueError(f"Subnet.load: cannot load {path}: {what}; {mend}")


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    text = {key: value for key, value in metadata.items() if key != "checksum"}
    digest.update(json.dumps(text, sort_keys=True).encode())
    _update(digest, tensors)
    return digest.hexdigest()


def _update(digest: Any, tensors: Mapping[str, Tensor]) -> None:
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(_as_bytes(tensor))


def _as_bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy())  # pyright: ignore


def listed(names: Iterable[str], limit: int = 8) -> str:
    """Return the names for an error message: the first few, and how many more there are."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
