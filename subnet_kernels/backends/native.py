"""Our C++ kernels through the extension ``subnet_kernels._C``: the backend ``cpu``, and what it shares with cuda.py."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..masks import Gumbel, MaskKind, SampledKind
from . import small_conv
from .base import (
    KERNEL_DTYPES,
    KIND_CODES,
    SAMPLED,
    AdamW,
    Backend,
    Call,
    ConvArgs,
    Needs,
    gradients_wanted,
    keeps_w_eff,
    numbers_of_entries,
    sampled_refusal,
)
from .layout import aligned, is_dense, with_strides_of

_FEWEST_FUSED = 16384  # weights in a forward pass; below, a call's overhead is all that counts, and F.linear has less
_LARGE = 1 << 20  # weights from which masks over one are taken one after the other: a call's overhead no longer counts,
# and memory of all masks' size, new at each step, costs more than W again (3072x768, 8 masks, 64 rows each: 2.7 times)
_STEP_BLOCK = 8 << 20  # bytes of a product that linear_step_ makes at once
_bump = torch.autograd.graph.increment_version


@functools.cache
def load_error() -> str | None:
    """None if the extension is loaded, else why not. The first call loads it."""
    try:
        importlib.import_module("subnet_kernels._C")
    except ImportError as error:
        return f"the compiled extension subnet_kernels._C is not available ({error}); reinstall with a C++ compiler"
    return None


def is_available() -> bool:
    """Whether the compiled extension is loaded."""
    return load_error() is None


@functools.cache
def has_cuda_kernels() -> bool:
    """Whether the extension was built with nvcc and this torch has CUDA."""
    return is_available() and torch._C._dispatch_has_kernel_for_dispatch_key("subnet_native::effective_weights", "CUDA")


def serves(tensor: Tensor) -> bool:
    """Whether the extension has kernels for that tensor's device."""
    return is_available() if tensor.device.type == "cpu" else tensor.device.type == "cuda" and has_cuda_kernels()


@functools.cache
def fused_linear_rows() -> int:
    """Up to so many rows of x, linear products run fused with the pass over their weight, on this processor."""
    return torch.ops.subnet_native.fused_linear_rows() if is_available() else 0


def _is_fused(kind: MaskKind, x: Tensor, *weights: Tensor) -> bool:
    """Whether the linear kernels for few rows serve these: everything fp32 and contiguous, scores of weight's shape.
    A hard mask stays with F.linear, so that its outputs are those of the layer without mask to the bit."""
    num = weights[0].numel()
    return (
        num > 0 and kind.name == "sigmoid" and 0 < x.numel() <= fused_linear_rows() * weights[0].shape[-1]
        and x.dtype == torch.float32 and x.is_contiguous() and x.dim() <= 8 and all(
            w.dtype == torch.float32 and w.is_contiguous() and w.numel() == num for w in weights
        )
    )  # fmt: skip


def _is_product_fused(kind: MaskKind, x: Tensor, weight: Tensor, scores: Tensor) -> bool:
    """Whether a forward product runs in them."""
    return weight.numel() >= _FEWEST_FUSED and _is_fused(kind, x, weight, scores)


