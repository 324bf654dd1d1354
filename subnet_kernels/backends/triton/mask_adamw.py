"""One AdamW step of mask scores in one pass: reads the scores, their gradient, both moments and the weight; writes the
scores, the moments and the effective weight of the next forward pass, and sums its mask.

g = grad + lam * slope(s, beta), or, of the effective weight's gradient, (grad*weight + grad_penalty + lam) * slope
s -= lr*weight_decay*s;  m1 += (1-b1)*(g - m1);  m2 = b2*m2 + (1-b2)*g*g
s -= lr/(1-b1^t) * m1 / (sqrt(m2)/sqrt(1-b2^t) + eps);  w_eff = weight * mask(s, next_beta)

32 bytes a weight in bf16 (reads s, g, m1, m2 16, weight 2; writes s, m1, m2 12, w_eff 2); 8 less with bf16 moments, 2
less with a bf16 gradient. Moments are fp32 or bf16; bf16 ones are rounded (rounding.py) when they are stored, after the
scores used them. Arithmetic in fp32, the corrections in fp64. One score per weight, dense storage of one element order.
Source: Loshchilov, Hutter, ICLR 2019.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .elementwise import write_masked
from .mask import mask_slope
from .rounding import round_to_bf16, rounding_bits


@triton.jit
def step_scalars(step, numbers, lr, lam, READS_LR: tl.constexpr, READS_LAM: tl.constexpr):
    """(t, lr, lr/(1-b1^t), sqrt(1-b2^t), lam). numbers: (1-b1, b2, 1-b2, log2 b1, log2 b2, eps, weight_decay). lr, lam:
    numbers, or pointers to them. step: a pointer to t."""
    rate = lr
    if READS_LR:
        rate = tl.load(lr).to(tl.float32)
    push = lam
    if READS_LAM:
        push = tl.load(lam).to(tl.float32)
    t = tl.load(step).to(tl.float64)
    rate_of_first = (rate / (1.0 - tl.exp2(t * numbers[3]))).to(tl.float32)
    root = tl.sqrt(1.0 - tl.exp2(t * numbers[4])).to(tl.float32)
    return t.to(tl.int64), rate, rate_of_first, root, push


@triton.jit
def adamw_block(
    grad, scores, exp_avg, exp_avg_sq, weight, w_eff, at, inside, scalars, numbers, beta, next_beta,
    OF_W_EFF: tl.constexpr, WRITES: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """The step at the weights ``at``, given their fp32 gradients and the numbers of step_scalars. OF_W_EFF: these are
    the effective weight's, and lam includes the penalty's. Returns the sum of the next mask if it WRITES w_eff, else
    0."""
    t, rate, rate_of_first, root, push = scalars
    not_beta1, beta2, not_beta2, _, _, eps, weight_decay = numbers
    score = tl.load(scores + at, mask=inside, other=0.0)
    first = tl.load(exp_avg + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(exp_avg_sq + at, mask=inside, other=0.0).to(tl.float32)
    slope = mask_slope(score, tl.load(beta), KIND)
    w = score  # any value, if nothing needs the weight
    if OF_W_EFF:
        w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
        grad = (grad * w + push) * slope
    else:
        grad = grad + push * slope
    score -= rate * weight_decay * score
    first += not_beta1 * (grad - first)
    second = beta2 * second + not_beta2 * grad * grad
    score -= rate_of_first * first / (tl.sqrt_rn(second) / root + eps)
    tl.store(scores + at, score, mask=inside)
    if exp_avg.dtype.element_ty == tl.bfloat16:
        bits = rounding_bits(at, t)
        tl.store(exp_avg + at, round_to_bf16(first, bits & 0xFFFF), mask=inside)
        tl.store(exp_avg_sq + at, round_to_bf16(second, bits >> 16), mask=inside)
    else:
        tl.store(exp_avg + at, first, mask=inside)
        tl.store(exp_avg_sq + at, second, mask=inside)
    mask_sum = 0.0
    if WRITES:
        if not OF_W_EFF:
            w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
        mask_sum = write_masked(w, score, w_eff, at, inside, tl.load(next_beta), KIND)
    return mask_sum


@triton.jit
def with_penalty(scalars, grad_penalty):
    """The numbers of step_scalars, grad_penalty added to lam."""
    return scalars[0], scalars[1], scalars[2], scalars[3], scalars[4] + grad_penalty


@triton.jit
def mask_adamw_kernel(
    scores, grads, exp_avg, exp_avg_sq, weight, w_eff, partials, step, grad_penalty, num, numbers, beta, next_beta, lr,
    lam, OF_W_EFF: tl.constexpr, HAS_PENALTY: tl.constexpr, READS_LR: tl.constexpr, READS_LAM: tl.constexpr,
    WRITES: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one tensor. grad_penalty: any pointer unless HAS_PENALTY, which is for OF_W_EFF alone. partials: the blocks'
    sums of the next mask."""
    block = tl.program_id(0)
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num
    scalars = step_scalars(step, numbers, lr, lam, READS_LR, READS_LAM)
    if HAS_PENALTY:
        scalars = with_penalty(scalars, tl.load(grad_penalty))
    grad = tl.load(grads + at, mask=inside, other=0.0).to(tl.float32)
    mask_sum = adamw_block(
        grad, scores, exp_avg, exp_avg_sq, weight, w_eff, at, inside, scalars, numbers, beta, next_beta, OF_W_EFF,
        WRITES, KIND,
    )  # fmt: skip
    if WRITES:
        tl.store(partials + block, mask_sum)


