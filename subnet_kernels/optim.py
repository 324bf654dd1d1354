"""MaskAdamW: AdamW for mask scores, which adds the mask penalty's gradient itself and writes effective weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.utils.weak import WeakTensorKeyDictionary

from .backends.base import AdamW, Backend
from .backends.layout import is_dense
from .dispatch import choose_for, forced_backend
from .in_backward import SpentGradient, Use, check_one_process, step_in_backward
from .masks import MaskKind, weights_per_score
from .ops import checks
from .ops.checks import is_of_masks
from .rounding import round_to_bf16, rounding_bits
from .shards import is_sharded, shard_of
from .slots import Slot, clear_all_slots

__all__ = ["MaskAdamW", "bind_masks"]


class Masked(NamedTuple):
    """What a score belongs to; layers put it on the parameter as ``scores.masked``."""

    weight: Tensor
    beta: Tensor
    kind: MaskKind
    slot: Callable[[], Slot | None]  # a weak reference: a slot keeps its scores alive, which are the key to this
    is_transposed: bool = False  # the op gets weight.t() and scores.t()
    per_score: int | None = None  # weights per score of the whole, where weight and scores are one rank's shards

    def weights_per_score(self, scores: Tensor) -> int:
        """How many weights one score governs; a shard's shapes do not tell where one score governs several rows."""
        return self.per_score or weights_per_score(tuple(self.weight.shape), tuple(scores.shape))

    def is_trained(self, scores: Tensor) -> bool:
        """Whether these scores take steps. A shard carries no flag; it is bound where its whole requires grad."""
        return self.per_score is not None or scores.requires_grad

    def num_masks(self, scores: Tensor) -> int | None:
        """How many masks over the one weight these scores are; None where they have no dimension for it."""
        return scores.shape[0] if is_of_masks(self.weight, scores) else None


_masked = WeakTensorKeyDictionary()  # not attributes of the parameters: those would follow them into saved files


PerMask = float | Tensor | Sequence[float]  # a number, or one per mask

_num_bindings = 0  # how often anything was bound: what was looked up before the last time is looked up anew


def bind_scores(scores: Tensor, masked: Masked) -> None:
    """Say what these scores belong to; masked layers do it whenever they get new scores."""
    global _num_bindings
    _num_bindings += 1
    _masked[scores] = masked


def bind_masks(scores: Tensor, weight: Tensor, beta: Tensor, kind: str | MaskKind = "sigmoid") -> None:
    """Say that ``scores``, of no layer, are masks over ``weight``: a MaskAdamW then steps them with the penalty.

    Args:
        scores: a parameter [G, *unit shape] (G masks over the one weight) or [*unit shape].
        weight: the frozen weight; beta: the 0-d tensor that its effective weights are made with, which may change in
            place; kind: of the masks.

    Raises:
        ValueError, TypeError: the shapes or dtypes do not fit.
    """
    checks.check_weight_and_scores("bind_masks", weight, scores)
    beta = checks.beta_tensor("bind_masks", beta, scores)
    bind_scores(scores, Masked(weight, beta, checks.check_kind("bind_masks", kind), _no_slot))


def _no_slot() -> None:
    return None


def masked_of(scores: Tensor) -> Masked | None:
    """What these scores belong to, or None for a tensor that is no masked layer's scores."""
    return _masked.get(scores)


