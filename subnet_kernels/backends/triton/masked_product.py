"""Products with weight * m whose mask is made inside the product (plan "fused"): the linear layer both ways.

out[m, n] = sum_k x[m, k] * (weight * mask)[n, k] + bias[n]; the gradient of x is the same product with grad_out in x's
place and weight transposed. It is computed transposed, [rows of weight] x [rows of x], so that the masked weight is the
left operand, which tensor cores of sm_90 take from registers: it is never written anywhere. The first step of the sum
is peeled off the loop: without that ptxas serialises the products (C7515).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .mask import mask_value


@triton.jit
def masked_tile(weight, scores, inside, inverse_temperature, KIND: tl.constexpr, DTYPE: tl.constexpr):
    """(weight * m rounded to DTYPE, sum of m) of one tile of pointers."""
    m = mask_value(tl.load(scores, mask=inside, other=0.0), inverse_temperature, KIND)
    w = tl.load(weight, mask=inside, other=0.0).to(tl.float32)
    return (w * m).to(DTYPE), tl.sum(tl.where(inside, m, 0.0))


@triton.jit
def masked_product_kernel(
    x, weight, scores, beta, bias, out, partials, m, n, k, x_row, x_column, weight_row, weight_column, score_row,
    score_column, group_row, group_column, HAS_BIAS: tl.constexpr, WANTS_SUM: tl.constexpr, IS_COARSE: tl.constexpr,
    KIND: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """Program (rows of x, rows of weight). partials[tile of n] = sum of m over its rows, by the first rows of x, if
    WANTS_SUM. IS_COARSE: the score of weight (r, c) is scores[r // group_row, c // group_column]; else scores have
    weight's strides. UPCAST: products in fp32 whatever the dtype (the interpreter's bf16 product is wrong)."""
    tile_m, tile_n = tl.program_id(0), tl.program_id(1)
    rows = tile_n * BN + tl.arange(0, BN)
    tokens = tile_m * BM + tl.arange(0, BM)
    depth = tl.arange(0, BK)
    ROUND: tl.constexpr = x.dtype.element_ty
    DTYPE: tl.constexpr = tl.float32 if UPCAST else ROUND
    weight += rows.to(tl.int64)[:, None] * weight_row + depth.to(tl.int64)[None, :] * weight_column
    if IS_COARSE:
        scores += (rows // group_row).to(tl.int64)[:, None] * score_row
        score = scores + (depth // group_column)[None, :] * score_column
    else:
        scores += rows.to(tl.int64)[:, None] * weight_row + depth.to(tl.int64)[None, :] * weight_column
        score = scores
    x += depth.to(tl.int64)[:, None] * x_column + tokens.to(tl.int64)[None, :] * x_row
    inverse_temperature = tl.load(beta)
    is_row = (rows < n)[:, None]
    is_token = (tokens < m)[None, :]
    w_eff, mask_sum = masked_tile(weight, score, is_row & (depth < k)[None, :], inverse_temperature, KIND, ROUND)
    v = tl.load(x, mask=(depth < k)[:, None] & is_token, other=0.0)
    product = tl.dot(w_eff.to(DTYPE), v.to(DTYPE), input_precision=PRECISION)
    for start in range(BK, k, BK):
        x += BK * x_column
        weight += BK * weight_column
        left = (start + depth) < k
        if IS_COARSE:
            score = scores + ((start + depth) // group_column)[None, :] * score_column
        else:
            score += BK * weight_column
        w_eff, tile_sum = masked_tile(weight, score, is_row & left[None, :], inverse_temperature, KIND, ROUND)
        if WANTS_SUM:
            mask_sum += tile_sum
        v = tl.load(x, mask=left[:, None] & is_token, other=0.0)
        product = tl.dot(w_eff.to(DTYPE), v.to(DTYPE), product, input_precision=PRECISION)
    if HAS_BIAS:
        product += tl.load(bias + rows, mask=rows < n, other=0.0).to(tl.float32)[:, None]
    out += tokens.to(tl.int64)[None, :] * n + rows[:, None]
    tl.store(out, product.to(out.dtype.element_ty), mask=is_row & is_token)
    if WANTS_SUM:
        if tile_m == 0:
            tl.store(partials + tile_n, mask_sum)
