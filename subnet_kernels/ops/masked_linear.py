"""``out = x @ (weight * mask).T + bias``, with the mask's penalty as a by-product."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.base import Backend, Needs, as_matrix, keeps_w_eff, linear_of_masks
from ..dispatch import choose_for
from ..in_backward import use_of
from ..masks import MaskKind, SampledKind, as_kind
from ..slots import Slot
from . import checks
from .checks import is_of_masks
from .effective_weight import (
    effective_weight_unchecked,
    is_transformed,
    is_vmapped,
    no_gradient,
    some,
)
from .many_masks import check_batch_of_masks, check_plan_of_masks, check_shared_input
from .once import differentiable_once, plain_apply
from .pending import PendingScoreGradients
from .refresh import refresh_in_graph
from .registry import register_op
from .sampled import check_key, check_one_mask, check_plan_of_sampled, run_sampled


class Settings(NamedTuple):
    """What steers one call besides its tensors."""

    kind: MaskKind
    plan: str | None = None
    backend: str | None = None
    slot: Slot | None = None
    wants_penalty: bool = True
    pending: PendingScoreGradients | None = None  # where convolutions put their score gradients off to, while open


def _forward(
    backend: Backend, x: Tensor, weight: Tensor, scores: Tensor, beta: Tensor, bias: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(out, penalty, effective weight to keep)"""
    kind, plan, slot = settings.kind, settings.plan, settings.slot
    if slot is None or not keeps_w_eff(plan):
        return backend.masked_linear(x, weight, scores, beta, bias, kind, plan)
    kept = slot.lookup(weight, scores, beta, kind, x.dtype)
    if kept is not None:
        w_eff, penalty = kept
        out = backend.linear(x, w_eff, bias, kind, weight, scores)
    else:
        buffers = slot.to_fill(weight, scores, beta, x.dtype)
        out, penalty, w_eff = backend.masked_linear(x, weight, scores, beta, bias, kind, plan, buffers)
        if buffers is not None:
            slot.mark_fresh(weight, scores, beta, kind, x.dtype)
            slot.is_made_in_product = backend.makes_w_eff_in_product(x, weight, scores, kind)
    return out, penalty.clone() if settings.wants_penalty else penalty, w_eff


# --- eager -----------------------------------------------------------------------------------------------------------


class _MaskedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scores: Tensor, beta: Tensor, bias: Tensor | None, settings: Settings
    ) -> Any:
        backend = choose_for(
            "masked_linear", weight, scores, settings.kind.name, x.dtype, settings.plan, settings.backend
        )
        out, penalty, w_eff = _forward(backend, x, weight, scores, beta, bias, settings)
        ctx.backend, ctx.kind = backend, settings.kind
        ctx.use = use_of(scores) if ctx.needs_input_grad[2] and settings.kind.is_trainable else None
        ctx.save_for_backward(x, weight, scores, beta, w_eff)
        ctx.set_materialize_grads(False)
        return (out, penalty) if settings.wants_penalty else out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_out: Tensor | None, grad_penalty: Tensor | None = None) -> Any:
        x, weight, scores, beta, w_eff = ctx.saved_tensors
        wants = ctx.needs_input_grad
        if ctx.use is not None and ctx.use.begin():
            return _step_in_backward(ctx, grad_out, grad_penalty, x, weight, scores, beta, w_eff)
        needs = Needs(wants[0], wants[1], wants[2] and ctx.use is None, wants[4])
        grad_x, grad_weight, grad_scores, grad_bias = ctx.backend.masked_linear_backward(
            grad_out, grad_penalty, x, weight, scores, beta, w_eff, ctx.kind, needs
        )
        return grad_x, grad_weight, grad_scores, None, grad_bias, None


def _step_in_backward(
    ctx: Any, grad_out: Tensor | None, grad_penalty: Tensor | None, x: Tensor, weight: Tensor, scores: Tensor,
    beta: Tensor, w_eff: Tensor | None,
) -> Any:
    """The backward pass of scores whose optimizer steps them in it: other gradients come first, and theirs is None."""
    use, wants = ctx.use, ctx.needs_input_grad
    needs = Needs(wants[0], wants[1], False, wants[4])
    grad_x, grad_weight, _, grad_bias = ctx.backend.masked_linear_backward(
        grad_out, grad_penalty, x, weight, scores, beta, w_eff, ctx.kind, needs
    )
    is_stepped = False
    if grad_out is not None and weight.numel():
        is_stepped = use.step_linear(as_matrix(grad_out), as_matrix(x), grad_penalty)
    if not is_stepped:
        needs = Needs(False, False, True, False)
        _, _, made, _ = ctx.backend.masked_linear_backward(
            grad_out, grad_penalty, x, weight, scores, beta, None, ctx.kind, needs
        )
        made = torch.zeros_like(scores) if made is None else made
        use.step_scores(made.t() if use.is_transposed else made)
    use.end()
    return grad_x, grad_weight, None, None, grad_bias, None