class MaskAdamW(torch.optim.AdamW):
    """torch.optim.AdamW on scores with ``lam * penalty_slope`` added to their gradient, once per step.

    With ``lam`` the loss needs no penalty term: one step equals one of AdamW on ``loss + lam * sum of the mask over
    weights``, whatever the number of micro-batches, clipping or checkpointing. The penalty's gradient is taken at the
    scores and beta that the step finds, those of the forward passes that made the gradient. A score that got no
    gradient is still pushed by the penalty. Parameters that are no layer's scores are treated as AdamW does.

    Scores of G masks over one weight, ``[G, ...]`` (see bind_masks), are stepped at once, and lr and lam may be given
    per mask. Each mask takes the steps that it would take alone, to the bit where a backend has the kernel.

    Where a backend has the kernel, a step is one pass over scores, gradient, moments and weight, which also writes the
    effective weight of the next forward pass into the layer's slot; gradients are left as they are. Elsewhere (coarse
    scores, fp64, the reference) torch's AdamW runs after a pass that adds the penalty's gradient to ``.grad``. Scores
    that are written through ``.data`` between a step and the next forward pass need MaskSet.invalidate().

    With ``in_backward`` scores are stepped in the backward pass, where their gradient is made, so that it is never
    stored: a linear layer's goes straight from the gradient of its output into the step. ``scores.grad`` is then a
    placeholder that refuses to be read, and ``step()`` advances the schedule and steps what got its gradient in another
    way (a compiled layer, a parameter that is no layer's scores) or none. The trajectory is the same. Whatever needs
    the gradients of a whole pass is refused: clipping, accumulation over several passes, GradScaler, hooks on scores, a
    layer that runs twice in one pass, several processes (DDP), rates or lam that change between the backward pass,
    which reads them, and ``step()``. A refusal comes before that layer is touched; layers behind it may have been
    stepped, so go on from a checkpoint. Between backward pass and ``step()`` forward passes see the new scores. Lower
    memory is the first reason to use it: it saves 4 bytes per weight.

    Attributes:
        before: called at the start of a step, to refuse it: MaskSet.adamw puts a check there.
        advance: called between reading beta and writing effective weights, to change beta: MaskSet.adamw puts the
            schedule's step here.
        upcoming: from a beta (0-d tensor) to a tensor of what ``advance`` will make of it; steps in backward write the
            effective weights of that beta. Without it, and with ``advance``, they write none.

    Args:
        params: parameters or groups of them (a copied or unpickled optimizer has no ``advance`` and ``upcoming``: to
            go on with a copy, make a new one by MaskSet.adamw and load the state into it); a group may set its own
            ``lam``.
        lr, betas, eps, weight_decay: as AdamW (decoupled decay, which also decays scores).
        lam: weight of the penalty per masked weight, finite and >= 0. Or a 0-d floating-point tensor on the scores'
            device, which may be changed in place between steps; its value is read on the device only, so that it is
            not checked. Or one per mask, for scores of G masks: a sequence of G floats, or a tensor [G].
        lr may be one per mask too, likewise; a tensor's values are not checked (torch's schedulers know no such
            rate).
        capturable: as AdamW's: a step may be captured in a CUDA graph. Numbers that are no tensors are then part of
            the graph; give a lam or lr that is to change as a tensor.
        in_backward: step scores in the backward pass, see above.
        moment_dtype: torch.bfloat16 keeps both moments of masked scores in half the memory, rounded so that they are
            right on average (rounding.py); None or torch.float32: in fp32.

    Raises:
        ValueError: a float lam is negative or not finite; lam is positive or a tensor for a group without any masked
            layer's scores; a tensor is not 0-d, not of a floating dtype, or on another device; lr or lam per mask for
            scores with another number of masks; amsgrad or maximize is set in a group (at the step); moment_dtype is
            another dtype.
        RuntimeError: with in_backward, by the backward pass or the step, where it would be wrong.

    Source: Loshchilov, Hutter, ICLR 2019; the arithmetic is torch's own.
    """

    before: Callable[[], None] | None = None
    advance: Callable[[], None] | None = None
    upcoming: Callable[[Tensor], Tensor] | None = None
    # the penalty's gradient must meet unscaled gradients, so a GradScaler has to unscale before the step
    _step_supports_amp_scaling = False

    def __init__(
        self, params: Any, lr: PerMask = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 1e-2, *, lam: PerMask = 0.0, in_backward: bool = False,
        moment_dtype: torch.dtype | None = None, capturable: bool = False,
    ) -> None:
        if moment_dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(
                f"MaskAdamW: moment_dtype must be None, torch.float32 or torch.bfloat16, got {moment_dtype}"
            )
        params = list(params)
        has_own_lr = [isinstance(group, dict) and "lr" in group for group in params]
        one_lr = 1e-3 if _is_per_mask(lr) else lr  # torch refuses others; those of groups it does not look at
        super().__init__(
            params, lr=one_lr, betas=betas, eps=eps, weight_decay=weight_decay,  # pyright: ignore
            capturable=capturable,
        )
        self.defaults["lr"] = lr
        for group, has_own in zip(self.param_groups, has_own_lr, strict=False):
            group["lr"] = group["lr"] if has_own else lr
        self._known: dict[int, _Known] = {}
        self.defaults.update(in_backward=in_backward, moment_dtype=moment_dtype or torch.float32)
        self._begin_in_backward()
        self.defaults["lam"] = lam
        for group in self.param_groups:
            self._complete(group)
        self._warned_capturable_if_run_uncaptured = True  # torch warns of eager steps, which are part of the plan here

    @property
    def in_backward(self) -> bool:
        """Whether scores are stepped in the backward pass."""
        return self.defaults.get("in_backward", False)

    @property
    def moment_dtype(self) -> torch.dtype:
        """How the moments of masked scores are kept."""
        return self.defaults.get("moment_dtype", torch.float32)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if "lam" in self.defaults:
            self._complete(self.param_groups[-1])
            self._register()

    def _complete(self, group: dict[str, Any]) -> None:
        group["lam"] = _check_lam(group.get("lam", self.defaults["lam"]), group["params"])
        group["lr"] = _check_lr(group["lr"], group["params"])
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
            self._complete(group)
        self._pass = _Pass()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; see the class."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step_untraced() if torch.compiler.is_compiling() else self._step()
        return loss

    @torch._disable_dynamo  # pyright: ignore  # step counts are read on the host, which would compile anew each time
    def _step_untraced(self) -> None:
        self._step()

    def _step(self) -> None:
        if self.before is not None:
            self.before()
        _check_capture(self)
        if self.in_backward:
            self._check_after_backward()
        stepped, self._pass = self._pass.stepped, _Pass()
        current = [finished for finished in stepped.values() if finished is not None and finished.is_current()]
        batches: dict[tuple[Any, ...], list[tuple[_Entry, Masked]]] = {}
        made: list[Tensor] = []  # scores whose gradient was made here
        has_others = any(finished is None for finished in stepped.values())
        for number, group in enumerate(self.param_groups):
            _check_group(group)
            lam = _check_lam(group["lam"], group["params"])
            params = [p for p in group["params"] if id(p) not in stepped]
            if _is_positive(lam):
                made += _make_missing_gradients(params)
            others = []
            for entry in self._entries({**group, "params": params}):
                masked, backend = self._kernel_of(entry, group)
                has_others |= masked is not None and masked.per_score is not None  # no slot is written for a shard
                if masked is None or backend is None:
                    others.append((entry, masked))
                else:
                    key = number, backend, masked.kind, id(masked.beta)
                    batches.setdefault(key, []).append((entry, masked))
            if others:
                has_others = True
                _torch_adamw(others, group, lam)
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
            kept = _mask_adamw(
                backend.mask_adamw_, kind, entries, group, before[beta], betas[beta], self.writes_effective_weights
            )
            for keeps in kept:
                if keeps is not None:
                    keeps.mark_fresh(betas[beta], kind)
        for scores in made if self.in_backward else ():
            scores.grad = None  # else the next backward pass would find it
        is_foretold = self._is_foretold()
        for finished in current if self._may_write() else ():
            finished.mark_fresh(is_foretold)
        self._register()

    # --- in backward --------------------------------------------------------------------------------------------------

    def _begin_in_backward(self) -> None:
        """(Again) say of all masked scores that they are stepped in the backward pass, if they are."""
        self._pass = _Pass()
        self._spent: dict[int, SpentGradient] = {}  # by id of the scores
        self._group_of: dict[int, int] = {}  # number of the group by id of the scores
        self._register()

    def _register(self) -> None:
        """The same for what is new: parameters that were added, scores of a copied model that were bound since."""
        if not self.in_backward or len(self._group_of) == sum(len(group["params"]) for group in self.param_groups):
            return
        self._step_supports_amp_scaling = True  # so that a GradScaler leaves the refusal to the step
        for number, group in enumerate(self.param_groups):
            for scores in group["params"]:
                if id(scores) not in self._group_of and masked_of(scores) is not None:
                    self._group_of[id(scores)] = number
                    step_in_backward(scores, self)

    def _is_foretold(self) -> bool:
        """Whether what ``upcoming`` says is what ``advance`` does: both are of one object (MaskSet.adamw's)."""
        owners = [getattr(function, "__self__", function) for function in (self.advance, self.upcoming)]
        return owners[0] is owners[1]

    def _may_write(self) -> bool:
        """Whether no hook around the step may write scores through .data, after the backward pass and unnoticed."""
        return not self._optimizer_step_pre_hooks and not self._optimizer_step_post_hooks

    def _check_after_backward(self) -> None:
        stepped = self._pass.stepped
        if getattr(self, "grad_scale", None) is not None or getattr(self, "found_inf", None) is not None:
            raise RuntimeError(
                "MaskAdamW: in_backward=True can't work with a GradScaler: scores were already stepped with scaled "
                "gradients; use bf16 without a scaler, or in_backward=False"
            )
        for group in self.param_groups:
            for scores in group["params"]:
                if id(scores) in stepped or not isinstance(scores.grad, SpentGradient):
                    continue
                if not stepped:
                    raise RuntimeError(
                        "MaskAdamW: in_backward=True: step() was called again without a backward pass in between"
                    )
                scores.grad = None  # of an earlier pass: this one did not run its layer
        for number, numbers in self._pass.numbers.items():
            if _numbers_of(self.param_groups[number]) != numbers:
                raise RuntimeError(
                    "MaskAdamW: in_backward=True: lr, betas, eps, weight_decay or lam were changed between the "
                    "backward pass, which has used them, and step(); change them after step()"
                )

    def step_use(self, use: Use, linear: tuple[Tensor, Tensor, Tensor | None] | None, grads: Any) -> bool:
        """Called by a layer's backward pass: step ``use.scores``.

        linear: (grad_out [M, N], x [M, K], grad_penalty) of a linear layer; grads: else, (gradient, grad_penalty) of
        the effective weight, or the scores' gradient. Returns False, and does nothing, where there is no kernel that
        takes this: the caller is to make the scores' gradient and come again with that.
        """
        scores = use.scores
        group = self.param_groups[self._group_of[id(scores)]]
        _check_group(group)
        lam = _check_lam_value(group["lam"], [scores])
        is_of_scores = isinstance(grads, Tensor)
        entry = self._entry_of(scores, group, grads if is_of_scores else None)
        masked, backend = self._kernel_of(entry, group)
        if masked is None or backend is None:
            if not is_of_scores:
                return False
            _torch_adamw([(entry, masked)], group, lam)
            self._finish_use(use, None)
            return True
        beta, kind = masked.beta, masked.kind
        writes = self._may_write() and (self.advance is None or self.upcoming is not None)
        next_beta = self._next_beta(beta)

        mask_adamw: Any = backend.mask_adamw_

        def run(params: Any, all_grads: Any, m: Any, v: Any, steps: Any, weights: Any, slots: Any, *rest: Any) -> None:
            if linear is not None:
                turn = (lambda t: t.t()) if masked.is_transposed else (lambda t: t)
                slot = slots[0] and (turn(slots[0][0]), slots[0][1])
                backend.linear_step_(
                    *linear, turn(params[0]), turn(m[0]), turn(v[0]), steps[0], turn(weights[0]), slot, *rest
                )
            elif is_of_scores:
                mask_adamw(params, all_grads, m, v, steps, weights, slots, *rest)
            else:
                mask_adamw(params, [grads[0]], m, v, steps, weights, slots, *rest, [grads[1]])

        kept = _mask_adamw(run, kind, [(entry, masked)], group, beta, next_beta, writes, in_backward=True)
        finished = _Finished(kept[0], scores, beta, beta._version, next_beta, kind)
        if finished.kept is not None:
            finished = finished._replace(versions=finished.read_versions(), stamp=finished.kept.slot.stamp())
        self._finish_use(use, finished)
        return True

    def _next_beta(self, beta: Tensor) -> Tensor:
        """What beta will be after step(), asked for once per pass and value of beta."""
        if self.upcoming is None:
            return beta
        key, known = (id(beta), beta._version), self._pass.next_betas
        if key not in known:
            known[key] = self.upcoming(beta)
        return known[key]

    def _finish_use(self, use: Use, finished: _Finished | None) -> None:
        scores = use.scores
        self._pass.stepped[id(scores)] = finished
        group = self._group_of[id(scores)]
        if group not in self._pass.numbers:
            self._pass.numbers[group] = _numbers_of(self.param_groups[group])
        spent = self._spent.get(id(scores))
        if spent is None or spent.shape != scores.shape or spent.dtype != scores.dtype or spent.device != scores.device:
            spent = self._spent[id(scores)] = SpentGradient.like(scores)
        scores.grad = spent

    def check_use(self, use: Use) -> None:
        """Refuse, before anything is done, what a step in the backward pass would get wrong."""
        scores = use.scores
        if id(scores) in self._pass.stepped:
            raise RuntimeError(
                "MaskAdamW: in_backward=True steps scores once between two calls of step(), and these got a second "
                "gradient: no accumulation over backward passes, no layer used twice in one; use in_backward=False"
            )
        if scores.grad is not None and not isinstance(scores.grad, SpentGradient):
            raise RuntimeError(
                "MaskAdamW: in_backward=True: scores.grad already holds a gradient, which this step would miss (of "
                "another backward pass, or zeros of zero_grad(set_to_none=False)); call zero_grad() before, or use "
                "in_backward=False"
            )
        if scores._backward_hooks or scores._post_accumulate_grad_hooks:  # pyright: ignore
            raise RuntimeError(
                "MaskAdamW: in_backward=True makes no gradient that a hook on scores could see; remove the hook, or "
                "use in_backward=False"
            )
        check_one_process()

    def make_state(self) -> None:
        """Make the state of all parameters that have none (step 0, moments of zeros), as their first step would: a
        checkpoint then has a place for it."""
        for group in self.param_groups:
            for param in group["params"]:
                if not self.state.get(param):
                    self._entry_of(param, group, None)

    def _entry_of(self, param: Tensor, group: dict[str, Any], grad: Tensor | None) -> _Entry:
        """The entry of one parameter, whatever its gradient."""
        state = self.state.get(param)
        if state and state["exp_avg"].dtype == self.moment_dtype:
            return _Entry(param, param.detach() if grad is None else grad, *(state[name] for name in _STATE))
        before, param.grad = param.grad, param.detach()  # torch makes the state only of what has a gradient
        try:
            entry = self._entries({**group, "params": [param]})[0]
        finally:
            param.grad = before
        return entry if grad is None else entry._replace(grad=grad)

    def _entries(self, group: dict[str, Any]) -> list[_Entry]:
        """The group's parameters that have a gradient, with their state, made where it is missing."""
        lists: tuple[list[Tensor], ...] = ([], [], [], [], [], [])
        self._init_group(group, *lists)  # params, grads, exp_avgs, exp_avg_sqs, (amsgrad's), steps
        params, grads, exp_avgs, exp_avg_sqs, _, steps = lists
        if self.moment_dtype != torch.float32:
            for i, param in enumerate(params):  # new ones, and those from a checkpoint, which torch brings to fp32
                if exp_avgs[i].dtype == torch.float32 and masked_of(param) is not None:
                    state = self.state[param]
                    exp_avgs[i] = state["exp_avg"] = exp_avgs[i].to(self.moment_dtype)
                    exp_avg_sqs[i] = state["exp_avg_sq"] = exp_avg_sqs[i].to(self.moment_dtype)
        return [_of_shard(_Entry(*entry)) for entry in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True)]

    def _kernel_of(self, entry: _Entry, group: dict[str, Any]) -> tuple[Masked | None, Backend | None]:
        """(what the parameter belongs to, the backend whose kernel steps it or None); both are remembered."""
        param, forced = entry.param, forced_backend()
        known = self._known.get(id(param))
        if (
            known is None or known.binding != _num_bindings or known.forced != forced or known.step is not entry.step
            or known.exp_avg is not entry.exp_avg or known.exp_avg_sq is not entry.exp_avg_sq
        ):  # fmt: skip
            masked = masked_of(param)
            has_linear_step = self.in_backward and masked is not None and masked.num_masks(param) is None
            op = "linear_step" if has_linear_step and param.dim() == 2 else "mask_adamw"
            backend = None if masked is None else _backend_of(entry, masked, op)
            state = entry.exp_avg, entry.exp_avg_sq, entry.step
            known = _Known(param, *state, _num_bindings, forced, masked, backend, param.stride())
            self._known[id(param)] = known
        if known.masked is None or known.backend is None or not group["fused"] or not known.masked.is_trained(param):
            return known.masked, None
        strides, grad = known.strides, entry.grad  # a write through .data can change how param and weight lie
        own = strides if known.masked.num_masks(param) is None else strides[1:]  # of one mask
        is_alike = param.stride() == strides and known.masked.weight.stride() == own and grad.stride() == strides
        is_fp32 = param.dtype == torch.float32 and grad.dtype == torch.float32
        return known.masked, known.backend if is_alike and is_fp32 and grad.device == param.device else None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._known = {}
        if "defaults" in state:  # a copy or what was unpickled, not load_state_dict
            self._begin_in_backward()


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
    if not torch.cuda.is_initialized():
        return None
    for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
        if (check := getattr(optimizer, name, None)) is not None:
            return check()


