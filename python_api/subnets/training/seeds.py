"""Random streams named by what they are for: (seed, stage, epoch, ...), never by what ran before."""

from __future__ import annotations

import hashlib

import torch

_MAX_SEED = 2**63


def seed_for(*parts: int | str) -> int:
    """A 63-bit seed that depends on the parts alone: the first 8 bytes of SHA-256 of their text.

    The same parts give the same seed in every process, on every machine and with every Python version.
    """
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, int | str):
            raise TypeError(f"seed_for: parts must be int or str, got {part!r} of type {type(part).__name__}")
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") % _MAX_SEED


def torch_generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by `seed_for(*parts)`."""
    return torch.Generator().manual_seed(seed_for(*parts))
