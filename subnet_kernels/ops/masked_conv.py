"""2-D convolution with ``weight * mask``, with the mask's penalty as a by-product."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.base import Backend, ConvArgs, Needs, keeps_w_eff
from ..backends.layout import with_strides_of
from ..dispatch import choose_for
from ..in_backward import use_of
from ..masks import MaskKind, SampledKind, as_kind
from . import checks
from .checks import is_of_masks
from .effective_weight import (
    effective_weight_unchecked,
    is_transformed,
    is_vmapped,
    no_gradient,
    some,
)
from .many_masks import check_batch_of_masks, check_plan_of_masks, check_shared_input, conv2d_of_masks
from .masked_linear import Settings, kept_effective_weight
from .once import differentiable_once, plain_apply
from .pending import Entry
from .refresh import refresh_in_graph
from .registry import register_op
from .sampled import check_key, check_one_mask, check_plan_of_sampled, run_sampled

IntOrPair = int | tuple[int, ...] | list[int]


def _forward(
    backend: Backend, x: Tensor, weight: Tensor, scores: Tensor, beta: Tensor, bias: Tensor | None, args: ConvArgs,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor | None]:
    kind, plan, slot = settings.kind, settings.plan, settings.slot
    if slot is None or not keeps_w_eff(plan):
        return backend.masked_conv2d(x, weight, scores, beta, bias, args, kind, plan)
    kept = slot.lookup(weight, scores, beta, kind, x.dtype)
    if kept is not None:
        w_eff, penalty = kept
        out = backend.conv2d(x, w_eff, bias, args, kind)
    else:
        buffers = slot.to_fill(weight, scores, beta, x.dtype)
        out, penalty, w_eff = backend.masked_conv2d(x, weight, scores, beta, bias, args, kind, plan, buffers)
        if buffers is not None:
            slot.mark_fresh(weight, scores, beta, kind, x.dtype)
    return out, penalty.clone() if settings.wants_penalty else penalty, w_eff


# --- eager -----------------------------------------------------------------------------------------------------------


class _MaskedConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scores: Tensor, beta: Tensor, bias: Tensor | None, args: ConvArgs,
        settings: Settings,
    ) -> Any:
        backend = choose_for(
            "masked_conv2d", weight, scores, settings.kind.name, x.dtype, settings.plan, settings.backend
        )
        out, penalty, w_eff = _forward(backend, x, weight, scores, beta, bias, args, settings)
        ctx.backend, ctx.kind, ctx.args, ctx.pending = backend, settings.kind, args, settings.pending
        ctx.use = use_of(scores) if ctx.needs_input_grad[2] and settings.kind.is_trainable else None
        ctx.save_for_backward(x, weight, scores, beta, w_eff)
        # the parameter itself: what is unpacked from save_for_backward may be a copy (checkpointing, save_on_cpu)
        ctx.leaf = scores if settings.pending is not None and scores.is_leaf and scores.requires_grad else None
        ctx.set_materialize_grads(False)
        return (out, penalty) if settings.wants_penalty else out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_out: Tensor | None, grad_penalty: Tensor | None = None) -> Any:
        x, weight, scores, beta, w_eff = ctx.saved_tensors
        wants, pending = ctx.needs_input_grad, ctx.pending
        if ctx.use is not None and ctx.use.begin():
            return _step_in_backward(ctx, grad_out, grad_penalty, x, weight, scores, beta, w_eff)
        if pending is not None and pending.is_open and _can_wait(ctx, grad_out, w_eff):
            assert grad_out is not None
            grad_x, grad_w_eff, grad_bias = ctx.backend.conv2d_backward(
                grad_out, x, w_eff, ctx.args, ctx.kind, (wants[0], True, wants[4])
            )
            assert grad_w_eff is not None
            pending.add(ctx.backend, ctx.kind, beta, Entry(grad_w_eff, grad_penalty, weight, ctx.leaf))
            return grad_x, None, None, None, grad_bias, None, None
        grad_x, grad_weight, grad_scores, grad_bias = ctx.backend.masked_conv2d_backward(
            grad_out, grad_penalty, x, weight, scores, beta, w_eff, ctx.args, ctx.kind,
            Needs(wants[0], wants[1], wants[2] and ctx.use is None, wants[4]),
        )
        return grad_x, grad_weight, grad_scores, None, grad_bias, None, None


def _step_in_backward(
    ctx: Any, grad_out: Tensor | None, grad_penalty: Tensor | None, x: Tensor, weight: Tensor, scores: Tensor,
    beta: Tensor, w_eff: Tensor | None,
) -> Any:
    """As in masked_linear.py."""
    use, wants = ctx.use, ctx.needs_input_grad
    is_stepped, made = False, None
    if grad_out is not None and w_eff is not None and not wants[1]:
        needs = wants[0], True, wants[4]
        grad_x, grad_w_eff, grad_bias = ctx.backend.conv2d_backward(grad_out, x, w_eff, ctx.args, ctx.kind, needs)
        grad_weight = None
        assert grad_w_eff is not None
        is_stepped = use.step_w_eff(with_strides_of(weight, grad_w_eff), grad_penalty)
        if not is_stepped:
            made, _ = ctx.backend.grad_scores(
                grad_w_eff, grad_penalty, weight, scores, beta, ctx.kind, True, False, may_overwrite=True
            )
    else:
        needs = Needs(wants[0], wants[1], True, wants[4])
        grad_x, grad_weight, made, grad_bias = ctx.backend.masked_conv2d_backward(
            grad_out, grad_penalty, x, weight, scores, beta, w_eff, ctx.args, ctx.kind, needs
        )
    if not is_stepped:
        use.step_scores(torch.zeros_like(scores) if made is None else made)
    use.end()
    return grad_x, grad_weight, None, None, grad_bias, None, None


def _can_wait(ctx: Any, grad_out: Tensor | None, w_eff: Tensor | None) -> bool:
    """Whether the score gradient, and no weight's, is wanted of a product that an effective weight was kept for."""
    _, wants_weight, wants_scores, *_ = ctx.needs_input_grad
    has_product = grad_out is not None and w_eff is not None
    return has_product and wants_scores and not wants_weight and ctx.kind.is_trainable and ctx.leaf is not None


