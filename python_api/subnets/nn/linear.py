"""MaskedLinear: nn.Linear with a trained mask over its weight."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subnet_kernels.masks import MaskKind
from subnet_kernels.ops import checks
from subnet_kernels.ops.masked_linear import (
    Settings,
    check_masked_linear,
    run_masked_linear,
)

from .base import MaskedLayer, Unit
from .convert import from_layer, to_layer


class MaskedLinear(MaskedLayer, nn.Linear):
    """nn.Linear whose weight is ``weight * mask(scores)``: ``F.linear(x, weight * sigmoid(beta*scores), bias)``.

    A subclass of nn.Linear; ``.weight`` is the base weight, and base state_dict keys stay. A fresh MaskedLinear trains
    all its parameters; :func:`subnets.mask_model` freezes all but the scores.

    Args:
        in_features, out_features, bias, device, dtype: as nn.Linear.
        kind: "sigmoid" or a MaskKind.
        score_init: the initial score (finite). At beta 1, -0.1 gives a mask of .475, dropped unless training raises it.
        unit: what one score governs: "weight", "row" (output unit), "column" (input unit), "head:H", or a pair of
            block sizes.

    Raises:
        ValueError: a non-finite score_init, an unknown kind, a unit that does not divide the weight.

    Example:
        >>> layer = MaskedLinear(3, 2, score_init=0.0)
        >>> layer.mask().unique().item()
        0.5
    """

    base_class = nn.Linear

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, kind: str | MaskKind = "sigmoid",
        score_init: float = -0.1, unit: Unit = "weight", device: Any = None, dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._add_mask(kind, score_init, unit)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **kwargs: Any) -> MaskedLinear:
        """A masked layer that shares ``linear``'s parameters (nothing is copied); ``linear`` itself stays as it is.

        Args:
            linear: exactly an nn.Linear, with finite weights.
            kwargs: kind, score_init (a float or a tensor of scores), unit.
        """
        return from_layer(cls, linear, **kwargs)

    def to_linear(self, hard: bool = True) -> nn.Linear:
        """A new nn.Linear with the masked weight: 1[s > 0] if ``hard``, else the soft mask at the present beta."""
        return to_layer(self, hard)

    def forward(self, x: Tensor) -> Tensor:
        state = self._state
        weight, bias = self.weight, self.bias
        if state.is_disabled:
            return F.linear(x, weight, bias)
        if self._given is not None:
            return F.linear(x, self._take_given(), bias)
        return masked_linear_of(self, x, weight, self.scores, bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.mask_extra_repr()}"


def masked_linear_of(layer: MaskedLayer, x: Tensor, weight: Tensor, scores: Tensor, bias: Tensor | None) -> Tensor:
    """``layer``'s forward pass through the op, with weight and scores as [N, K]."""
    is_plain = x.dtype == weight.dtype and x.shape[-1] == weight.shape[1] and scores.dtype == torch.float32
    if not is_plain or torch._C._is_any_autocast_enabled():
        cast_to = checks.autocast_dtype(x)
        x, bias = checks.cast_for_autocast(x, cast_to), checks.cast_for_autocast(bias, cast_to)
        check_masked_linear(x, weight, scores, bias, cast_to is not None)
    beta = layer._state.beta
    slot = layer._slot
    if not layer._collects():
        return run_masked_linear(
            x, weight, scores, beta, bias, Settings(layer.current_kind, layer.plan, None, slot, False)
        )
    settings = Settings(layer.current_kind, layer.plan, None, slot)
    out, penalty = run_masked_linear(x, weight, scores, beta, bias, settings)
    layer._collect(penalty)
    return out
