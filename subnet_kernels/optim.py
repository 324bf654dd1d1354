"""MaskAdamW: AdamW for mask scores, which adds the mask penalty's gradient itself and writes effective weights."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.utils.weak import WeakTensorKeyDictionary

from .backends.base import AdamW, Backend
from .backends.layout import is_dense
from .dispatch import choose_for, forced_backend
from .masks import MaskKind, weights_per_score
from .slots import Slot, clear_all_slots


class Masked(NamedTuple):
    """What a score belongs to; layers put it on the parameter as ``scores.masked``."""

    weight: Tensor
    beta: Tensor
    kind: MaskKind
    slot: weakref.ref[Slot]  # weak: a slot keeps its scores alive, which are the key under which this is found
    is_transposed: bool = False  # the op gets weight.t() and scores.t()


_masked = WeakTensorKeyDictionary()  # not attributes of the parameters: those would follow them into saved files


_num_bindings = 0  # how often anything was bound: what was looked up before the last time is looked up anew


def bind_scores(scores: Tensor, masked: Masked) -> None:
    """Say what these scores belong to; masked layers do it whenever they get new scores."""
    global _num_bindings
    _num_bindings += 1
    _masked[scores] = masked


def masked_of(scores: Tensor) -> Masked | None:
    """What these scores belong to, or None for a tensor that is no masked layer's scores."""
    return _masked.get(scores)


