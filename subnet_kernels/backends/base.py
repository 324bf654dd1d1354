"""What a backend is: an answer to "will you run this call?", and the raw functions, without autograd.

The linear and convolution functions here are the ``cached`` plan, shared by every backend whose own work is the
elementwise part: one effective weight, then the vendor's matrix product or convolution. A backend with a kernel that
fuses the mask into the product overrides them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..masks import MaskKind, SampledKind, expand_scores, sum_to_scores
from .layout import empty_of_masks

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of weights and products in C++, CUDA and Triton
DRAWN_KINDS = ("gumbel", "bernoulli")  # which they draw by comparing with thresholds
KIND_CODES = {"sigmoid": 0, "hard": 1}  # how their kernels name the mask kinds that they have
SAMPLED = "sampled_weight"  # the op of a call that draws masks
PLANS = (None, "cached", "fused", "recompute")


def keeps_w_eff(plan: str | None) -> bool:
    """Whether a forward pass under this plan hands its effective weight to the backward pass."""
    return plan not in ("fused", "recompute")


class Call(NamedTuple):
    """The facts of one call that decide which backend runs it."""

    op: str
    device: str
    weight_dtype: torch.dtype
    compute_dtype: torch.dtype
    kind: str
    plan: str | None = None
    num_dims: int = 2
    is_same_shape: bool = True
    num_weights: int = 0  # up to the next power of two; 0 where it does not matter


def sampled_refusal(call: Call) -> str | None:
    """Why the kernels in C++, CUDA and Triton do not draw the masks of a call, if they don't."""
    if call.kind not in DRAWN_KINDS:
        return f"kind {call.kind!r} is not drawn here ({', '.join(DRAWN_KINDS)} are)"
    return None if call.is_same_shape else "sampled masks of units are not built here (one score per weight is)"


class ConvArgs(NamedTuple):
    """Geometry of a 2-D convolution: pairs of ints, padding already symmetric."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


class Needs(NamedTuple):
    """Which gradients the caller wants."""

    x: bool
    weight: bool
    scores: bool
    bias: bool


class AdamW(NamedTuple):
    """The numbers of one AdamW step. lr and lam may be 0-d tensors on the scores' device; lam: see MaskAdamW."""

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    lam: float | Tensor = 0.0


def numbers_of_entries(numbers: AdamW | Sequence[AdamW], num: int) -> list[AdamW]:
    """The numbers of each of ``num`` entries of a step: one for all, or one per entry (they differ in lr and lam)."""
    return [numbers] * num if isinstance(numbers, AdamW) else list(numbers)


def gradients_wanted(
    kind: MaskKind, grad_w_eff: Tensor | None, grad_penalty: Tensor | None, needs_scores: bool, needs_weight: bool
) -> tuple[bool, bool]:
    """Whether grad_scores has a gradient of the scores, and one of weight, to make."""
    has_any = grad_w_eff is not None or grad_penalty is not None
    return needs_scores and kind.is_trainable and has_any, needs_weight and grad_w_eff is not None


