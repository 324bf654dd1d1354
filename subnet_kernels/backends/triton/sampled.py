"""Sampled masks, made again wherever they are needed: thresholds, effective weights and score gradients.

thresholds = ceil(2^16 * sigmoid(beta*s) - 1/2)              reads s 4, writes 2 bytes a weight
w_eff[g] = weight * 1[draw[g] < threshold]                   reads weight and threshold once, writes w_eff for each mask
grad_scores += weight * sum over g of grad_w_eff[g] * slope  reads grad_w_eff once, the rest once for all masks

One Philox call gives the draws of eight columns of a mask (philox.py); seed and step are read from the device's memory,
so that a captured CUDA graph draws anew at every replay. weight, thresholds, scores and grad_scores are contiguous
[rows, columns], w_eff and grad_w_eff [masks, rows, columns]. Arithmetic in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...masks import Gumbel, SampledKind
from ...random import check_samples, rows_and_columns
from ..base import Backend
from . import configs
from .launch import on_device_of
from .mask import SIGMOID, mask_slope, mask_value
from .philox import random_eights


@triton.jit
def keep_thresholds_kernel(scores, beta, thresholds, num, BLOCK: tl.constexpr):
    """masks.keep_thresholds over the flat range of scores; 0 where a score is NaN."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num
    m = mask_value(tl.load(scores + at, mask=inside, other=0.0), tl.load(beta), SIGMOID)
    kept = tl.ceil(65536.0 * m - 0.5)
    kept = tl.where(kept > 0.0, tl.where(kept < 65535.0, kept, 65535.0), 0.0)
    tl.store(thresholds + at, kept.to(tl.int32).to(tl.uint16), mask=inside)


@triton.jit
def places(columns, groups, num_groups, BLOCK: tl.constexpr):
    """Of a program's BLOCK groups of eight columns, of which a row has ``groups``: (row, group in it, places of their
    weights [BLOCK, 8], whether these exist)."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, group = index // groups, index % groups
    column = group[:, None] * 8 + tl.arange(0, 8)[None, :]
    inside = (index < num_groups)[:, None] & (column < columns)
    return row, group, row.to(tl.int64)[:, None] * columns + column, inside


@triton.jit(do_not_specialize=["first_sample", "num_masks"])
def sampled_weight_kernel(
    weight, thresholds, key, w_eff, num, columns, groups, num_groups, first_sample, num_masks, BLOCK: tl.constexpr
):
    """num: weights of a mask; first_sample: the number of the first mask."""
    row, group, at, inside = places(columns, groups, num_groups, BLOCK)
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    threshold = tl.load(thresholds + at, mask=inside, other=0).to(tl.int32)
    for mask in range(0, num_masks):
        draws = random_eights(key, row, group, first_sample + mask)
        masked = w * tl.where(draws < threshold, 1.0, 0.0)
        tl.store(w_eff + at, masked.to(w_eff.dtype.element_ty), mask=inside)
        w_eff += num


@triton.jit(do_not_specialize=["first_sample", "num_masks"])
def sampled_grad_scores_kernel(
    grad_w_eff, weight, scores, beta, key, grad_scores, tau, num, columns, groups, num_groups, first_sample, num_masks,
    HAS_NOISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """HAS_NOISE: the slope is that of sigmoid((z + noise)/tau), else that of sigmoid(z)."""
    row, group, at, inside = places(columns, groups, num_groups, BLOCK)
    score = tl.load(scores + at, mask=inside, other=0.0)
    inverse_temperature = tl.load(beta)
    total = tl.zeros_like(score)
    for mask in range(0, num_masks):
        grad = tl.load(grad_w_eff + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_NOISE:
            u = random_eights(key, row, group, first_sample + mask).to(tl.float32) + 0.5  # times 2^16
            noise = tl.log((65536.0 - u) / u)
            grad *= mask_slope(inverse_temperature * score + noise, 1.0 / tau, SIGMOID)
        total += grad
        grad_w_eff += num
    if HAS_NOISE:
        total *= inverse_temperature
    else:
        total *= mask_slope(score, inverse_temperature, SIGMOID)
    total *= tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad_scores + at, tl.load(grad_scores + at, mask=inside, other=0.0) + total, mask=inside)


def _launch(kernel: Any, kind: SampledKind, shape: torch.Size, *arguments: Any, **options: Any) -> None:
    """A program for each configs.SAMPLED.block groups of eight columns of a mask."""
    rows, columns = rows_and_columns(shape)
    check_samples(kind.sample, kind.samples)
    groups, config = triton.cdiv(columns, 8), configs.SAMPLED
    num_groups = rows * groups
    if num_groups >= 2**31 - config.block:
        raise ValueError(f"sampled masks: a weight may have 2^31 groups of eight columns, got shape {list(shape)}")
    if num_groups:
        kernel[(triton.cdiv(num_groups, config.block),)](
            *arguments, rows * columns, columns, groups, num_groups, kind.sample, kind.samples, **options,
            BLOCK=config.block, num_warps=config.num_warps,
        )  # fmt: skip


class TritonSampled(Backend):
    """The methods of TritonBackend for sampled masks (what that refuses does not come here)."""

    def keep_thresholds(self, scores: Tensor, beta: Tensor, kind: SampledKind) -> Tensor:
        scores, config = scores.contiguous(), configs.ELEMENTWISE
        thresholds = torch.empty_like(scores, dtype=torch.uint16)
        if num := scores.numel():
            with on_device_of(scores):
                keep_thresholds_kernel[(triton.cdiv(num, config.block),)](
                    scores, beta, thresholds, num, config.block, num_warps=config.num_warps
                )
        return thresholds

    def sampled_weights(
        self, weight: Tensor, scores: Tensor, thresholds: Tensor | None, beta: Tensor, kind: SampledKind, out: Tensor
    ) -> None:
        assert out.is_contiguous() and out.numel() == kind.samples * weight.numel()
        if thresholds is None:
            thresholds = self.keep_thresholds(scores, beta, kind)
        with on_device_of(weight):
            given = weight.contiguous(), thresholds, kind.key, out
            _launch(sampled_weight_kernel, kind, weight.shape, *given)
        torch.autograd.graph.increment_version(out)

    def sampled_grad_scores_of_all_(
        self, grad_scores: Tensor, grad_w_eff: Tensor, weight: Tensor, scores: Tensor, beta: Tensor, kind: SampledKind
    ) -> None:
        assert grad_scores.is_contiguous() and grad_w_eff.numel() == kind.samples * weight.numel()
        has_noise, tau = (True, kind.tau) if isinstance(kind, Gumbel) else (False, 1.0)
        with on_device_of(weight):
            tensors = grad_w_eff.contiguous(), weight.contiguous(), scores.contiguous()
            given = *tensors, beta, kind.key, grad_scores, tau
            _launch(sampled_grad_scores_kernel, kind, weight.shape, *given, HAS_NOISE=has_noise)
        torch.autograd.graph.increment_version(grad_scores)

    sampled_weight, sampled_grad_scores_ = sampled_weights, sampled_grad_scores_of_all_  # of one sample: the same
