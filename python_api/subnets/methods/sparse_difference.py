"""`SparseDifference`: what a fine-tuning added to a few weights of a model; added, applied, kept in files, ours and
those of composable-sft.

File (safetensors): ``positions:<parameter>`` int64 ``[n]``, ascending in C order, and ``values:<parameter>`` ``[n]``;
``dense:<parameter>``, whole tensors. Metadata (text): ``format``, ``format_version``, ``shapes`` and ``provenance``
(JSON), ``checksum``, the `weights_hash` of all tensors.

composable-sft's ``pytorch_diff.bin`` is ``torch.save({"diffs": {parameter: {"size", "index_steps", "values"}}, "abs":
{parameter: tensor}})``. Its flat positions are column-major, ``sum_d coordinate_d * prod_{k<d} size_k``, ascending,
written as the first and then the steps between neighbours.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..foreign_file import check_tensor, loaded
from ..subnet import Subnet
from ..subnet_file import listed, weights_hash
from ..subnet_fit import check_unmasked, fitting_parameters
from ..training.files import save_tensors

FORMAT, FORMAT_VERSION = "subnets.SparseDifference", "1"
SFT_FILE = "pytorch_diff.bin"
_PREFIXES = ("positions:", "values:", "dense:")


@dataclass(frozen=True, eq=False)
class Change:
    """What is added to one parameter.

    Attributes:
        shape: the parameter's.
        positions: int64 ``[n]``, places in its C order, ascending.
        values: floating-point ``[n]``.
    """

    shape: tuple[int, ...]
    positions: Tensor
    values: Tensor


class SparseDifference:
    """phi: the change of a few weights, so that ``theta = theta_0 + phi``; several are combined by ``+``.

    Args:
        changes: parameter name to `Change`.
        dense: parameter name to a whole tensor that takes the parameter's place, such as a task's output layer.
        provenance: where it comes from: a dict that JSON can hold.

    Raises:
        TypeError: tensors of other types.
        ValueError: positions that are out of range, not ascending or not as many as values; values that are not finite;
            a parameter both changed and dense.

    Source: Ansell, Ponti, Korhonen, Vulic, "Composable Sparse Fine-Tuning for Cross-Lingual Transfer", ACL 2022.

    >>> change = Change((2, 3), torch.tensor([1, 3, 5]), torch.tensor([0.5, -1.0, 2.0]))
    >>> phi = SparseDifference({"weight": change})
    >>> model = nn.Linear(3, 2)
    >>> with phi.applied(model), torch.no_grad():
    ...     changed = model.weight.clone()
    >>> (changed - model.weight).detach().round(decimals=3).tolist()
    [[0.0, 0.5, 0.0], [-1.0, 0.0, 2.0]]
    """

    def __init__(
        self,
        changes: Mapping[str, Change],
        dense: Mapping[str, Tensor] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        self.changes = {name: _checked(name, change) for name, change in changes.items()}
        self.dense = {name: _own(tensor) for name, tensor in (dense or {}).items()}
        self.provenance = dict(provenance or {})
        bad = [name for name, its in self.dense.items() if not _is_finite(its)]
        if bad:
            raise ValueError(f"SparseDifference: dense tensors must be floating-point and finite, not {listed(bad)}")
        both = [name for name in self.changes if name in self.dense]
        if both:
            raise ValueError(f"SparseDifference: {listed(both)} must be changed or dense, not both")

    @classmethod
    def between(
        cls, before: Mapping[str, Tensor], after: Mapping[str, Tensor], *, threshold: float = 1e-7, **rest: Any
    ) -> SparseDifference:
        """Return ``after - before`` of the parameters in ``before``, without entries of size at most ``threshold``.

        Differences of 16-bit weights are taken and kept in fp32. ``rest``: dense and provenance.

        Args:
            before, after: parameter name to tensor.
            threshold: 1e-7 is composable-sft's.
            rest: arguments of the class.

        Raises:
            ValueError: as the class.
        """
        changes = {}
        for name, old in before.items():
            delta = difference(after[name], old).reshape(-1)
            positions = (delta.abs() > threshold).nonzero().view(-1)
            changes[name] = Change(tuple(old.shape), positions, delta[positions])
        return cls(changes, **rest)

    def num_changed(self) -> int:
        """Return the number of changed weights, dense tensors not counted."""
        return sum(len(change.positions) for change in self.changes.values())

    def __repr__(self) -> str:
        dense = f", {len(self.dense)} dense tensors" if self.dense else ""
        return f"SparseDifference({self.num_changed()} weights of {len(self.changes)} parameters{dense})"

    def subnet(self) -> Subnet:
        """Return the set of changed weights; its parameters are those of ``changes``."""
        masks = {}
        for name, change in self.changes.items():
            masks[name] = torch.zeros(math.prod(change.shape), dtype=torch.bool)
            masks[name][change.positions] = True
            masks[name] = masks[name].view(change.shape)
        return Subnet(masks, self.provenance)

    def __add__(self, other: SparseDifference) -> SparseDifference:
        """Return the sum: values of weights that both change are added, dense tensors of both come along.

        Raises:
            ValueError: a parameter has two shapes, is changed in one and dense in the other, or has two different dense
                tensors.
        """
        if not isinstance(other, SparseDifference):
            return NotImplemented
        changes = dict(self.changes)
        for name, change in other.changes.items():
            changes[name] = _added(name, changes[name], change) if name in changes else change
        shared = [name for name in self.dense if name in other.dense]
        clashing = [name for name in shared if not torch.equal(self.dense[name], other.dense[name])]
        if clashing:
            what = f"both sides hold dense tensors of {listed(clashing)}, which cannot be added"
            raise ValueError(f"SparseDifference: {what}; leave one side's out")
        of = [self.provenance, other.provenance]
        return SparseDifference(changes, {**self.dense, **other.dense}, {"operation": "add", "of": of})

    # --- on a model

    def apply_to(self, model: nn.Module, *, dense: bool = True) -> nn.Module:
        """Return ``model`` with the difference added in place, ``theta += phi``.

        Args:
            model: unmasked, of the parameters that the difference names.
            dense: also write the dense tensors over the model's. False leaves the model's own, as for a language's
                difference in a model that has a task's output layer.

        Raises:
            ValueError: parameters are missing or of other shapes (listed); nothing is changed then.
        """
        self._write(model, 1, dense, "SparseDifference.apply_to")
        return model

    def revert_from(self, model: nn.Module) -> nn.Module:
        """Return ``model`` with the difference taken off in place, ``theta -= phi``: right to rounding, not to the bit.

        What dense tensors have replaced does not come back; `applied` restores all of it.

        Raises:
            ValueError: as `apply_to`.
        """
        self._write(model, -1, False, "SparseDifference.revert_from")
        return model

    @contextlib.contextmanager
    def applied(self, model: nn.Module, *, dense: bool = True) -> Iterator[nn.Module]:
        """Context in which the difference is applied; afterwards these parameters are as before, bit for bit.

        Args:
            model, dense: as for `apply_to`.

        Raises:
            ValueError: as `apply_to`.
        """
        parameters = self._fitting(model, "SparseDifference.applied")
        saved = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        try:
            self._write(model, 1, dense, "SparseDifference.applied")
            yield model
        finally:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(saved[name])

    def _fitting(self, model: nn.Module, caller: str) -> dict[str, nn.Parameter]:
        shapes = {name: list(change.shape) for name, change in self.changes.items()}
        shapes |= {name: list(tensor.shape) for name, tensor in self.dense.items()}
        check_unmasked(model, caller)
        there = {name: list(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
        odd = [f"{name} {its} (model: {there.get(name, 'absent')})" for name, its in shapes.items()
               if there.get(name) != its]  # fmt: skip
        if odd:
            raise ValueError(
                f"{caller}: the difference does not fit the model, in {listed(odd)}; pass the model it was made for"
            )
        masks = {name: torch.empty(its, device="meta") for name, its in shapes.items()}
        return fitting_parameters(masks, model, caller)

    @torch.no_grad()
    def _write(self, model: nn.Module, sign: int, dense: bool, caller: str) -> None:
        parameters = self._fitting(model, caller)
        for name, change in self.changes.items():
            parameter = parameters[name].view(1) if parameters[name].ndim == 0 else parameters[name]
            places = torch.unravel_index(change.positions.to(parameter.device), parameter.shape)
            added = parameter[places] + sign * change.values.to(parameter.device)
            parameter.index_put_(places, added.to(parameter.dtype))
        for name, tensor in self.dense.items() if dense else ():
            parameters[name].copy_(tensor)

    # --- files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all."""
        parts = [{name: change.positions for name, change in self.changes.items()},
                 {name: change.values for name, change in self.changes.items()}, self.dense]  # fmt: skip
        tensors = {p + name: its for p, part in zip(_PREFIXES, parts, strict=True) for name, its in part.items()}
        shapes = {name: list(change.shape) for name, change in self.changes.items()}
        metadata = {"format": FORMAT, "format_version": FORMAT_VERSION, "shapes": json.dumps(shapes)}
        metadata |= {"provenance": json.dumps(self.provenance, allow_nan=False), "checksum": weights_hash(tensors)}
        save_tensors(Path(path), tensors, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SparseDifference:
        """Return what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged or something else.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"SparseDifference.load: there is no file {path}; check the path")
        try:
            with safe_open(str(path), framework="pt", device="cpu") as file:
                metadata = dict(file.metadata() or {})
                if metadata.get("format") != FORMAT or metadata.get("format_version") != FORMAT_VERSION:
                    raise ValueError("it was not written by SparseDifference.save, or by a later version")
                tensors = {name: file.get_tensor(name).clone() for name in list(file.keys())}
            if weights_hash(tensors) != metadata.get("checksum"):
                raise ValueError("its checksum does not match its contents, so the file is damaged")
            changes = {name: Change(tuple(shape), tensors.pop(f"positions:{name}"), tensors.pop(f"values:{name}"))
                       for name, shape in json.loads(metadata["shapes"]).items()}  # fmt: skip
            dense = {name.removeprefix("dense:"): its for name, its in tensors.items()}
            return cls(changes, dense, json.loads(metadata["provenance"]))
        except Exception as error:  # safetensors and json raise types of their own
            text = " ".join(str(error).split())[:300]
            raise ValueError(f"SparseDifference.load: cannot load {path}: {text}") from error

    @classmethod
    def read_composable_sft(cls, path: str | os.PathLike[str]) -> SparseDifference:
        """Return the difference in a ``pytorch_diff.bin`` of composable-sft, or in the folder that holds one.

        Nothing that the file says is run: torch's ``weights_only`` reads it, after a look at what its pickle names.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, hostile, of another format, or holds positions that are out of range.
        """
        path = Path(path)
        path = path / SFT_FILE if path.is_dir() else path
        caller = "SparseDifference.read_composable_sft"
        where = f"{caller}: cannot read {path}"
        content = loaded(path, caller, _STAND_INS)
        diffs, dense = (content.get("diffs", {}), content.get("abs", {})) if isinstance(content, dict) else ({}, {})
        if not isinstance(diffs, dict) or not isinstance(dense, dict) or not (diffs or dense):
            raise ValueError(f"{where}: it must hold a dict of 'diffs' and 'abs'; pass composable-sft's {SFT_FILE}")
        for name, tensor in dense.items():
            if not isinstance(tensor, Tensor):
                raise ValueError(f"{where}: the dense value of {name!r} must be a tensor")
            check_tensor(name, tensor, where)
        changes = {name: _decoded(name, encoded, where) for name, encoded in diffs.items()}
        return cls(changes, dense, {"file": f"composable-sft {SFT_FILE}"})

    def write_composable_sft(self, path: str | os.PathLike[str]) -> None:
        """Write a ``pytorch_diff.bin`` for composable-sft.

        Args:
            path: of the file, or an existing folder to write it in.

        Raises:
            ValueError: a parameter has 2^31 weights or more: that library adds positions up in 32 bits.
        """
        large = [name for name, change in self.changes.items() if math.prod(change.shape) >= 2**31]
        if large:
            what = f"parameters must have fewer than 2^31 weights, which {listed(large)} do not"
            raise ValueError(f"SparseDifference.write_composable_sft: {what}; use save")
        path = Path(path)
        diffs = {name: _encoded(change) for name, change in self.changes.items()}
        torch.save({"diffs": diffs, "abs": self.dense}, path / SFT_FILE if path.is_dir() else path)


def difference(after: Tensor, before: Tensor) -> Tensor:
    """Return ``after - before``, of 16-bit tensors in fp32."""
    dtype = after.dtype if after.dtype.itemsize >= 4 else torch.float32
    return after.detach().to(dtype) - before.to(after.device, dtype)


def _is_finite(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and bool(tensor.isfinite().all())


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().to(device="cpu", memory_format=torch.contiguous_format, copy=True)


def _checked(name: str, change: Change) -> Change:
    shape, positions, values = change.shape, change.positions, change.values
    if not isinstance(positions, Tensor) or not isinstance(values, Tensor):
        raise TypeError(f"SparseDifference: positions and values of {name!r} must be tensors")
    if positions.dtype != torch.int64 or positions.ndim != 1 or values.shape != positions.shape:
        got = f"{positions.dtype} {list(positions.shape)} and {list(values.shape)}"
        raise ValueError(f"SparseDifference: {name!r} must have int64 positions [n] and values [n], got {got}")
    if not _is_finite(values):
        raise ValueError(f"SparseDifference: the values of {name!r} must be floating-point and finite")
    size, shape = math.prod(shape), tuple(shape)
    if len(positions) and (int(positions.min()) < 0 or int(positions.max()) >= size):
        what = f"positions in {name!r} must lie in [0, {size}), the number of weights of {list(shape)}"
        raise ValueError(f"SparseDifference: {what}, got {int(positions.min())} to {int(positions.max())}")
    if not bool((positions[1:] > positions[:-1]).all()):
        raise ValueError(f"SparseDifference: the positions in {name!r} must ascend, each once")
    return Change(shape, _own(positions), _own(values))


def _added(name: str, left: Change, right: Change) -> Change:
    if left.shape != right.shape:
        shapes = f"{list(left.shape)} and {list(right.shape)}"
        raise ValueError(f"SparseDifference: both sides must be of one model, but {name!r} has shapes {shapes}")
    positions, place = torch.cat([left.positions, right.positions]).unique(return_inverse=True)
    values = torch.cat([left.values, right.values])
    return Change(left.shape, positions, values.new_zeros(len(positions)).index_add_(0, place, values))


# --- composable-sft's encoding


def _reversed_order(positions: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return flat positions in C order of ``shape`` as those of the same places with all dimensions reversed."""
    if len(shape) < 2:
        return positions
    strides = [1, *itertools.accumulate(shape[:-1], lambda a, b: a * b)]
    flat = torch.zeros_like(positions)
    for coordinate, stride in zip(torch.unravel_index(positions, shape), strides, strict=True):
        flat += coordinate * stride
    return flat


def _encoded(change: Change) -> dict[str, Any]:
    columns, order = _reversed_order(change.positions, change.shape).sort()
    steps = columns.diff(prepend=columns.new_zeros(1)).tolist() if len(columns) else []
    return {"size": torch.Size(change.shape), "index_steps": steps, "values": change.values[order]}


def _decoded(name: str, encoded: Any, where: str) -> Change:
    if not isinstance(encoded, dict) or set(encoded) != {"size", "index_steps", "values"}:
        raise ValueError(f"{where}: the difference of {name!r} must hold 'size', 'index_steps' and 'values'")
    size, steps, values = encoded["size"], encoded["index_steps"], encoded["values"]
    are_whole = [isinstance(its, (list, tuple)) and all(type(i) is int and 0 <= i < 2**62 for i in its)
                 for its in (size, steps)]  # fmt: skip
    if not all(are_whole) or not isinstance(values, Tensor):
        raise ValueError(f"{where}: the difference of {name!r} must hold size and steps of integers >= 0, and a tensor")
    check_tensor(name, values, where)
    shape, columns = tuple(size), list(itertools.accumulate(steps))
    if columns and columns[-1] >= math.prod(shape):
        what = f"positions of {name!r} reach {columns[-1]}, beyond the {math.prod(shape)} weights of {list(shape)}"
        raise ValueError(f"{where}: {what}; the file is damaged or of another model")
    if len(columns) != values.numel() or values.ndim != 1:
        got = f"{list(values.shape)} and {len(columns)}"
        raise ValueError(f"{where}: {name!r} must have as many values as positions, got {got}")
    positions, order = _reversed_order(torch.tensor(columns, dtype=torch.int64), shape[::-1]).sort()
    return Change(shape, positions, values[order])


class _Int64:
    """Stands for numpy's dtype of the one numpy scalar that the file holds per parameter, its first position."""

    def __init__(self, name: str, *rest: Any) -> None:
        if name != "i8":
            raise ValueError(f"its numpy scalar must be of type i8, got {name!r:.80}")
        self.order = "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]


def _scalar(dtype: _Int64, data: bytes) -> int:
    if len(data) != 8:
        raise ValueError("its numpy scalar must have 8 bytes")
    return int.from_bytes(data, "big" if dtype.order == ">" else "little", signed=True)


_STAND_INS: dict[str, Callable[..., Any]] = {
    "torch.Size": torch.Size, "_codecs.encode": str.encode, "numpy.dtype": _Int64,
    "numpy.core.multiarray.scalar": _scalar, "numpy._core.multiarray.scalar": _scalar,
}  # fmt: skip
