"""MaskedConv2d: nn.Conv2d with a trained mask over its weight."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subnet_kernels.backends.base import ConvArgs
from subnet_kernels.masks import MaskKind
from subnet_kernels.ops import checks
from subnet_kernels.ops.masked_conv import (
    check_fits,
    check_masked_conv2d,
    resolve_conv_args,
    run_masked_conv2d,
)
from subnet_kernels.ops.masked_linear import Settings

from .base import MaskedLayer, Unit
from .convert import from_layer, to_layer

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class MaskedConv2d(MaskedLayer, nn.Conv2d):
    """nn.Conv2d whose weight is ``weight * mask(scores)``: ``F.conv2d(x, weight * sigmoid(beta*scores), bias, ...)``.

    Args:
        in_channels ... dtype: as nn.Conv2d, every padding and padding_mode included.
        kind, score_init: as MaskedLinear.
        unit: "weight", "row" (one score per filter), "column" (per input channel), "head:H", or four block sizes.

    Raises:
        ValueError: as MaskedLinear.

    Example:
        >>> import torch
        >>> MaskedConv2d(3, 8, 3, unit="row").scores.shape
        torch.Size([8, 1, 1, 1])
    """

    base_class = nn.Conv2d
    op = "masked_conv2d"

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1, padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1, groups: int = 1, bias: bool = True, padding_mode: PaddingMode = "zeros", *,
        kind: str | MaskKind = "sigmoid", score_init: float = -0.1, unit: Unit = "weight",
        device: Any = None, dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
            device=device, dtype=dtype,
        )  # fmt: skip
        self._add_mask(kind, score_init, unit)

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, **kwargs: Any) -> MaskedConv2d:
        """As MaskedLinear.from_linear, for exactly an nn.Conv2d."""
        return from_layer(cls, conv, **kwargs)

    def to_conv2d(self, hard: bool = True) -> nn.Conv2d:
        """As MaskedLinear.to_linear."""
        return to_layer(self, hard)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, scores = self.weight, self.bias, self.scores
        if self._state.is_disabled:
            return nn.Conv2d.forward(self, x)
        if self._given is not None:
            return self._conv_forward(x, self._take_given(), bias)
        is_single = x.dim() == 3
        if (args := self._args_of_ordinary(x)) is None:
            cast_to = checks.autocast_dtype(x)
            x, bias = checks.cast_for_autocast(x, cast_to), checks.cast_for_autocast(bias, cast_to)
            check_masked_conv2d(x, weight, scores, bias, self.groups, cast_to is not None)
            padding = self.padding
            if self.padding_mode != "zeros":
                x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
            x, args = resolve_conv_args(
                x.unsqueeze(0) if is_single else x, weight, self.stride, padding, self.dilation, self.groups
            )
            check_fits(x, weight, args)
        beta = self._state.beta
        collects = self._collects()
        settings = Settings(self.current_kind, self.plan, None, self._slot, collects, self._state.pending)
        out = run_masked_conv2d(x, weight, scores, beta, bias, args, settings)
        if collects:
            out, penalty = out
            self._collect(penalty)
        return out.squeeze(0) if is_single else out

    def _args_of_ordinary(self, x: Tensor) -> ConvArgs | None:
        """The geometry for an input that needs no look: a batch of weight's dtype with the right channels, larger than
        the kernel, zero padding in numbers, fp32 scores, no autocast. None for others: the checks then say more."""
        weight, padding, dilation = self.weight, self.padding, self.dilation
        if (
            isinstance(padding, str) or self.padding_mode != "zeros" or x.dim() != 4 or x.dtype != weight.dtype
            or self.scores.dtype != torch.float32 or torch._C._is_any_autocast_enabled()
        ):
            return None
        _, channels, height, width = x.shape
        _, per_group, kernel_height, kernel_width = weight.shape
        if (
            channels != per_group * self.groups or height <= dilation[0] * kernel_height
            or width <= dilation[1] * kernel_width
        ):
            return None
        return ConvArgs(self.stride, padding, dilation, self.groups)  # pyright: ignore[reportArgumentType]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.mask_extra_repr()}"
