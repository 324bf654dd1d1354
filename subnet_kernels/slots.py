"""Slots: who owns an effective weight that outlives one call, and how staleness is noticed.

A masked layer owns one :class:`Slot`: persistent buffers for its effective weight and penalty, and a key that says of
which weight, scores, beta, kind and dtype they were made. Each use compares the key and refreshes if it differs, so
that several uses between two optimizer steps (gradient accumulation, shared layers) cost one masking pass.

The key holds memory addresses and version counters. Both can be fooled (a write through ``.data`` bumps nothing; a deep
copy starts at version 0), therefore every optimizer step clears all slots unless the optimizer wrote them itself, a
copied or unpickled slot is empty, layers clear theirs where tensors are replaced, and :meth:`Slot.is_exact` recomputes.

CUDA graphs: a capture never trusts what was made outside of it and uses memory of its own, or of its warm-up. Inside
one :func:`~subnet_kernels.capturing.capture_scope` a slot is trusted as usual; in a capture of somebody else's every
use refreshes. Once a slot, or an optimizer's step, took part in a capture, replays may change scores at any time
unnoticed: from then on every use outside refreshes.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from .backends.base import Backend
from .capturing import FOREIGN, capture_number, keep_in_scope, memory_number
from .dispatch import forced_backend
from .masks import MaskKind

_generation = 0  # part of every key; raised to clear all slots at once
_is_hook_registered = False
_numbers = itertools.count()
_slots: weakref.WeakValueDictionary[int, Slot] = weakref.WeakValueDictionary()


def penalty_dtype(weight: Tensor) -> torch.dtype:
    """The penalty's dtype, which is the scores': fp32, fp64 beside an fp64 weight."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def slot_of(number: int) -> Slot | None:
    """The living slot of that number."""
    return _slots.get(number)


def clear_all_slots() -> None:
    """Make every slot stale."""
    global _generation
    _generation += 1


def _after_any_optimizer_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    _clear_untraced(optimizer) if torch.compiler.is_compiling() else _clear_after(optimizer)


@torch._disable_dynamo  # pyright: ignore  # traced, the generation would be a constant of the graph: one graph per step
def _clear_untraced(optimizer: Optimizer) -> None:
    _clear_after(optimizer)


def _clear_after(optimizer: Optimizer) -> None:
    if not getattr(optimizer, "writes_effective_weights", False):
        clear_all_slots()
    first = next((p for group in optimizer.param_groups for p in group["params"]), None)
    if first is not None and capture_number(first):
        for slot in list(_slots.values()):
            slot.note_capture()


def _register_hook_once() -> None:
    global _is_hook_registered
    if not _is_hook_registered:
        register_optimizer_step_post_hook(_after_any_optimizer_step)
        _is_hook_registered = True


