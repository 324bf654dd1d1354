"""Where in a network a parameter stands, read from its name alone: role and depth, and which part of it is which head.

    "transformer.h.3.attn.c_attn.weight"  ->  role "attn.c_attn", depth 3

It looks at dots and numbers only, so names of any architecture will do. A name without a number has no depth.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor


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

# How the names of attention's projections end in the models people have, and where their heads lie: blocks of the
# weight's output units ("out"), of its input units ("in"), of query's, key's and value's output units one after the
# other ("qkv"), of output units that hold query, key and value of a head ("out" too), or the first dimension ("first").
_PROJECTIONS = [
    (re.compile(rf"(^|\.)({names})(\.weight)?$"), kind)
    for kind, names in {
        "first": r"_?W_[QKV]|W_O",  # TransformerLens: [heads, ...]
        "qkv": r"c_attn|in_proj_weight|in_proj|qkv|Wqkv",
        "out": r"[qkv]|[qkv]_proj|[qkv]_lin|to_[qkv]|attention\.w[qkv]|query|key|value|query_key_value",
        "in": r"o|o_proj|out_proj|out_lin|to_out\.0|attention\.(wo|(output\.)?dense)|attn\.(c_)?proj",
    }.items()
]


def is_projection(name: str) -> bool:
    """Does the name end as an attention projection's does, so that parts of it belong to heads?"""
    return _kind(name) is not None


def head_densities(masks: Mapping[str, Tensor], heads: int | None) -> dict[str, dict[str, list[float]]]:
    """Return, for each attention projection among the masks, the density of every head.

    Which projections there are is told by how their names end (GPT-2, BERT, ViT, Llama, T5, nn.MultiheadAttention,
    TransformerLens and what is named like them), the size of a head by ``heads`` and the widest of them, so that
    key and value may have fewer heads than query.

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
        raise ValueError(f"head_densities: heads must be 1 or more, got {heads}")
    found: dict[str, dict[str, list[float]]] = {}
    flat: dict[str, dict[str, Tensor]] = {}  # name -> part -> counts of kept weights by unit of the heads' dimension
    units: dict[str, int] = {}  # name -> weights in such a unit
    for name, mask in masks.items():
        kind = _kind(name)
        if kind == "first" and mask.ndim == 3 and mask.numel():
            found[name] = {"": (mask.flatten(1).sum(1) / (mask.numel() // len(mask))).tolist()}
        elif kind not in (None, "first") and mask.ndim == 2 and mask.numel():
            dim = _head_dimension(name, kind, masks)
            if dim is not None:
                counts = mask.sum(1 - dim)
                flat[name] = dict(zip("qkv", counts.chunk(3))) if kind == "qkv" else {"": counts}
                units[name] = mask.shape[1 - dim]
    if heads is None or not flat:
        return found
    widths = {name: len(next(iter(parts.values()))) for name, parts in flat.items()}
    widest = max(widths, key=lambda name: widths[name])
    if widths[widest] % heads:
        raise ValueError(
            f"head_densities: heads must divide the width of {widest}, {widths[widest]}, got {heads}; pass the model's "
            "number of attention heads"
        )
    size = widths[widest] // heads
    for name, parts in flat.items():
        if widths[name] % size == 0:
            each = size * units[name]
            found[name] = {part: (c.view(-1, size).sum(1) / each).tolist() for part, c in parts.items()}
    return {name: found[name] for name in masks if name in found}


def _kind(name: str) -> str | None:
    return next((kind for ending, kind in _PROJECTIONS if ending.search(name)), None)


def _head_dimension(name: str, kind: str | None, masks: Mapping[str, Tensor]) -> int | None:
    """The dimension along which heads lie: 0 or 1; None where it can't be told. A Linear's weight is [out, in],
    transformers' Conv1D's [in, out]; with c_attn, which is three times as long as wide, one can tell which it is."""
    rows, columns = masks[name].shape
    if kind == "qkv":
        return 0 if rows == 3 * columns else 1 if columns == 3 * rows else None
    if "c_proj" in name:
        sibling = masks.get(name.replace("c_proj", "c_attn"))
        dim = None if sibling is None else _head_dimension(name.replace("c_proj", "c_attn"), "qkv", masks)
        return None if dim is None else 1 - dim
    return 0 if kind == "out" else 1
