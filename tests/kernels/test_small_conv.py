"""Convolutions of small images as matrix products: their numbers against fp64, where they run, and how results lie."""

from __future__ import annotations

import itertools

import pytest
import subnets
import torch
import torch.nn.functional as F
from torch import nn

import subnet_kernels as sk
from subnet_kernels.backends import small_conv
from subnet_kernels.backends.base import ConvArgs
from subnet_kernels.testing import conv_case, ours, worst_errors

CHANNELS_LAST = torch.channels_last
PLAIN = ConvArgs((1, 1), (1, 1), (1, 1), 1)

# (x, weight, geometry), all of at least FEWEST_WEIGHTS weights and few places
SERVED = [
    ((3, 96, 2, 2), (80, 96, 3, 3), {"padding": 1}),
    ((3, 64, 4, 5), (128, 64, 3, 3), {"padding": 1, "stride": 2}),
    ((2, 64, 3, 7), (110, 64, 2, 5), {"padding": (1, 2), "stride": (1, 3), "dilation": (2, 1)}),
    ((5, 256, 4, 4), (300, 256, 1, 1), {"stride": 2}),
    ((1, 96, 9, 9), (80, 96, 3, 3), {"padding": "same"}),
]


@pytest.fixture
def calls(monkeypatch):
    """Which of the two products ran here."""
    made = []
    for name in ("conv2d", "conv2d_backward"):
        function = getattr(small_conv, name)
        monkeypatch.setattr(small_conv, name, lambda *a, f=function, n=name: (made.append(n), f(*a))[1])
    return made


def test_every_geometry_gives_the_convolution_and_its_gradients_in_fp64():
    sizes = [(2, 2), (4, 5), (7, 3)]
    kernels = [(3, 3), (1, 1), (2, 5)]
    count = 0
    for (h, w), (kh, kw), stride, padding, dilation in itertools.product(
        sizes, kernels, [(1, 1), (2, 3)], [(0, 0), (1, 2), (3, 1)], [(1, 1), (2, 1)]
    ):
        if h + 2 * padding[0] <= dilation[0] * (kh - 1) or w + 2 * padding[1] <= dilation[1] * (kw - 1):
            continue
        generator = torch.Generator().manual_seed(count)
        x = torch.randn(3, 4, h, w, dtype=torch.float64, generator=generator).contiguous(memory_format=CHANNELS_LAST)
        weight = torch.randn(6, 4, kh, kw, dtype=torch.float64, generator=generator)
        weight, bias = weight.contiguous(memory_format=CHANNELS_LAST), torch.randn(6, dtype=torch.float64)
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        expected = F.conv2d(*leaves, stride, padding, dilation)  # pyright: ignore[reportCallIssue]
        grad_out = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
        args = ConvArgs(stride, padding, dilation, 1)
        got = small_conv.conv2d(x, weight, bias, args)
        gradients = small_conv.conv2d_backward(grad_out, x, weight, args, (True, True, True))
        for a, b in zip((got, *gradients), (expected, *torch.autograd.grad(expected, leaves, grad_out)), strict=True):
            assert a is not None and a.shape == b.shape
            assert (a - b).abs().max() < 1e-12, (h, w, kh, kw, stride, padding, dilation)
        count += 1
    assert count == 88


