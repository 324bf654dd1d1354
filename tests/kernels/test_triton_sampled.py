"""Sampled masks on the Triton backend: in Triton's interpreter where there is no GPU (see test_triton.py)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import subnet_kernels as sk
from benchmarks import gpu_sampled
from subnet_kernels.backends.triton import TritonBackend, load_error
from subnet_kernels.dispatch import BackendRefused
from subnet_kernels.masks import Bernoulli, Gumbel, HardConcrete

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if load_error() is not None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if DEVICE == "cpu" and not TritonBackend._is_interpreted():
    pytest.skip("no GPU: `make test` runs this file interpreted, in a process of its own", allow_module_level=True)

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from subnet_kernels.backends.triton import configs  # noqa: E402
from subnet_kernels.backends.triton.philox import random_eights  # noqa: E402
from subnet_kernels.random import plain_random_bits  # noqa: E402

pytestmark = pytest.mark.gpu
SOME_DTYPES = [("fp32", "fp32"), ("bf16", "fp16"), ("fp16", "bf16")]


@triton.jit
def draws_kernel(key, out, first_sample, groups, num, BLOCK: tl.constexpr):
    """out int32 [samples, rows, groups * 8], num draws a sample"""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    draws = random_eights(key, index // groups, index % groups, tl.program_id(1) + first_sample)
    at = tl.program_id(1).to(tl.int64) * num + index[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(out + at, draws)


def draws_of(key, sample, samples, rows, groups, block):
    out = torch.full((samples, rows, groups * 8), -1, dtype=torch.int32, device=DEVICE)
    draws_kernel[(rows * groups // block, samples)](key, out, sample, groups, rows * groups * 8, block)
    return out


@pytest.fixture
def large_blocks(monkeypatch):
    """The interpreter's time goes by programs, not by weights."""
    if DEVICE == "cpu":
        monkeypatch.setattr(configs, "SAMPLED", replace(configs.SAMPLED, block=2048))
        monkeypatch.setattr(configs, "ELEMENTWISE", replace(configs.ELEMENTWISE, block=8192))


@pytest.mark.parametrize("seed, step, sample", [(0, 0, 0), (-7, 2**32 + 5, 4096 * 9), (2**62 + 3, -1, 2**32 - 3)])
def test_draws_are_those_of_the_python_definition_to_the_bit(seed, step, sample):
    key = torch.tensor([seed, step], device=DEVICE)
    wanted = plain_random_bits(key[0], key[1], 2, 256, 256, sample).to(torch.int32)
    assert torch.equal(draws_of(key, sample, 2, 256, 32, 1024), wanted)


@pytest.mark.usefixtures("large_blocks")
def test_thresholds_decisions_and_gradients_are_within_their_bounds():
    checks = list(gpu_sampled.checks(DEVICE, 5, TritonBackend(), dtypes=SOME_DTYPES))
    assert len(checks) == 4 + 3 + 3
    assert {name: ratio for name, ratio in checks if not ratio <= 1} == {}
    assert min(ratio for name, ratio in checks if "gradients" in name) > 0.01  # it does measure


def test_blocks_of_the_shipped_size_change_nothing():
    checks = [*gpu_sampled.decision_checks(DEVICE, 6, TritonBackend(), (), SOME_DTYPES[:1])]
    checks += gpu_sampled.grad_checks(DEVICE, 6, TritonBackend(), (), SOME_DTYPES[:1])
    assert {name: ratio for name, ratio in checks if not ratio <= 1} == {}


@pytest.mark.parametrize("kind", [Gumbel(tau=0.5, samples=2), Bernoulli(samples=4)], ids=repr)
def test_layers_give_the_reference_outputs_and_gradients(kind):
    generator = torch.Generator().manual_seed(3)
    x, weight, scores = (
        torch.randn(shape, generator=generator).to(DEVICE).requires_grad_() for shape in ((8, 19), (5, 19), (5, 19))
    )
    key, grads = torch.tensor([4, 2], device=DEVICE), {}
    for name in ("reference", "triton"):
        out, penalty = sk.masked_linear(x, weight, scores, 2.0, kind=kind, key=key, backend=name)
        made = torch.autograd.grad((out * out).sum() + 0.1 * penalty, (x, weight, scores))
        with sk.use_backend(name):
            w_eff, _ = sk.effective_weight(weight, scores, 2.0, kind=kind, key=key)
        (of_w_eff,) = torch.autograd.grad((w_eff * w_eff * w_eff).sum(), scores)
        grads[name] = [out, penalty, w_eff, of_w_eff, *made]
    for of_triton, of_reference in zip(grads["triton"], grads["reference"], strict=True):
        assert (of_triton - of_reference).abs().max() <= 1e-5 * of_reference.abs().max()
        assert of_reference.abs().max() > 0.1


def test_what_it_does_not_draw_is_refused_in_words_and_explained():
    weight, key = torch.ones(4, 4, device=DEVICE), torch.tensor([1, 2], device=DEVICE)
    whole, rows = torch.zeros(4, 4, device=DEVICE), torch.zeros(4, 1, device=DEVICE)
    refusals = {
        "kind 'hard_concrete' is not drawn here": (whole, HardConcrete()),
        "sampled masks of units are not built here": (rows, Gumbel()),
    }
    for reason, (scores, kind) in refusals.items():
        with (
            sk.use_backend("triton"),
            pytest.raises(BackendRefused, match=f"backend 'triton' refused sampled_weight: {reason}"),
        ):
            sk.effective_weight(weight, scores, 1.0, kind=kind, key=key)
        said = sk.explain("effective_weight", weight, scores, 1.0, kind=kind, key=key, backend="triton")
        assert reason in said and "no backend runs it" in said
    said = sk.explain("masked_linear", weight, weight, whole, 1.0, kind=Gumbel(samples=2), key=key, backend="triton")
    assert "backend triton" in said and "drawn again for each product" in said
