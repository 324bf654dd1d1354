"""Anchors: entries of a Parameter that stay bit-identical while any torch optimizer trains the rest.

Zeroing the gradient is not enough: weight decay and momentum from before move an entry all the same. So an anchor keeps
the planted values and puts them back after each optimizer step, through torch's global post-hook, which every
`torch.optim.Optimizer` runs, built before or after, fused, foreach or under ``torch.compile(optimizer.step)``. The
gradient is zeroed too, so that clipping by norm and the optimizer's state do not see the planted entries.

The anchors of a module lie in its attribute ``_subnet_anchors`` (name of the parameter to `Anchor`): not in the
state_dict, but in deepcopy and torch.save, which both rebuild the hooks through `Anchor.__setstate__`.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from subnet_kernels.packing import pack_mask, unpack_bits

ATTRIBUTE = "_subnet_anchors"

# id of a live Parameter -> its anchor; an entry leaves with its Parameter. Not keyed by the tensor itself: tensors
# compare elementwise.
_anchors: dict[int, Anchor] = {}
_step_hook: RemovableHandle | None = None


class Anchor:
    """Planted entries of one Parameter: mask and values, kept against gradients and optimizer steps.

    Args:
        parameter: plain floating-point Parameter, trainable or not; already holds the planted values.
        mask: bool, parameter's shape.
        values: ``[kept]`` in the C order of the mask, parameter's dtype and device.
        keep_positions: also keep where the planted entries are, as int32 (int64 from 2^31 entries on). See `transfer`.
    """

    def __init__(self, parameter: nn.Parameter, mask: Tensor, values: Tensor, keep_positions: bool = False) -> None:
        self.packed = pack_mask(mask.to(parameter.device))
        self.values = values
        self.keep_positions = keep_positions
        self._positions: Tensor | None = None
        self._reference: weakref.ref[nn.Parameter] | None = None
        self._attach(parameter)

    def mask_of(self, parameter: Tensor) -> Tensor:
        """Return the mask of planted entries: bool, parameter's shape, on its device."""
        self._follow(parameter.device)
        return self._unpacked(parameter)

    def detach(self) -> None:
        """Stop holding the entries and remove the hooks; afterwards the parameter trains freely."""
        self._gradient_hook.remove()
        if _anchors.get(self._key) is self:
            del _anchors[self._key]
        if not _anchors:
            _remove_step_hook()

    def restore(self, parameter: Tensor) -> None:
        """Write the planted values into the parameter (or a copy of it), in its dtype and on its device."""
        self._follow(parameter.device)
        self.values = self.values.to(parameter.dtype)
        with torch.no_grad():
            if self._positions is not None and parameter.is_contiguous():
                parameter.view(-1).index_copy_(0, self._positions.long(), self.values)
            else:
                parameter.masked_scatter_(self._unpacked(parameter), self.values)

    def _zero_gradient(self, gradient: Tensor) -> Tensor:
        """Return the gradient with zeros at the planted entries; a new tensor, others may hold the old one."""
        self._follow(gradient.device)
        if gradient.layout == torch.sparse_coo:
            gradient = gradient.coalesce()
            values = gradient.values().masked_fill(self._unpacked(gradient)[tuple(gradient.indices())], 0)
            return torch.sparse_coo_tensor(
                gradient.indices(), values, gradient.shape, is_coalesced=True, check_invariants=False
            )
        if self._positions is not None and gradient.is_contiguous():
            return gradient.reshape(-1).index_fill(0, self._positions.long(), 0).view_as(gradient)
        return gradient.masked_fill(self._unpacked(gradient), 0)

    def _unpacked(self, like: Tensor) -> Tensor:
        return unpack_bits(self.packed, like.numel()).view(like.shape)

    def _follow(self, device: torch.device) -> None:
        """Move to where the parameter went: `.to(device)` keeps the Parameter object, and so hook and anchor."""
        if self.packed.device != device:
            self.packed = self.packed.to(device)
            self.values = self.values.to(device)
            self._positions = None
        if self.keep_positions and self._positions is None:
            positions = unpack_bits(self.packed, 8 * self.packed.numel()).nonzero().view(-1)  # padding bits are zero
            self._positions = positions.int() if 8 * self.packed.numel() < 2**31 else positions

    def _attach(self, parameter: nn.Parameter) -> None:
        self._key = id(parameter)
        self._reference = weakref.ref(parameter, self._forget)
        requires_grad = parameter.requires_grad
        # A frozen parameter gets its hook too, for the day when it is unfrozen; torch registers hooks on others only.
        parameter.requires_grad_(True)
        self._gradient_hook = parameter.register_hook(self._zero_gradient)
        parameter.requires_grad_(requires_grad)
        _anchors[self._key] = self
        _register_step_hook()

    def _forget(self, reference: weakref.ref[nn.Parameter]) -> None:
        # The step hook stays: the collector may call this while an optimizer iterates over its hooks.
        if self._key in _anchors and _anchors[self._key]._reference is reference:
            del _anchors[self._key]

    def __getstate__(self) -> dict[str, Any]:
        return {
            "parameter": None if self._reference is None else self._reference(),
            "packed": self.packed,
            "values": self.values,
            "keep_positions": self.keep_positions,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.packed = state["packed"]
        self.values = state["values"]
        self.keep_positions = state["keep_positions"]
        self._positions = None
        self._reference = None
        # None: the parameter was replaced and is gone, the anchor lay idle in its module and goes on doing so.
        if state["parameter"] is not None:
            self._attach(state["parameter"])


def anchor_of(parameter: nn.Parameter) -> Anchor | None:
    """Return the anchor that holds entries of this Parameter, or None."""
    return _anchors.get(id(parameter))


def _restore_planted(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not _anchors:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            anchor = _anchors.get(id(parameter))
            if anchor is not None:
                anchor.restore(parameter)


def _register_step_hook() -> None:
    global _step_hook
    if _step_hook is None:
        # Not traced by torch.compile(optimizer.step): traced, the hook would be compiled again for every new anchor.
        hook = torch._disable_dynamo(_restore_planted)  # pyright: ignore
        _step_hook = register_optimizer_step_post_hook(hook)


def _remove_step_hook() -> None:
    global _step_hook
    if _step_hook is not None:
        _step_hook.remove()
        _step_hook = None