_STATE = ("exp_avg", "exp_avg_sq", "step")  # of torch's AdamW, in the order of an _Entry


class _Entry(NamedTuple):
    """One parameter of a step."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor


def _of_shard(entry: _Entry) -> _Entry:
    """What this rank steps of a sharded parameter (FSDP2): the entry of its part, as scores of its part of the weight.
    A step is elementwise, so it needs no other. What is not sharded comes back."""
    whole = entry.param
    if not is_sharded(whole):
        return entry
    entry = _Entry(*(shard_of(tensor) for tensor in entry))
    masked = masked_of(whole)
    known = masked_of(entry.param)
    if masked is None or not whole.requires_grad:
        return entry if known is None else entry._replace(param=entry.param.detach())  # frozen since: bound to nothing
    weight = shard_of(masked.weight)
    if known is None or known.weight is not weight or known.beta is not masked.beta or known.kind != masked.kind:
        count = masked.weights_per_score(whole)
        bind_scores(entry.param, Masked(weight, masked.beta, masked.kind, _no_slot, masked.is_transposed, count))
    return entry


def _backend_of(entry: _Entry, masked: Masked, op: str) -> Backend | None:
    """The backend whose kernel steps these scores, given a gradient of their dtype and strides; None: torch's AdamW."""
    param = entry.param
    if not masked.kind.is_trainable:
        return None
    weight, one = masked.weight, param
    if masked.num_masks(param) is not None:
        if not all(t.stride() == param.stride() for t in entry[2:4]):
            return None
        entry = next(iter(_masks_of(entry)))
        one = entry.param
    if (
        param.dtype != torch.float32 or weight.shape != one.shape or weight.device != param.device
        or masked.beta.device != param.device or entry.step.dtype != torch.float32
        or any(t.device != param.device for t in entry[2:])
        or any(t.stride() != weight.stride() for t in (one, *entry[2:4]))
        or entry.exp_avg.dtype != entry.exp_avg_sq.dtype or entry.exp_avg.dtype not in (torch.float32, torch.bfloat16)
        or not is_dense(weight)
    ):  # fmt: skip
        return None
    backend = choose_for(op, weight, one, masked.kind.name, weight.dtype)
    return backend if backend.has_mask_adamw else None


