"""MaskAdamW: AdamW for mask scores, which adds the mask penalty's gradient itself."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .dispatch import choose_for
from .masks import MaskKind, weights_per_score
from .slots import Slot


class Masked(NamedTuple):
    """What a score belongs to; layers put it on the parameter as ``scores.masked``."""

    weight: Tensor
    beta: Tensor
    kind: MaskKind
    slot: weakref.ref[Slot]  # weak: a slot keeps its scores alive, which are the key under which this is found


_masked = WeakTensorKeyDictionary()  # not attributes of the parameters: those would follow them into saved files


def bind_scores(scores: Tensor, masked: Masked) -> None:
    """Say what these scores belong to; masked layers do it whenever they get new scores."""
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

    Args:
        params: parameters or groups of them; a group may set its own ``lam``.
        lr, betas, eps, weight_decay: as AdamW (decoupled decay, which also decays scores).
        lam: weight of the penalty per masked weight, finite and >= 0. Or a 0-d floating-point tensor on the scores'
            device, which may be changed in place between steps; its value is read on the device only, so that it is
            not checked.
        capturable: as AdamW's: a step may be captured in a CUDA graph. A float lam, lr or weight_decay is then part of
            the graph; give what is to change as a tensor.
        in_backward, moment_dtype: not built yet; refused.

    Raises:
        ValueError: a float lam is negative or not finite; lam is positive or a tensor for a group without any masked
            layer's scores; a tensor is not 0-d, not of a floating dtype, or on another device.
        NotImplementedError: in_backward or moment_dtype were asked for.

    Source: Loshchilov, Hutter, ICLR 2019; the arithmetic is torch's own.
    """

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
        for group in self.param_groups:
            group["lam"] = _check_lam(group.get("lam", lam), group["params"])
            group["fused"] = all(p.device.type in ("cpu", "cuda") for p in group["params"])
        self.defaults["lam"] = lam
        # the penalty's gradient must meet unscaled gradients, so a GradScaler has to unscale before the step
        self._step_supports_amp_scaling = False
        self._warned_capturable_if_run_uncaptured = True  # torch warns of eager steps, which are part of the plan here

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if "lam" in self.defaults:
            group = self.param_groups[-1]
            group["lam"] = _check_lam(group.get("lam", self.defaults["lam"]), group["params"])

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As AdamW's; a lam that is a tensor stays that tensor, which somebody else may hold, and takes the value."""
        before = [group["lam"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, lam in zip(self.param_groups, before, strict=True):
            if isinstance(lam, Tensor):
                group["lam"] = lam.copy_(torch.as_tensor(group.get("lam", lam)))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; see the class."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lam = _check_lam(group["lam"], group["params"])
            if isinstance(lam, Tensor) or lam:
                _add_penalty_gradients(group["params"], lam)
        _plain_adamw_step(self)
        return loss


def _plain_adamw_step(optimizer: torch.optim.Optimizer) -> None:
    """AdamW's step without hooks: constructing any AdamW wraps the class's method in them, and MaskAdamW.step is
    wrapped already, so that each hook would run twice."""
    step = torch.optim.AdamW.step
    while getattr(step, "hooked", False):
        step = step.__wrapped__  # type: ignore[attr-defined]
    step(optimizer)  # type: ignore[arg-type]


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


def _add_penalty_gradients(params: list[Tensor], lam: float | Tensor) -> None:
    """grad += lam * (weights per score) * penalty_slope, one call per kind, backend and beta."""
    batches: dict[tuple[Any, ...], tuple[list[Tensor], list[Tensor], list[int]]] = {}
    for scores in params:
        masked = masked_of(scores)
        if masked is None or not scores.requires_grad or not masked.kind.is_trainable:
            continue
        if scores.grad is None:
            scores.grad = torch.zeros_like(scores)
        kind = masked.kind
        backend = choose_for("add_penalty_grad", scores, scores, kind.name, scores.dtype)
        batch = batches.setdefault((backend, kind, id(masked.beta), masked.beta, scores.dtype), ([], [], []))
        batch[0].append(scores.grad)
        batch[1].append(scores)
        batch[2].append(weights_per_score(tuple(masked.weight.shape), tuple(scores.shape)))
    for (backend, kind, _, beta, dtype), (grads, scores, counts) in batches.items():
        backend.add_penalty_grad_(grads, scores, counts, beta.to(dtype), lam, kind)