class MaskAdamW(torch.optim.AdamW):
    """torch.optim.AdamW on scores with ``lam * penalty_slope`` added to their gradient, once per step.

    With ``lam`` the loss needs no penalty term: one step equals one of AdamW on ``loss + lam * sum of the mask over
    weights``, whatever the number of micro-batches, clipping or checkpointing. The penalty's gradient is taken at the
    scores and beta that the step finds, those of the forward passes that made the gradient. A score that got no
    gradient is still pushed by the penalty. Parameters that are no layer's scores are treated as AdamW does.

    Where a backend has the kernel, a step is one pass over scores, gradient, moments and weight, which also writes the
    effective weight of the next forward pass into the layer's slot; gradients are left as they are. Elsewhere (coarse
    scores, fp64, the reference) torch's AdamW runs after a pass that adds the penalty's gradient to ``.grad``. Scores
    that are written through ``.data`` between a step and the next forward pass need MaskSet.invalidate().

    Attributes:
        advance: called between reading beta and writing effective weights, to change beta: MaskSet.adamw puts the
            schedule's step here.

    Args:
        params: parameters or groups of them; a group may set its own ``lam``.
        lr, betas, eps, weight_decay: as AdamW (decoupled decay, which also decays scores).
        lam: weight of the penalty per masked weight, finite and >= 0. Or a 0-d floating-point tensor on the scores'
            device, which may be changed in place between steps; its value is read on the device only, so that it is
            not checked.
        capturable: as AdamW's: a step may be captured in a CUDA graph. Numbers that are no tensors are then part of
            the graph; give a lam or lr that is to change as a tensor.
        in_backward, moment_dtype: not built yet; refused.

    Raises:
        ValueError: a float lam is negative or not finite; lam is positive or a tensor for a group without any masked
            layer's scores; a tensor is not 0-d, not of a floating dtype, or on another device.
            amsgrad or maximize is set in a group (at the step).
        NotImplementedError: in_backward or moment_dtype were asked for.

    Source: Loshchilov, Hutter, ICLR 2019; the arithmetic is torch's own.
    """

    advance: Callable[[], None] | None = None
    # the penalty's gradient must meet unscaled gradients, so a GradScaler has to unscale before the step
    _step_supports_amp_scaling = False

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 1e-2, *, lam: float | Tensor = 0.0, in_backward: bool = False,
        moment_dtype: torch.dtype | None = None, capturable: bool = False,
    ) -> None:
        if in_backward:
            raise NotImplementedError("MaskAdamW: in_backward=True is not built yet; leave it False")
        if moment_dtype is not None:
            raise NotImplementedError("MaskAdamW: moment_dtype is not built yet; leave it None (fp32 moments)")
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, capturable=capturable)
        self._known: dict[int, _Known] = {}
        self.defaults["lam"] = lam
        for group in self.param_groups:
            self._complete(group)
        self._warned_capturable_if_run_uncaptured = True  # torch warns of eager steps, which are part of the plan here

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if "lam" in self.defaults:
            self._complete(self.param_groups[-1])

    def _complete(self, group: dict[str, Any]) -> None:
        group["lam"] = _check_lam(group.get("lam", self.defaults["lam"]), group["params"])
        group["fused"] = all(p.device.type in ("cpu", "cuda") for p in group["params"])

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As AdamW's; a lam that is a tensor stays that tensor, which somebody else may hold, and takes the value."""
        before = [group["lam"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, lam in zip(self.param_groups, before, strict=True):
            group.setdefault("lam", lam)  # torch's own AdamW has none
            if isinstance(lam, Tensor):
                group["lam"] = lam.copy_(torch.as_tensor(group.get("lam", lam)))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; see the class."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    @torch._disable_dynamo  # pyright: ignore  # step counts are read on the host, which would compile anew each time
    def _step(self) -> None:
        _check_capture(self)
        batches: dict[tuple[Any, ...], list[tuple[_Entry, Masked]]] = {}
        has_others = False
        for number, group in enumerate(self.param_groups):
            _check_group(group)
            lam = _check_lam(group["lam"], group["params"])
            if has_penalty := isinstance(lam, Tensor) or lam > 0:
                _make_missing_gradients(group["params"])
            others = []
            for entry in self._entries(group):
                masked, backend = self._kernel_of(entry, group)
                if masked is None or backend is None:
                    others.append((entry, masked))
                else:
                    key = number, backend, masked.kind, id(masked.beta)
                    batches.setdefault(key, []).append((entry, masked))
            if others:
                has_others = True
                if has_penalty:
                    _add_penalty_gradients(others, lam)
                _torch_adamw([entry for entry, _ in others], group)
        if has_others:
            clear_all_slots()  # now, not after the step: what the kernels write stays
        # a hook after the step may edit scores through .data, which nothing would notice
        self.writes_effective_weights = not self._optimizer_step_post_hooks
        betas = {key[3]: entries[0][1].beta for key, entries in batches.items()}
        before = {number: beta.clone() for number, beta in betas.items()}
        if self.advance is not None:
            self.advance()
        for (number, backend, kind, beta), entries in batches.items():
            group = self.param_groups[number]
            _mask_adamw(backend, kind, entries, group, before[beta], betas[beta], self.writes_effective_weights)

    def _entries(self, group: dict[str, Any]) -> list[_Entry]:
        """The group's parameters that have a gradient, with their state, made where it is missing."""
        lists: tuple[list[Tensor], ...] = ([], [], [], [], [], [])
        self._init_group(group, *lists)  # params, grads, exp_avgs, exp_avg_sqs, (amsgrad's), steps
        params, grads, exp_avgs, exp_avg_sqs, _, steps = lists
        return [_Entry(*entry) for entry in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True)]

    def _kernel_of(self, entry: _Entry, group: dict[str, Any]) -> tuple[Masked | None, Backend | None]:
        """(what the parameter belongs to, the backend whose kernel steps it or None); both are remembered."""
        param, forced = entry.param, forced_backend()
        known = self._known.get(id(param))
        if (
            known is None or known.binding != _num_bindings or known.forced != forced or known.step is not entry.step
            or known.exp_avg is not entry.exp_avg or known.exp_avg_sq is not entry.exp_avg_sq
        ):  # fmt: skip
            masked = masked_of(param)
            backend = None if masked is None else _backend_of(entry, masked)
            state = entry.exp_avg, entry.exp_avg_sq, entry.step
            known = _Known(param, *state, _num_bindings, forced, masked, backend, param.stride())
            self._known[id(param)] = known
        if known.masked is None or known.backend is None or not group["fused"] or not param.requires_grad:
            return known.masked, None
        strides, grad = known.strides, entry.grad  # a write through .data can change how param and weight lie
        is_alike = param.stride() == strides and known.masked.weight.stride() == strides and grad.stride() == strides
        is_fp32 = param.dtype == torch.float32 and grad.dtype == torch.float32
        return known.masked, known.backend if is_alike and is_fp32 and grad.device == param.device else None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._known = {}


class _Known(NamedTuple):
    """What was found out of a parameter, and under which circumstances."""

    param: Tensor  # kept, so that no other can get its id
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    binding: int
    forced: str | None
    masked: Masked | None
    backend: Backend | None
    strides: tuple[int, ...]


def _check_capture(optimizer: torch.optim.Optimizer) -> None:
    """torch's own refusal to be captured where a group is not capturable; its name depends on the version."""
    for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
        if (check := getattr(optimizer, name, None)) is not None:
            return check()


class _Entry(NamedTuple):
    """One parameter of a step."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor


def _backend_of(entry: _Entry, masked: Masked) -> Backend | None:
    """The backend whose kernel steps these scores, given a gradient of their dtype and strides; None: torch's AdamW."""
    param = entry.param
    if not masked.kind.is_trainable:
        return None
    weight = masked.weight
    if (
        param.dtype != torch.float32 or weight.shape != param.shape or weight.device != param.device
        or masked.beta.device != param.device or entry.step.dtype != torch.float32
        or any(t.device != param.device for t in entry[2:])
        or any(t.dtype != torch.float32 or t.stride() != weight.stride() for t in (param, *entry[2:4]))
        or not is_dense(weight)
    ):  # fmt: skip
        return None
    backend = choose_for("mask_adamw", weight, param, masked.kind.name, weight.dtype)
    return backend if backend.has_mask_adamw else None


def _torch_adamw(entries: list[_Entry], group: dict[str, Any]) -> None:
    params, grads, exp_avgs, exp_avg_sqs, steps = (list(part) for part in zip(*entries, strict=True))
    adam(
        params, grads, exp_avgs, exp_avg_sqs, [], steps, foreach=group["foreach"], capturable=group["capturable"],
        fused=group["fused"], decoupled_weight_decay=True, amsgrad=False, beta1=group["betas"][0],
        beta2=group["betas"][1], lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
    )  # fmt: skip


def _mask_adamw(
    backend: Backend, kind: MaskKind, entries: list[tuple[_Entry, Masked]], group: dict[str, Any], beta: Tensor,
    next_beta: Tensor, writes: bool,
) -> None:
    """One step of these in one pass, which, if it ``writes``, makes the effective weights of layers that keep one."""
    params, grads, exp_avgs, exp_avg_sqs, steps = (list(p) for p in zip(*(e for e, _ in entries), strict=True))
    masked = [of for _, of in entries]
    torch._foreach_add_(steps, 1)  # pyright: ignore
    kept: list[tuple[Slot, Tensor, Tensor] | None] = []
    slots: list[tuple[Tensor, Tensor] | None] = []
    for of in masked:
        slot, weight = of.slot(), of.weight.t() if of.is_transposed else of.weight
        if slot is None or slot.w_eff is None or not writes:
            kept.append(None)
            slots.append(None)
            continue
        w_eff, penalty = slot.buffers(weight, slot.w_eff.dtype)
        slot.clear()
        kept.append((slot, weight, w_eff))
        slots.append((w_eff.t() if of.is_transposed else w_eff, penalty))
    beta1, beta2 = group["betas"]
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.device != params[0].device:
        lr = float(lr)  # torch lets it lie on the host
    numbers = AdamW(lr, beta1, beta2, group["eps"], group["weight_decay"], group["lam"])
    weights = [of.weight for of in masked]
    try:
        backend.mask_adamw_(
            params, grads, exp_avgs, exp_avg_sqs, steps, weights, slots, beta, next_beta, kind, numbers
        )
    except Exception:
        torch._foreach_add_(steps, -1)  # pyright: ignore  # refused: nothing was done
        raise
    for param, of, keeps in zip(params, masked, kept, strict=True):
        if keeps is not None:
            slot, weight, w_eff = keeps
            scores = param.t() if of.is_transposed else param
            slot.mark_fresh(weight, scores, next_beta, kind, w_eff.dtype)


def _check_group(group: dict[str, Any]) -> None:
    if group["amsgrad"] or group["maximize"]:
        raise ValueError("MaskAdamW: amsgrad and maximize are not built; leave them False")


def _check_lam(lam: float | Tensor, params: list[Tensor]) -> float | Tensor:
    if isinstance(lam, Tensor):
        devices = {str(scores.device) for scores in params}
        if lam.dim() != 0 or not lam.is_floating_point() or {str(lam.device)} != devices:
            raise ValueError(
                f"MaskAdamW: a tensor lam must be 0-d, floating-point and on the scores' device "
                f"({', '.join(sorted(devices))}), got {lam.dtype} {list(lam.shape)} on {lam.device}"
            )
    elif not math.isfinite(lam) or lam < 0:
        raise ValueError(f"MaskAdamW: lam must be finite and >= 0, got {lam}")
    has_penalty = isinstance(lam, Tensor) or lam > 0
    if has_penalty and not any(masked_of(scores) is not None for scores in params):
        value = "a tensor" if isinstance(lam, Tensor) else lam
        raise ValueError(
            f"MaskAdamW: lam={value} needs masked layers' scores, this group has none; use "
            "masks_of(model).adamw(lam=...)"
        )
    return lam


def _make_missing_gradients(params: list[Tensor]) -> None:
    """Scores that got no gradient are still pushed by the penalty."""
    for scores in params:
        if scores.grad is not None or not scores.requires_grad:
            continue
        masked = masked_of(scores)
        if masked is not None and masked.kind.is_trainable:
            scores.grad = torch.zeros_like(scores)


def _add_penalty_gradients(entries: list[tuple[_Entry, Masked | None]], lam: float | Tensor) -> None:
    """grad += lam * (weights per score) * penalty_slope, one call per kind, backend and beta."""
    batches: dict[tuple[Any, ...], tuple[list[Tensor], list[Tensor], list[int]]] = {}
    for (scores, grad, *_), masked in entries:
        if masked is None or not scores.requires_grad or not masked.kind.is_trainable:
            continue
        kind = masked.kind
        backend = choose_for("add_penalty_grad", scores, scores, kind.name, scores.dtype)
        batch = batches.setdefault((backend, kind, id(masked.beta), masked.beta, scores.dtype), ([], [], []))
        batch[0].append(grad)
        batch[1].append(scores)
        batch[2].append(weights_per_score(tuple(masked.weight.shape), tuple(scores.shape)))
    for (backend, kind, _, beta, dtype), (grads, scores, counts) in batches.items():
        backend.add_penalty_grad_(grads, scores, counts, beta.to(dtype), lam, kind)
