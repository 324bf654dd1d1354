"""What every masked layer shares: its scores, the state it shares with the other layers of its model, its slot."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from subnet_kernels.backends.base import keeps_w_eff
from subnet_kernels.in_backward import SpentGradient
from subnet_kernels.masks import (
    MaskKind,
    SampledKind,
    as_kind,
    expand_scores,
    weights_per_score,
)
from subnet_kernels.ops.checks import check_beta_value
from subnet_kernels.ops.pending import PendingScoreGradients
from subnet_kernels.optim import Masked, bind_scores
from subnet_kernels.shards import is_sharded, shard_of, whole
from subnet_kernels.slots import Slot

Unit = str | tuple[int, ...]


@dataclass
class Schedule:
    """beta after ``count`` optimizer steps: start * (to/start)^(count/steps), changed every ``every`` steps, ``to`` at
    the end. ``count`` is an int, or an int64 0-d tensor: then everything is computed where it lies, in fp64."""

    start: float
    to: float
    steps: int
    every: int = 1
    count: int | Tensor = 0

    @property
    def is_on_device(self) -> bool:
        return isinstance(self.count, Tensor)

    def beta(self) -> Any:
        """beta now: a float, or a 0-d fp64 tensor beside count."""
        count: Any = self.count
        done = count // self.every * self.every
        if isinstance(count, Tensor):
            done = done.masked_fill(count >= self.steps, self.steps).double()
        elif count >= self.steps:
            done = self.steps
        return self.start * (self.to / self.start) ** (done / self.steps)

    def values(self) -> dict[str, Any]:
        """The fields as plain values, and whether count is on the device."""
        return {**vars(self), "count": int(self.count), "on_device": self.is_on_device}

    def copy(self) -> Schedule:
        """The same, with a count of its own."""
        return replace(self, count=self.count.clone() if isinstance(self.count, Tensor) else self.count)

    def to_device(self, device: torch.device) -> None:
        """Count in a tensor there from now on."""
        self.count = torch.as_tensor(self.count, dtype=torch.int64).to(device)


@dataclass
class MaskState:
    """What the masked layers of one model share. beta and key are plain tensors that keep their identity: every layer,
    slot and optimizer sees a change at once."""

    beta: Tensor
    key: Tensor  # int64 [seed, step], from which sampled kinds draw
    is_hard: bool = False
    is_disabled: bool = False
    schedule: Schedule | None = None
    penalties: dict[int, Tensor] | None = None  # by slot number, of the layers that ran inside collect_penalty()
    requires_grad: dict[str, bool] = field(default_factory=dict)  # of the model's parameters before masking
    pending: PendingScoreGradients = field(default_factory=PendingScoreGradients)

    def __deepcopy__(self, memo: dict[int, Any]) -> MaskState:
        schedule = None if self.schedule is None else self.schedule.copy()
        # not disabled: the copy is in no block that would end it
        beta, key = self.beta.detach().clone(), self.key.clone()
        copy = MaskState(beta, key, self.is_hard, False, schedule, None, dict(self.requires_grad))
        memo[id(self)] = copy
        return copy

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        vars(self).setdefault("key", _new_key(0, self.beta.device))  # pickled before there were sampled kinds

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "penalties": None, "is_disabled": False, "pending": PendingScoreGradients()}


def new_state(device: torch.device | str | None = None, seed: int = 0) -> MaskState:
    is_meta = device is not None and torch.device(device).type == "meta"  # beta always has a value
    device = "cpu" if is_meta else device
    beta = torch.ones((), dtype=torch.float32, device=device)
    return MaskState(beta, _new_key(seed, device))


def _new_key(seed: int, device: torch.device | str | None) -> Tensor:
    return torch.tensor([seed, 0], dtype=torch.int64, device=device)


def unit_shape(unit: Unit, shape: tuple[int, ...], where: str) -> tuple[int, ...]:
    """The scores' shape for a weight of role order [outputs, inputs, ...].

    "weight": one score per weight; "row": per output unit (filter); "column": per input unit (channel); "head:H": per
    block of N/H rows; a tuple of block sizes (16, 16): per block.

    Raises:
        ValueError: unknown unit, or one that does not divide the weight.
    """
    if unit == "weight":
        return shape
    if unit == "row":
        return (shape[0], *(1,) * (len(shape) - 1))
    if unit == "column" and shape[1:]:
        return (1, shape[1], *(1,) * (len(shape) - 2))
    if isinstance(unit, str) and unit.startswith("head:") and unit[5:].isdigit() and int(unit[5:]) > 0:
        if shape[0] % int(unit[5:]):
            raise ValueError(f"{where}: unit {unit!r} needs rows that divide into heads, the weight has {shape[0]}")
        return (int(unit[5:]), *(1,) * (len(shape) - 1))
    if isinstance(unit, tuple) and len(unit) == len(shape) and all(isinstance(b, int) and b > 0 for b in unit):
        if any(size % block for size, block in zip(shape, unit, strict=True)):
            raise ValueError(f"{where}: unit {unit} must divide the weight's sizes {list(shape)}")
        return tuple(size // block for size, block in zip(shape, unit, strict=True))
    raise ValueError(
        f"{where}: unit must be 'weight', 'row', 'column', 'head:<number of heads>' or {len(shape)} block sizes that "
        f"divide {list(shape)}, got {unit!r}"
    )


def check_can_mask(module: nn.Module, name: str, parameter: str = "weight") -> None:
    """An ordinary parameter of that name, present and finite.

    Raises:
        ValueError: says what is in the way.
    """
    weight = module._parameters.get(parameter)
    if weight is None:
        raise ValueError(
            f"{name}: its {parameter} is not a plain parameter (weight_norm, spectral_norm or pruning computes it); "
            "remove that first"
        )
    if not weight.is_floating_point():
        raise ValueError(f"{name}: its {parameter} must be floating point, got {weight.dtype}")
    if not weight.is_meta and not bool(torch.isfinite(weight).all()):
        raise ValueError(
            f"{name}: its {parameter} has NaN or infinite entries; masking can't repair a diverged network"
        )


def check_loaded(state_dict: dict, *names: str) -> None:
    """Raises ValueError if one of these entries has NaN or infinite values."""
    for name in names:
        tensor = state_dict.get(name)
        if isinstance(tensor, Tensor) and not tensor.is_meta and not bool(torch.isfinite(shard_of(tensor)).all()):
            raise ValueError(
                f"load_state_dict: {name} has NaN or infinite entries; nothing of this layer is loaded (the layers "
                "before it are)"
            )


class MaskedLayer(nn.Module):
    """Mixin of the masked layers. ``weight`` is the base weight, ``scores`` the trained scores (same memory layout)."""

    base_class: type[nn.Module]  # the ordinary layer's class, to which unmask goes back
    passes_transposed = False  # whether the op gets weight.t() and scores.t()
    op = "masked_linear"  # that serves its forward pass

    weight: nn.Parameter
    scores: nn.Parameter
    kind: MaskKind
    unit: Unit
    plan: str | None
    _state: MaskState
    _slot: Slot
    _first_sample = 0  # by which the draws of a model's layers are told apart
    _given: tuple[Tensor, Tensor] | None = None  # (effective weight, penalty) that forward uses: see serve()

    def weight_name(self, module_name: str) -> str:
        """The base weight's name in the unmasked model, from this module's name."""
        return f"{module_name}.weight" if module_name else "weight"

    def scores_name(self, weight_name: str) -> str:
        """The scores' name in the masked model, from the base weight's."""
        return weight_name.removesuffix("weight") + "scores"

    def _scores_shape(self, unit: Unit, where: str) -> tuple[int, ...]:
        """The scores' shape in weight's own layout."""
        return unit_shape(unit, tuple(self.weight.shape), where)

    def _add_mask(
        self, kind: str | MaskKind, score_init: float | Tensor, unit: Unit, state: MaskState | None = None
    ) -> None:
        """Turn an ordinary layer's attributes into a masked layer's: add scores, state and slot."""
        where = type(self).__name__
        self.kind, self.unit = as_kind(kind), unit
        self.plan = "recompute" if self.kind.is_sampled else None  # the next pass of another step draws anew
        weight = self.weight
        shape = self._scores_shape(unit, where)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        if isinstance(score_init, Tensor):
            if tuple(score_init.shape) != shape:
                raise ValueError(f"{where}: initial scores must have shape {list(shape)}, got {list(score_init.shape)}")
            if not bool(torch.isfinite(score_init).all()):
                raise ValueError(f"{where}: initial scores must be finite, got NaN or infinity")
            data = score_init.detach().to(device=weight.device, dtype=dtype, copy=True)
        else:
            if not math.isfinite(score_init):
                raise ValueError(f"{where}: score_init must be finite, got {score_init}")
            data = torch.full(shape, score_init, dtype=dtype, device=weight.device)
        if shape == tuple(weight.shape):  # weight's memory order, so that one pass reads both
            data = torch.empty_like(weight, dtype=dtype).copy_(data)
        self.scores = nn.Parameter(data)
        self._state = new_state(weight.device) if state is None else state
        self._slot = Slot()
        self._bind_scores()

    def _bind_scores(self) -> None:
        """Tell MaskAdamW what the scores belong to."""
        if is_sharded(self.scores):  # FSDP2 gathers and frees the whole tensors: nothing of their size is to be kept,
            if keeps_w_eff(self.plan):  # and memory and versions do not tell whether a kept one is stale
                self.plan = "recompute"
            self._slot.release()
            self._move_beta(self.scores.device)
        slot = weakref.ref(self._slot)
        bind_scores(self.scores, Masked(self.weight, self._state.beta, self.kind, slot, self.passes_transposed))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # a deep copy or an unpickled layer has scores of its own
        self._bind_scores()

    def _remove_mask(self) -> None:
        """Back to an ordinary layer's attributes."""
        del self.scores, self.kind, self.unit, self.plan, self._state, self._slot
        for name in ("base_class", "_first_sample"):
            self.__dict__.pop(name, None)

    # --- what a user asks ------------------------------------------------------------------------------------------

    @property
    def beta(self) -> Tensor:
        """The inverse temperature, a 0-d tensor shared by all layers of one MaskSet. Setting it checks the value
        (finite, >= 0) and changes it for all of them."""
        return self._state.beta

    @beta.setter
    def beta(self, value: float) -> None:
        with torch.no_grad():
            self._state.beta.fill_(check_beta_value(f"{type(self).__name__}.beta", float(value)))
        self._slot.clear()

    @property
    def current_kind(self) -> MaskKind:
        """The mask in force: the binary one after harden() or inside hard(), else the layer's own kind."""
        kind = self.kind
        if self._state.is_hard:
            return kind.hard
        return kind.at(self._state.key, self._first_sample) if isinstance(kind, SampledKind) else kind

    def kept(self) -> Tensor:
        """The binary mask that is kept, bool, one value per score: {s > 0}, unless the kind says otherwise."""
        return self._value(self.kind.hard, whole(self.scores.detach())) > 0

    def _value(self, kind: MaskKind, scores: Tensor) -> Tensor:
        """The mask as the forward pass makes it, in scores' layout: draws and ties go by places of the op's [N, K]."""
        if not self.passes_transposed:
            return kind.value(scores, self.beta)
        return kind.value(scores.t(), self.beta).t()

    def mask(self) -> Tensor:
        """The mask in force, m = sigmoid(beta*s) or 1[s > 0], one value per weight (weight's shape, scores' dtype); the
        first of sampled ones."""
        with torch.no_grad():
            return expand_scores(self._value(self.current_kind, self.scores), tuple(self.weight.shape))

    @property
    def weights_per_score(self) -> int:
        """How many weights one score governs."""
        return weights_per_score(tuple(self.weight.shape), tuple(self.scores.shape))

    def mask_extra_repr(self) -> str:
        return f"kind={self.kind.name}, unit={self.unit!r}"

    # --- penalties -------------------------------------------------------------------------------------------------

    def _collects(self) -> bool:
        """Whether this forward pass must hand out its penalty."""
        if self._state.penalties is None:
            return False
        if not torch.is_grad_enabled():
            raise RuntimeError(
                "collect_penalty: a masked layer ran without grad inside it (reentrant checkpointing does this), so "
                "its penalty would have no gradient; use checkpoint(..., use_reentrant=False), or evaluate outside it"
            )
        return True

    def _collect(self, penalty: Tensor) -> None:
        penalties = self._state.penalties
        assert penalties is not None
        if self._slot.number not in penalties:  # a layer that runs twice counts once
            penalties[self._slot.number] = penalty

    @contextlib.contextmanager
    def serve(self, scores: Tensor, w_eff: Tensor, penalty: Tensor) -> Iterator[None]:
        """Inside, the layer has these scores [S...], and its forward pass uses this effective weight [W...], in
        weight's layout, and this penalty. Under torch.func.vmap they may be batched."""
        own = self._parameters["scores"]
        self._parameters["scores"] = scores  # pyright: ignore[reportArgumentType]  # as torch.func.functional_call does
        self._given = w_eff, penalty
        try:
            yield
        finally:
            self._parameters["scores"] = own
            del self._given

    def _take_given(self) -> Tensor:
        """The effective weight that was given; its penalty is handed out where one is collected."""
        assert self._given is not None
        w_eff, penalty = self._given
        if self._collects():
            self._collect(penalty)
        return w_eff

    def _replicate_for_data_parallel(self) -> MaskedLayer:
        raise RuntimeError(
            f"{type(self).__name__}: nn.DataParallel is refused: its copies of a layer would share one effective "
            "weight between devices; use DistributedDataParallel (torchrun), or one GPU (CUDA_VISIBLE_DEVICES=0)"
        )

    # --- device, dtype, loading ------------------------------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Scores and beta follow the device, never the dtype: fp32 (fp64 beside an fp64 weight), also in .half()."""
        scores = self._parameters.pop("scores")
        assert scores is not None
        try:
            super()._apply(fn, recurse)
        finally:
            self._parameters["scores"] = scores
        with torch.no_grad():
            moved = fn(scores.data)
            wanted = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
            if moved.dtype != wanted:
                moved = torch.empty_like(moved, dtype=wanted)
                if not scores.is_meta:
                    moved.copy_(scores.data)
            grad = scores.grad
            if torch._has_compatible_shallow_copy_type(scores, moved):  # pyright: ignore
                scores.data = moved
            else:
                self._parameters["scores"] = nn.Parameter(moved, scores.requires_grad)
            if isinstance(grad, SpentGradient):
                self.scores.grad = None
            elif grad is not None:
                self.scores.grad = grad.to(device=moved.device, dtype=wanted)
            self._move_beta(moved.device)
        self._slot.release()
        self._bind_scores()
        return self

    def _move_beta(self, device: torch.device) -> None:
        """beta, in place, and key and a count of steps beside it. They always have values, so they never go to meta."""
        state = self._state
        if state.beta.device == device or device.type == "meta":
            return
        state.beta.data = state.beta.data.to(device)
        state.key.data = state.key.data.to(device)
        if state.schedule is not None and state.schedule.is_on_device:
            state.schedule.to_device(device)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any, **kwargs: Any) -> None:
        check_loaded(state_dict, f"{prefix}scores", f"{prefix}weight")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        wanted = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        if self.scores.dtype != wanted:  # load_state_dict(assign=True) takes tensors as they come
            self._parameters["scores"] = nn.Parameter(self.scores.detach().to(wanted), self.scores.requires_grad)
        self._slot.clear()
        self._bind_scores()
