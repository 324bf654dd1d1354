"""grad_scores = ((grad_out.T @ x) * weight + grad_penalty) * slope in one kernel: the product's tile never leaves the
registers before it is the score gradient. Where the tiles of [N, K] do not fill the chip the sum over tokens is split;
then a second kernel adds the parts in their order and does the epilogue. The first step of the sum is peeled off the
loop: Triton 3.6 otherwise makes code that ptxas serialises (C7515)."""

from __future__ import annotations

import triton
import triton.language as tl

from .mask import mask_slope, mask_value


@triton.jit
def epilogue(
    product, at, inside, weight, scores, beta, grad_penalty, grad_scores, grad_weight, HAS_PENALTY: tl.constexpr,
    WANTS_WEIGHT: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """From grad_out.T @ x at the weights `at` to the gradients of scores and, if wanted, of weight."""
    score = tl.load(scores + at, mask=inside, other=0.0)
    inverse_temperature = tl.load(beta)
    total = product * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_PENALTY:
        total += tl.load(grad_penalty)
    tl.store(grad_scores + at, total * mask_slope(score, inverse_temperature, KIND), mask=inside)
    if WANTS_WEIGHT:
        m = mask_value(score, inverse_temperature, KIND)
        tl.store(grad_weight + at, (product * m).to(grad_weight.dtype.element_ty), mask=inside)


@triton.jit
def token_product(
    grad_out, x, m, n, k, grad_out_row, grad_out_column, x_row, x_column, tile, part, steps_per_part,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Of a tile: (grad_out.T @ x over a part of the tokens, rows, columns, whether these are rows and columns of
    [N, K]). UPCAST: products in fp32 whatever the dtype (the interpreter's bf16 product is wrong)."""
    num_column_tiles = tl.cdiv(k, BK)
    rows = (tile // num_column_tiles) * BN + tl.arange(0, BN)
    columns = (tile % num_column_tiles) * BK + tl.arange(0, BK)
    first = part * steps_per_part * BM
    last = tl.minimum(m, first + steps_per_part * BM)
    tokens = first + tl.arange(0, BM)
    is_row, is_column = (rows < n)[:, None], (columns < k)[None, :]
    grad_out += rows.to(tl.int64)[:, None] * grad_out_column + tokens.to(tl.int64)[None, :] * grad_out_row
    x += tokens.to(tl.int64)[:, None] * x_row + columns.to(tl.int64)[None, :] * x_column
    g = tl.load(grad_out, mask=is_row & (tokens < last)[None, :], other=0.0)
    v = tl.load(x, mask=(tokens < last)[:, None] & is_column, other=0.0)
    if UPCAST:
        g, v = g.to(tl.float32), v.to(tl.float32)
    product = tl.dot(g, v, input_precision=PRECISION)
    for start in range(first + BM, last, BM):
        grad_out += BM * grad_out_row
        x += BM * x_row
        left = (start + tl.arange(0, BM)) < last
        g = tl.load(grad_out, mask=is_row & left[None, :], other=0.0)
        v = tl.load(x, mask=left[:, None] & is_column, other=0.0)
        if UPCAST:
            g, v = g.to(tl.float32), v.to(tl.float32)
        product = tl.dot(g, v, product, input_precision=PRECISION)
    return product, rows, columns, is_row, is_column


@triton.jit
def score_gradient_kernel(
    grad_out, x, weight, scores, beta, grad_penalty, grad_scores, grad_weight, parts, m, n, k, grad_out_row,
    grad_out_column, x_row, x_column, steps_per_part, HAS_PENALTY: tl.constexpr, WANTS_WEIGHT: tl.constexpr,
    KIND: tl.constexpr, IS_SPLIT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Program (tile of [N, K], part of the tokens). parts fp32 [num_parts, N, K] is written if IS_SPLIT, else the
    results are."""
    part = tl.program_id(1)
    product, rows, columns, is_row, is_column = token_product(
        grad_out, x, m, n, k, grad_out_row, grad_out_column, x_row, x_column, tl.program_id(0), part, steps_per_part,
        PRECISION, UPCAST, BN, BK, BM,
    )  # fmt: skip
    inside = is_row & is_column
    at = rows.to(tl.int64)[:, None] * k + columns[None, :]
    if IS_SPLIT:
        tl.store(parts + part.to(tl.int64) * n * k + at, product, mask=inside)
    else:
        epilogue(
            product, at, inside, weight, scores, beta, grad_penalty, grad_scores, grad_weight, HAS_PENALTY,
            WANTS_WEIGHT, KIND,
        )  # fmt: skip


@triton.jit
def score_gradients_of_masks_kernel(
    grad_out, x, weight, scores, beta, grad_penalty, grad_scores, num_masks, m, n, k, grad_out_mask, grad_out_row,
    grad_out_column, x_mask, x_row, x_column, HAS_PENALTY: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Of G masks over one weight. grad_out [G, M, N], x [G, M, K] (x_mask 0: one for all), weight [N, K], scores and
    grad_scores [G, N, K], grad_penalty [G]. Programs of all masks over one tile of the weight follow each other, so
    that it comes from memory once."""
    program = tl.program_id(0)
    mask = (program % num_masks).to(tl.int64)
    product, rows, columns, is_row, is_column = token_product(
        grad_out + mask * grad_out_mask, x + mask * x_mask, m, n, k, grad_out_row, grad_out_column, x_row, x_column,
        program // num_masks, 0, tl.cdiv(m, BM), PRECISION, UPCAST, BN, BK, BM,
    )  # fmt: skip
    at = rows.to(tl.int64)[:, None] * k + columns[None, :]
    of_mask = mask * n * k
    epilogue(
        product, at, is_row & is_column, weight, scores + of_mask, beta, grad_penalty + mask, grad_scores + of_mask,
        weight, HAS_PENALTY, False, KIND,
    )  # fmt: skip


@triton.jit
def sum_of_parts(parts, at, inside, num, num_parts, BLOCK: tl.constexpr):
    """The product at a block of the flat range of weights: its parts [num_parts, num], added in their order."""
    product = tl.zeros((BLOCK,), dtype=tl.float32)
    parts += at
    for _ in range(0, num_parts):
        product += tl.load(parts, mask=inside, other=0.0)
        parts += num
    return product


@triton.jit
def add_parts_kernel(
    parts, weight, scores, beta, grad_penalty, grad_scores, grad_weight, num, num_parts, HAS_PENALTY: tl.constexpr,
    WANTS_WEIGHT: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds up the parts in their order, then the epilogue, over the flat range of weights."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num
    product = sum_of_parts(parts, at, inside, num, num_parts, BLOCK)
    epilogue(
        product, at, inside, weight, scores, beta, grad_penalty, grad_scores, grad_weight, HAS_PENALTY, WANTS_WEIGHT,
        KIND,
    )  # fmt: skip
