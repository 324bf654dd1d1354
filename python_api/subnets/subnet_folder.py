"""A subnet as a folder to share: the file, and a card that says what it is. Nothing but the file is ever read back."""

from __future__ import annotations

import html
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .training.files import write_text

if TYPE_CHECKING:
    from .subnet import Subnet

FILE = "subnet.safetensors"
CARD = "README.md"
_MARK = "<!-- Written by Subnet.save_pretrained. Without this line the card is yours: it is left as it is. -->"


def file_in(folder: str | os.PathLike[str]) -> Path:
    """Return the path of the subnet file in a folder.

    Raises:
        FileNotFoundError: there is no such folder, or no subnet file in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        hint = "is a file; use Subnet.load" if folder.is_file() else "does not exist; nothing is downloaded here"
        raise FileNotFoundError(f"Subnet.from_pretrained: it takes a folder of Subnet.save_pretrained, {folder} {hint}")
    if not (folder / FILE).is_file():
        raise FileNotFoundError(
            f"Subnet.from_pretrained: {folder} holds no {FILE}; pass a folder of Subnet.save_pretrained"
        )
    return folder / FILE


def write_card(folder: Path, subnet: Subnet) -> None:
    """Write the card beside the file, unless there is one that somebody has made their own."""
    path = folder / CARD
    if path.exists() and _MARK not in path.read_text(encoding="utf-8", errors="replace"):
        return
    write_text(path, card(subnet))


def card(subnet: Subnet) -> str:
    """Return the card, Markdown with the front matter that model hubs read. Whatever the provenance holds stands in it
    as text, never as markup."""
    known = subnet.provenance
    base = known.get("base_model") if isinstance(known.get("base_model"), str) else None
    whose = _text(base or known.get("architecture", "a network"))
    total = sum(mask.numel() for mask in subnet.masks.values())
    size = f"{subnet.num_kept():,} of {total:,} weights in {len(subnet.masks)} parameters"
    holds = ["one bit per weight"]
    holds += ["the kept values, so that it can be planted without its network"] if subnet.weights else []
    holds += ["8-bit ranks of its scores, so that fractions of it can be planted"] if subnet.ranks else []
    densities = [(name, f"{density:.4f}") for name, density in subnet.density(per_layer=True).items()]
    lines = [
        "---", "library_name: subnet-kernels", "tags: [subnet, pruning]",
        *([f"base_model: {json.dumps(base)}"] if base else []), "---", _MARK, "",
        f"# A subnetwork of {whose}", "",
        f"{size}: density {subnet.density():.4f}. Task: {_text(known.get('task', 'not recorded'))}.", "",
        f"The file holds {', '.join(holds)}. SHA-256 of the masked weights of the network it was found in: "
        f"{_text(subnet.base_hash or 'not recorded')}.", "",
        "## How to load it", "",
        "```python", "from subnets import Subnet, transfer", "",
        'subnet = Subnet.from_pretrained("path/to/this/folder")',
        "with subnet.applied(model):       # model: the network it was found in, computing with the subnet alone",
        "    ...",
        f"transfer(subnet, {'None' if subnet.weights else 'model'}, other)    # plant it in another network, frozen",
        "```", "",
        *_table("Metrics", ("metric", "value"), _pairs(known.get("metrics"))),
        *_table("Density", ("parameter", "density"), densities),
        "## Where it comes from", "", "```json", json.dumps(known, indent=2), "```",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _pairs(metrics: Any) -> list[tuple[str, Any]]:
    return list(metrics.items()) if isinstance(metrics, dict) else []


def _table(title: str, head: tuple[str, str], rows: list[tuple[str, Any]]) -> list[str]:
    if not rows:
        return []
    body = [f"| {_text(name)} | {_text(value)} |" for name, value in rows]
    return [f"## {title}", "", f"| {head[0]} | {head[1]} |", "|---|---|", *body, ""]


def _text(value: Any) -> str:
    """The value on one line, without a character that Markdown or HTML would act on."""
    line = " ".join(str(value).split()).encode(errors="replace").decode()
    return "".join(f"\\{c}" if c in "\\`*_[]|#!~" else c for c in html.escape(line, quote=False))