@triton.jit
def mask_adamw_of_many_kernel(
    table, block_tensor, block_first, partials, numbers, beta, next_beta, lr, lam, G_DTYPE: tl.constexpr,
    M_DTYPE: tl.constexpr, W_DTYPE: tl.constexpr, O_DTYPE: tl.constexpr, OF_W_EFF: tl.constexpr,
    WRITES: tl.constexpr, KIND: tl.constexpr, IS_ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of many tensors in one launch. table int64 [L, 11]: addresses of scores, grads, exp_avg, exp_avg_sq, weight,
    w_eff, step, grad_penalty (0: none), lr and lam (0: the arguments), and the number of weights; the rest as in
    effective_weights_kernel."""
    block = tl.program_id(0)
    row = table + tl.load(block_tensor + block).to(tl.int64) * 11
    scores, grads = tl.load(row).to(tl.pointer_type(tl.float32)), tl.load(row + 1).to(tl.pointer_type(G_DTYPE))
    exp_avg = tl.load(row + 2).to(tl.pointer_type(M_DTYPE))
    exp_avg_sq = tl.load(row + 3).to(tl.pointer_type(M_DTYPE))
    weight, w_eff = tl.load(row + 4).to(tl.pointer_type(W_DTYPE)), tl.load(row + 5).to(tl.pointer_type(O_DTYPE))
    step, grad_penalty = tl.load(row + 6).to(tl.pointer_type(tl.float32)), tl.load(row + 7)
    lr_at, lam_at, num = tl.load(row + 8), tl.load(row + 9), tl.load(row + 10)
    rate = tl.load(lr_at.to(tl.pointer_type(tl.float32)), mask=lr_at != 0, other=lr)
    push = tl.load(lam_at.to(tl.pointer_type(tl.float32)), mask=lam_at != 0, other=lam)
    first = tl.load(block_first + block)
    if IS_ALIGNED:
        scores, grads = tl.multiple_of(scores, 16), tl.multiple_of(grads, 16)
        exp_avg, exp_avg_sq = tl.multiple_of(exp_avg, 16), tl.multiple_of(exp_avg_sq, 16)
        weight, w_eff = tl.multiple_of(weight, 16), tl.multiple_of(w_eff, 16)
        num, first = tl.multiple_of(num, 16), tl.multiple_of(first, 16)
    at = first + tl.arange(0, BLOCK)
    inside = at < num
    scalars = step_scalars(step, numbers, rate, push, False, False)
    if OF_W_EFF:
        penalty = tl.load(grad_penalty.to(tl.pointer_type(tl.float32)), mask=grad_penalty != 0, other=0.0)
        scalars = with_penalty(scalars, penalty)
    grad = tl.load(grads + at, mask=inside, other=0.0).to(tl.float32)
    mask_sum = adamw_block(
        grad, scores, exp_avg, exp_avg_sq, weight, w_eff, at, inside, scalars, numbers, beta, next_beta, OF_W_EFF,
        WRITES, KIND,
    )  # fmt: skip
    if WRITES:
        tl.store(partials + block, mask_sum)