_apply = plain_apply(_MaskedConv2d)


def run_masked_conv2d(
    x: Tensor, weight: Tensor, scores: Tensor, beta: Tensor, bias: Tensor | None, args: ConvArgs, settings: Settings
) -> Any:
    """The op without checks: (out, penalty), or out alone where ``settings.wants_penalty`` is False."""
    if isinstance(settings.kind, SampledKind):
        return run_sampled(
            x, weight, scores, beta, bias, settings.kind, args, settings.backend, settings.wants_penalty
        )
    if torch.compiler.is_compiling():
        kind, plan, backend, slot = settings[:4]
        kept = refresh_in_graph(slot if keeps_w_eff(plan) else None, weight, scores, beta, kind, x.dtype)
        out, penalty, _ = _op(
            x, weight, scores, beta, bias, args.stride, args.padding, args.dilation, args.groups, kind.name,
            kind.params(), None, plan, backend, *kept,
        )
        return (out, penalty) if settings.wants_penalty else out
    if is_transformed("masked_conv2d", settings.backend) or is_vmapped():
        w_eff, penalty = effective_weight_unchecked(weight, scores, beta, settings.kind, x.dtype, settings.backend)
        out = F.conv2d(x, w_eff, bias, args.stride, args.padding, args.dilation, args.groups)
        return (out, penalty) if settings.wants_penalty else out
    return _apply(x, weight, scores, beta, bias, args, settings)


# --- registered ------------------------------------------------------------------------------------------------------