def _masks_of(entry: _Entry) -> Iterator[_Entry]:
    """The parts of an entry of several masks, each as an entry of its own; they share its memory and its step."""
    tensors = [t.detach().unbind() for t in (entry.param, entry.grad, entry.exp_avg, entry.exp_avg_sq)]
    for param, grad, exp_avg, exp_avg_sq in zip(*tensors, strict=True):
        yield _Entry(param.requires_grad_(entry.param.requires_grad), grad, exp_avg, exp_avg_sq, entry.step)


def _torch_adamw(entries: list[tuple[_Entry, Masked | None]], group: dict[str, Any], lam: PerMask) -> None:
    """torch's step, after the penalty's gradient was added to the gradients of masked scores."""
    others: list[tuple[_Entry, Masked | None]] = []
    for entry, masked in entries:
        if masked is None or masked.num_masks(entry.param) is None:
            others.append((entry, masked))
            continue
        count = entry.step.clone()
        for mask, part in enumerate(_masks_of(entry)):
            entry.step.copy_(count)
            _torch_adamw_of([(part, masked)], group, _of_mask(group["lr"], mask), _of_mask(lam, mask))
    if others:
        _torch_adamw_of(others, group, group["lr"], lam)


def _torch_adamw_of(
    entries: list[tuple[_Entry, Masked | None]], group: dict[str, Any], lr: Any, lam: Any
) -> None:
    """The same with one rate and one lam."""
    if _is_positive(lam):
        _add_penalty_gradients(entries, lam)
    params, grads, exp_avgs, exp_avg_sqs, steps = (list(part) for part in zip(*(e for e, _ in entries), strict=True))
    firsts = [moment.float() for moment in exp_avgs] if _has_short(exp_avgs) else exp_avgs
    seconds = [moment.float() for moment in exp_avg_sqs] if _has_short(exp_avgs) else exp_avg_sqs
    adam(
        params, grads, firsts, seconds, [], steps, foreach=group["foreach"], capturable=group["capturable"],
        fused=group["fused"], decoupled_weight_decay=True, amsgrad=False, beta1=group["betas"][0],
        beta2=group["betas"][1], lr=lr, weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
    )  # fmt: skip
    for first, second, m, v, step in zip(firsts, seconds, exp_avgs, exp_avg_sqs, steps, strict=True):
        if m.dtype == torch.bfloat16:
            random = rounding_bits(m.numel(), step, m.device)
            for moment, exact, bits in ((m, first, random & 0xFFFF), (v, second, random >> 16)):
                _in_storage_order(moment).copy_(round_to_bf16(_in_storage_order(exact), bits))


