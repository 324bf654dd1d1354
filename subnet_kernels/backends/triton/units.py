"""Kernels for scores that govern several weights each: rows, columns, heads, filters, any block.

Weights are given as dense storage with the sizes of four dimensions in storage order (leading ones where there are
fewer), scores contiguous in the same order of dimensions. A score governs group_d neighbours along dimension d.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .elementwise import write_masked
from .mask import mask_slope


@triton.jit
def score_index(at, size_1, size_2, size_3, group_0, group_1, group_2, group_3):
    """Which score governs the weight at offset ``at``."""
    index_3, rest = at % size_3, at // size_3
    index_2, rest = rest % size_2, rest // size_2
    index_1, index_0 = rest % size_1, rest // size_1
    score = index_0 // group_0
    score = score * (size_1 // group_1) + index_1 // group_1
    score = score * (size_2 // group_2) + index_2 // group_2
    return score * (size_3 // group_3) + index_3 // group_3


@triton.jit
def effective_weight_unit_kernel(
    weight, scores, beta, w_eff, partials, num, size_1, size_2, size_3, group_0, group_1, group_2, group_3,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """w_eff = weight * m; partials[block] = sum of m over the block's weights."""
    block = tl.program_id(0)
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num
    where = score_index(at, size_1, size_2, size_3, group_0, group_1, group_2, group_3)
    score = tl.load(scores + where, mask=inside, other=0.0)
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(partials + block, write_masked(w, score, w_eff, at, inside, tl.load(beta), KIND))


@triton.jit
def score_sums_kernel(
    grad_w_eff, weight, sums, num_scores, size_1, size_2, size_3, group_0, group_1, group_2, group_3, per_score,
    per_part, BLOCK: tl.constexpr,
):  # fmt: skip
    """sums[part, score] = sum of grad_w_eff * weight over the part's share of the weights that the score governs."""
    score, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    scores_3, scores_2, scores_1 = size_3 // group_3, size_2 // group_2, size_1 // group_1
    first_3, rest = score % scores_3 * group_3, score // scores_3
    first_2, rest = rest % scores_2 * group_2, rest // scores_2
    first_1, first_0 = rest % scores_1 * group_1, rest // scores_1 * group_0
    last = tl.minimum(per_score, (part + 1) * per_part)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(part * per_part, last, BLOCK):
        inner = start + tl.arange(0, BLOCK)
        inside = inner < last
        index_3, rest_in = inner % group_3 + first_3, inner // group_3
        index_2, rest_in = rest_in % group_2 + first_2, rest_in // group_2
        index_1, index_0 = rest_in % group_1 + first_1, rest_in // group_1 + first_0
        at = ((index_0 * size_1 + index_1) * size_2 + index_2) * size_3 + index_3
        grad = tl.load(grad_w_eff + at, mask=inside, other=0.0).to(tl.float32)
        total += grad * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(sums + part.to(tl.int64) * num_scores + score, tl.sum(total, axis=0))


@triton.jit
def finish_scores_kernel(
    sums, grad_penalty, scores, beta, grad_scores, num_scores, num_parts, per_score, HAS_PENALTY: tl.constexpr,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad_scores = (the parts' sums, in their order, + grad_penalty * weights per score) * slope"""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_scores
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    sums += at
    for _ in range(0, num_parts):
        total += tl.load(sums, mask=inside, other=0.0)
        sums += num_scores
    if HAS_PENALTY:
        total += tl.load(grad_penalty) * per_score
    slope = mask_slope(tl.load(scores + at, mask=inside, other=0.0), tl.load(beta), KIND)
    tl.store(grad_scores + at, total * slope, mask=inside)