_apply = plain_apply(_MaskedLinear)


def run_masked_linear(
    x: Tensor, weight: Tensor, scores: Tensor, beta: Tensor, bias: Tensor | None, settings: Settings
) -> Any:
    """The op without checks: (out, penalty), or out alone where ``settings.wants_penalty`` is False."""
    if isinstance(settings.kind, SampledKind):
        return run_sampled(
            x, weight, scores, beta, bias, settings.kind, None, settings.backend, settings.wants_penalty
        )
    if torch.compiler.is_compiling():
        kind, plan, backend, slot = settings[:4]
        kept = refresh_in_graph(slot if keeps_w_eff(plan) else None, weight, scores, beta, kind, x.dtype)
        out, penalty, _ = _op(
            x, weight, scores, beta, bias, kind.name, kind.params(), None, plan, backend, *kept
        )
        return (out, penalty) if settings.wants_penalty else out
    if is_transformed("masked_linear", settings.backend) or is_vmapped():
        w_eff, penalty = effective_weight_unchecked(weight, scores, beta, settings.kind, x.dtype, settings.backend)
        out = F.linear(x, w_eff, bias)
        return (out, penalty) if settings.wants_penalty else out
    return _apply(x, weight, scores, beta, bias, settings)


class _MaskedLinearOfMasks(torch.autograd.Function):
    """The same for several masks over the weight."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scores: Tensor, beta: Tensor, bias: Tensor | None, kind: MaskKind,
        name: str | None, is_shared: bool,
    ) -> Any:
        backend = choose_for("masked_linear", weight, scores[0], kind.name, x.dtype, None, name)
        out, penalty, w_effs = backend.masked_linear_of_masks(x, weight, scores, beta, bias, kind, is_shared)
        ctx.backend, ctx.kind, ctx.is_shared = backend, kind, is_shared
        ctx.save_for_backward(x, weight, scores, beta, *w_effs)
        ctx.set_materialize_grads(False)
        return out, penalty

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_out: Tensor | None, grad_penalty: Tensor | None) -> Any:
        x, weight, scores, beta, *w_effs = ctx.saved_tensors
        wants = ctx.needs_input_grad
        grad_x, grad_weight, grad_scores, grad_bias = ctx.backend.masked_linear_of_masks_backward(
            grad_out, grad_penalty, x, weight, scores, beta, w_effs, ctx.kind, ctx.is_shared,
            Needs(wants[0], wants[1], wants[2], wants[4]),
        )
        return grad_x, grad_weight, grad_scores, None, grad_bias, None, None, None


def _run_of_masks(
    x: Tensor, weight: Tensor, scores: Tensor, beta: Tensor, bias: Tensor | None, kind: MaskKind, backend: str | None,
    is_shared: bool,
) -> tuple[Tensor, Tensor]:
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        w_eff, penalty = effective_weight_unchecked(weight, scores, beta, kind, x.dtype, backend)
        return linear_of_masks(x, w_eff, bias, is_shared), penalty
    return _MaskedLinearOfMasks.apply(x, weight, scores, beta, bias, kind, backend, is_shared)


# --- registered ------------------------------------------------------------------------------------------------------


def _implementation(
    x: Tensor, weight: Tensor, scores: Tensor, beta: Tensor, bias: Tensor | None, kind: str, params: list[float],
    key: Tensor | None, plan: str | None, backend: str | None, w_eff: Tensor | None = None,
    penalty: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    chosen, mask_kind = choose_for("masked_linear", weight, scores, kind, x.dtype, plan, backend), as_kind(kind, params)
    if w_eff is not None and penalty is not None:
        return chosen.linear(x, w_eff, bias, mask_kind, weight, scores), penalty.clone(), no_gradient(weight)
    # "cached" where the plan is left open: the fake says that an effective weight comes back
    out, penalty, w_eff = chosen.masked_linear(x, weight, scores, beta, bias, mask_kind, plan or "cached")
    return out, penalty, no_gradient(weight) if w_eff is None else w_eff


def kept_effective_weight(plan: str | None, given: Tensor | None, made: Tensor) -> Tensor | None:
    """What the backward pass is given: the slot's effective weight, the one just made, or none."""
    return None if not keeps_w_eff(plan) else made if given is None else given


