"""The mask functions of :mod:`subnet_kernels.masks`, for Triton kernels: their one translation."""

from __future__ import annotations

import triton
import triton.language as tl

SIGMOID: tl.constexpr = tl.constexpr(0)
HARD: tl.constexpr = tl.constexpr(1)
_NEGLIGIBLE: tl.constexpr = tl.constexpr(69.3147181)  # 100 ln 2: exp(-a) counts as 0 above (see masks.py)


@triton.jit
def sigmoid_pair(z):
    """(sigmoid(|z|), sigmoid(-|z|)) from one exp; neither is a subtraction from 1, so both keep their digits."""
    a = tl.abs(z)
    e = tl.where(a > _NEGLIGIBLE, 0.0, tl.exp(-a))
    above = 1.0 / (1.0 + e)
    return above, e * above


@triton.jit
def mask_value(score, beta, KIND: tl.constexpr):
    """m: sigmoid(beta*s), or 1[s > 0]."""
    if KIND == HARD:
        return tl.where(score > 0, 1.0, 0.0)
    z = beta * score
    above, below = sigmoid_pair(z)
    return tl.where(z >= 0, above, below)


@triton.jit
def mask_slope(score, beta, KIND: tl.constexpr):
    """dm/ds: beta*m*sigmoid(-z), or 0."""
    if KIND == HARD:
        return tl.zeros_like(score)
    above, below = sigmoid_pair(beta * score)
    return beta * (above * below)
