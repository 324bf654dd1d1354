"""One AdamW step of mask scores in one pass: reads the scores, their gradient, both moments and the weight; writes the
scores, the moments and the effective weight of the next forward pass, and sums its mask.

g = grad + lam * slope(s, beta);  s -= lr*weight_decay*s;  m1 += (1-b1)*(g - m1);  m2 = b2*m2 + (1-b2)*g*g
s -= lr/(1-b1^t) * m1 / (sqrt(m2)/sqrt(1-b2^t) + eps);  w_eff = weight * mask(s, next_beta)

32 bytes a weight in bf16 (reads s, g, m1, m2 16, weight 2; writes s, m1, m2 12, w_eff 2). Arithmetic in fp32, the
corrections in fp64. One score per weight, dense storage of one element order. Source: Loshchilov, Hutter, ICLR 2019.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .elementwise import write_masked
from .mask import mask_slope


@triton.jit
def adamw_block(
    scores, grads, exp_avg, exp_avg_sq, weight, w_eff, partial, step, at, inside, numbers, beta, next_beta, lr, lam,
    READS_LR: tl.constexpr, READS_LAM: tl.constexpr, WRITES: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """numbers: (1-b1, b2, 1-b2, log2 b1, log2 b2, eps, weight_decay). lr, lam: numbers, or pointers to them. step: a
    pointer to t. WRITES: there is an effective weight; partial gets the block's sum of its mask."""
    not_beta1, beta2, not_beta2, log_beta1, log_beta2, eps, weight_decay = numbers
    rate = lr
    if READS_LR:
        rate = tl.load(lr).to(tl.float32)
    push = lam
    if READS_LAM:
        push = tl.load(lam).to(tl.float32)
    t = tl.load(step).to(tl.float64)
    rate_of_first = (rate / (1.0 - tl.exp2(t * log_beta1))).to(tl.float32)
    root = tl.sqrt(1.0 - tl.exp2(t * log_beta2)).to(tl.float32)
    score = tl.load(scores + at, mask=inside, other=0.0)
    grad = tl.load(grads + at, mask=inside, other=0.0) + push * mask_slope(score, tl.load(beta), KIND)
    first, second = tl.load(exp_avg + at, mask=inside, other=0.0), tl.load(exp_avg_sq + at, mask=inside, other=0.0)
    score -= rate * weight_decay * score
    first += not_beta1 * (grad - first)
    second = beta2 * second + not_beta2 * grad * grad
    score -= rate_of_first * first / (tl.sqrt_rn(second) / root + eps)
    tl.store(scores + at, score, mask=inside)
    tl.store(exp_avg + at, first, mask=inside)
    tl.store(exp_avg_sq + at, second, mask=inside)
    if WRITES:
        write_masked(weight, score, w_eff, partial, at, inside, tl.load(next_beta), KIND)


@triton.jit
def mask_adamw_kernel(
    scores, grads, exp_avg, exp_avg_sq, weight, w_eff, partials, step, num, numbers, beta, next_beta, lr, lam,
    READS_LR: tl.constexpr, READS_LAM: tl.constexpr, WRITES: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one tensor."""
    block = tl.program_id(0)
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    adamw_block(
        scores, grads, exp_avg, exp_avg_sq, weight, w_eff, partials + block, step, at, at < num, numbers, beta,
        next_beta, lr, lam, READS_LR, READS_LAM, WRITES, KIND,
    )  # fmt: skip


@triton.jit
def mask_adamw_of_many_kernel(
    table, block_tensor, block_first, partials, numbers, beta, next_beta, lr, lam, W_DTYPE: tl.constexpr,
    O_DTYPE: tl.constexpr, READS_LR: tl.constexpr, READS_LAM: tl.constexpr, WRITES: tl.constexpr, KIND: tl.constexpr,
    IS_ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of many tensors in one launch. table int64 [L, 8]: addresses of scores, grads, exp_avg, exp_avg_sq, weight, w_eff
    and step, and the number of weights; the rest as in effective_weights_kernel."""
    block = tl.program_id(0)
    row = table + tl.load(block_tensor + block).to(tl.int64) * 8
    scores, grads = tl.load(row).to(tl.pointer_type(tl.float32)), tl.load(row + 1).to(tl.pointer_type(tl.float32))
    exp_avg = tl.load(row + 2).to(tl.pointer_type(tl.float32))
    exp_avg_sq = tl.load(row + 3).to(tl.pointer_type(tl.float32))
    weight, w_eff = tl.load(row + 4).to(tl.pointer_type(W_DTYPE)), tl.load(row + 5).to(tl.pointer_type(O_DTYPE))
    step, num = tl.load(row + 6).to(tl.pointer_type(tl.float32)), tl.load(row + 7)
    first = tl.load(block_first + block)
    if IS_ALIGNED:
        scores, grads = tl.multiple_of(scores, 16), tl.multiple_of(grads, 16)
        exp_avg, exp_avg_sq = tl.multiple_of(exp_avg, 16), tl.multiple_of(exp_avg_sq, 16)
        weight, w_eff = tl.multiple_of(weight, 16), tl.multiple_of(w_eff, 16)
        num, first = tl.multiple_of(num, 16), tl.multiple_of(first, 16)
    at = first + tl.arange(0, BLOCK)
    adamw_block(
        scores, grads, exp_avg, exp_avg_sq, weight, w_eff, partials + block, step, at, at < num, numbers, beta,
        next_beta, lr, lam, READS_LR, READS_LAM, WRITES, KIND,
    )  # fmt: skip