class Slot:
    """Persistent effective weight (weight's shape and strides, compute dtype) and penalty (0-d) of one weight."""

    __slots__ = (
        "__weakref__", "_kept", "_key", "_made_for", "_stamp", "_was_captured", "is_made_in_product", "number",
        "penalty", "w_eff",
    )  # fmt: skip

    def __init__(self) -> None:
        _register_hook_once()
        self.w_eff: Tensor | None = None
        self.penalty: Tensor | None = None
        self._key: tuple[Any, ...] | None = None
        self._made_for: tuple[Any, ...] | None = None  # the weight's metadata and the capture that the buffers fit
        self._was_captured = False  # replays may change scores behind the key: outside of captures nothing is fresh
        self._stamp: tuple[object, int] | None = None  # of what was written ahead, see stamp()
        self._kept: tuple[Tensor, Tensor] | None = None  # the key's tensors, so that no other can get their addresses
        # whether the last forward pass that found it stale made the effective weight within its product, which costs
        # less than a pass of its own: an optimizer then leaves it to the next
        self.is_made_in_product = False
        self.number = next(_numbers)  # names the slot inside a compiled graph
        _slots[self.number] = self

    def __reduce__(self) -> tuple[type[Slot], tuple[()]]:
        return Slot, ()  # a copy, and what is read back from a file, is empty

    def clear(self) -> None:
        """Make this slot stale; its memory is kept for the next use."""
        self._key = self._kept = self._stamp = None

    def stamp(self) -> tuple[object, int]:
        """Note that the buffers were written for a beta that is still to come. The mark says, with has_stamp, whether
        nothing has cleared this slot, or all of them, since."""
        self._stamp = object(), _generation
        return self._stamp

    def has_stamp(self, stamp: tuple[object, int] | None) -> bool:
        """Whether nothing has cleared this slot, or all of them, since :meth:`stamp` gave this mark."""
        return stamp is not None and self._stamp is stamp and stamp[1] == _generation

    def release(self) -> None:
        """Make this slot stale and give its memory back."""
        self.w_eff = self.penalty = self._key = self._kept = self._made_for = self._stamp = None

    def note_capture(self) -> None:
        """Say that a graph was captured whose replays may change scores or beta: see the module."""
        self._was_captured = True
        self.clear()

    @staticmethod
    def _key_of(weight: Tensor, scores: Tensor, beta: Tensor, kind: MaskKind, dtype: torch.dtype) -> tuple[Any, ...]:
        return (
            _generation, capture_number(weight), forced_backend(), weight.data_ptr(), weight._version,
            scores.data_ptr(), scores._version, beta.data_ptr(), beta._version, kind, dtype, weight.stride(),
        )  # fmt: skip

    def is_fresh(self, weight: Tensor, scores: Tensor, beta: Tensor, kind: MaskKind, dtype: torch.dtype) -> bool:
        """Whether the buffers hold the effective weight of exactly these."""
        return self._key is not None and self._key == self._key_of(weight, scores, beta, kind, dtype)

    def lookup(
        self, weight: Tensor, scores: Tensor, beta: Tensor, kind: MaskKind, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor] | None:
        """The buffers (w_eff, penalty) if they hold those of exactly these, else None."""
        if self._key is None or weight.is_inference() or scores.is_inference() or beta.is_inference():
            return None  # inference tensors have no version counter to key on
        if self._key != self._key_of(weight, scores, beta, kind, dtype):
            return None
        assert self.w_eff is not None and self.penalty is not None
        return self.w_eff, self.penalty

    def to_fill(
        self, weight: Tensor, scores: Tensor, beta: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor] | None:
        """The buffers, stale until :meth:`mark_fresh`; None where the slot is to be left alone: in inference mode,
        whose tensors can't be saved for a later backward pass, and under FakeTensorMode, whose hold no values."""
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:  # pyright: ignore
            return None
        if torch.is_inference_mode_enabled() or weight.is_inference() or scores.is_inference() or beta.is_inference():
            return None
        self._key = None
        return self.buffers(weight, dtype)

    def buffers(self, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The buffers to write: those kept, or new ones where they do not fit, belong to another capture (or none), or
        a pending backward pass holds them."""
        capture = memory_number(weight)
        made_for = (weight.shape, weight.stride(), weight.device, dtype, capture)
        is_held = self.w_eff is not None and self.w_eff._use_count() > 1  # pyright: ignore  # by a pending backward pass
        if self._made_for != made_for or is_held or capture == FOREIGN:
            self.w_eff = torch.empty_like(weight, dtype=dtype, requires_grad=False)
            self.penalty = torch.empty((), dtype=penalty_dtype(weight), device=weight.device)
            self._made_for = made_for
            keep_in_scope(self.w_eff, self.penalty)
        assert self.w_eff is not None and self.penalty is not None
        return self.w_eff, self.penalty

    def buffers_in_use(self, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """The buffers, to be overwritten although the backward pass that is under way holds them; None where they do
        not fit. Another one that holds them is told by the version counter."""
        if self.w_eff is None or self.penalty is None or self._made_for is None:
            return None
        fits = self._made_for[:3] == (weight.shape, weight.stride(), weight.device)
        return (self.w_eff, self.penalty) if fits and self._made_for[4] == memory_number(weight) else None

    def mark_fresh(self, weight: Tensor, scores: Tensor, beta: Tensor, kind: MaskKind, dtype: torch.dtype) -> None:
        """Say that the buffers were just written from these (by a multi-tensor kernel or an optimizer)."""
        key = self._key_of(weight, scores, beta, kind, dtype)
        capture = key[1]
        if capture:
            self._was_captured = True
        if capture == FOREIGN or (self._was_captured and not capture):
            self.clear()  # right for the use that comes now, and for no other
            return
        self._key, self._kept = key, (weight, scores)

    def is_exact(
        self, weight: Tensor, scores: Tensor, beta: Tensor, kind: MaskKind, dtype: torch.dtype, backend: Backend
    ) -> bool:
        """Whether the next use would see the effective weight that a fresh computation gives, bit for bit. A stale slot
        is exact: its next use refreshes it."""
        if not self.is_fresh(weight, scores, beta, kind, dtype):
            return True
        assert self.w_eff is not None
        now, _ = backend.effective_weight(weight, scores, beta, kind, dtype)
        return torch.equal(_bits(now), _bits(self.w_eff))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