def _args(stride: list[int], padding: list[int], dilation: list[int], groups: int) -> ConvArgs:
    return ConvArgs((stride[0], stride[1]), (padding[0], padding[1]), (dilation[0], dilation[1]), groups)


def _implementation(
    x: Tensor, weight: Tensor, scores: Tensor, beta: Tensor, bias: Tensor | None, stride: list[int],
    padding: list[int], dilation: list[int], groups: int, kind: str, params: list[float], key: Tensor | None,
    plan: str | None, backend: str | None, w_eff: Tensor | None = None, penalty: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    chosen = choose_for("masked_conv2d", weight, scores, kind, x.dtype, plan, backend)
    args, mask_kind = _args(stride, padding, dilation, groups), as_kind(kind, params)
    if w_eff is not None and penalty is not None:
        return chosen.conv2d(x, w_eff, bias, args, mask_kind), penalty.clone(), no_gradient(weight)
    plan = plan or "cached"
    out, penalty, w_eff = chosen.masked_conv2d(x, weight, scores, beta, bias, args, mask_kind, plan)
    return out, penalty, no_gradient(weight) if w_eff is None else w_eff


def _fake(
    x, weight, scores, beta, bias, stride, padding, dilation, groups, kind, params, key, plan, backend, w_eff=None,
    penalty=None,
):
    made = torch.empty_like(weight, dtype=x.dtype)
    out = F.conv2d(x, made, bias, stride, padding, dilation, groups)
    keeps_none = not keeps_w_eff(plan) or w_eff is not None
    return torch.empty_like(out), scores.new_empty(()), no_gradient(weight) if keeps_none else made


def _backward_implementation(
    grad_out: Tensor, grad_penalty: Tensor | None, x: Tensor, weight: Tensor, scores: Tensor, beta: Tensor,
    w_eff: Tensor | None, stride: list[int], padding: list[int], dilation: list[int], groups: int, kind: str,
    params: list[float], key: Tensor | None, backend: str | None, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    plan = "recompute" if w_eff is None else None  # as the forward pass asked, so that the same backend is found
    chosen = choose_for("masked_conv2d", weight, scores, kind, x.dtype, plan, backend)
    grad_x, grad_weight, grad_scores, grad_bias = chosen.masked_conv2d_backward(
        grad_out, grad_penalty, x, weight, scores, beta, w_eff, _args(stride, padding, dilation, groups),
        as_kind(kind, params), Needs(*needs),
    )
    return (
        no_gradient(x) if grad_x is None else grad_x.contiguous(),
        no_gradient(weight) if grad_weight is None else grad_weight,
        no_gradient(scores) if not needs[2] else torch.zeros_like(scores) if grad_scores is None else grad_scores,
        no_gradient(x) if grad_bias is None else grad_bias,
    )


def _backward_fake(
    grad_out, grad_penalty, x, weight, scores, beta, w_eff, stride, padding, dilation, groups,
    kind, params, key, backend, needs,
):
    return (
        x.new_empty(x.shape) if needs[0] else no_gradient(x),
        torch.empty_like(weight) if needs[1] else no_gradient(weight),
        torch.empty_like(scores) if needs[2] else no_gradient(scores),
        x.new_empty(weight.shape[0]) if needs[3] else no_gradient(x),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, scores, beta, _, stride, padding, dilation, groups, kind, params, key, plan, backend, given, _ = inputs
    ctx.save_for_backward(x, weight, scores, beta, kept_effective_weight(plan, given, output[2]), key)
    ctx.rest = stride, padding, dilation, groups, kind, params, backend
    ctx.out_shape = output[0].shape
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_penalty: Tensor | None, _grad_w_eff: Tensor | None) -> Any:
    x, weight, scores, beta, w_eff, key = ctx.saved_tensors
    stride, padding, dilation, groups, kind, params, backend = ctx.rest
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 4)]
    if grad_out is None and grad_penalty is None:
        return (None,) * 16
    if grad_out is None:
        grad_out = x.new_zeros(ctx.out_shape)
    gradients = _backward_op(
        grad_out, grad_penalty, x, weight, scores, beta, w_eff, stride, padding, dilation, groups, kind, params, key,
        backend, needs,
    )
    grad_x, grad_weight, grad_scores, grad_bias = (some(g, n) for g, n in zip(gradients, needs, strict=True))
    return grad_x, grad_weight, grad_scores, None, grad_bias, *(None,) * 11


