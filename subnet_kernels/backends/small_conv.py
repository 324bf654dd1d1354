"""Convolutions of small images on a CPU, as matrix products.

Where a layer has about as many filters as its output has places (batch, rows and columns together), as in the last
stages of a ResNet, the vendor's convolution spends its time on rearranging weights. As products of the columns (for
each place of the output, the part of x that its filters see) such a layer is 1.2 to 7 times faster:

    out = columns @ W.T        dcolumns = dout @ W        dW = dout.T @ columns

W [O, KH*KW*C] is the weight's memory in channels_last, and so is dW. Places times KH*KW*C is at most twice the weight's
size, and so is what columns and dcolumns take, for one product each.
Source: Chellapilla, Puri, Simard, "High Performance Convolutional Neural Networks for Document Processing", 2006.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .base import ConvArgs

FEWEST_WEIGHTS = 1 << 16  # below, the calls of the columns' copies are all that counts
# Places per filter, forward and backward of one layer, vendor's time / ours on one thread (AVX-512, AMX; fp32, bf16):
# 0.25: 3.6, 7.0 (512x512x3x3); 2: 1.17, 2.4 (256x256x3x3, 256x128x3x3); 16: 0.56, 0.81 (128x128x3x3)
MOST_PLACES = 2


def serves(x: Tensor, weight: Tensor, args: ConvArgs) -> bool:
    """Whether a convolution is to run here."""
    if (
        args.groups != 1 or weight.numel() < FEWEST_WEIGHTS or x.dtype not in (torch.float32, torch.bfloat16)
        or weight.dtype != x.dtype or x.is_contiguous()
        or not x.is_contiguous(memory_format=torch.channels_last)
        or not weight.is_contiguous(memory_format=torch.channels_last)
    ):  # fmt: skip
        return False
    height, width = _out_size(x, weight, args)
    return 0 < x.shape[0] * height * width <= MOST_PLACES * weight.shape[0]


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, args: ConvArgs) -> Tensor:
    """F.conv2d of what serves() accepts: x [B, C, H, W], weight [O, C, KH, KW], out [B, O, OH, OW] in channels_last."""
    columns, matrix = _columns(x, weight, args), _matrix(weight)
    out = columns.mm(matrix.t()) if bias is None else torch.addmm(bias, columns, matrix.t())
    return out.view(x.shape[0], *_out_size(x, weight, args), weight.shape[0]).permute(0, 3, 1, 2)


def conv2d_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, args: ConvArgs, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Its gradients (x, weight, bias), those of x and weight in channels_last. In bf16 the parts of x's gradient are
    rounded before they are added up, in fp32."""
    rows = grad_out.permute(0, 2, 3, 1).reshape(-1, weight.shape[0])
    grad_x = grad_weight = grad_bias = None
    if wanted[0]:
        parts = _by_place(rows.mm(_matrix(weight)), x, weight, args)
        dtype = torch.promote_types(x.dtype, torch.float32)
        total = torch.zeros(x.permute(0, 2, 3, 1).shape, dtype=dtype, device=x.device)
        for of_x, of_columns in _taps(x, weight, args):
            total[of_x] += parts[of_columns]
        grad_x = total.to(x.dtype).permute(0, 3, 1, 2)
    if wanted[1]:
        out, channels, height, width = weight.shape
        product = rows.t().mm(_columns(x, weight, args))
        grad_weight = product.view(out, height, width, channels).permute(0, 3, 1, 2)
    if wanted[2]:
        grad_bias = rows.sum(0)
    return grad_x, grad_weight, grad_bias


def _out_size(x: Tensor, weight: Tensor, args: ConvArgs) -> tuple[int, int]:
    height, width = (
        (x.shape[2 + i] + 2 * args.padding[i] - args.dilation[i] * (weight.shape[2 + i] - 1) - 1) // args.stride[i] + 1
        for i in (0, 1)
    )
    return height, width


def _matrix(weight: Tensor) -> Tensor:
    return weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1)


def _by_place(columns: Tensor, x: Tensor, weight: Tensor, args: ConvArgs) -> Tensor:
    """[places, KH*KW*C] as [B, OH, OW, KH, KW, C]"""
    return columns.view(x.shape[0], *_out_size(x, weight, args), *weight.shape[2:], weight.shape[1])


def _columns(x: Tensor, weight: Tensor, args: ConvArgs) -> Tensor:
    """For each place of the output, what its filters see of x, zero where that is padding: [places, KH*KW*C]."""
    height, width = _out_size(x, weight, args)
    columns = x.new_zeros(x.shape[0] * height * width, weight[0].numel())
    by_place, images = _by_place(columns, x, weight, args), x.permute(0, 2, 3, 1)
    for of_x, of_columns in _taps(x, weight, args):
        by_place[of_columns] = images[of_x]
    return columns


def _taps(x: Tensor, weight: Tensor, args: ConvArgs) -> Iterator[tuple[tuple, tuple]]:
    """For each position in the filter: where it lies in x [B, H, W, C] and in the columns [B, OH, OW, KH, KW, C]."""
    size = _out_size(x, weight, args)
    pairs = [[_tap(at, x.shape[2 + i], size[i], args, i) for at in range(weight.shape[2 + i])] for i in (0, 1)]
    for i, (rows, out_rows) in enumerate(pairs[0]):
        for j, (columns, out_columns) in enumerate(pairs[1]):
            yield (slice(None), rows, columns), (slice(None), out_rows, out_columns, i, j)


def _tap(at: int, size: int, out_size: int, args: ConvArgs, dim: int) -> tuple[slice, slice]:
    """Along one dimension, the places in x and in the output that meet at position ``at`` of the filter: out * stride +
    first is in x."""
    stride, first = args.stride[dim], at * args.dilation[dim] - args.padding[dim]
    begin = max(0, -(first // stride))  # the first output place whose place in x is not before its edge
    end = max(begin, min(out_size, (size - 1 - first) // stride + 1))
    if begin == end:
        return slice(0, 0), slice(0, 0)
    return slice(begin * stride + first, (end - 1) * stride + first + 1, stride), slice(begin, end)
