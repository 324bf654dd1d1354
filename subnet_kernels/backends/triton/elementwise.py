"""Kernels that read and write each weight once: effective weight and mask sum, score gradient, penalty gradient.

One score per weight (units.py has the others); all tensors are given as dense storage of the same element order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .mask import mask_slope, mask_value


@triton.jit
def write_masked(w, score, w_eff, at, inside, beta, KIND: tl.constexpr):
    """w_eff = w * m at the weights ``at``, given w (fp32), scores and beta; returns the sum of m."""
    m = mask_value(score, beta, KIND)
    tl.store(w_eff + at, (w * m).to(w_eff.dtype.element_ty), mask=inside)
    return tl.sum(tl.where(inside, m, 0.0))


@triton.jit
def effective_weight_kernel(
    weight, scores, beta, w_eff, partials, num, KIND: tl.constexpr, BLOCK: tl.constexpr
):
    """w_eff = weight * m; partials[block] = sum of m over the block's weights."""
    block = tl.program_id(0)
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num
    score = tl.load(scores + at, mask=inside, other=0.0)
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(partials + block, write_masked(w, score, w_eff, at, inside, tl.load(beta), KIND))


@triton.jit
def effective_weights_kernel(
    table, block_tensor, block_first, beta, partials, W_DTYPE: tl.constexpr, O_DTYPE: tl.constexpr,
    KIND: tl.constexpr, IS_ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same for many tensors in one launch. table int64 [L, 4]: addresses of weight, scores and w_eff, number of
    weights; block_tensor int32 and block_first int64 [blocks]: which tensor, from which element on (consecutive tensors
    over one weight take turns, so that it comes from memory once). IS_ALIGNED: all addresses and numbers are multiples
    of 16, so that memory is accessed 16 bytes at a time."""
    block = tl.program_id(0)
    row = table + tl.load(block_tensor + block).to(tl.int64) * 4
    weight, scores, w_eff, num = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    first = tl.load(block_first + block)
    weight, w_eff = weight.to(tl.pointer_type(W_DTYPE)), w_eff.to(tl.pointer_type(O_DTYPE))
    scores = scores.to(tl.pointer_type(tl.float32))
    if IS_ALIGNED:
        weight, scores, w_eff = tl.multiple_of(weight, 16), tl.multiple_of(scores, 16), tl.multiple_of(w_eff, 16)
        num, first = tl.multiple_of(num, 16), tl.multiple_of(first, 16)
    at = first + tl.arange(0, BLOCK)
    inside = at < num
    score = tl.load(scores + at, mask=inside, other=0.0)
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(partials + block, write_masked(w, score, w_eff, at, inside, tl.load(beta), KIND))


@triton.jit
def add_up_kernel(partials, places, sums, BLOCK: tl.constexpr):
    """sums[i]: a tensor's partials added up in fp64, always in the same order. places int64 [L, 3]: where its first one
    is, how many there are, and how far one is from the next."""
    i = tl.program_id(0)
    first, num, stride = tl.load(places + 3 * i), tl.load(places + 3 * i + 1), tl.load(places + 3 * i + 2)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for start in range(0, num, BLOCK):
        at = start + lanes
        total += tl.load(partials + first + at * stride, mask=at < num, other=0.0).to(tl.float64)
    tl.store(sums + i, tl.sum(total, axis=0).to(tl.float32))


@triton.jit
def grad_scores_kernel(
    grad_w_eff, grad_penalty, weight, scores, beta, grad_scores, grad_weight, num, HAS_GRAD: tl.constexpr,
    HAS_PENALTY: tl.constexpr, WANTS_SCORES: tl.constexpr, WANTS_WEIGHT: tl.constexpr, KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """grad_scores = (grad_w_eff*weight + grad_penalty) * slope, grad_weight = grad_w_eff * m. What is
    not given or not wanted may be any pointer."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num
    score = tl.load(scores + at, mask=inside, other=0.0)
    inverse_temperature = tl.load(beta)
    total = tl.zeros_like(score)
    grad = tl.zeros_like(score)
    if HAS_GRAD:
        grad = tl.load(grad_w_eff + at, mask=inside, other=0.0).to(tl.float32)
        total = grad * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_PENALTY:
        total += tl.load(grad_penalty)
    if WANTS_SCORES:
        tl.store(grad_scores + at, total * mask_slope(score, inverse_temperature, KIND), mask=inside)
    if WANTS_WEIGHT:
        m = mask_value(score, inverse_temperature, KIND)
        tl.store(grad_weight + at, (grad * m).to(grad_weight.dtype.element_ty), mask=inside)


@triton.jit
def grad_scores_of_many_kernel(
    table, block_tensor, block_first, beta, G_DTYPE: tl.constexpr, W_DTYPE: tl.constexpr, KIND: tl.constexpr,
    IS_ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad_scores of many tensors in one launch. table int64 [L, 6]: addresses of grad_w_eff, weight, scores,
    grad_scores, grad_penalty (0: none), and the number of weights; the rest as in effective_weights_kernel."""
    block = tl.program_id(0)
    row = table + tl.load(block_tensor + block).to(tl.int64) * 6
    grad_w_eff, weight = tl.load(row).to(tl.pointer_type(G_DTYPE)), tl.load(row + 1).to(tl.pointer_type(W_DTYPE))
    scores, grad_scores = tl.load(row + 2), tl.load(row + 3)
    scores, grad_scores = scores.to(tl.pointer_type(tl.float32)), grad_scores.to(tl.pointer_type(tl.float32))
    grad_penalty, num = tl.load(row + 4), tl.load(row + 5)
    first = tl.load(block_first + block)
    if IS_ALIGNED:
        grad_w_eff, weight = tl.multiple_of(grad_w_eff, 16), tl.multiple_of(weight, 16)
        scores, grad_scores = tl.multiple_of(scores, 16), tl.multiple_of(grad_scores, 16)
        num, first = tl.multiple_of(num, 16), tl.multiple_of(first, 16)
    at = first + tl.arange(0, BLOCK)
    inside = at < num
    total = tl.load(grad_w_eff + at, mask=inside, other=0.0).to(tl.float32)
    total *= tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(grad_penalty.to(tl.pointer_type(tl.float32)), mask=grad_penalty != 0, other=0.0)
    slope = mask_slope(tl.load(scores + at, mask=inside, other=0.0), tl.load(beta), KIND)
    tl.store(grad_scores + at, total * slope, mask=inside)


@triton.jit
def add_penalty_grad_kernel(
    grads, scores, beta, lam, scale, num, READS_LAM: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr
):
    """grads += scale * slope(scores), or lam * scale * slope(scores) with lam in memory (else it may be any pointer)"""
    if READS_LAM:
        scale *= tl.load(lam)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num
    score = tl.load(scores + at, mask=inside, other=0.0)
    grad = tl.load(grads + at, mask=inside, other=0.0)
    tl.store(grads + at, grad + scale * mask_slope(score, tl.load(beta), KIND), mask=inside)
