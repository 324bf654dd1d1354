"""masked_conv2d on every backend that runs here, against fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import subnet_kernels as sk
from subnet_kernels.testing import conv_case, ours, worst_errors

BACKENDS = [("reference", "cached"), ("reference", "fused"), ("cpu", "cached"), (None, None)]

# (x, weight, geometry). torch 2.13.0 corrupts the heap in the fp32 backward pass of F.conv2d itself for some small
# lopsided configurations in channels_last, so channels_last is compared on symmetric ones only.
GEOMETRIES = [
    ((2, 3, 8, 8), (4, 3, 3, 3), {}),
    ((1, 1, 1, 1), (1, 1, 1, 1), {}),
    ((2, 4, 9, 7), (6, 2, 3, 3), {"stride": 2, "padding": 1, "groups": 2}),
    ((2, 4, 9, 7), (4, 1, 5, 2), {"stride": (1, 3), "padding": (2, 0), "dilation": (1, 2), "groups": 4}),
    ((2, 3, 6, 5), (5, 3, 3, 3), {"padding": "same", "dilation": 2}),
    ((2, 3, 6, 5), (5, 3, 2, 4), {"padding": "same"}),
    ((2, 3, 6, 5), (5, 3, 2, 4), {"padding": "valid"}),
    ((3, 7, 5, 5), (11, 7, 1, 1), {}),
]


def by(backend, plan):
    return lambda case: ours(case, backend=backend, plan=plan)


@pytest.mark.parametrize("backend, plan", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("x_shape, weight_shape, geometry", GEOMETRIES, ids=str)
def test_value_and_every_gradient_are_within_the_error_bound(backend, plan, dtype, x_shape, weight_shape, geometry):
    worst = worst_errors(conv_case(x_shape, weight_shape, dtype, **geometry), by(backend, plan))
    assert max(worst.values()) <= 1, worst


@pytest.mark.parametrize("backend, plan", BACKENDS)
@pytest.mark.parametrize("is_channels_last", [False, True])
@pytest.mark.parametrize(
    "scores_shape", [(6, 4, 3, 3), (6, 1, 1, 1), (1, 4, 1, 1), (3, 2, 1, 3), (1, 1, 1, 1)], ids=str
)
def test_units_and_channels_last_are_within_the_error_bound(backend, plan, is_channels_last, scores_shape):
    case = conv_case(
        (2, 4, 8, 8), (6, 4, 3, 3), scores_shape=scores_shape, is_channels_last=is_channels_last, padding=1
    )
    worst = worst_errors(case, by(backend, plan))
    assert max(worst.values()) <= 1, worst


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_filter_score_counts_once_for_each_weight_it_governs(backend):
    scores = torch.tensor([0.5, -0.5]).reshape(2, 1, 1, 1)
    _, penalty = sk.masked_conv2d(torch.randn(1, 3, 5, 5), torch.randn(2, 3, 3, 3), scores, 2.0, backend=backend)
    assert penalty.item() == pytest.approx(27 * torch.sigmoid(torch.tensor([1.0, -1.0])).sum().item(), rel=1e-6)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_an_empty_batch_is_valid(backend):
    scores = torch.randn(4, 3, 3, 3, requires_grad=True)
    out, penalty = sk.masked_conv2d(torch.empty(0, 3, 8, 8), torch.randn(4, 3, 3, 3), scores, 1.0, backend=backend)
    assert out.shape == (0, 4, 6, 6)
    (out.sum() + penalty).backward()
    m = torch.sigmoid(scores.detach())
    torch.testing.assert_close(scores.grad, m * (1 - m))


def test_an_image_without_batch_dimension_equals_a_batch_of_one():
    x, w, s = torch.randn(3, 7, 7), torch.randn(4, 3, 3, 3), torch.randn(4, 3, 3, 3)
    out, _ = sk.masked_conv2d(x, w, s, 2.0, padding="same")
    assert torch.equal(out, sk.masked_conv2d(x[None], w, s, 2.0, padding="same")[0][0])


def test_channels_last_weight_and_scores_keep_their_strides_in_the_gradient():
    w = torch.randn(8, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    s = torch.randn(8, 4, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    w_eff, _ = sk.effective_weight(w, s, 2.0)
    assert w_eff.stride() == w.stride()
    sk.masked_conv2d(torch.randn(2, 4, 6, 6), w, s, 2.0)[0].sum().backward()
    assert s.grad.stride() == s.stride()


@pytest.mark.parametrize("plan", ["cached", "fused"])
def test_gradcheck_in_fp64(plan):
    case = conv_case((2, 2, 5, 4), (4, 1, 3, 2), torch.float64, scores_shape=(4, 1, 1, 2), groups=2, padding=1)
    leaves = [t.requires_grad_() for t in (case.x, case.weight, case.scores, case.bias)]

    def op(x, w, s, b):
        return sk.masked_conv2d(x, w, s, 1.3, b, **case.conv, plan=plan)

    assert torch.autograd.gradcheck(op, leaves)


@pytest.mark.parametrize("plan", [None, "fused"])
def test_opcheck(plan):
    case = conv_case((2, 2, 5, 4), (4, 2, 3, 2), groups=1)
    x, w, s, b = (t.requires_grad_() for t in (case.x, case.weight, case.scores, case.bias))
    geometry = ([1, 1], [1, 1], [1, 1], 1)
    args = (x, w, s, torch.tensor(1.5), b, *geometry, "sigmoid", [], None, plan, None, None, None)
    torch.library.opcheck(torch.ops.subnet_kernels.masked_conv2d.default, args)
    x, w, s = x.detach(), w.detach(), s.detach()
    grad_out = torch.randn_like(F.conv2d(x, w, None, *geometry))
    args = (grad_out, None, x, w, s, torch.tensor(1.5), None, *geometry, "sigmoid", [], None, None, [True] * 4)
    torch.library.opcheck(torch.ops.subnet_kernels.masked_conv2d_backward.default, args)


def test_compile_fullgraph_gives_eager_results():
    x, w = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
    s, s_eager = (torch.full((4, 1, 1, 1), 0.3, requires_grad=True) for _ in range(2))

    def step(s):
        out, penalty = sk.masked_conv2d(x, w, s, torch.tensor(2.0), padding="same", stride=1)
        return out.pow(2).mean() + 1e-3 * penalty

    torch.compile(step, fullgraph=True, backend="aot_eager")(s).backward()
    step(s_eager).backward()
    torch.testing.assert_close(s.grad, s_eager.grad)


X, W, S = torch.randn(2, 4, 6, 6), torch.randn(8, 4, 3, 3), torch.randn(8, 4, 3, 3)


@pytest.mark.parametrize(
    "args, kwargs, error, words",
    [
        ((X, W, S, 1.0), {"stride": 0}, ValueError, "stride must be an int or a pair of ints >= 1, got 0"),
        ((X, W, S, 1.0), {"padding": -1}, ValueError, "padding must be an int or a pair of ints >= 0, got -1"),
        ((X, W, S, 1.0), {"padding": "full"}, ValueError, "padding must be 'same', 'valid'"),
        ((X, W, S, 1.0), {"padding": "same", "stride": 2}, ValueError, "padding='same' needs stride 1"),
        ((X, W, S, 1.0), {"dilation": 9}, ValueError, "kernel spans 19 in height"),
        ((X, W, S, 1.0), {"groups": 3}, ValueError, "x must be"),
        ((X, W[:, :3], S[:, :3], 1.0), {}, ValueError, r"x must be \[B, C, H, W\] .* 3 channels"),
        ((X[0, 0], W, S, 1.0), {}, ValueError, "x must be"),
        ((X, W[0], S[0], 1.0), {}, ValueError, "weight must have 4 dimensions"),
        ((X, W, S[:3], 1.0), {}, ValueError, "sizes that divide it"),
        ((X, W, S, 1.0, torch.randn(3)), {}, ValueError, r"bias must have shape \[8\], got \[3\]"),
        ((X.double(), W, S, 1.0), {}, TypeError, "x must have weight's dtype"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_one_sentence(args, kwargs, error, words):
    with pytest.raises(error, match=words):
        sk.masked_conv2d(*args, **kwargs)
