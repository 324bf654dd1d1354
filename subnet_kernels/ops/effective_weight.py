"""``w_eff = weight * mask`` and the mask's penalty, for one tensor or for a whole model at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

from ..backends.base import Backend
from ..backends.layout import empty_of_masks
from ..dispatch import BACKENDS, BackendRefused, choose_for, forced_backend
from ..masks import MaskKind, SampledKind, as_kind, expand_scores, is_sampled, weights_per_score
from . import checks
from .checks import is_of_masks
from .once import differentiable_once
from .registry import register_op, register_vmap
from .sampled import (
    check_key,
    check_one_mask,
    choose_sampled,
    sampled_effective_weight,
    sampled_effective_weight_backward,
)


def is_vmapped() -> bool:
    """Whether torch.func.vmap, and no other transform, is at work: then the registered op runs, which has a rule for it
    (see _vmap)."""
    if not torch._C._are_functorch_transforms_active():
        return False
    interpreters = retrieve_all_functorch_interpreters()
    return all(interpreter.key() == TransformType.Vmap for interpreter in interpreters)


def is_transformed(op: str, backend: str | None = None) -> bool:
    """Whether a torch.func transform (grad, jvp, ...) is at work: then the plain expression runs, which every transform
    can take apart, and only the reference backend can serve it. vmap alone is none of them.

    Raises:
        BackendRefused: another backend was asked for by name.
    """
    if not torch._C._are_functorch_transforms_active() or is_vmapped():
        return False
    name = backend or forced_backend()
    if name not in (None, "reference"):
        raise BackendRefused(f"backend {name!r} refused {op}: torch.func transforms run on the reference backend")
    return True


def plain_effective_weight(
    weight: Tensor, scores: Tensor, beta: Tensor, kind: MaskKind, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The same in plain differentiable PyTorch.

    Raises:
        BackendRefused: the kind's slope is not the derivative of its value.
    """
    if kind.name not in ("sigmoid", "hard"):
        raise BackendRefused(
            f"effective_weight: torch.func transforms differentiate a mask's value, and kind {kind.name!r} has a slope "
            "of its own; use loss.backward()"
        )
    if is_of_masks(weight, scores):
        made = [plain_effective_weight(weight, part, beta, kind, dtype) for part in scores.unbind()]
        return torch.stack([w_eff for w_eff, _ in made]), torch.stack([penalty for _, penalty in made])
    m = expand_scores(kind.value(scores, beta), tuple(weight.shape))
    penalty = kind.penalty(scores, beta).sum() * weights_per_score(tuple(weight.shape), tuple(scores.shape))
    return (weight.to(scores.dtype) * m).to(dtype), penalty


def _choose(
    weight: Tensor, scores: Tensor, kind: str, dtype: torch.dtype, backend: str | None = None
) -> Backend:
    """The backend of one call; for several masks that of each."""
    if is_sampled(kind):
        return choose_sampled(weight, scores, kind, dtype, backend)
    one = scores[0] if is_of_masks(weight, scores) else scores
    return choose_for("effective_weight", weight, one, kind, dtype, None, backend)


def _run(
    backend: Backend, weight: Tensor, scores: Tensor, beta: Tensor, kind: MaskKind, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    if isinstance(kind, SampledKind):
        return sampled_effective_weight(backend, weight, scores, beta, kind, dtype)
    if is_of_masks(weight, scores):
        return backend.effective_weight_of_masks(weight, scores, beta, kind, dtype)
    return backend.effective_weight(weight, scores, beta, kind, dtype)


def _run_backward(
    backend: Backend, grad_w_eff: Tensor | None, grad_penalty: Tensor | None, weight: Tensor, scores: Tensor,
    beta: Tensor, kind: MaskKind, needs_scores: bool, needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    if isinstance(kind, SampledKind):
        return sampled_effective_weight_backward(
            backend, grad_w_eff, grad_penalty, weight, scores, beta, kind, needs_scores, needs_weight
        )
    run = backend.grad_scores_of_masks if is_of_masks(weight, scores) else backend.grad_scores
    return run(grad_w_eff, grad_penalty, weight, scores, beta, kind, needs_scores, needs_weight)


def no_gradient(like: Tensor) -> Tensor:
    """Stands for None in the results of a registered backward op, whose schema knows tensors only."""
    return like.new_empty(0)


def some(tensor: Tensor, wanted: bool) -> Tensor | None:
    return tensor if wanted else None


# --- eager: an autograd.Function, the least overhead -----------------------------------------------------------------


class _EffectiveWeight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, scores: Tensor, beta: Tensor, kind: MaskKind, dtype: torch.dtype, name: str | None
    ) -> Any:
        backend = _choose(weight, scores, kind.name, dtype, name)
        ctx.backend, ctx.kind = backend, kind
        ctx.save_for_backward(weight, scores, beta, kind.key if isinstance(kind, SampledKind) else None)
        ctx.set_materialize_grads(False)
        return _run(backend, weight, scores, beta, kind, dtype)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_w_eff: Tensor | None, grad_penalty: Tensor | None) -> Any:
        weight, scores, beta, _key = ctx.saved_tensors  # a key that was changed since is noticed here
        grad_scores, grad_weight = _run_backward(
            ctx.backend, grad_w_eff, grad_penalty, weight, scores, beta, ctx.kind,
            needs_scores=ctx.needs_input_grad[1], needs_weight=ctx.needs_input_grad[0],
        )
        return grad_weight, grad_scores, None, None, None, None


