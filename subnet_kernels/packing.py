"""Masks at one bit per weight.

Layout, the same in files and in memory: element i of the C-order mask is bit ``i % 8`` (least significant first) of
byte ``i // 8``; the bits after the last element are zero. The strides of the mask's tensor play no role.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .backends import native

# Row b holds the eight bools of byte b, read as one int64: unpacking on the CPU is then a gather of n/8 words, about
# 25 us for 200,000 elements, where shifting and comparing every element takes ten times as long.
_BYTE_TO_BOOLS = ((torch.arange(256, device="cpu")[:, None] >> torch.arange(8, device="cpu")) & 1).bool()
_BYTE_TO_WORD = _BYTE_TO_BOOLS.view(torch.int64).reshape(256)


def pack_mask(mask: Tensor) -> Tensor:
    """Return ``packed[i // 8] = sum over i of mask.flatten()[i] << (i % 8)``: the mask at one bit per element.

    Equals ``numpy.packbits(mask.numpy().ravel(), bitorder="little")``.

    Args:
        mask: bool, any shape and strides (also empty or 0-d), any device.

    Returns:
        uint8 ``[ceil(mask.numel() / 8)]`` on the mask's device, in the C order of the mask's shape, padding bits zero.

    Raises:
        TypeError: ``mask`` is not a bool tensor.

    >>> pack_mask(torch.tensor([[True, False, True], [False, False, False], [False, False, True]])).tolist()
    [5, 1]
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(
            f"pack_mask: mask must be a bool tensor, got {_describe(mask)}; threshold it first (scores > 0)"
        )
    if native.serves(mask):
        return torch.ops.subnet_native.pack_mask(mask.contiguous())
    flat = mask.reshape(-1)
    bits = torch.nn.functional.pad(flat.to(torch.uint8), (0, -flat.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(dim=1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the bool mask with ``mask.flatten()[i] = (packed[i // 8] >> (i % 8)) & 1``: the inverse of `pack_mask`.

    Args:
        packed: uint8 ``[ceil(n / 8)]`` with n the product of ``shape``, any device.
        shape: sizes of the mask (non-negative integers; ``()`` for a 0-d mask).

    Returns:
        bool, contiguous, of shape ``shape``, on the device of ``packed``.

    Raises:
        TypeError: ``packed`` is not uint8, or ``shape`` not a sequence of integers.
        ValueError: ``packed`` has another size than ``shape`` needs, or a padding bit is set (the bytes are damaged or
            belong to another shape). The check of the padding reads one byte, so it waits for the device.

    >>> unpack_mask(torch.tensor([5, 1], dtype=torch.uint8), (3, 3)).int().tolist()
    [[1, 0, 1], [0, 0, 0], [0, 0, 1]]
    """
    sizes = _checked_sizes(shape)
    num = math.prod(sizes)
    if not isinstance(packed, Tensor) or packed.dtype != torch.uint8:
        raise TypeError(f"unpack_mask: packed must be a uint8 tensor as pack_mask returns, got {_describe(packed)}")
    if packed.ndim != 1 or packed.numel() != (num + 7) // 8:
        raise ValueError(
            f"unpack_mask: packed must have shape [{(num + 7) // 8}] for a mask of shape {list(sizes)}, "
            f"got {list(packed.shape)}; pass the shape that the mask was packed with"
        )
    if num % 8 and int(packed[-1]) >> (num % 8):
        raise ValueError(
            f"unpack_mask: the padding bits after the {num} elements of shape {list(sizes)} must be zero, "
            f"got last byte {int(packed[-1]):#04x}; the bytes are damaged or belong to another shape"
        )
    return unpack_bits(packed, num).view(sizes)


def unpack_bits(packed: Tensor, num: int) -> Tensor:
    """Return the first ``num`` bits of ``packed`` as a bool tensor ``[num]``: `unpack_mask` without any check.

    Args:
        packed: uint8 ``[ceil(num / 8)]``.
        num: elements of the mask.
    """
    if native.serves(packed):
        return torch.ops.subnet_native.unpack_mask(packed.contiguous(), num)
    if packed.device.type == "cpu":
        return torch.index_select(_BYTE_TO_WORD, 0, packed.to(torch.int32)).view(torch.bool)[:num]
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[:, None] >> shifts) & 1).bool().view(-1)[:num]


def _checked_sizes(shape: Sequence[int]) -> tuple[int, ...]:
    is_sizes = isinstance(shape, (tuple, list)) and all(isinstance(n, int) and not isinstance(n, bool) for n in shape)
    if not is_sizes:
        raise TypeError(f"unpack_mask: shape must be a sequence of integers, got {shape!r}; pass mask.shape")
    if any(n < 0 for n in shape):
        raise ValueError(f"unpack_mask: shape must hold non-negative sizes, got {list(shape)}")
    return tuple(shape)


def _describe(value: object) -> str:
    return f"a {value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__