class ExtensionBackend(Backend):
    """The elementwise ops that the extension has under one name for CPU and CUDA. ``name`` is the device type."""

    has_mask_adamw = True

    def __init__(self, name: str) -> None:
        self.name = name
        self.ops = torch.ops.subnet_native

    def refuse(self, call: Call) -> str | None:
        if (reason := load_error()) is not None:
            return reason
        if call.device != self.name:
            return f"weight is on {call.device}"
        if call.weight_dtype not in KERNEL_DTYPES or call.compute_dtype not in KERNEL_DTYPES:
            return f"{call.weight_dtype} weight computed in {call.compute_dtype} is not among its dtypes"
        if call.op == SAMPLED:
            return sampled_refusal(call)
        if call.kind not in KIND_CODES:
            return f"kind {call.kind!r} is not built here yet"
        if call.num_dims > 4 or call.num_dims < 1:
            return f"a weight with {call.num_dims} dimensions is not built here (1 to 4 are)"
        if call.plan == "fused":
            return (
                "plan 'fused' is not built here yet (a matrix product with the mask inside); use plan='recompute', "
                "which keeps as little, or plan='cached'"
            )
        return None

    def effective_weight(
        self, weight: Tensor, scores: Tensor, beta: Tensor, kind: MaskKind, dtype: torch.dtype,
        out: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        op, code = self.ops.effective_weight.default, KIND_CODES[kind.name]
        if out is not None and weight.is_contiguous() and scores.is_contiguous() and out[0].is_contiguous():
            op(weight, scores, beta, code, *out)  # every forward pass of a layer comes here
            _bump(out)
            return out
        if not is_dense(weight):
            weight = weight.contiguous()
        scores = aligned(weight, scores)
        if out is None:
            w_eff, penalty = torch.empty_like(weight, dtype=dtype), torch.empty_like(beta)
            op(weight, scores, beta, code, w_eff, penalty)
            return w_eff, penalty
        w_eff, penalty = out
        if w_eff.stride() == weight.stride():
            op(weight, scores, beta, code, w_eff, penalty)
        else:
            dense = torch.empty_like(weight, dtype=dtype)
            op(weight, scores, beta, code, dense, penalty)
            w_eff.copy_(dense)
        _bump((w_eff, penalty))
        return out

    def effective_weights(
        self, weights: list[Tensor], scores: list[Tensor], beta: Tensor, kind: MaskKind, dtypes: list[torch.dtype],
        out: list[Tensor] | None = None,
    ) -> tuple[list[Tensor], Tensor]:
        weights = [w if is_dense(w) else w.contiguous() for w in weights]
        scores = [aligned(w, s) for w, s in zip(weights, scores, strict=True)]
        penalties = torch.empty(len(weights), dtype=torch.float32, device=beta.device)
        w_effs = [torch.empty_like(w, dtype=d) for w, d in zip(weights, dtypes, strict=True)]
        if out is not None:
            w_effs = [o if o.stride() == w.stride() else w for o, w in zip(out, w_effs, strict=True)]
        op = self.ops.effective_weights.default
        op(weights, scores, beta, KIND_CODES[kind.name], w_effs, penalties)
        if out is not None:
            for given, made in zip(out, w_effs, strict=True):
                given.copy_(made) if given is not made else _bump(given)
            return out, penalties
        return w_effs, penalties

    def grad_scores(
        self, grad_w_eff: Tensor | None, grad_penalty: Tensor | None, weight: Tensor, scores: Tensor, beta: Tensor,
        kind: MaskKind, needs_scores: bool, needs_weight: bool, may_overwrite: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        wants_scores, wants_weight = gradients_wanted(kind, grad_w_eff, grad_penalty, needs_scores, needs_weight)
        if not wants_scores and not wants_weight:
            return None, None
        op, code = self.ops.grad_scores.default, KIND_CODES[kind.name]
        if (
            may_overwrite and grad_w_eff is not None and not wants_weight and grad_w_eff.dtype == torch.float32
            and grad_w_eff.is_contiguous() and weight.is_contiguous() and scores.is_contiguous()
            and scores.numel() == weight.numel()
        ):  # every backward pass of an fp32 layer comes here
            op(grad_w_eff, grad_penalty, weight, scores, beta, code, grad_w_eff, None)
            return grad_w_eff, None
        if not is_dense(weight):
            weight = weight.contiguous()
        if grad_w_eff is not None:
            grad_w_eff = with_strides_of(weight, grad_w_eff)
        given, scores = scores, aligned(weight, scores)
        can_reuse = (
            may_overwrite and grad_w_eff is not None and grad_w_eff.dtype == torch.float32
            and grad_w_eff.shape == scores.shape and grad_w_eff.stride() == scores.stride()
        )
        grad_scores = grad_w_eff if can_reuse else torch.empty_like(scores)
        assert grad_scores is not None
        grad_weight = torch.empty_like(weight) if wants_weight else None
        op(grad_w_eff, grad_penalty, weight, scores, beta, code, grad_scores, grad_weight)
        if wants_scores and given is not scores:  # back to the strides that the caller's scores have
            grad_scores = torch.empty_like(given).copy_(grad_scores)
        return grad_scores if wants_scores else None, grad_weight

    def grad_scores_of_many(
        self, grad_w_effs: list[Tensor], grad_penalties: list[Tensor | None], weights: list[Tensor],
        scores: list[Tensor], beta: Tensor, kind: MaskKind, out: list[Tensor] | None = None,
    ) -> list[Tensor]:
        dense = [w if is_dense(w) else w.contiguous() for w in weights]
        grads = [with_strides_of(w, g) for w, g in zip(dense, grad_w_effs, strict=True)]
        flat = [aligned(w, s) for w, s in zip(dense, scores, strict=True)]
        into = grads if out is None else out
        made = [
            i if i.dtype == torch.float32 and (i.shape, i.stride()) == (s.shape, s.stride()) else torch.empty_like(s)
            for i, s in zip(into, flat, strict=True)
        ]
        none = beta.new_empty(0)
        penalties = [none if penalty is None else penalty for penalty in grad_penalties]
        op = self.ops.grad_scores_of_many.default
        op(grads, penalties, dense, flat, beta, KIND_CODES[kind.name], made)
        if out is not None:
            for given, written in zip(out, made, strict=True):
                given.copy_(written) if written is not given else _bump(given)
            return out
        return [
            m if s.stride() == m.stride() else torch.empty_like(s).copy_(m) for m, s in zip(made, scores, strict=True)
        ]


    def keep_thresholds(self, scores: Tensor, beta: Tensor, kind: SampledKind) -> Tensor | None:
        thresholds = torch.empty(scores.shape, dtype=torch.uint16, device=scores.device)
        self.ops.keep_thresholds.default(scores, beta, thresholds)
        return thresholds

    def sampled_weight(
        self, weight: Tensor, scores: Tensor, thresholds: Tensor | None, beta: Tensor, kind: SampledKind, out: Tensor
    ) -> None:
        self.ops.sampled_weight.default(weight, thresholds, kind.key, kind.sample, out)

    def sampled_grad_scores_(
        self, grad_scores: Tensor, grad_w_eff: Tensor, weight: Tensor, scores: Tensor, beta: Tensor, kind: SampledKind
    ) -> None:
        tau = kind.tau if isinstance(kind, Gumbel) else 1.0
        self.ops.sampled_grad_scores.default(
            grad_w_eff.contiguous(), weight, scores, beta, kind.key, kind.sample, tau, isinstance(kind, Gumbel),
            grad_scores,
        )  # fmt: skip


class NativeBackend(ExtensionBackend):
    """Vendor matrix products, and our one-pass kernels for everything elementwise, on a CPU."""

    def masked_linear(
        self, x: Tensor, weight: Tensor, scores: Tensor, beta: Tensor, bias: Tensor | None, kind: MaskKind,
        plan: str | None, buffers: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if not _is_product_fused(kind, x, weight, scores):
            w_eff, penalty = self.effective_weight(weight, scores, beta, kind, x.dtype, buffers)
            return F.linear(x, w_eff, bias), penalty, w_eff if keeps_w_eff(plan) else None
        w_eff, penalty = (torch.empty_like(weight), torch.empty_like(beta)) if buffers is None else buffers
        out = x.new_empty(*x.shape[:-1], weight.shape[0])
        bias = bias if bias is None else bias.contiguous()
        torch.ops.subnet_native.masked_linear.default(x, weight, scores, beta, bias, w_eff, penalty, out)
        if buffers is not None:
            _bump(buffers)
        return out, penalty, w_eff if keeps_w_eff(plan) else None

    def masked_linear_of_masks(
        self, x: Tensor, weight: Tensor, scores: Tensor, beta: Tensor, bias: Tensor | None, kind: MaskKind,
        is_shared: bool,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        if weight.numel() < _LARGE:
            return super().masked_linear_of_masks(x, weight, scores, beta, bias, kind, is_shared)
        parts = [x] * len(scores) if is_shared else x.chunk(len(scores))
        outs, penalties, w_effs = [], [], []
        for part, score in zip(parts, scores.unbind(), strict=True):
            out, penalty, w_eff = self.masked_linear(part, weight, score, beta, bias, kind, "cached")
            assert w_eff is not None
            outs.append(out)
            penalties.append(penalty)
            w_effs.append(w_eff)
        return torch.cat(outs), torch.stack(penalties), w_effs

    def masked_linear_of_masks_backward(
        self, grad_out: Tensor | None, grad_penalty: Tensor | None, x: Tensor, weight: Tensor, scores: Tensor,
        beta: Tensor, w_effs: list[Tensor], kind: MaskKind, is_shared: bool, needs: Needs,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        if weight.numel() < _LARGE or grad_out is None:
            return super().masked_linear_of_masks_backward(
                grad_out, grad_penalty, x, weight, scores, beta, w_effs, kind, is_shared, needs
            )
        num = len(scores)
        penalties = [None] * num if grad_penalty is None else list(grad_penalty.unbind())
        parts = [x] * num if is_shared else x.chunk(num)
        grad_x, grad_weight, grad_bias = [], None, None
        grad_scores = torch.empty_like(scores) if needs.scores and kind.is_trainable else None
        for mask, (rows, part) in enumerate(zip(grad_out.chunk(num), parts, strict=True)):
            of_x, of_weight, of_scores, of_bias = self.masked_linear_backward(
                rows, penalties[mask], part, weight, scores[mask], beta, w_effs[mask], kind, needs
            )
            grad_x += [] if of_x is None else [of_x]
            grad_weight = of_weight if grad_weight is None or of_weight is None else grad_weight.add_(of_weight)
            grad_bias = of_bias if grad_bias is None or of_bias is None else grad_bias.add_(of_bias)
            if grad_scores is not None and of_scores is not None:
                grad_scores[mask] = of_scores
        total = None if not grad_x else torch.stack(grad_x).sum(0) if is_shared else torch.cat(grad_x)
        return total, grad_weight, grad_scores, grad_bias

    def makes_w_eff_in_product(self, x: Tensor, weight: Tensor, scores: Tensor, kind: MaskKind) -> bool:
        return _is_product_fused(kind, x, weight, scores)

    def linear(
        self, x: Tensor, w_eff: Tensor, bias: Tensor | None, kind: MaskKind, weight: Tensor, scores: Tensor
    ) -> Tensor:
        if not _is_product_fused(kind, x, weight, scores):
            return F.linear(x, w_eff, bias)
        out = x.new_empty(*x.shape[:-1], w_eff.shape[0])
        torch.ops.subnet_native.linear.default(x, w_eff, bias if bias is None else bias.contiguous(), out)
        return out

    def linear_grad_scores(
        self, grad_out: Tensor | None, x: Tensor | None, grad_penalty: Tensor | None, weight: Tensor, scores: Tensor,
        beta: Tensor, kind: MaskKind, needs_scores: bool, needs_weight: bool, is_fused: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        if (
            grad_out is not None and x is not None and needs_scores and not needs_weight
            and _is_fused(kind, x, weight, scores) and grad_out.is_contiguous()
        ):
            grad_scores = torch.empty_like(scores)
            op = torch.ops.subnet_native.linear_grad_scores.default
            op(grad_out, grad_penalty, x, weight, scores, beta, grad_scores)
            return grad_scores, None
        return super().linear_grad_scores(
            grad_out, x, grad_penalty, weight, scores, beta, kind, needs_scores, needs_weight
        )

    def conv2d(self, x: Tensor, w_eff: Tensor, bias: Tensor | None, args: ConvArgs, kind: MaskKind) -> Tensor:
        if kind.name == "sigmoid" and small_conv.serves(x, w_eff, args):  # hard: as the layer without mask, to the bit
            return small_conv.conv2d(x, w_eff, bias, args)
        return super().conv2d(x, w_eff, bias, args, kind)

    def conv2d_backward(
        self, grad_out: Tensor, x: Tensor, w_eff: Tensor, args: ConvArgs, kind: MaskKind,
        wanted: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if kind.name == "sigmoid" and small_conv.serves(x, w_eff, args):
            return small_conv.conv2d_backward(grad_out, x, w_eff, args, wanted)
        return super().conv2d_backward(grad_out, x, w_eff, args, kind, wanted)

    def add_penalty_grad_(
        self, grads: list[Tensor], scores: list[Tensor], weights_per_score: list[int], beta: Tensor,
        lam: float | Tensor, kind: MaskKind,
    ) -> None:
        torch.ops.subnet_native.add_penalty_grad.default(
            grads, scores, weights_per_score, beta, float(lam), KIND_CODES[kind.name]
        )
        for grad in grads:
            _bump(grad)

    def mask_adamw_(
        self, scores: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
        steps: list[Tensor], weights: list[Tensor], slots: list[tuple[Tensor, Tensor] | None], beta: Tensor,
        next_beta: Tensor, kind: MaskKind, numbers: AdamW | Sequence[AdamW],
        grad_penalties: list[Tensor | None] | None = None,
    ) -> None:
        self._mask_adamw(
            scores, grads, exp_avgs, exp_avg_sqs, steps, weights, slots, beta, next_beta, kind, numbers, grad_penalties,
            [0] * len(scores),
        )
        _bump([*scores, *exp_avgs, *exp_avg_sqs, *(tensor for slot in slots for tensor in slot or ())])

    def _mask_adamw(
        self, scores: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
        steps: list[Tensor], weights: list[Tensor], slots: list[tuple[Tensor, Tensor] | None], beta: Tensor,
        next_beta: Tensor, kind: MaskKind, numbers: AdamW | Sequence[AdamW],
        grad_penalties: list[Tensor | None] | None, firsts: list[int],
    ) -> None:
        """mask_adamw_ of parts of tensors, which begin at these places in storage order."""
        nothing = beta.new_empty(0)  # how the op is told that an entry has no effective weight, or no penalty
        w_effs, penalties = zip(*(slot or (nothing, nothing) for slot in slots)) if slots else ((), ())
        given = [nothing if grad is None else grad for grad in grad_penalties or [None] * len(scores)]
        each = numbers_of_entries(numbers, len(scores))
        if not each:
            return
        torch.ops.subnet_native.mask_adamw.default(
            scores, grads, exp_avgs, exp_avg_sqs, weights, w_effs, penalties, [float(step) for step in steps], beta,
            next_beta, KIND_CODES[kind.name], [float(n.lr) for n in each], each[0].beta1, each[0].beta2, each[0].eps,
            each[0].weight_decay, [float(n.lam) for n in each], grad_penalties is not None, given, firsts,
        )  # fmt: skip

    def linear_step_(
        self, grad_out: Tensor, x: Tensor, grad_penalty: Tensor | None, scores: Tensor, exp_avg: Tensor,
        exp_avg_sq: Tensor, step: Tensor, weight: Tensor, slot: tuple[Tensor, Tensor] | None, beta: Tensor,
        next_beta: Tensor, kind: MaskKind, numbers: AdamW,
    ) -> None:
        if (
            _is_fused(kind, x, weight, scores) and grad_out.is_contiguous() and x.is_contiguous()
            and (slot is None or slot[0].dtype == torch.float32)
        ):
            nothing = beta.new_empty(0)
            w_eff, penalty = slot or (nothing, nothing)
            torch.ops.subnet_native.linear_step.default(
                grad_out, grad_penalty, x, scores, exp_avg, exp_avg_sq, weight, w_eff, penalty, float(step), beta,
                next_beta, *(float(number) for number in numbers),
            )  # fmt: skip
            _bump([scores, exp_avg, exp_avg_sq, *(slot or ())])
            return
        is_plain = weight.is_contiguous() and scores.is_contiguous() and (slot is None or slot[0].is_contiguous())
        if not is_plain or not weight.numel():
            return super().linear_step_(
                grad_out, x, grad_penalty, scores, exp_avg, exp_avg_sq, step, weight, slot, beta, next_beta, kind,
                numbers,
            )
        # The product in blocks of rows, so that no memory of weight's size is asked for; fresh pages cost more than a
        # pass over old ones (4096x4096, 256 rows of x, one thread: 165 ms in one block, 127 in blocks of 12 MB).
        num_rows = weight.shape[0]
        rows = -(-num_rows // -(-weight.numel() * x.element_size() // _STEP_BLOCK))
        grad_w_eff = x.new_empty(rows, weight.shape[1])
        sums = beta.new_zeros(-(-num_rows // rows))
        for block, begin in enumerate(range(0, num_rows, rows)):
            part = slice(begin, min(begin + rows, num_rows))
            product = torch.mm(grad_out.t()[part], x, out=grad_w_eff[: part.stop - begin])
            self._mask_adamw(
                [scores[part]], [product], [exp_avg[part]], [exp_avg_sq[part]], [step], [weight[part]],
                [None if slot is None else (slot[0][part], sums[block])], beta, next_beta, kind, numbers,
                [grad_penalty], [begin * weight.shape[1]],
            )  # fmt: skip
        if slot is not None:
            slot[1].copy_(sums.sum(dtype=torch.float64))
        _bump([scores, exp_avg, exp_avg_sq, *(slot or ())])