def _fake(x, weight, scores, beta, bias, kind, params, key, plan, backend, w_eff=None, penalty=None):
    keeps_none = not keeps_w_eff(plan) or w_eff is not None
    made = no_gradient(weight) if keeps_none else torch.empty_like(weight, dtype=x.dtype)
    return x.new_empty(*x.shape[:-1], weight.shape[0]), scores.new_empty(()), made


def _backward_implementation(
    grad_out: Tensor, grad_penalty: Tensor | None, x: Tensor, weight: Tensor, scores: Tensor, beta: Tensor,
    w_eff: Tensor | None, kind: str, params: list[float], key: Tensor | None, backend: str | None, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    plan = "recompute" if w_eff is None else None  # as the forward pass asked, so that the same backend is found
    chosen = choose_for("masked_linear", weight, scores, kind, x.dtype, plan, backend)
    grad_x, grad_weight, grad_scores, grad_bias = chosen.masked_linear_backward(
        grad_out, grad_penalty, x, weight, scores, beta, w_eff, as_kind(kind, params), Needs(*needs)
    )
    return (
        no_gradient(x) if grad_x is None else grad_x,
        no_gradient(weight) if grad_weight is None else grad_weight,
        no_gradient(scores) if not needs[2] else torch.zeros_like(scores) if grad_scores is None else grad_scores,
        no_gradient(x) if grad_bias is None else grad_bias,
    )


def _backward_fake(
    grad_out, grad_penalty, x, weight, scores, beta, w_eff, kind, params, key, backend, needs
):
    return (
        x.new_empty(x.shape) if needs[0] else no_gradient(x),
        torch.empty_like(weight) if needs[1] else no_gradient(weight),
        torch.empty_like(scores) if needs[2] else no_gradient(scores),
        x.new_empty(weight.shape[0]) if needs[3] else no_gradient(x),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, scores, beta, _bias, kind, params, key, plan, backend, given, _ = inputs
    ctx.save_for_backward(x, weight, scores, beta, kept_effective_weight(plan, given, output[2]), key)
    ctx.rest = kind, params, backend
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_penalty: Tensor | None, _grad_w_eff: Tensor | None) -> Any:
    x, weight, scores, beta, w_eff, key = ctx.saved_tensors
    kind, params, backend = ctx.rest
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 4)]
    if grad_out is None and grad_penalty is None:
        return (None,) * 12
    if grad_out is None:
        grad_out = x.new_zeros(*x.shape[:-1], weight.shape[0])
    gradients = _backward_op(
        grad_out, grad_penalty, x, weight, scores, beta, w_eff, kind, params, key, backend, needs
    )
    grad_x, grad_weight, grad_scores, grad_bias = (some(g, n) for g, n in zip(gradients, needs, strict=True))
    return grad_x, grad_weight, grad_scores, None, grad_bias, *(None,) * 7


_backward_op = register_op(
    "masked_linear_backward",
    "(Tensor grad_out, Tensor? grad_penalty, Tensor x, Tensor weight, Tensor scores, Tensor beta, Tensor? w_eff, "
    "str kind, float[] params, Tensor? key, str? backend, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_implementation,
    _backward_fake,
)
_op = register_op(
    "masked_linear",
    "(Tensor x, Tensor weight, Tensor scores, Tensor beta, Tensor? bias, str kind, float[] params, Tensor? key, "
    "str? plan, str? backend, Tensor? w_eff, Tensor? penalty) -> (Tensor, Tensor, Tensor)",
    _implementation,
    _fake,
    _backward,
    _setup_context,
)


# --- public ----------------------------------------------------------------------------------------------------------


def check_masked_linear(x: Tensor, weight: Tensor, scores: Tensor, bias: Tensor | None, is_autocast: bool) -> None:
    """The checks of :func:`masked_linear`, once for eager, compiled and layer calls."""
    op = "masked_linear"
    checks.check_weight_and_scores(op, weight, scores)
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight must have 2 dimensions [N, K], got {checks.shape_of(weight)}")
    checks.check_x(op, x, weight, is_autocast)
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: x must have {weight.shape[1]} features in its last dimension (weight is "
            f"{checks.shape_of(weight)}), got shape {checks.shape_of(x)}"
        )
    checks.check_bias(op, bias, weight.shape[0], x)


