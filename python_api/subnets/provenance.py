"""What a subnet remembers of where it comes from: free JSON, in which some names always mean the same."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

NAMED = {
    "base_model": "id or folder of the model, as transformers' `name_or_path` has it",
    "architecture": "the model's class",
    "num_heads": "its number of attention heads, by which `subnets inspect` tells them apart",
    "method": "what found the subnet",
    "beta": "inverse temperature at the end",
    "lam": "weight of the mask penalty",
    "seed": "of the search",
    "metrics": "name to number: what the subnet scores",
    "versions": "library to version",
    "task": "what was searched for",
}


def provenance_of(model: nn.Module, **known: Any) -> dict[str, Any]:
    """Return the provenance of a subnet of ``model``: what can be told from it, and what is ``known`` (None is not)."""
    facts = {
        "base_model": _base_model(model), "architecture": _class_of(model).__name__, "num_heads": _num_heads(model),
        **known,
    }  # fmt: skip
    return {name: value for name, value in facts.items() if value is not None} | {"versions": _versions(model)}


def base_of(*provenances: dict[str, Any]) -> dict[str, Any]:
    """Return what all of them say of their base model: the entries of it that are the same in each."""
    first, *rest = provenances
    names = [name for name in ("base_model", "architecture") if name in first]
    return {name: first[name] for name in names if all(its.get(name) == first[name] for its in rest)}


def _base_model(model: nn.Module) -> str | None:
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return name if isinstance(name, str) and name else None


def _num_heads(model: nn.Module) -> int | None:
    """As transformers and TransformerLens name it."""
    for settings, name in (("config", "num_attention_heads"), ("cfg", "n_heads")):
        heads = getattr(getattr(model, settings, None), name, None)
        if isinstance(heads, int) and heads > 0:
            return heads
    return None


def _class_of(model: nn.Module) -> type:
    """The model's class without its masks, which are subclasses, as is what fully_shard makes."""
    wrappers = "subnets.nn.", "torch.distributed.fsdp"
    return next(base for base in type(model).__mro__ if not base.__module__.startswith(wrappers))


def _versions(model: nn.Module) -> dict[str, str]:
    from . import __version__

    versions = {"subnets": __version__, "torch": str(torch.__version__)}
    if any(base.__module__.partition(".")[0] == "transformers" for base in type(model).__mro__):
        versions["transformers"] = sys.modules["transformers"].__version__
    return versions
