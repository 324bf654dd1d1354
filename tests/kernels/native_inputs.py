"""Inputs and truth for the tests of the raw ops in torch.ops.subnet_native."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

ops = torch.ops.subnet_native
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

# Weight's shape, scores' shape, order of weight's dimensions in memory.
COARSE = {
    "row": ((37, 129), (37, 1), None),
    "column": ((130, 67), (1, 67), None),
    "head": ((48, 40), (6, 1), None),
    "head columns": ((33, 64), (1, 4), None),
    "block": ((36, 60), (9, 20), None),
    "large block": ((30, 140), (3, 2), None),
    "one score": ((19, 23), (1, 1), None),
    "row of a transposed weight": ((37, 129), (37, 1), (1, 0)),
    "column of a transposed weight": ((130, 67), (1, 67), (1, 0)),
    "block of a transposed weight": ((36, 60), (9, 20), (1, 0)),
    "filter": ((24, 16, 3, 3), (24, 1, 1, 1), None),
    "channel": ((24, 16, 3, 3), (1, 16, 1, 1), None),
    "kernel": ((24, 16, 3, 3), (24, 16, 1, 1), None),
    "position": ((24, 16, 3, 3), (1, 1, 3, 3), None),
    "filter in channels_last": ((24, 16, 3, 3), (24, 1, 1, 1), (0, 2, 3, 1)),
    "channel in channels_last": ((24, 16, 3, 3), (1, 16, 1, 1), (0, 2, 3, 1)),
    "filter groups in channels_last": ((24, 16, 3, 3), (6, 8, 1, 3), (0, 2, 3, 1)),
    "large row": ((70, 3000), (70, 1), None),
    "large column": ((1100, 190), (1, 190), None),
}


def _supported() -> tuple[str, ...]:
    best = ops.cpu_capability()
    names = []
    for name in ("portable", "avx2", "avx512"):
        try:
            ops.set_cpu_capability(name)
        except RuntimeError:
            continue
        names.append(name)
    ops.set_cpu_capability(best)
    return tuple(names)


CAPABILITIES = _supported()  # a test in test_native_other_ops.py checks this list against the processor's own


@contextmanager
def capability(name: str) -> Iterator[None]:
    """The kernels of one instruction set, whatever this processor would choose."""
    best = ops.cpu_capability()
    ops.set_cpu_capability(name)
    try:
        yield
    finally:
        ops.set_cpu_capability(best)


def randn(shape: tuple[int, ...], seed: int, order: tuple[int, ...] | None = None) -> Tensor:
    """fp32 values whose dimensions lie in memory in ``order`` (slowest first)."""
    generator = torch.Generator().manual_seed(seed)
    if order is None:
        return torch.randn(shape, generator=generator)
    stored = torch.randn([shape[d] for d in order], generator=generator)
    return stored.permute([order.index(d) for d in range(len(shape))])


def nan_like(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An output that shows every element that was not written."""
    return torch.full_like(like, float("nan"), dtype=dtype or like.dtype)


def spread(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """One value per score -> one per weight."""
    for d, size in enumerate(shape):
        values = values.repeat_interleave(size // values.shape[d], dim=d) if values.shape[d] else values
    return values


def gather(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """One value per weight -> sums per score."""
    blocked = [n for size, k in zip(values.shape, shape) for n in (k, size // k)]
    return values.reshape(blocked).sum(dim=list(range(1, len(blocked), 2)))


def assert_within(actual: Tensor, truth: Tensor, bound: Tensor, what: str = "") -> None:
    """Every element's error is at most its bound; a NaN that the truth does not have fails."""
    error = (actual.double() - truth).abs()
    worst = (error / bound.clamp_min(1e-300)).max().item() if error.numel() else 0.0
    assert bool((error <= bound).all()), f"{what}: error is {worst:.2f} times its bound"