_backward_op = register_op(
    "masked_conv2d_backward",
    "(Tensor grad_out, Tensor? grad_penalty, Tensor x, Tensor weight, Tensor scores, Tensor beta, Tensor? w_eff, "
    "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, str kind, float[] params, Tensor? key, "
    "str? backend, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_implementation,
    _backward_fake,
)
_op = register_op(
    "masked_conv2d",
    "(Tensor x, Tensor weight, Tensor scores, Tensor beta, Tensor? bias, SymInt[] stride, SymInt[] padding, "
    "SymInt[] dilation, SymInt groups, str kind, float[] params, Tensor? key, str? plan, str? backend, "
    "Tensor? w_eff, Tensor? penalty) -> (Tensor, Tensor, Tensor)",
    _implementation,
    _fake,
    _backward,
    _setup_context,
)


# --- public ----------------------------------------------------------------------------------------------------------


def _pair(name: str, value: IntOrPair, minimum: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(v, int) and v >= minimum for v in pair):
        raise ValueError(f"masked_conv2d: {name} must be an int or a pair of ints >= {minimum}, got {value!r}")
    return pair[0], pair[1]


def resolve_conv_args(
    x: Tensor, weight: Tensor, stride: IntOrPair, padding: IntOrPair | str, dilation: IntOrPair, groups: int
) -> tuple[Tensor, ConvArgs]:
    """(x, padded where "same" is lopsided, and the geometry in pairs); as F.conv2d resolves them."""
    stride, dilation = _pair("stride", stride, 1), _pair("dilation", dilation, 1)
    if weight.shape[0] % groups:
        raise ValueError(f"masked_conv2d: groups must divide the {weight.shape[0]} output channels, got {groups!r}")
    if isinstance(padding, str) and padding not in ("same", "valid"):
        raise ValueError(f"masked_conv2d: padding must be 'same', 'valid', an int or a pair of ints, got {padding!r}")
    if padding == "valid":
        padding = 0
    if padding == "same":
        if stride != (1, 1):
            raise ValueError(f"masked_conv2d: padding='same' needs stride 1, got {stride}")
        totals = [dilation[i] * (weight.shape[2 + i] - 1) for i in (0, 1)]
        extra = [total % 2 for total in totals]
        if any(extra):
            x = F.pad(x, (0, extra[1], 0, extra[0]))
        padding = (totals[0] // 2, totals[1] // 2)
    return x, ConvArgs(stride, _pair("padding", padding, 0), dilation, groups)


def check_masked_conv2d(
    x: Tensor, weight: Tensor, scores: Tensor, bias: Tensor | None, groups: int, is_autocast: bool
) -> None:
    """The checks of :func:`masked_conv2d`, once for eager, compiled and layer calls."""
    op = "masked_conv2d"
    checks.check_weight_and_scores(op, weight, scores)
    if not isinstance(groups, int) or groups < 1:
        raise ValueError(f"{op}: groups must be an int >= 1, got {groups!r}")
    if weight.dim() != 4:
        raise ValueError(f"{op}: weight must have 4 dimensions [O, C/groups, KH, KW], got {checks.shape_of(weight)}")
    checks.check_x(op, x, weight, is_autocast)
    if x.dim() not in (3, 4) or x.shape[-3] != weight.shape[1] * groups:
        raise ValueError(
            f"{op}: x must be [B, C, H, W] or [C, H, W] with C = {weight.shape[1]}*groups = "
            f"{weight.shape[1] * groups} channels (weight is {checks.shape_of(weight)}), got shape {checks.shape_of(x)}"
        )
    checks.check_bias(op, bias, weight.shape[0], x)


def check_fits(x: Tensor, weight: Tensor, args: ConvArgs) -> None:
    """The kernel must fit into the padded image."""
    for i, side in enumerate(("height", "width")):
        needed = args.dilation[i] * (weight.shape[2 + i] - 1) + 1
        if x.shape[2 + i] + 2 * args.padding[i] < needed:
            raise ValueError(
                f"masked_conv2d: the kernel spans {needed} in {side}, more than x's padded {side} "
                f"{x.shape[2 + i] + 2 * args.padding[i]}; use more padding or a smaller dilation"
            )


def masked_conv2d(
    x: Tensor, weight: Tensor, scores: Tensor, beta: Tensor | float, bias: Tensor | None = None,
    stride: IntOrPair = 1, padding: IntOrPair | str = 0, dilation: IntOrPair = 1, groups: int = 1, *,
    kind: str | MaskKind = "sigmoid", plan: str | None = None, backend: str | None = None, shared_input: bool = False,
    key: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``(F.conv2d(x, weight * sigmoid(beta*scores), bias, stride, padding, dilation, groups), mask.sum())``.

    Args:
        x: [B, C, H, W] or [C, H, W], contiguous or channels_last; weight's dtype, unless autocast casts it.
        weight: [O, C/groups, KH, KW], contiguous or channels_last (read as it lies).
        scores: weight's shape or sizes that divide it ([O, 1, 1, 1]: one score per filter); fp32 (fp64 beside fp64).
            Or G masks, ``[G, ...]``, and x [G*B, C, H, W], as in masked_linear.
        beta, bias, kind, plan, backend, shared_input, key: as in masked_linear; bias is [O].
        stride, padding, dilation, groups: as in F.conv2d, padding "same" and "valid" included.

    Returns:
        out [B, O, OH, OW] (or [O, OH, OW]) and penalty, as masked_linear.

    Raises:
        ValueError, TypeError, BackendRefused: as masked_linear.

    Accuracy and what is kept for backward: as masked_linear.

    Example:
        >>> import torch
        >>> out, penalty = masked_conv2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3), torch.zeros(1, 1, 1, 1), 1.0)
        >>> out.item(), penalty.item()
        (4.5, 4.5)
    """
    op = "masked_conv2d"
    checks.check_tensor(op, "x", x)
    cast_to = checks.autocast_dtype(x)
    x, bias = checks.cast_for_autocast(x, cast_to), checks.cast_for_autocast(bias, cast_to)
    check_masked_conv2d(x, weight, scores, bias, groups, cast_to is not None)
    mask_kind = checks.check_kind(op, kind)
    checks.check_plan(op, plan)
    beta = checks.beta_tensor(op, beta, scores)
    is_many = is_of_masks(weight, scores)
    if is_many:
        check_plan_of_masks(op, plan)
        check_batch_of_masks(op, x, scores.shape[0], shared_input, 4)
        check_one_mask(op, mask_kind)
    else:
        check_shared_input(op, shared_input)
        mask_kind = check_key(op, mask_kind, key, scores)
        check_plan_of_sampled(op, mask_kind, plan)
    is_single = x.dim() == 3
    x, args = resolve_conv_args(x.unsqueeze(0) if is_single else x, weight, stride, padding, dilation, groups)
    check_fits(x, weight, args)
    if is_many:
        w_eff, penalty = effective_weight_unchecked(weight, scores, beta, mask_kind, x.dtype, backend)
        return conv2d_of_masks(x, w_eff, bias, args, shared_input), penalty
    out, penalty = run_masked_conv2d(x, weight, scores, beta, bias, args, Settings(mask_kind, plan, backend))
    return (out.squeeze(0) if is_single else out), penalty
