"""Tensors out of other people's files: safetensors, and what torch.save writes, without running what such a file says.

A file of torch.save is a zip of a pickle and of the tensors' bytes. It is looked over first: nothing in it may be
compressed (a small file could hold gigabytes), and its pickle may name only what a dict of tensors needs. Then it is
read by ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import os
import pickletools
import zipfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

_ALLOWED = {
    "collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter",
    *(f"torch {kind}Storage" for kind in ("Bool", "Byte", "Char", "Short", "Int", "Long")),
    *(f"torch {kind}Storage" for kind in ("Half", "BFloat16", "Float", "Double")),
}  # fmt: skip
_TUPLES = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}


def tensors_of(source: str | os.PathLike[str] | Mapping[str, Any], caller: str) -> dict[str, Tensor]:
    """Return the tensors of a state dict or of a file that holds one, by name, on the CPU.

    A dict whose entry "state_dict" is a dict stands for that one. Entries that are no tensors are left out.

    Args:
        source: a dict, or the path of a safetensors file or of a file that torch.save wrote (torch 1.6 or newer).
        caller: begins the error message.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, of another format, or holds something else than tensors and plain values; or a
            tensor is not dense, not on a device with memory, or a view that is larger than its memory; or a name is not
            one that a parameter can have.
    """
    where = caller
    if not isinstance(source, Mapping):
        where = f"{caller}: cannot read {Path(source)}"
        source = loaded(source, caller)
    inner = source.get("state_dict") if isinstance(source, Mapping) else None
    entries = inner if isinstance(inner, Mapping) else source
    if not isinstance(entries, Mapping) or not all(isinstance(name, str) for name in entries):
        raise ValueError(f"{where}: it must hold a dict of name to tensor, got {type(entries).__name__}")
    tensors = {name: value.detach() for name, value in entries.items() if isinstance(value, Tensor)}
    for name, tensor in tensors.items():
        check_tensor(name, tensor, where)
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def loaded(
    path: str | os.PathLike[str], caller: str, stand_ins: Mapping[str, Callable[..., Any]] | None = None
) -> Any:
    """Return what a safetensors file, or one that torch.save wrote, holds; on the CPU, its tensors unchecked.

    Args:
        path: of the file.
        caller: begins the error message.
        stand_ins: names that the pickle may use besides those of a dict of tensors ("numpy.dtype"), to what is called
            in their place. Those that torch's ``weights_only`` knows itself (torch.Size, _codecs.encode) stay its own.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, of another format, or its pickle names something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{caller}: there is no file {path}; check the path")
    try:
        return _read(path, stand_ins or {})
    except Exception as error:  # each of zipfile, pickletools, torch and safetensors raises types of its own
        text = " ".join(str(error).split())
        mend = "pass a safetensors file, or a dict of tensors by torch.save"
        raise ValueError(f"{caller}: cannot read {path}: {text[:300]}; {mend}") from error


def check_tensor(name: str, tensor: Tensor, where: str) -> None:
    """Raise ValueError unless ``name`` can be a parameter's and ``tensor`` is dense, with memory for its entries."""
    if len(name) > 500 or not name.isprintable():
        shown = ascii(name[:80])
        raise ValueError(f"{where}: {shown} is no name of a parameter; it must be at most 500 printable characters")
    is_plain = tensor.layout == torch.strided and tensor.device.type != "meta" and not tensor.is_quantized
    if not is_plain or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        what = f"must be a dense tensor with memory for all its {tensor.numel()} entries"
        raise ValueError(f"{where}: {name!r} {what}")


def _read(path: Path, stand_ins: Mapping[str, Callable[..., Any]]) -> Any:
    with open(path, "rb") as stream:
        start = stream.read(4)
    if start != b"PK\x03\x04":
        with safe_open(str(path), framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name).clone() for name in list(file.keys())}
    _check_archive(path, {" ".join(name.rsplit(".", 1)) for name in stand_ins})
    with torch.serialization.safe_globals([(call, name) for name, call in stand_ins.items()]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _check_archive(path: Path, also: Collection[str]) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is a compressed archive, which torch.save never writes")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("its entries are larger than the file")
        pickles = [entry for entry in entries if entry.filename.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise ValueError("it is an archive, but not one of torch.save")
        _check_pickle(archive.read(pickles[0]), also)


def _check_pickle(data: bytes, also: Collection[str]) -> None:
    """Raise ValueError if the pickle names anything but tensors, their storages and dicts, and ``also``.

    A tuple that is referred to again is refused as well: the hash of such nested tuples takes exponential time.
    """
    tuples: set[Any] = set()
    last = ""
    for code, argument, _ in pickletools.genops(data):
        if code.name == "GLOBAL" and argument not in _ALLOWED and argument not in also:
            raise ValueError(f"its pickle names {argument!r}, which a dict of tensors does not need, so it is not read")
        if code.name in ("BINPUT", "LONG_BINPUT") and last in _TUPLES:
            tuples.add(argument)
        if code.name in ("BINGET", "LONG_BINGET") and argument in tuples:
            raise ValueError("its pickle refers to a tuple twice, which torch.save does not do, so it is not read")
        last = code.name
