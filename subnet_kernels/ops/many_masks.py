"""G masks over one frozen weight: scores ``[G, *unit shape]``, effective weights ``[G, *weight.shape]``, penalties [G].

One pass makes all effective weights (the weight comes from memory once), one batched product serves all masks, and one
pass turns the gradients of the effective weights into those of the scores. Mask g sees the g-th 1/G of the batch and
no other; with a shared input all masks see the same rows, which are read once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.base import ConvArgs
from . import checks


def check_batch_of_masks(op: str, x: Tensor, num_masks: int, is_shared: bool, min_dims: int) -> None:
    """x has a batch dimension in front, and, unless it is shared, one that G parts share evenly.

    Raises:
        ValueError: it has not.
    """
    if x.dim() < min_dims:
        raise ValueError(
            f"{op}: beside scores with {num_masks} masks x needs a batch dimension in front, got shape "
            f"{checks.shape_of(x)}"
        )
    if not is_shared and x.shape[0] % num_masks:
        raise ValueError(
            f"{op}: x's first dimension must be a multiple of the {num_masks} masks (mask g serves the g-th part of "
            f"the batch), got shape {checks.shape_of(x)}; pass shared_input=True where all masks see the same rows"
        )


def check_shared_input(op: str, is_shared: bool) -> None:
    """Only several masks can share an input."""
    if is_shared:
        raise ValueError(f"{op}: shared_input=True needs scores with a leading dimension of masks")


def check_plan_of_masks(op: str, plan: str | None) -> None:
    """Plans that keep no effective weight are not built for several masks."""
    if plan not in (None, "cached"):
        raise NotImplementedError(
            f"{op}: plan {plan!r} is not built for scores with several masks; leave plan None, or call once per mask"
        )


def conv2d_of_masks(x: Tensor, w_eff: Tensor, bias: Tensor | None, args: ConvArgs, is_shared: bool) -> Tensor:
    """[G*B, C, H, W] with w_eff [G, O, C/groups, h, w] to [G*B, O, H', W']; a shared x is [B, C, H, W]."""
    geometry = (args.stride, args.padding, args.dilation)
    num, filters = w_eff.shape[:2]
    if is_shared and args.groups == 1:  # one convolution with all filters
        wide = F.conv2d(x, w_eff.flatten(0, 1), None if bias is None else bias.repeat(num), *geometry)
        return wide.unflatten(1, (num, filters)).movedim(1, 0).flatten(0, 1)
    parts = [x] * num if is_shared else x.chunk(num)
    outs = [F.conv2d(part, w, bias, *geometry, args.groups) for part, w in zip(parts, w_eff.unbind(), strict=True)]
    return torch.cat(outs)
