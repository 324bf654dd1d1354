"""Many bit masks over one weight: several subnetworks evaluated side by side, a bit of memory per weight for each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import native
from ..backends.base import as_matrix
from ..packing import unpack_mask
from . import checks

_BLOCK = 1 << 18  # weights of a block, which with its masked copy fits a core's cache


def packed_weight(weight: Tensor, packed: Tensor, out: Tensor) -> None:
    """out = weight where its bit is set, else 0; contiguous, alike in shape."""
    if native.serves(weight) and weight.dtype != torch.float64:
        torch.ops.subnet_native.packed_weight(weight, packed, out)
    else:
        torch.mul(weight, unpack_mask(packed, tuple(weight.shape)), out=out)


def packed_linear(
    x: Tensor, weight: Tensor, packed: Tensor, bias: Tensor | None = None, *, shared_input: bool = False
) -> Tensor:
    """``F.linear(x_t, weight * mask_t, bias)`` for T bit masks over one weight, without their effective weights: one
    exists at a time. For evaluation: there is no gradient.

    Args:
        x: [T*B, ..., K] in weight's dtype (autocast casts both): mask t serves the t-th B of the first dimension; or
            [B, ..., K] with ``shared_input``, which all masks see.
        weight: [N, K].
        packed: uint8 [T, ceil(N*K/8)], each row what ``pack_mask`` gives for a bool [N, K].
        bias: [N] or None.
        shared_input: whether x is one batch for all masks.

    Returns:
        [T*B, ..., N], the masks' parts one after the other.

    Raises:
        ValueError, TypeError: an argument does not fit.
        RuntimeError: a gradient would be wanted.

    Example:
        >>> import torch
        >>> from subnet_kernels import pack_mask
        >>> masks = [torch.tensor([[True, False]]), torch.tensor([[False, True]])]
        >>> packed = torch.stack([pack_mask(mask) for mask in masks])
        >>> packed_linear(torch.ones(2, 2), torch.tensor([[3.0, 4.0]]), packed).tolist()
        [[3.0], [4.0]]
    """
    op = "packed_linear"
    for name, tensor in (("x", x), ("weight", weight), ("packed", packed)):
        checks.check_tensor(op, name, tensor)
    checks.check_float_dtype(op, "weight", weight)
    cast_to = checks.autocast_dtype(x)
    if cast_to is not None:
        x, weight = checks.cast_for_autocast(x, cast_to), checks.cast_for_autocast(weight, cast_to)
        with torch.autocast(x.device.type, enabled=False):
            bias = checks.cast_for_autocast(bias, cast_to)
            return packed_linear(x, weight, packed, bias, shared_input=shared_input)
    if weight.dim() != 2 or x.dim() < 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: needs weight [N, K] and x [T*B, ..., K], got {checks.shape_of(weight)} and {checks.shape_of(x)}"
        )
    checks.check_x(op, x, weight, False)
    checks.check_bias(op, bias, weight.shape[0], x)
    num_bytes = (weight.numel() + 7) // 8
    if packed.dtype != torch.uint8 or packed.dim() != 2 or packed.shape[1] != num_bytes or not packed.shape[0]:
        raise ValueError(
            f"{op}: packed must be uint8 [T, {num_bytes}], rows of pack_mask for weight {checks.shape_of(weight)}, "
            f"got {packed.dtype} {checks.shape_of(packed)}"
        )
    if packed.device != weight.device:
        raise ValueError(f"{op}: packed must be on weight's device {weight.device}, got {packed.device}")
    num = packed.shape[0]
    if not shared_input and x.shape[0] % num:
        raise ValueError(
            f"{op}: x's first dimension must be a multiple of the {num} masks, got shape {checks.shape_of(x)}; pass "
            "shared_input=True where all masks see the same rows"
        )
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        raise RuntimeError(f"{op}: is for evaluation and has no gradient; call it under torch.no_grad()")
    weight, packed = weight.contiguous(), packed.contiguous()
    parts = [x] * num if shared_input else list(x.chunk(num))
    num_rows, num_columns = weight.shape
    rows = num_rows if weight.is_cuda else max(8, _BLOCK // max(num_columns, 1) // 8 * 8)  # a block begins at a byte
    w_eff = torch.empty_like(weight[: min(rows, num_rows)])
    if rows >= num_rows:
        outs = []
        for part, bits in zip(parts, packed, strict=True):
            packed_weight(weight, bits, w_eff)
            outs.append(F.linear(part, w_eff, bias))
        return torch.cat(outs)
    # W comes from memory once and its masked blocks stay in the cache, the long side of each product being K: few rows
    # of w_eff and of x make a slow F.linear
    columns = [as_matrix(part).t().contiguous() for part in parts]
    out = x.new_empty(num, columns[0].shape[1], num_rows)
    for begin in range(0, num_rows, rows):
        block = weight[begin : begin + rows]
        bits = packed[:, begin * num_columns // 8 : (begin * num_columns + block.numel() + 7) // 8].contiguous()
        for mask in range(num):
            packed_weight(block, bits[mask], w_eff[: len(block)])
            out[mask, :, begin : begin + rows] = torch.mm(w_eff[: len(block)], columns[mask]).t()
    if bias is not None:
        out += bias
    return out.view(num * parts[0].shape[0], *x.shape[1:-1], num_rows)
