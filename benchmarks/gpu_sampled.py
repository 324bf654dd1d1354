"""What gpu_check checks of sampled masks, and how fast they are beside masks drawn by eager PyTorch.

Every check draws fresh inputs from the seed, fills outputs with NaN and returns its worst error as a multiple of the
allowed one. Decisions are integer comparisons, so effective weights are exact; score gradients are compared with fp64.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from subnet_kernels.backends.base import Backend
from subnet_kernels.masks import NUM_DRAWS, Bernoulli, Gumbel, SampledKind, logistic_noise
from subnet_kernels.random import plain_random_bits, rows_and_columns

from .gpu_cuda import DTYPES, Check, Inputs, equal_error, worst_ratio

SHAPES = ((1,), (13,), (7, 1), (1, 15), (33, 131), (48, 64), (6, 4, 3, 3), (0, 5), (3, 0))
LARGE = ((257, 389), (96, 1040))  # a hundred thousand weights; of one pair of dtypes
PAIRS = tuple(itertools.product(DTYPES, DTYPES))
KINDS = (Gumbel(samples=3, sample=4096 * 7 + 5), Gumbel(tau=2 / 3, sample=2**32 - 9), Bernoulli(samples=2))
BETA, U = 3.0, 2.0**-24


def _key(seed: int, device: str) -> Tensor:
    """Both words of the seed are in use; the step counts mod 2^32."""
    return torch.tensor([seed * 0x1_0000_0F01 - 3, 2**32 + 9], device=device)


def plain_draws(kind: SampledKind, shape: Sequence[int]) -> Tensor:
    """int32 [samples, *shape], by random.py's definition."""
    assert kind.key is not None
    seed, step = kind.key.unbind()
    bits = plain_random_bits(seed, step, kind.samples, *rows_and_columns(shape), kind.sample)
    return bits.to(torch.int32).view(kind.samples, *shape)


def threshold_checks(device: str, seed: int, backend: Backend) -> Iterator[Check]:
    """ceil(2^16 p - 1/2) lies within 1/2 of 2^16 p, and p's rounding errors, unless it is clamped."""
    for beta in (0.0, 1.0, BETA, 200.0):
        worst = 0.0
        for i, shape in enumerate((*SHAPES, *LARGE) if beta == BETA else SHAPES):
            scores = Inputs(device, seed + i)(shape, offset=i % 3)
            given = torch.tensor(beta, device=device)
            made = backend.keep_thresholds(scores, given, KINDS[i % 3])
            assert made is not None and made.dtype == torch.uint16 and made.shape == scores.shape
            z = beta * scores.double()
            true = (NUM_DRAWS * torch.sigmoid(z)).clamp(max=NUM_DRAWS - 0.5)
            bound = 0.5 + NUM_DRAWS * 4 * U * torch.sigmoid(z) * (1 + z.abs())
            worst = max(worst, worst_ratio(made.to(torch.int32), true, bound))
        yield f"{backend.name}, thresholds, beta {beta:g}", worst


