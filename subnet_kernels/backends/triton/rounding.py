"""The rounding of :mod:`subnet_kernels.rounding`, for Triton kernels: its one translation, the same to the bit."""

from __future__ import annotations

import triton
import triton.language as tl

from ... import rounding

_STRIDE: tl.constexpr = tl.constexpr(rounding.STEP_STRIDE)
_FIRST, _SECOND = (tl.constexpr(number) for number in rounding.MULTIPLIERS)
_A, _B, _C = (tl.constexpr(number) for number in rounding.SHIFTS)


@triton.jit
def rounding_bits(at, step):
    """uint32 of the elements ``at`` (integers, in storage order) in the step of that number (an integer scalar)."""
    x = at.to(tl.uint32) + step.to(tl.uint32) * _STRIDE
    x = (x ^ (x >> _A)) * _FIRST
    x = (x ^ (x >> _B)) * _SECOND
    return x ^ (x >> _C)


@triton.jit
def round_to_bf16(values, random):
    """fp32 values to bf16 by ``random``, uint32 in [0, 2^16)."""
    bits = values.to(tl.uint32, bitcast=True)
    bits = tl.where(values == values, bits + random, bits | 0x400000)
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