@pytest.mark.parametrize("plan", ["cached", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("x_shape, weight_shape, geometry", SERVED, ids=str)
def test_value_and_every_gradient_are_within_the_error_bound(calls, plan, dtype, x_shape, weight_shape, geometry):
    case = conv_case(x_shape, weight_shape, dtype, is_channels_last=True, **geometry)
    worst = worst_errors(case, lambda case: ours(case, backend="cpu", plan=plan))
    assert max(worst.values()) <= 1, worst
    assert calls == ["conv2d", "conv2d_backward"]


def test_scores_of_filters_go_through_it_too(calls):
    x_shape, weight_shape, geometry = SERVED[0]
    case = conv_case(x_shape, weight_shape, scores_shape=(80, 1, 1, 1), is_channels_last=True, **geometry)
    worst = worst_errors(case, lambda case: ours(case, backend="cpu"))
    assert max(worst.values()) <= 1, worst
    assert calls == ["conv2d", "conv2d_backward"]


def test_results_lie_in_channels_last_and_the_weights_gradient_as_the_weight():
    x = torch.randn(3, 96, 4, 2).contiguous(memory_format=CHANNELS_LAST)
    weight = torch.randn(80, 96, 3, 3).contiguous(memory_format=CHANNELS_LAST)
    out = small_conv.conv2d(x, weight, None, PLAIN)
    grad_x, grad_weight, grad_bias = small_conv.conv2d_backward(out, x, weight, PLAIN, (True, True, False))
    assert grad_x is not None and grad_weight is not None
    assert out.stride() == F.conv2d(x, weight, padding=1).stride() == (640, 1, 160, 80)
    assert (grad_x.stride(), grad_weight.stride(), grad_bias) == (x.stride(), weight.stride(), None)


def test_it_serves_few_places_of_many_weights_in_channels_last_only():
    def is_served(x=(8, 128, 4, 4), weight=(64, 128, 3, 3), args=PLAIN, dtype=torch.float32, of_weight=CHANNELS_LAST):
        x = torch.empty(x, dtype=dtype).contiguous(memory_format=CHANNELS_LAST)
        return small_conv.serves(x, torch.empty(weight, dtype=dtype).contiguous(memory_format=of_weight), args)

    assert is_served() and is_served(dtype=torch.bfloat16)  # 128 places, 64 filters: twice as many
    assert not is_served(x=(9, 128, 4, 4))
    assert is_served(x=(32, 128, 4, 4), args=ConvArgs((2, 2), (1, 1), (1, 1), 1))
    assert not is_served(weight=(56, 128, 3, 3), x=(1, 128, 4, 4))  # 64,512 weights
    assert not is_served(weight=(128, 64, 3, 3), args=ConvArgs((1, 1), (1, 1), (1, 1), 2))
    assert not is_served(dtype=torch.float16) and not is_served(dtype=torch.float64)
    assert not is_served(of_weight=torch.contiguous_format)
    assert not is_served(x=(0, 128, 4, 4))
    weight = torch.empty(64, 128, 3, 3).contiguous(memory_format=CHANNELS_LAST)
    assert not small_conv.serves(torch.empty(8, 128, 4, 4), weight, PLAIN)
    assert not small_conv.serves(torch.empty(8, 128, 1, 1), weight, PLAIN)  # its layout is either: as F.conv2d says


def test_a_hard_mask_gives_the_bits_of_the_layer_without_mask(calls):
    x_shape, weight_shape, geometry = SERVED[0]
    case = conv_case(x_shape, weight_shape, is_channels_last=True, kind="hard", **geometry)
    out, _ = sk.masked_conv2d(case.x, case.weight, case.scores, 1.0, case.bias, kind="hard", backend="cpu", padding=1)
    assert torch.equal(out, F.conv2d(case.x, case.weight * (case.scores > 0), case.bias, padding=1)) and not calls


def test_a_compiled_call_is_told_the_right_strides(calls):
    x_shape, weight_shape, geometry = SERVED[0]
    case = conv_case(x_shape, weight_shape, is_channels_last=True, **geometry)
    weight = case.weight.detach().requires_grad_(False)
    scores = torch.empty_like(weight).copy_(case.scores).requires_grad_()
    args = (case.x, weight, scores, torch.tensor(3.0), case.bias, (1, 1), (1, 1), (1, 1), 1, "sigmoid", [], None, None)
    torch.library.opcheck(
        torch.ops.subnet_kernels.masked_conv2d.default, (*args, "cpu", None, None), test_utils="test_faketensor"
    )
    assert calls


@pytest.mark.parametrize("in_backward", [False, True])
def test_layers_train_as_with_the_vendors_convolutions(calls, monkeypatch, in_backward):
    def scores_after_three_steps():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.Conv2d(128, 96, 3, stride=2, padding=1))
        model.to(memory_format=CHANNELS_LAST)  # pyright: ignore[reportCallIssue]
        masks = subnets.mask_model(model, "all-conv")
        masks.anneal(start=1.0, to=2.0, steps=3)
        optimizer = masks.adamw(lr=0.1, lam=1e-4, eps=1e-2, in_backward=in_backward)  # eps: no sign of a tiny gradient
        x = torch.randn(2, 64, 4, 4).contiguous(memory_format=CHANNELS_LAST)
        for _ in range(3):
            (100 * model(x).square().sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
        return [scores.detach().clone() for scores in masks.scores().values()]

    got = scores_after_three_steps()
    assert calls == (["conv2d"] * 2 + ["conv2d_backward"] * 2) * 3
    monkeypatch.setattr(small_conv, "MOST_PLACES", 0)
    expected = scores_after_three_steps()
    assert len(calls) == 12
    for a, b in zip(got, expected, strict=True):
        assert (b + 0.1).abs().mean() > 0.05  # they moved from -0.1
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