class Backend:
    """One way to run the ops. ``refuse`` returns None (it will run the call) or the reason why not, in words."""

    name: str

    def refuse(self, call: Call) -> str | None:
        raise NotImplementedError

    # --- elementwise ----------------------------------------------------------------------------------------------

    def effective_weight(
        self, weight: Tensor, scores: Tensor, beta: Tensor, kind: MaskKind, dtype: torch.dtype,
        out: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(weight * m in ``dtype`` with weight's strides, sum of m over weights, 0-d); into ``out`` if given."""
        raise NotImplementedError

    def effective_weights(
        self, weights: list[Tensor], scores: list[Tensor], beta: Tensor, kind: MaskKind, dtypes: list[torch.dtype],
        out: list[Tensor] | None = None,
    ) -> tuple[list[Tensor], Tensor]:
        """The same for many tensors: (list of w_eff, penalties [L])."""
        pairs = []
        for i, (weight, score) in enumerate(zip(weights, scores, strict=True)):
            w_eff, penalty = self.effective_weight(weight, score, beta, kind, dtypes[i])
            pairs.append((w_eff if out is None else out[i].copy_(w_eff), penalty))
        if not pairs:
            return [], beta.new_zeros(0)
        return [w_eff for w_eff, _ in pairs], torch.stack([penalty for _, penalty in pairs])

    def grad_scores(
        self, grad_w_eff: Tensor | None, grad_penalty: Tensor | None, weight: Tensor, scores: Tensor, beta: Tensor,
        kind: MaskKind, needs_scores: bool, needs_weight: bool, may_overwrite: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        """(ds = sum over the score's weights of grad_w_eff*weight*slope + grad_penalty*penalty_slope,
        dW = grad_w_eff*m). ``may_overwrite``: the memory of grad_w_eff may be used for the result."""
        raise NotImplementedError

    def grad_scores_of_many(
        self, grad_w_effs: list[Tensor], grad_penalties: list[Tensor | None], weights: list[Tensor],
        scores: list[Tensor], beta: Tensor, kind: MaskKind, out: list[Tensor] | None = None,
    ) -> list[Tensor]:
        """The scores' gradients of grad_scores for many trainable tensors: into ``out`` (each dense and of its scores'
        shape; it may be the fp32 gradient itself), or anywhere: then the memory of grad_w_effs may be used."""
        tensors = zip(grad_w_effs, grad_penalties, weights, scores, strict=True)
        made = [
            self.grad_scores(g, p, w, s, beta, kind, True, False, may_overwrite=out is None)[0]
            for g, p, w, s in tensors
        ]
        kept = [grad_scores for grad_scores in made if grad_scores is not None]
        return kept if out is None else [o.copy_(m) for o, m in zip(out, kept, strict=True)]

    # --- G masks over one weight: scores [G, *unit shape] ---------------------------------------------------------

    def effective_weight_of_masks(
        self, weight: Tensor, scores: Tensor, beta: Tensor, kind: MaskKind, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """effective_weight for each mask: ([G, *weight.shape], each part in weight's strides, and penalties [G])."""
        w_eff, num = empty_of_masks(weight, len(scores), dtype), len(scores)
        _, penalties = self.effective_weights(
            [weight] * num, list(scores.unbind()), beta, kind, [dtype] * num, list(w_eff.unbind())
        )
        return w_eff, penalties

    def grad_scores_of_masks(
        self, grad_w_eff: Tensor | None, grad_penalty: Tensor | None, weight: Tensor, scores: Tensor, beta: Tensor,
        kind: MaskKind, needs_scores: bool, needs_weight: bool, may_overwrite: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        """grad_scores for each mask, of gradients [G, *weight.shape] and [G]: (ds [G, *unit shape], dW, their sum)."""
        wants_scores, wants_weight = gradients_wanted(kind, grad_w_eff, grad_penalty, needs_scores, needs_weight)
        grads = [None] * len(scores) if grad_w_eff is None else list(grad_w_eff.unbind())
        penalties = [None] * len(scores) if grad_penalty is None else list(grad_penalty.unbind())
        grad_scores = grad_weight = None
        if wants_weight:
            for grad, score in zip(grads, scores.unbind(), strict=True):
                _, part = self.grad_scores(grad, None, weight, score, beta, kind, False, True)
                assert part is not None
                grad_weight = part if grad_weight is None else grad_weight.add_(part)
        if wants_scores:
            can_reuse = (
                may_overwrite and grad_w_eff is not None and grad_w_eff.dtype == scores.dtype
                and grad_w_eff.shape == scores.shape and grad_w_eff.stride() == scores.stride()
            )
            grad_scores = grad_w_eff if can_reuse else torch.empty_like(scores)
            assert grad_scores is not None
            if grad_w_eff is None:
                for out, penalty, score in zip(grad_scores, penalties, scores.unbind(), strict=True):
                    made, _ = self.grad_scores(None, penalty, weight, score, beta, kind, True, False)
                    assert made is not None
                    out.copy_(made)
            else:
                self.grad_scores_of_many(
                    grads, penalties, [weight] * len(scores), list(scores.unbind()), beta, kind,  # pyright: ignore
                    list(grad_scores.unbind()),
                )
        return grad_scores, grad_weight

    def masked_linear_of_masks(
        self, x: Tensor, weight: Tensor, scores: Tensor, beta: Tensor, bias: Tensor | None, kind: MaskKind,
        is_shared: bool,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """masked_linear for each mask and its part of the batch (or all of it): (out [G*B, ..., N], penalties [G], the
        effective weights to keep: one [G, N, K] or G of [N, K])."""
        w_eff, penalties = self.effective_weight_of_masks(weight, scores, beta, kind, x.dtype)
        return linear_of_masks(x, w_eff, bias, is_shared), penalties, [w_eff]

    def masked_linear_of_masks_backward(
        self, grad_out: Tensor | None, grad_penalty: Tensor | None, x: Tensor, weight: Tensor, scores: Tensor,
        beta: Tensor, w_effs: list[Tensor], kind: MaskKind, is_shared: bool, needs: Needs,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Gradients (x, weight, scores, bias), as masked_linear_backward."""
        num = len(scores)
        grad_x = grad_bias = grad_w_eff = grad_scores = None
        if grad_out is not None:
            (w_eff,) = w_effs
            rows = grad_out.reshape(num, count_rows(grad_out) // num, weight.shape[0])
            columns = x.reshape(1 if is_shared else num, rows.shape[1], weight.shape[1])
            if needs.x:
                if is_shared:  # the sum over masks within one product
                    wide = rows.transpose(0, 1).reshape(rows.shape[1], num * weight.shape[0])
                    grad_x = wide.mm(w_eff.reshape(num * weight.shape[0], weight.shape[1])).view(x.shape)
                else:
                    grad_x = torch.bmm(rows, w_eff).view(x.shape)
            if needs.bias:
                grad_bias = rows.sum((0, 1))
            if needs.scores and kind.is_trainable and not needs.weight:
                grad_scores = self.linear_grad_scores_of_masks(
                    rows, columns[0] if is_shared else columns, grad_penalty, weight, scores, beta, kind
                )
            if grad_scores is None and (needs.weight or (needs.scores and kind.is_trainable)):
                grad_w_eff = torch.bmm(rows.transpose(1, 2), columns.expand(num, -1, -1))
        if grad_scores is not None:
            return grad_x, None, grad_scores, grad_bias
        grad_scores, grad_weight = self.grad_scores_of_masks(
            grad_w_eff, grad_penalty, weight, scores, beta, kind, needs.scores, needs.weight, may_overwrite=True
        )
        return grad_x, grad_weight, grad_scores, grad_bias

    def linear_grad_scores_of_masks(
        self, grad_out: Tensor, x: Tensor, grad_penalty: Tensor | None, weight: Tensor, scores: Tensor, beta: Tensor,
        kind: MaskKind,
    ) -> Tensor | None:
        """ds [G, *unit shape] of grad_out [G, M, N] and x [G, M, K], or [M, K] for all, by a kernel that writes no
        product; None where there is none or the vendor's way is faster."""
        return None

    # --- sampled masks: a kind of one sample, or all of its samples; with its key -----------------------------------

    def keep_thresholds(self, scores: Tensor, beta: Tensor, kind: SampledKind) -> Tensor | None:
        """What draws are compared with, by masks.keep_thresholds: uint16 of scores' shape; None for kinds that this
        backend makes in another way."""
        return None

    def sampled_weight(
        self, weight: Tensor, scores: Tensor, thresholds: Tensor | None, beta: Tensor, kind: SampledKind, out: Tensor
    ) -> None:
        """out = weight * m, contiguous, of weight's shape."""
        m = expand_scores(kind.value(scores, beta), tuple(weight.shape))
        out.copy_(weight.to(m.dtype) * m)

    def sampled_weights(
        self, weight: Tensor, scores: Tensor, thresholds: Tensor | None, beta: Tensor, kind: SampledKind, out: Tensor
    ) -> None:
        """The same for each of the kind's samples: out [samples, *weight.shape]."""
        for part, one in zip(out.unbind(), kind.each(), strict=True):
            self.sampled_weight(weight, scores, thresholds, beta, one, part)

    def sampled_grad_scores_(
        self, grad_scores: Tensor, grad_w_eff: Tensor, weight: Tensor, scores: Tensor, beta: Tensor, kind: SampledKind
    ) -> None:
        """grad_scores += sum over the weights of a score of grad_w_eff * weight, times slope."""
        product = grad_w_eff.to(scores.dtype) * weight.to(scores.dtype)
        grad_scores += sum_to_scores(product, tuple(scores.shape)) * kind.slope(scores, beta)

    def sampled_grad_scores_of_all_(
        self, grad_scores: Tensor, grad_w_eff: Tensor, weight: Tensor, scores: Tensor, beta: Tensor, kind: SampledKind
    ) -> None:
        """The same for all of the kind's samples: grad_w_eff [samples, *weight.shape]."""
        for part, one in zip(grad_w_eff.unbind(), kind.each(), strict=True):
            self.sampled_grad_scores_(grad_scores, part, weight, scores, beta, one)

    # --- the step ---------------------------------------------------------------------------------------------------

    def add_penalty_grad_(
        self, grads: list[Tensor], scores: list[Tensor], weights_per_score: list[int], beta: Tensor,
        lam: float | Tensor, kind: MaskKind,
    ) -> None:
        """grads += lam * weights_per_score * penalty_slope, in place; lam may be a 0-d tensor on the scores' device,
        whose value no GPU backend reads on the host."""
        raise NotImplementedError

    has_mask_adamw = False  # whether there is a kernel for mask_adamw_

    def mask_adamw_(
        self, scores: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
        steps: list[Tensor], weights: list[Tensor], slots: list[tuple[Tensor, Tensor] | None], beta: Tensor,
        next_beta: Tensor, kind: MaskKind, numbers: AdamW | Sequence[AdamW],
        grad_penalties: list[Tensor | None] | None = None,
    ) -> None:
        """One AdamW step (its number in ``steps``, 0-d; its numbers as numbers_of_entries has them) on trainable fp32
        scores of their weight's shape and strides, all dense, with lam * penalty_slope at ``beta`` added to the
        gradients in passing; then, where slots has (w_eff, penalty), the effective weight and the penalty of the new
        scores at ``next_beta``. In place, in one pass.

        Moments are both fp32 or both bf16, rounded as rounding.py says. With ``grad_penalties``, ``grads`` are those of
        the effective weights (a kernel dtype, weight's strides), and the scores' are made of the two in passing."""
        raise NotImplementedError

    def linear_step_(
        self, grad_out: Tensor, x: Tensor, grad_penalty: Tensor | None, scores: Tensor, exp_avg: Tensor,
        exp_avg_sq: Tensor, step: Tensor, weight: Tensor, slot: tuple[Tensor, Tensor] | None, beta: Tensor,
        next_beta: Tensor, kind: MaskKind, numbers: AdamW,
    ) -> None:
        """mask_adamw_ for one linear layer, of the gradients that reach its output [M, N] and penalty (variant F)."""
        grad_w_eff = linear_grad_w_eff(grad_out, x, weight)
        self.mask_adamw_(
            [scores], [grad_w_eff], [exp_avg], [exp_avg_sq], [step], [weight], [slot], beta, next_beta, kind, numbers,
            [grad_penalty],
        )  # fmt: skip

    def plan_of(self, op: str, x: Tensor, weight: Tensor, scores: Tensor, plan: str | None) -> str:
        """The plan that a call runs under: the one asked for, or, where it is left open, this backend's choice."""
        return plan or "cached"

    # --- linear ---------------------------------------------------------------------------------------------------

    def masked_linear(
        self, x: Tensor, weight: Tensor, scores: Tensor, beta: Tensor, bias: Tensor | None, kind: MaskKind,
        plan: str | None, buffers: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(out, penalty, the effective weight to keep for the backward pass or None: it is made again there); the
        effective weight and the penalty are written into ``buffers`` if given."""
        w_eff, penalty = self.effective_weight(weight, scores, beta, kind, x.dtype, buffers)
        return self.linear(x, w_eff, bias, kind, weight, scores), penalty, w_eff if keeps_w_eff(plan) else None

    def makes_w_eff_in_product(self, x: Tensor, weight: Tensor, scores: Tensor, kind: MaskKind) -> bool:
        """Whether masked_linear writes the effective weight of this call in passing, within its product."""
        return False

    def linear(
        self, x: Tensor, w_eff: Tensor, bias: Tensor | None, kind: MaskKind, weight: Tensor, scores: Tensor
    ) -> Tensor:
        """The product of masked_linear with an effective weight that is there already; the same bits as there."""
        return F.linear(x, w_eff, bias)

    def masked_linear_backward(
        self, grad_out: Tensor | None, grad_penalty: Tensor | None, x: Tensor, weight: Tensor, scores: Tensor,
        beta: Tensor, w_eff: Tensor | None, kind: MaskKind, needs: Needs,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Gradients (x, weight, scores, bias); None for what is not needed or has no gradient."""
        grad_x = grad_bias = rows = columns = None
        if grad_out is not None:
            rows = as_matrix(grad_out)
            if needs.x:
                grad_x = self.linear_grad_x(rows, weight, scores, beta, kind) if w_eff is None else rows.mm(w_eff)
                if x.dim() != 2:
                    grad_x = grad_x.view(x.shape)
            if needs.weight or (needs.scores and kind.is_trainable):
                columns = as_matrix(x)
            if needs.bias:
                grad_bias = rows.sum(0)
        grad_scores, grad_weight = self.linear_grad_scores(
            rows, columns, grad_penalty, weight, scores, beta, kind, needs.scores, needs.weight, w_eff is None
        )
        return grad_x, grad_weight, grad_scores, grad_bias

    def linear_grad_x(self, grad_out: Tensor, weight: Tensor, scores: Tensor, beta: Tensor, kind: MaskKind) -> Tensor:
        """grad_out @ (weight * m), [M, N] to [M, K], where the forward pass kept no effective weight."""
        return grad_out.mm(self.effective_weight(weight, scores, beta, kind, grad_out.dtype)[0])

    def linear_grad_scores(
        self, grad_out: Tensor | None, x: Tensor | None, grad_penalty: Tensor | None, weight: Tensor, scores: Tensor,
        beta: Tensor, kind: MaskKind, needs_scores: bool, needs_weight: bool, is_fused: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        """grad_scores of ``grad_w_eff = grad_out.T @ x`` ([M, N] and [M, K]; x is None where nothing needs it).
        is_fused: the call's plan keeps nothing of weight's size, so a kernel that writes no product is preferred."""
        grad_w_eff = None
        if grad_out is not None and x is not None:
            grad_w_eff = linear_grad_w_eff(grad_out, x, weight)
        return self.grad_scores(
            grad_w_eff, grad_penalty, weight, scores, beta, kind, needs_scores, needs_weight, may_overwrite=True
        )

    # --- convolution ----------------------------------------------------------------------------------------------

    def masked_conv2d(
        self, x: Tensor, weight: Tensor, scores: Tensor, beta: Tensor, bias: Tensor | None, args: ConvArgs,
        kind: MaskKind, plan: str | None, buffers: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As masked_linear."""
        w_eff, penalty = self.effective_weight(weight, scores, beta, kind, x.dtype, buffers)
        return self.conv2d(x, w_eff, bias, args, kind), penalty, w_eff if keeps_w_eff(plan) else None

    def conv2d(self, x: Tensor, w_eff: Tensor, bias: Tensor | None, args: ConvArgs, kind: MaskKind) -> Tensor:
        """The convolution of masked_conv2d with an effective weight that is there already; the same bits as there."""
        return F.conv2d(x, w_eff, bias, args.stride, args.padding, args.dilation, args.groups)

    def conv2d_backward(
        self, grad_out: Tensor, x: Tensor, w_eff: Tensor, args: ConvArgs, kind: MaskKind,
        wanted: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Its gradients (x, effective weight, bias), those that are wanted."""
        return conv2d_backward(grad_out, x, w_eff, args, wanted)

    def masked_conv2d_backward(
        self, grad_out: Tensor | None, grad_penalty: Tensor | None, x: Tensor, weight: Tensor, scores: Tensor,
        beta: Tensor, w_eff: Tensor | None, args: ConvArgs, kind: MaskKind, needs: Needs,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """As masked_linear_backward."""
        grad_x = grad_bias = grad_w_eff = None
        if grad_out is not None:
            if w_eff is None:
                w_eff, _ = self.effective_weight(weight, scores, beta, kind, x.dtype)
            wants_weight = needs.weight or (needs.scores and kind.is_trainable)
            grad_x, grad_w_eff, grad_bias = self.conv2d_backward(
                grad_out, x, w_eff, args, kind, (needs.x, wants_weight, needs.bias)
            )
        grad_scores, grad_weight = self.grad_scores(
            grad_w_eff, grad_penalty, weight, scores, beta, kind, needs.scores, needs.weight, may_overwrite=True
        )
        return grad_x, grad_weight, grad_scores, grad_bias


def linear_of_masks(x: Tensor, w_eff: Tensor, bias: Tensor | None, is_shared: bool) -> Tensor:
    """[G*B, ..., K] with w_eff [G, N, K] to [G*B, ..., N]; a shared x is [B, ..., K] and its rows are used by all."""
    num, outputs, features = w_eff.shape
    if is_shared:  # one product with all effective weights side by side
        wide = F.linear(x, w_eff.reshape(num * outputs, features), None if bias is None else bias.repeat(num))
        per_mask = wide.view(*x.shape[:-1], num, outputs).movedim(-2, 0)
        return per_mask.reshape(num * x.shape[0], *x.shape[1:-1], outputs)
    by_mask, factors = x.reshape(num, count_rows(x) // num, features), w_eff.transpose(1, 2)
    out = torch.bmm(by_mask, factors) if bias is None else torch.baddbmm(bias, by_mask, factors)
    return out.view(*x.shape[:-1], outputs)


def count_rows(x: Tensor) -> int:
    """Rows of [..., K] as a matrix, also of an empty one, of which reshape can't tell."""
    return math.prod(x.shape[:-1])


def as_matrix(tensor: Tensor) -> Tensor:
    """[..., N] as [M, N]; a matrix as it is, also an empty one, of which reshape can't tell M."""
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def linear_grad_w_eff(grad_out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """grad_out.T @ x, [M, N] and [M, K] to [N, K], in weight's memory order."""
    if weight.stride(0) < weight.stride(1):  # a transposed weight
        return x.t().mm(grad_out).t()
    return grad_out.t().mm(x)


def conv2d_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, args: ConvArgs, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The vendor's gradients (x, weight, bias) of F.conv2d."""
    return torch.ops.aten.convolution_backward(
        grad_out, x, weight, [weight.shape[0]], list(args.stride), list(args.padding), list(args.dilation), False,
        [0, 0], args.groups, list(wanted),
    )  # fmt: skip