def _has_short(moments: list[Tensor]) -> bool:
    return any(moment.dtype == torch.bfloat16 for moment in moments)


def _in_storage_order(tensor: Tensor) -> Tensor:
    return tensor.as_strided((tensor.numel(),), (1,)) if is_dense(tensor) else tensor.reshape(-1)


def _count(steps: list[Tensor], by: int) -> None:
    if len(steps) == 1:
        steps[0].add_(by)
    else:
        torch._foreach_add_(steps, by)  # pyright: ignore


class _Kept(NamedTuple):
    """An effective weight that a step wrote."""

    slot: Slot
    weight: Tensor  # as the op gets it, and so the scores
    scores: Tensor
    w_eff: Tensor
    penalty: Tensor

    def mark_fresh(self, beta: Tensor, kind: MaskKind) -> None:
        self.slot.mark_fresh(self.weight, self.scores, beta, kind, self.w_eff.dtype)


class _Finished(NamedTuple):
    """A step that a backward pass took, and the state that its effective weight belongs to once beta has advanced."""

    kept: _Kept | None
    scores: Tensor
    beta: Tensor
    beta_version: int
    next_beta: Tensor
    kind: MaskKind
    versions: tuple[int, ...] = ()
    stamp: tuple[object, int] | None = None

    def read_versions(self) -> tuple[int, ...]:
        assert self.kept is not None
        return self.kept.w_eff._version, self.scores._version, self.kept.weight._version

    def is_current(self) -> bool:
        """Whether nobody has touched anything since."""
        return (
            self.kept is not None and self.kept.slot.w_eff is self.kept.w_eff and self.read_versions() == self.versions
            and self.beta._version == self.beta_version and self.kept.slot.has_stamp(self.stamp)
        )  # fmt: skip

    def mark_fresh(self, is_foretold: bool) -> None:
        """After beta has advanced: to what was foretold, which on a GPU is not looked at."""
        assert self.kept is not None
        if is_foretold if self.beta.is_cuda else torch.equal(self.beta, self.next_beta):
            self.kept.mark_fresh(self.beta, self.kind)


