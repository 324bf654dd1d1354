"""out = x @ (weight * m).T + bias with the mask made inside the product, for few rows of x (plan "fused").

The product is computed transposed, [rows of weight] x [rows of x], so that the masked weight is the left operand, which
tensor cores of sm_90 take from registers. The first step of the sum is peeled off the loop: without that ptxas
serialises the products (C7515)."""

from __future__ import annotations

import triton
import triton.language as tl

from .mask import mask_value


@triton.jit
def masked_tile(weight, scores, inside, inverse_temperature, KIND: tl.constexpr, DTYPE: tl.constexpr):
    """(weight * m in DTYPE, sum of m) of one tile."""
    m = mask_value(tl.load(scores, mask=inside, other=0.0), inverse_temperature, KIND)
    w = tl.load(weight, mask=inside, other=0.0).to(tl.float32)
    return (w * m).to(DTYPE), tl.sum(tl.where(inside, m, 0.0))


@triton.jit
def small_m_kernel(
    x, weight, scores, beta, bias, out, partials, m, n, k, x_row, x_column, HAS_BIAS: tl.constexpr,
    KIND: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """Program (rows of weight, rows of x); partials[tile of n] = sum of m over its rows, by the first rows of x."""
    tile_n, tile_m = tl.program_id(0), tl.program_id(1)
    rows = tile_n * BN + tl.arange(0, BN)
    tokens = tile_m * BM + tl.arange(0, BM)
    depth = tl.arange(0, BK)
    DTYPE: tl.constexpr = tl.float32 if UPCAST else x.dtype.element_ty
    at = rows.to(tl.int64)[:, None] * k + depth[None, :]
    x += depth.to(tl.int64)[:, None] * x_column + tokens.to(tl.int64)[None, :] * x_row
    inverse_temperature = tl.load(beta)
    is_row = (rows < n)[:, None]
    is_token = (tokens < m)[None, :]
    w_eff, mask_sum = masked_tile(
        weight + at, scores + at, is_row & (depth < k)[None, :], inverse_temperature, KIND, x.dtype.element_ty
    )
    v = tl.load(x, mask=(depth < k)[:, None] & is_token, other=0.0)
    product = tl.dot(w_eff.to(DTYPE), v.to(DTYPE), input_precision=PRECISION)
    for start in range(BK, k, BK):
        x += BK * x_column
        left = (start + depth) < k
        w_eff, tile_sum = masked_tile(
            weight + at + start, scores + at + start, is_row & left[None, :], inverse_temperature, KIND,
            x.dtype.element_ty,
        )  # fmt: skip
        mask_sum += tile_sum
        v = tl.load(x, mask=left[:, None] & is_token, other=0.0)
        product = tl.dot(w_eff.to(DTYPE), v.to(DTYPE), product, input_precision=PRECISION)
    if HAS_BIAS:
        product += tl.load(bias + rows, mask=rows < n, other=0.0).to(tl.float32)[:, None]
    out += tokens.to(tl.int64)[None, :] * n + rows[:, None]
    tl.store(out, product.to(out.dtype.element_ty), mask=is_row & is_token)
    if tile_m == 0:
        tl.store(partials + tile_n, mask_sum)
