"""The opaque op by which a compiled graph brings a layer's slot up to date: it looks at the key when it runs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..capturing import keep_if_captured
from ..dispatch import choose_for
from ..masks import MaskKind, as_kind
from ..slots import Slot, slot_of
from .registry import register_op


def _implementation(
    weight: Tensor, scores: Tensor, beta: Tensor, kind: str, params: list[float], slot: int, w_eff: Tensor,
    penalty: Tensor,
) -> None:
    owner, mask_kind = slot_of(slot), as_kind(kind, params)
    if owner is not None:  # its buffers were made outside of a capture, and the compiled graph holds on to them
        keep_if_captured(weight, w_eff, penalty, owner.w_eff, owner.penalty)
    if owner is not None and (weight.is_inference() or scores.is_inference() or beta.is_inference()):
        owner.clear()  # what is written here can't be told from anything else later: no version counters
        owner = None
    if owner is not None and owner.is_fresh(weight, scores, beta, mask_kind, w_eff.dtype):
        return
    if owner is not None:
        owner.is_made_in_product = False  # here it is a pass of its own
    backend = choose_for("effective_weight", weight, scores, kind, w_eff.dtype)
    backend.effective_weight(weight, scores, beta, mask_kind, w_eff.dtype, (w_eff, penalty))
    if owner is not None:
        owner.mark_fresh(weight, scores, beta, mask_kind, w_eff.dtype)


_op = register_op(
    "refresh_effective_weight",
    "(Tensor weight, Tensor scores, Tensor beta, str kind, float[] params, int slot, Tensor(a!) w_eff, "
    "Tensor(b!) penalty) -> ()",
    _implementation,
    lambda *args: None,
    is_mutating=True,
)


def refresh_in_graph(
    slot: Slot | None, weight: Tensor, scores: Tensor, beta: Tensor, kind: MaskKind, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """(w_eff, penalty): the slot's buffers, up to date when the graph gets here; or (None, None) where the call must
    make its own: there is no slot, its buffers do not exist yet or do not fit, or the mask is hard (soft and hard
    passes must not share a buffer that a backward pass may need)."""
    if slot is None or not kind.is_trainable:
        return None, None
    w_eff, penalty = slot.w_eff, slot.penalty
    if w_eff is None or penalty is None or w_eff.dtype != dtype or w_eff.stride() != weight.stride():
        return None, None
    _op(weight.detach(), scores.detach(), beta, kind.name, kind.params(), slot.number, w_eff, penalty)
    return w_eff, penalty