@dataclass
class _Pass:
    """What backward passes have done since the last step()."""

    stepped: dict[int, _Finished | None] = field(default_factory=dict)  # by id of the scores; None: by torch's AdamW
    next_betas: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # by id and version of the present one
    numbers: dict[int, tuple[Any, ...]] = field(default_factory=dict)  # by group: lr and so on, as the first step read


def _mask_adamw(
    run: Callable[..., None], kind: MaskKind, entries: list[tuple[_Entry, Masked]], group: dict[str, Any], beta: Tensor,
    next_beta: Tensor, writes: bool, in_backward: bool = False,
) -> list[_Kept | None]:
    """One step of these in one pass by ``run`` (arguments as Backend.mask_adamw_), which, if it ``writes``, makes the
    effective weights of layers that keep one. Says which; they are not marked fresh yet."""
    counts = [entry.step for entry, _ in entries]
    numbers = _numbers_of_entries(entries, group)
    if isinstance(numbers, list):
        entries = [
            (part, of) for entry, of in entries for part in (_masks_of(entry) if of.num_masks(entry.param) else [entry])
        ]
    params, grads, exp_avgs, exp_avg_sqs, steps = (list(p) for p in zip(*(e for e, _ in entries), strict=True))
    masked = [of for _, of in entries]
    _count(counts, 1)
    kept: list[_Kept | None] = []
    slots: list[tuple[Tensor, Tensor] | None] = []
    for param, of in zip(params, masked, strict=True):
        slot, weight = of.slot(), of.weight.t() if of.is_transposed else of.weight
        buffers = None
        if slot is not None and slot.w_eff is not None and writes and not slot.is_made_in_product:
            buffers = slot.buffers_in_use(weight) if in_backward else slot.buffers(weight, slot.w_eff.dtype)
            slot.clear()
        if slot is None or buffers is None:
            kept.append(None)
            slots.append(None)
            continue
        w_eff, penalty = buffers
        kept.append(_Kept(slot, weight, param.t() if of.is_transposed else param, w_eff, penalty))
        slots.append((w_eff.t() if of.is_transposed else w_eff, penalty))
    weights = [of.weight for of in masked]
    try:
        run(params, grads, exp_avgs, exp_avg_sqs, steps, weights, slots, beta, next_beta, kind, numbers)
    except Exception:
        _count(counts, -1)  # refused: nothing was done
        raise
    return kept


