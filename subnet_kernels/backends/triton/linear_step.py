"""The optimizer's step of one linear layer inside its score gradient's product (variant F): no gradient is stored.

A tile of grad_out.T @ x is accumulated as in score_gradient.py, cut into columns, and each cut steps its weights as
mask_adamw.py says. Uncut, a tile of 128x128 spills: score, moments and weight take as many registers as the product.
Where the sum over tokens is in parts, a second kernel adds them and steps. Per weight in bf16 28 bytes (reads s, m1, m2
12, W 2; writes s, m1, m2 12, w_eff 2), 20 with bf16 moments, and 8 per part.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .mask_adamw import adamw_block, step_scalars, with_penalty
from .score_gradient import sum_of_parts, token_product


@triton.jit
def halves(tile):
    """The left and the right columns of a tile."""
    rows: tl.constexpr = tile.shape[0]
    columns: tl.constexpr = tile.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(tile, (rows, 2, columns)), (0, 2, 1)))


@triton.jit
def linear_step_kernel(
    grad_out, x, grad_penalty, scores, exp_avg, exp_avg_sq, weight, w_eff, partials, step, m, n, k, grad_out_row,
    grad_out_column, x_row, x_column, numbers, beta, next_beta, lr, lam, HAS_PENALTY: tl.constexpr,
    READS_LR: tl.constexpr, READS_LAM: tl.constexpr, WRITES: tl.constexpr, KIND: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Program: tile of [N, K]. scores, moments, weight and w_eff are contiguous. partials: the tiles' sums of the next
    mask; the rest as in mask_adamw_kernel and score_gradient_kernel."""
    scalars = step_scalars(step, numbers, lr, lam, READS_LR, READS_LAM)
    if HAS_PENALTY:
        scalars = with_penalty(scalars, tl.load(grad_penalty))
    product, rows, _, is_row, _ = token_product(
        grad_out, x, m, n, k, grad_out_row, grad_out_column, x_row, x_column, tl.program_id(0), 0, tl.cdiv(m, BM),
        PRECISION, UPCAST, BN, BK, BM,
    )  # fmt: skip
    left, right = halves(product)
    first, second = halves(left)
    third, fourth = halves(right)
    cuts = (first, second, third, fourth)
    CUT: tl.constexpr = BK // 4
    first_column = (tl.program_id(0) % tl.cdiv(k, BK)) * BK
    mask_sum = 0.0
    for i in tl.static_range(4):
        columns = first_column + i * CUT + tl.arange(0, CUT)
        mask_sum += adamw_block(
            cuts[i], scores, exp_avg, exp_avg_sq, weight, w_eff, rows.to(tl.int64)[:, None] * k + columns[None, :],
            is_row & (columns < k)[None, :], scalars, numbers, beta, next_beta, True, WRITES, KIND,
        )  # fmt: skip
    if WRITES:
        tl.store(partials + tl.program_id(0), mask_sum)


@triton.jit
def step_of_parts_kernel(
    parts, grad_penalty, scores, exp_avg, exp_avg_sq, weight, w_eff, partials, step, num, num_parts, numbers, beta,
    next_beta, lr, lam, HAS_PENALTY: tl.constexpr, READS_LR: tl.constexpr, READS_LAM: tl.constexpr,
    WRITES: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds up the parts of the product (score_gradient_kernel's) in their order, then the step, over the flat range of
    weights."""
    block = tl.program_id(0)
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num
    scalars = step_scalars(step, numbers, lr, lam, READS_LR, READS_LAM)
    if HAS_PENALTY:
        scalars = with_penalty(scalars, tl.load(grad_penalty))
    product = sum_of_parts(parts, at, inside, num, num_parts, BLOCK)
    mask_sum = adamw_block(
        product, scores, exp_avg, exp_avg_sq, weight, w_eff, at, inside, scalars, numbers, beta, next_beta, True,
        WRITES, KIND,
    )  # fmt: skip
    if WRITES:
        tl.store(partials + block, mask_sum)
