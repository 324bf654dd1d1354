"""MaskedHFConv1D: Hugging Face's Conv1D (GPT-2's linear layer, its weight [inputs, outputs]) with a trained mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from subnet_kernels.masks import MaskKind

from .base import MaskedLayer, Unit, unit_shape
from .convert import from_layer, to_layer
from .linear import masked_linear_of


def is_hf_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D; asks the class's name, so that transformers need not be installed."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


class MaskedHFConv1D(MaskedLayer):
    """transformers' Conv1D whose weight is ``weight * mask(scores)``: ``x @ (weight * sigmoid(beta*scores)) + bias``.

    Args:
        nf, nx: numbers of outputs and inputs; weight is [nx, nf], bias [nf], as in transformers.
        kind, score_init: as MaskedLinear.
        unit: names roles as everywhere: "row" is one score per output, here a column of the stored weight.
        device, dtype: as nn.Linear.

    Raises:
        ValueError: as MaskedLinear.
    """

    passes_transposed = True

    def __init__(
        self, nf: int, nx: int, *, kind: str | MaskKind = "sigmoid", score_init: float = -0.1, unit: Unit = "weight",
        device: Any = None, dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.empty(nx, nf, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(nf, device=device, dtype=dtype))
        nn.init.normal_(self.weight, std=0.02)
        self._add_mask(kind, score_init, unit)

    @classmethod
    def from_conv1d(cls, conv1d: nn.Module, **kwargs: Any) -> MaskedHFConv1D:
        """As MaskedLinear.from_linear, for exactly transformers' Conv1D."""
        if not is_hf_conv1d(conv1d):
            raise TypeError(f"MaskedHFConv1D: needs exactly transformers' Conv1D, got {type(conv1d).__name__}")
        return from_layer(cls, conv1d, **kwargs)

    def to_conv1d(self, hard: bool = True) -> nn.Module:
        """As MaskedLinear.to_linear; transformers' Conv1D."""
        return to_layer(self, hard)

    def _scores_shape(self, unit: Unit, where: str) -> tuple[int, ...]:
        outputs_first = unit_shape(unit, tuple(reversed(self.weight.shape)), where)
        return tuple(reversed(outputs_first))

    def forward(self, x: Tensor) -> Tensor:
        if self._state.is_disabled or self._given is not None:
            weight = self.weight if self._state.is_disabled else self._take_given()
            rows = torch.addmm(self.bias, x.view(-1, x.size(-1)), weight)
            return rows.view(*x.shape[:-1], self.nf)
        return masked_linear_of(self, x, self.weight.t(), self.scores.t(), self.bias)

    def extra_repr(self) -> str:
        return f"nf={self.nf}, nx={self.nx}, {self.mask_extra_repr()}"