def decision_checks(
    device: str, seed: int, backend: Backend, large: Sequence[tuple[int, ...]] = LARGE,
    dtypes: Sequence[tuple[str, str]] = PAIRS,
) -> Iterator[Check]:
    """Effective weights for given thresholds are plain PyTorch's to the bit: all samples in one call and one by one,
    misaligned memory, thresholds of 0 and 2^16 - 1. Weights are numbers of both dtypes."""
    beta = torch.tensor(BETA, device=device)
    for number, (w_name, o_name) in enumerate(dtypes):
        w_dtype, o_dtype, pairs = DTYPES[w_name], DTYPES[o_name], []
        for i, shape in enumerate((*SHAPES, *large) if number == 0 else SHAPES):
            randn, kind = Inputs(device, seed + i), KINDS[i % 3].at(_key(seed, device))
            weight, scores = randn(shape, w_dtype, i % 3), randn(shape)
            weight.copy_(weight.to(o_dtype))
            high = torch.randint(-1, NUM_DRAWS + 1, shape, generator=randn.generator, device=device)
            thresholds = high.clamp(0, NUM_DRAWS - 1).to(torch.int32)
            is_kept = plain_draws(kind, shape) < thresholds
            wanted = (weight.float() * is_kept).to(o_dtype)
            memory = torch.full((wanted.numel() + 1,), float("nan"), dtype=o_dtype, device=device)
            out = memory[i % 2 :][: wanted.numel()].view(wanted.shape)
            given = thresholds.to(torch.uint16)
            backend.sampled_weights(weight, scores, given, beta, kind, out)
            pairs.append((out.clone(), wanted))
            for one, apart, true in zip(kind.each(), out.fill_(float("nan")), wanted, strict=True):
                backend.sampled_weight(weight, scores, given, beta, one, apart)
                pairs.append((apart, true))
        yield f"{backend.name}, sampled weights, {w_name} to {o_name}", equal_error(pairs)


def slopes(kind: SampledKind, scores: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """In fp64, [samples, ...]: dm/ds, and by how much of it fp32 arithmetic may be off."""
    z = beta * scores.double().expand(kind.samples, *scores.shape)
    if not isinstance(kind, Gumbel):
        return beta * torch.sigmoid(z) * torch.sigmoid(-z), U * (16 + 4 * z.abs())
    noise = logistic_noise(plain_draws(kind, scores.shape), torch.float64)
    y = (z + noise) / kind.tau
    slope = beta * torch.sigmoid(y) * torch.sigmoid(-y) / kind.tau
    return slope, U * (16 + (12 * (1 + noise.abs()) + 4 * z.abs()) / kind.tau + 4 * y.abs())


def grad_checks(
    device: str, seed: int, backend: Backend, large: Sequence[tuple[int, ...]] = LARGE,
    dtypes: Sequence[tuple[str, str]] = PAIRS,
) -> Iterator[Check]:
    """Score gradients, added to what is there: all samples in one call and one by one."""
    beta = torch.tensor(BETA, device=device)
    for number, (g_name, w_name) in enumerate(dtypes):
        g_dtype, w_dtype, worst = DTYPES[g_name], DTYPES[w_name], 0.0
        for i, shape in enumerate((*SHAPES, *large) if number == 0 else SHAPES):
            randn, kind = Inputs(device, seed + i), KINDS[(i + 1) % 3].at(_key(seed, device))
            weight, scores, before = randn(shape, w_dtype, i % 3), randn(shape), randn(shape, offset=i % 2)
            grads = randn((kind.samples, *shape), g_dtype)
            slope, off = slopes(kind, scores, BETA)
            parts = grads.double() * weight.double() * slope
            total = before.double() + parts.sum(0)
            bound = (parts.abs() * off).sum(0) + 1e-28  # a slope below 2^-100 is 0
            bound += (kind.samples + 3) * U * (parts.abs().sum(0) + before.double().abs())
            together, apart = before.clone(), before.clone()
            backend.sampled_grad_scores_of_all_(together, grads, weight, scores, beta, kind)
            for one, grad in zip(kind.each(), grads, strict=True):
                backend.sampled_grad_scores_(apart, grad, weight, scores, beta, one)
            worst = max(worst, worst_ratio(together, total, bound), worst_ratio(apart, total, bound))
        yield f"{backend.name}, sampled score gradients, gradients {g_name}, weights {w_name}", worst


def checks(
    device: str, seed: int, backend: Backend, large: Sequence[tuple[int, ...]] = LARGE,
    dtypes: Sequence[tuple[str, str]] = PAIRS,
) -> Iterator[Check]:
    """All of them on one backend. dtypes: names, of weights and what is made of them."""
    yield from threshold_checks(device, seed, backend)
    yield from decision_checks(device, seed, backend, large, dtypes)
    yield from grad_checks(device, seed, backend, large, dtypes)
