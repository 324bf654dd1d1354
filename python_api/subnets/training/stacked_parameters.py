"""What all stacks share: parameters and gradients with a leading member dimension."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self


class StackedParameters:
    """P networks side by side: `params[name]` and `grads[name]` are [P, ...]."""

    params: dict[str, Tensor]
    grads: dict[str, Tensor]

    @property
    def members(self) -> int:
        """How many networks there are: P."""
        return len(next(iter(self.params.values())))

    def like(self, params: dict[str, Tensor]) -> Self:
        """A stack of other parameters [P', ...], which are not copied; it has no gradients."""
        other = copy.copy(self)
        other.params, other.grads = params, {}
        return other

    def keep(self, members: Tensor) -> None:
        """Keeps these members (int64 indices) in this order, in new memory; the others leave."""
        self.params = {name: value[members] for name, value in self.params.items()}
        self.grads = {name: torch.zeros_like(value) for name, value in self.params.items()}