# --- registered: torch.compile ---------------------------------------------------------------------------------------


def _implementation(
    weight: Tensor, scores: Tensor, beta: Tensor, kind: str, params: list[float], key: Tensor | None,
    dtype: torch.dtype, backend: str | None,
) -> tuple[Tensor, Tensor]:
    made = as_kind(kind, params, key)
    return _run(_choose(weight, scores, kind, dtype, backend), weight, scores, beta, made, dtype)


def _fake(weight, scores, beta, kind, params, key, dtype, backend):
    if is_of_masks(weight, scores):
        return empty_of_masks(weight, scores.shape[0], dtype), scores.new_empty(scores.shape[0])
    made = as_kind(kind, params)
    if isinstance(made, SampledKind) and made.samples > 1:
        return weight.new_empty((made.samples, *weight.shape), dtype=dtype), scores.new_empty(())
    return torch.empty_like(weight, dtype=dtype), scores.new_empty(())


def _backward_implementation(
    grad_w_eff: Tensor | None, grad_penalty: Tensor | None, weight: Tensor, scores: Tensor, beta: Tensor, kind: str,
    params: list[float], key: Tensor | None, backend: str | None, needs_scores: bool, needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    dtype = weight.dtype if grad_w_eff is None else grad_w_eff.dtype
    grad_scores, grad_weight = _run_backward(
        _choose(weight, scores, kind, dtype, backend), grad_w_eff, grad_penalty, weight, scores, beta,
        as_kind(kind, params, key), needs_scores, needs_weight,
    )
    return (
        no_gradient(scores) if not needs_scores else torch.zeros_like(scores) if grad_scores is None else grad_scores,
        no_gradient(weight) if not needs_weight else torch.zeros_like(weight) if grad_weight is None else grad_weight,
    )


def _backward_fake(
    grad_w_eff, grad_penalty, weight, scores, beta, kind, params, key, backend, needs_scores, needs_weight
):
    return (
        torch.empty_like(scores) if needs_scores else no_gradient(scores),
        torch.empty_like(weight) if needs_weight else no_gradient(weight),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    weight, scores, beta, kind, params, key, _dtype, backend = inputs
    ctx.save_for_backward(weight, scores, beta, key)
    ctx.rest = kind, params, backend
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_w_eff: Tensor | None, grad_penalty: Tensor | None) -> Any:
    weight, scores, beta, key = ctx.saved_tensors
    kind, params, backend = ctx.rest
    needs_weight, needs_scores = ctx.needs_input_grad[:2]
    if grad_w_eff is None and grad_penalty is None:
        return (None,) * 8
    grad_scores, grad_weight = _backward_op(
        grad_w_eff, grad_penalty, weight, scores, beta, kind, params, key, backend, needs_scores, needs_weight
    )
    return some(grad_weight, needs_weight), some(grad_scores, needs_scores), *(None,) * 6


_backward_op = register_op(
    "effective_weight_backward",
    "(Tensor? grad_w_eff, Tensor? grad_penalty, Tensor weight, Tensor scores, Tensor beta, str kind, float[] params, "
    "Tensor? key, str? backend, bool needs_scores, bool needs_weight) -> (Tensor, Tensor)",
    _backward_implementation,
    _backward_fake,
)
_op = register_op(
    "effective_weight",
    "(Tensor weight, Tensor scores, Tensor beta, str kind, float[] params, Tensor? key, ScalarType dtype, "
    "str? backend) -> (Tensor, Tensor)",
    _implementation,
    _fake,
    _backward,
    _setup_context,
)


def _vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
    """torch.func.vmap over scores alone is one call for G masks; over weight or beta, one call per member."""
    (weight, scores, beta), (of_weight, of_scores, of_beta) = args[:3], in_dims[:3]
    if of_weight is None and of_beta is None and of_scores is not None:
        scores = scores.movedim(of_scores, 0)
        if scores.dim() <= weight.dim() + 1:
            return _op(weight, scores, *args[2:]), (0, 0)
        inner = scores.shape[1]  # vmap of vmap, or of several masks
        w_eff, penalty = _op(weight, scores.flatten(0, 1), *args[2:])
        return (w_eff.unflatten(0, (-1, inner)), penalty.unflatten(0, (-1, inner))), (0, 0)

    members = [
        [t if dim is None else t.select(dim, i) for t, dim in zip((weight, scores, beta), in_dims[:3], strict=True)]
        for i in range(info.batch_size)
    ]
    made = [_op(*member, *args[3:]) for member in members]
    return (torch.stack([w_eff for w_eff, _ in made]), torch.stack([penalty for _, penalty in made])), (0, 0)


register_vmap("effective_weight", _vmap)


def effective_weight_unchecked(
    weight: Tensor, scores: Tensor, beta: Tensor, kind: MaskKind, dtype: torch.dtype, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`effective_weight` of checked arguments, on the backend of that name if given."""
    if is_transformed("effective_weight", backend):
        return plain_effective_weight(weight, scores, beta, kind, dtype)
    key = None
    if isinstance(kind, SampledKind):
        if is_vmapped() or is_of_masks(weight, scores):
            check_one_mask("effective_weight", kind)
        weight, scores, key = weight.contiguous(), scores.contiguous(), kind.key
    if torch.compiler.is_compiling() or is_vmapped():
        return _op(weight, scores, beta, kind.name, kind.params(), key, dtype, backend)
    return _EffectiveWeight.apply(weight, scores, beta, kind, dtype, backend)


# --- public ----------------------------------------------------------------------------------------------------------


def effective_weight(
    weight: Tensor, scores: Tensor, beta: Tensor | float, *, kind: str | MaskKind = "sigmoid",
    dtype: torch.dtype | None = None, key: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``(w_eff, penalty)``: ``w_eff = (weight.float() * sigmoid(beta*scores)).to(dtype)`` and ``penalty = mask.sum()``.

    The PyTorch lines it equals: ``m = torch.sigmoid(beta * scores); w_eff = weight * m; penalty = m.sum()``, in one
    pass over memory.

    Args:
        weight: fp32, bf16, fp16 or fp64, of any shape with 1 to 4 dimensions (more on the reference backend). A dense
            tensor in any memory order (transposed, channels_last) is read as it lies.
        scores: fp32 (fp64 beside an fp64 weight), weight's number of dimensions; each size divides weight's: one score
            governs ``weight.size(d) / scores.size(d)`` neighbouring weights along dimension d. Or G masks over the one
            weight, ``[G, ...]``: it is then read once for all (torch.func.vmap over scores gives the same).
        beta: inverse temperature; a float (checked: finite and >= 0) or a 0-d tensor on the scores' device (not read).
        kind: "sigmoid", "hard" (m = 1[s > 0]), another kind's name or a MaskKind (masks.py lists them).
        dtype: of w_eff; weight's if None.
        key: for a sampled kind, int64 [seed, step] on the scores' device, read there: equal keys draw equal masks.

    Returns:
        w_eff with weight's shape and strides, and penalty, 0-d in scores' dtype: the sum of m over *weights*; with
        several masks ``[G, *weight.shape]`` and ``[G]``; with a kind of several samples ``[samples, *weight.shape]``
        and 0-d. Both are ordinary autograd outputs; gradients reach scores and, where it requires grad, weight.

    Raises:
        ValueError, TypeError: an argument does not fit; the message says which and what fits.

    Accuracy: one rounding to ``dtype``; mask values within 2 units in the last place of fp32.
    Source: Savarese et al. 2020 (arXiv 1912.04427), section 3.

    Example:
        >>> import torch
        >>> w_eff, penalty = effective_weight(torch.ones(2, 2), torch.zeros(2, 2), 1.0)
        >>> w_eff.tolist(), penalty.item()
        ([[0.5, 0.5], [0.5, 0.5]], 2.0)
    """
    op = "effective_weight"
    checks.check_weight_and_scores(op, weight, scores)
    mask_kind = checks.check_kind(op, kind)
    mask_kind = check_key(op, mask_kind, key, scores)
    beta = checks.beta_tensor(op, beta, scores)
    _check_dtype(op, dtype)
    return effective_weight_unchecked(weight, scores, beta, mask_kind, weight.dtype if dtype is None else dtype)


def effective_weights(
    weights: Sequence[Tensor], scores: Sequence[Tensor], beta: Tensor | float, *, kind: str | MaskKind = "sigmoid",
    dtype: torch.dtype | None = None,
) -> tuple[list[Tensor], Tensor]:
    """``([w_eff of each], penalty of all)``: :func:`effective_weight` for a whole model in one call.

    Args:
        weights, scores: equally long lists; each pair as in effective_weight, all on one device.
        beta, kind, dtype: as in effective_weight, shared by all.

    Returns:
        The list of effective weights and the sum of all penalties (0-d; 0 for empty lists; [G] for G masks each).

    Where a gradient is wanted this is :func:`effective_weight` per tensor, so that each keeps only what it needs.

    Raises:
        ValueError, TypeError: as effective_weight, and for lists of different length.
    """
    op = "effective_weights"
    if isinstance(weights, Tensor) or isinstance(scores, Tensor):
        raise TypeError(f"{op}: weights and scores must be lists of tensors, got a tensor; for one: effective_weight")
    weights, scores = list(weights), list(scores)
    checks.check_same_number(op, weights=weights, scores=scores)
    mask_kind = checks.check_kind(op, kind)
    _check_dtype(op, dtype)
    for weight, score in zip(weights, scores, strict=True):
        checks.check_weight_and_scores(op, weight, score)
    if mask_kind.is_sampled:
        raise NotImplementedError(f"{op}: kind {mask_kind.name!r} is sampled; call effective_weight for each weight")
    if not weights:
        return [], torch.zeros(())
    nums = {s.shape[0] if is_of_masks(w, s) else None for w, s in zip(weights, scores, strict=True)}
    if len(nums) > 1:
        raise ValueError(f"{op}: all scores must have the same number of masks, or none a dimension of masks")
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (*weights, *scores))
    devices = {w.device for w in weights}
    if len(devices) > 1:
        raise ValueError(f"{op}: all weights must be on one device, got {sorted(map(str, devices))}")
    if (
        needs_grad or torch.compiler.is_compiling() or is_transformed(op) or is_vmapped()
        or len({w.dtype for w in weights}) > 1 or nums != {None}
    ):  # fmt: skip
        pairs = [
            effective_weight(w, s, beta, kind=mask_kind, dtype=dtype) for w, s in zip(weights, scores, strict=True)
        ]
        return [w_eff for w_eff, _ in pairs], torch.stack([penalty for _, penalty in pairs]).sum(0)
    beta = checks.beta_tensor(op, beta, scores[0])
    w_effs, penalties = effective_weights_raw(weights, scores, beta, mask_kind, dtype or weights[0].dtype)
    return w_effs, penalties.sum()


def _check_dtype(op: str, dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in checks.FLOAT_DTYPES:
        raise TypeError(f"{op}: dtype must be a floating point dtype, got {dtype}")


def _serves(
    backend: Backend, weights: list[Tensor], scores: list[Tensor], kind: MaskKind, dtype: torch.dtype
) -> bool:
    try:
        for weight, score in zip(weights, scores, strict=True):
            choose_for("effective_weights", weight, score, kind.name, dtype, name=backend.name)
    except BackendRefused:
        return False
    return True


def effective_weights_raw(
    weights: list[Tensor], scores: list[Tensor], beta: Tensor, kind: MaskKind, dtype: torch.dtype,
    out: list[Tensor] | None = None, backend: Backend | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Without checks or autograd: (list of w_eff, penalties [L]); into ``out`` if given. One dtype and device. backend:
    the first that serves all of them, unless given."""
    if backend is None:
        chosen = {choose_for("effective_weights", w, s, kind.name, dtype) for w, s in zip(weights, scores, strict=True)}
        backend = next((b for b in BACKENDS.values() if b in chosen and _serves(b, weights, scores, kind, dtype)), None)
        backend = backend or BACKENDS["reference"]
    return backend.effective_weights(weights, scores, beta, kind, [dtype] * len(weights), out)
