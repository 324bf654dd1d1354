"""Where in a network a parameter stands, read from its name alone: role and depth, and which part of it is which head.

    "transformer.h.3.attn.c_attn.weight"  ->  role "attn.c_attn", depth 3

It looks at dots and numbers only, so names of any architecture will do. A name without a number has no depth.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from subnets.subnet_heads import head_densities, head_dimension, num_parts


@dataclass(frozen=True)
class Place:
    """What a parameter's name says: ``role``, the same at all depths, and ``depth``, None where the name has no number.

    ``position`` is where to draw it: its depth, or between depth and depth + 1 where the role has several parameters at
    this depth (blocks of a stage, experts of a layer).
    """

    role: str
    depth: int | None
    position: float | None


def places_of(names: Sequence[str]) -> dict[str, Place]:
    """Return the place of each parameter name of one model.

    Depth is the first part of the name that is a number ("h.3.attn"). The role is the name with "*" for that number and
    for further ones that count things (a plural before them: "stages.0.layers.1"), without the parts that all roles
    begin with and without a last "weight". Numbers at the end of a part before it ("layer1.0.conv1"), or of the first
    such part where no part is a number ("fc1", "fc2"), count too if other names have another number there.
    """
    split = {name: _parts(name) for name in names}
    seen: dict[tuple[str, ...], set[int]] = {}  # what stands before a number -> the numbers there
    for parts in split.values():
        for i, (_, number) in enumerate(parts):
            if number is not None:
                seen.setdefault(_stems(parts, i), set()).add(number)
    roles: dict[str, tuple[str, ...]] = {}
    numbers: dict[str, tuple[int, ...]] = {}
    for name, parts in split.items():
        role, own = [], []
        for i, (stem, number) in enumerate(parts):
            if number is None or (stem and len(seen[_stems(parts, i)]) == 1):
                role.append(stem if number is None else f"{stem}{number}")
            else:
                role.append(f"{stem}*")
                own.append(number)
        roles[name], numbers[name] = tuple(role), tuple(own)
    shared = _shared_beginning([roles[name] for name in names if numbers[name]])
    places = {}
    for name in names:
        role, own = roles[name], numbers[name]
        short = ".".join(role[shared:] if own else role)
        alike = sorted({n for other, n in numbers.items() if own and roles[other] == role and n[0] == own[0]})
        position = own[0] + alike.index(own) / len(alike) if own else None
        places[name] = Place(short.removesuffix(".weight"), own[0] if own else None, position)
    return places


def _parts(name: str) -> list[tuple[str, int | None]]:
    """The name's parts as (part, None), or (what stands before the number, number) where a number may count."""
    pieces = [re.fullmatch(r"(.*?)(\d{0,9})", part, re.DOTALL) for part in name.split(".")]  # 9: names may be hostile
    split = [match.groups() for match in pieces if match]
    first = next((i for i, (stem, digits) in enumerate(split) if digits and not stem), None)
    if first is None:
        first = next((i for i, (_, digits) in enumerate(split) if digits), len(split))
    parts: list[tuple[str, int | None]] = []
    for i, (stem, digits) in enumerate(split):
        is_counted = i <= first or (not stem and split[i - 1][0].endswith("s"))
        parts.append((stem, int(digits)) if digits and is_counted else (stem + digits, None))
    return parts


def _stems(parts: Sequence[tuple[str, int | None]], last: int) -> tuple[str, ...]:
    return tuple(stem for stem, _ in parts[: last + 1])


def _shared_beginning(roles: Sequence[tuple[str, ...]]) -> int:
    """How many first parts all roles have in common, one part of each role (and a last "weight") left over."""
    if not roles:
        return 0
    most = min(len(role) - (role[-1] == "weight" and len(role) > 1) for role in roles) - 1
    return next((i for i in range(most) if len({role[i] for role in roles}) > 1), most)


# --- heads -----------------------------------------------------------------------------------------------------------

def heads_by_projection(masks: Mapping[str, Tensor], heads: int | None) -> dict[str, dict[str, list[float]]]:
    """Return, for each attention projection among the masks, the density of every head, as `Subnet.density_per_head`.

    Which projections there are is told by their names (`subnet_heads.HEADS_ALONG`), the size of a head by ``heads`` and
    the widest of them, so that key and value may have fewer heads than query.

    Args:
        masks: parameter name -> bool tensor, as in `Subnet.masks`.
        heads: the model's number of attention heads, >= 1; None where it is not known: then only parameters that have
            a dimension of heads ("W_Q" [heads, d_model, d_head]) are given.

    Returns:
        name -> {"": densities}, or {"q": ..., "k": ..., "v": ...} for a projection that holds all three.

    Raises:
        ValueError: ``heads`` is < 1 or does not divide the widest projection.
    """
    if heads is not None and heads < 1:
        raise ValueError(f"heads must be 1 or more, got {heads}")
    dims = {name: head_dimension(name, masks) for name, mask in masks.items() if mask.numel()}
    raw = [name for name, dim in dims.items() if dim is not None and masks[name].ndim == 3]
    widths = {
        name: masks[name].shape[dim] // num_parts(name, masks[name])
        for name, dim in dims.items()
        if dim is not None and masks[name].ndim == 2 and heads is not None
    }
    size = 1
    if heads is not None and widths:
        widest = max(widths, key=lambda name: widths[name])
        size, rest = divmod(widths[widest], heads)
        if rest:
            raise ValueError(
                f"heads must divide the width of {widest}, {widths[widest]}, got {heads}; pass the model's number of "
                "attention heads"
            )
    fitting = {name: masks[name] for name in masks if name in raw or (name in widths and widths[name] % size == 0)}
    found = head_densities(fitting, size, None, "heads_by_projection") if fitting else {}
    return {name: _parts_of(name, masks[name], densities) for name, densities in found.items()}


def _parts_of(name: str, mask: Tensor, densities: Tensor) -> dict[str, list[float]]:
    if num_parts(name, mask) == 1:
        return {"": densities.tolist()}
    return {part: its.tolist() for part, its in zip("qkv", densities.chunk(3), strict=True)}