def _numbers_of_entries(entries: list[tuple[_Entry, Masked]], group: dict[str, Any]) -> AdamW | list[AdamW]:
    """The numbers of a step; one for each mask where there are parameters of several."""
    lr: Any = group["lr"]
    if isinstance(lr, Tensor) and lr.device != entries[0][0].param.device:
        lr = lr.tolist()  # torch lets it lie on the host
    beta1, beta2 = group["betas"]
    eps, weight_decay, lam = group["eps"], group["weight_decay"], group["lam"]
    nums = [of.num_masks(entry.param) for entry, of in entries]
    if not any(nums):
        return AdamW(lr, beta1, beta2, eps, weight_decay, lam)
    masks = [mask for num in nums for mask in range(num or 1)]
    return [AdamW(_of_mask(lr, m), beta1, beta2, eps, weight_decay, _of_mask(lam, m)) for m in masks]


def _is_per_mask(value: Any) -> bool:
    return value.dim() == 1 if isinstance(value, Tensor) else isinstance(value, (list, tuple))


def _of_mask(value: Any, mask: int) -> Any:
    return value[mask] if _is_per_mask(value) else value


def _is_positive(lam: PerMask) -> bool:
    """Whether there is a penalty, as far as that can be told without looking at a tensor."""
    return isinstance(lam, Tensor) or any(part > 0 for part in (lam if isinstance(lam, Sequence) else [lam]))


