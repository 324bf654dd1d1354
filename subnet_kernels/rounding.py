"""Rounding to bf16 that is right on average: how bf16 moments of an optimizer are stored.

Rounded to the nearest, a bf16 second moment could not decay: beta2 = .999 changes it by a thousandth, half a unit in
its last place is two to four thousandths. So a value is rounded up with the probability of its distance from below, by
a number that depends on the element's place and the step alone: runs repeat to the bit, on every backend, whatever the
tiling and threads. This file is the definition; csrc/rounding.h and backends/triton/rounding.py are its translations.
"""

from __future__ import annotations

import torch
from torch import Tensor

# An integer hash of good avalanche in five steps. Source: C. Wellons, "Prospecting for hash functions" (2018),
# lowbias32.
MULTIPLIERS = (0x7FEB352D, 0x846CA68B)
SHIFTS = (16, 15, 16)
STEP_STRIDE = 0x9E3779B9  # 2^32 / the golden ratio: far apart for neighbouring steps
_MASK = 0xFFFFFFFF


def rounding_bits(num: int, step: int | Tensor, device: torch.device | None = None) -> Tensor:
    """For elements 0 .. num-1 in storage order, 32 bits each (int64): hash(index + step * STEP_STRIDE), mod 2^32. The
    low half rounds the first moment, the high half the second. ``step`` counts from 1; a 0-d tensor stays where it
    is."""
    if isinstance(step, Tensor):
        step = step.to(device=device, dtype=torch.int64)
    x = (torch.arange(num, device=device) + step * STEP_STRIDE) & _MASK
    x = ((x ^ (x >> SHIFTS[0])) * MULTIPLIERS[0]) & _MASK
    x = ((x ^ (x >> SHIFTS[1])) * MULTIPLIERS[1]) & _MASK
    return x ^ (x >> SHIFTS[2])


def round_to_bf16(values: Tensor, random: Tensor) -> Tensor:
    """fp32 values to bf16 by ``random`` (integers in [0, 2^16), same shape): the 16 bits that are dropped are added to
    it first and carry into those that stay. Infinities stay, a NaN stays a NaN."""
    bits = values.contiguous().view(torch.int32).to(torch.int64) & _MASK
    rounded = ((bits + random) & 0xFFFF0000).where(~values.isnan(), bits | 0x400000)
    rounded = torch.where(rounded >= 1 << 31, rounded - (1 << 32), rounded).to(torch.int32)
    return rounded.view(torch.float32).to(torch.bfloat16)  # exact, but for a NaN, which stays one