def masked_linear(
    x: Tensor, weight: Tensor, scores: Tensor, beta: Tensor | float, bias: Tensor | None = None, *,
    kind: str | MaskKind = "sigmoid", plan: str | None = None, backend: str | None = None, shared_input: bool = False,
    key: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``(x @ (weight * sigmoid(beta*scores)).T + bias, mask.sum())``.

    The PyTorch lines it equals: ``m = torch.sigmoid(beta * scores); out = F.linear(x, weight * m, bias);
    penalty = m.sum()``.

    Args:
        x: [..., K], fp32, bf16, fp16 or fp64; weight's dtype, unless autocast casts it.
        weight: [N, K], contiguous or transposed (both are read as they lie).
        scores: [N, K] or sizes that divide them ([N, 1]: one score per row, [1, K]: per column, [N/h, 1]: per head);
            fp32 (fp64 beside an fp64 weight). Or G masks over the one weight, ``[G, ...]``: x is then [G*B, ..., K],
            and mask g serves the g-th B of its first dimension.
        beta: inverse temperature; a float (finite, >= 0) or a 0-d tensor on the same device (its value is not read).
        bias: [N] or None.
        kind: "sigmoid", "hard", another kind's name or a MaskKind (masks.py lists them). With ``Gumbel(samples=4)`` and
            the like, four masks are drawn, and mask g serves the g-th quarter of x's first dimension.
        plan: "cached" makes one effective weight, calls the vendor's matrix product and keeps it for the backward pass;
            "fused" computes the mask inside the products and keeps nothing of weight's size; "recompute" keeps nothing
            either, but a backend without such products makes an effective weight for each of them; None lets dispatch
            choose.
        backend: the name of one, or None: use_backend's, else the best that does not refuse.
        shared_input: with G masks: x is [B, ..., K], and all masks serve all of it.
        key: for a sampled kind, int64 [seed, step] on the scores' device, read there: equal keys draw equal masks.

    Returns:
        out [..., N] in x's dtype (autocast's where it is on) and penalty, 0-d in scores' dtype: the sum of the mask
        over weights. With G masks: out [G*B, ..., N], the masks' parts one after the other, and penalty [G]. Both are
        ordinary autograd outputs: ``ds = grad_w_eff*weight*slope + grad_penalty*penalty_slope``.
        Gradients reach x, scores, bias and weight where they require grad; not beta. Double backward raises.

    Raises:
        ValueError, TypeError: an argument does not fit; the message says which, what fits and what came.
        BackendRefused: the backend that was asked for by name can't run the call.
        NotImplementedError: several masks under plan "fused" or "recompute".

    Accuracy: the effective weight is rounded once, to the compute dtype; products accumulate in fp32.
    Kept for backward: x, weight, scores and, with plan "cached", one effective weight; of a sampled kind no mask and no
    effective weight, but two bytes per score.
    Source: Savarese et al. 2020 (arXiv 1912.04427).

    Example:
        >>> import torch
        >>> out, penalty = masked_linear(torch.ones(1, 3), torch.ones(2, 3), torch.zeros(2, 3), 1.0)
        >>> out.tolist(), penalty.item()
        ([[1.5, 1.5]], 3.0)
    """
    op = "masked_linear"
    checks.check_tensor(op, "x", x)
    cast_to = checks.autocast_dtype(x)
    x, bias = checks.cast_for_autocast(x, cast_to), checks.cast_for_autocast(bias, cast_to)
    check_masked_linear(x, weight, scores, bias, cast_to is not None)
    mask_kind = checks.check_kind(op, kind)
    checks.check_plan(op, plan)
    beta = checks.beta_tensor(op, beta, scores)
    if is_of_masks(weight, scores):
        check_plan_of_masks(op, plan)
        check_batch_of_masks(op, x, scores.shape[0], shared_input, 2)
        check_one_mask(op, mask_kind)
        return _run_of_masks(x, weight, scores, beta, bias, mask_kind, backend, shared_input)
    check_shared_input(op, shared_input)
    mask_kind = check_key(op, mask_kind, key, scores)
    check_plan_of_sampled(op, mask_kind, plan)
    return run_masked_linear(x, weight, scores, beta, bias, Settings(mask_kind, plan, backend))