def _check_per_mask(name: str, value: PerMask, params: list[Tensor]) -> PerMask:
    """Numbers per mask are as many as the masks of every parameter; a sequence comes back as a tuple of floats."""
    if isinstance(value, (float, int)) or not _is_per_mask(value):
        return value
    if isinstance(value, Sequence):
        value = tuple(float(part) for part in value)
    count = len(value)
    for scores in params:
        masked = masked_of(scores)
        num = None if masked is None else masked.num_masks(scores)
        if num != count:
            raise ValueError(
                f"MaskAdamW: {count} values of {name}, one per mask, need scores of {count} masks (see "
                f"bind_masks), got a parameter of shape {list(scores.shape)} with {num or 'no dimension of'} masks"
            )
    return value


def _check_lr(lr: PerMask, params: list[Tensor]) -> PerMask:
    lr = _check_per_mask("lr", lr, params)
    if isinstance(lr, tuple) and not all(0 <= part < math.inf for part in lr):
        raise ValueError(f"MaskAdamW: lr must be finite and >= 0, got {lr}")
    return lr


def _numbers_of(group: dict[str, Any]) -> tuple[Any, ...]:
    """What a step reads of its group, tensors by identity and version."""
    values = (group["lr"], *group["betas"], group["eps"], group["weight_decay"], group["lam"])
    return tuple((id(value), value._version) if isinstance(value, Tensor) else value for value in values)


def _check_group(group: dict[str, Any]) -> None:
    if group["amsgrad"] or group["maximize"]:
        raise ValueError("MaskAdamW: amsgrad and maximize are not built; leave them False")


def _check_lam_value(lam: PerMask, params: list[Tensor]) -> PerMask:
    lam = _check_per_mask("lam", lam, params)
    if isinstance(lam, Tensor):
        devices = {str(scores.device) for scores in params}
        if lam.dim() > 1 or not lam.is_floating_point() or {str(lam.device)} != devices:
            raise ValueError(
                f"MaskAdamW: a tensor lam must be 0-d, floating-point and on the scores' device "
                f"({', '.join(sorted(devices))}), got {lam.dtype} {list(lam.shape)} on {lam.device}"
            )
    elif not all(0 <= part < math.inf for part in (lam if isinstance(lam, tuple) else (lam,))):  # pyright: ignore
        raise ValueError(f"MaskAdamW: lam must be finite and >= 0, got {lam}")
    return lam


def _check_lam(lam: PerMask, params: list[Tensor]) -> PerMask:
    lam = _check_lam_value(lam, params)
    if _is_positive(lam) and not any(masked_of(scores) is not None for scores in params):
        value = "a tensor" if isinstance(lam, Tensor) else lam
        raise ValueError(
            f"MaskAdamW: lam={value} needs masked layers' scores, this group has none; use "
            "masks_of(model).adamw(lam=...)"
        )
    return lam


def _make_missing_gradients(params: list[Tensor]) -> list[Tensor]:
    """Scores that got no gradient are still pushed by the penalty: those that were given one of zeros."""
    made = []
    for scores in params:
        if scores.grad is not None or not scores.requires_grad:
            continue
        masked = masked_of(scores)
        if masked is not None and masked.kind.is_trainable:
            scores.grad = torch.zeros_like(scores)
            made.append(scores)
    return made


def _add_penalty_gradients(entries: list[tuple[_Entry, Masked | None]], lam: float | Tensor) -> None:
    """grad += lam * (weights per score) * penalty_slope, one call per kind, backend and beta."""
    batches: dict[tuple[Any, ...], tuple[list[Tensor], list[Tensor], list[int]]] = {}
    for (scores, grad, *_), masked in entries:
        if masked is None or not masked.is_trained(scores) or not masked.kind.is_trainable:
            continue
        kind = masked.kind
        backend = choose_for("add_penalty_grad", scores, scores, kind.name, scores.dtype)
        batch = batches.setdefault((backend, kind, id(masked.beta), masked.beta, scores.dtype), ([], [], []))
        batch[0].append(grad)
        batch[1].append(scores)
        batch[2].append(masked.weights_per_score(scores))
    for (backend, kind, _, beta, dtype), (grads, scores, counts) in batches.items():
        backend.add_penalty_grad_(grads, scores, counts, beta.to(dtype), lam, kind)
