"""A discovery's step as a CUDA graph: for batches like the first one replayed, for others run as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ..capture import CapturedStep
from ..masking import MaskSet
from .data import PLAIN


class ReplayedStep:
    """``step(batch) -> loss``, captured at the first batch with static copies of its tensors on the masks' device.

    A later batch of the same structure, with tensors of the same shapes and dtypes and everything else equal, is copied
    in and replayed; any other goes through ``step`` itself, which computes the same.

    Raises:
        TypeError: the first batch holds something that is neither a tensor nor a plain value.
    """

    def __init__(self, step: Callable[[Any], Tensor], masks: MaskSet, optimizer: torch.optim.Optimizer) -> None:
        self._step, self._masks, self._optimizer = step, masks, optimizer
        self._captured: CapturedStep | None = None
        self._static: list[Any] = []
        self._spec: TreeSpec | None = None

    def __call__(self, batch: Any) -> Tensor:
        """The loss of one step, in memory of its own."""
        leaves, spec = tree_flatten(batch)
        if self._captured is None:
            self._captured = self._capture(leaves, spec)
        if spec != self._spec or not all(map(_fits, self._static, leaves)):
            return self._step(batch)
        with torch.no_grad():
            for static, leaf in zip(self._static, leaves, strict=True):
                if isinstance(static, Tensor):
                    static.copy_(leaf)
        loss = self._captured()
        assert isinstance(loss, Tensor)
        return loss.clone()

    def _capture(self, leaves: list[Any], spec: TreeSpec) -> CapturedStep:
        if strange := {type(leaf).__name__ for leaf in leaves if not isinstance(leaf, (Tensor, *PLAIN))}:
            raise TypeError(
                f"discover: cuda_graph=True copies batches of tensors in tuples, lists and dicts, got a batch with "
                f"{', '.join(sorted(strange))}; convert it (dict(batch)), or leave cuda_graph False"
            )
        device = next(iter(self._masks.scores().values())).device
        self._static = [leaf.detach().to(device, copy=True) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._spec = spec
        return CapturedStep(  # the objective may take the containers apart: new ones for each run
            self._masks, lambda: self._step(tree_unflatten(self._static, spec)), self._optimizer
        )


def _fits(static: Any, leaf: Any) -> bool:
    if isinstance(static, Tensor):
        return isinstance(leaf, Tensor) and leaf.shape == static.shape and leaf.dtype == static.dtype
    return type(static) is type(leaf) and static == leaf
