"""Sampled masks: exact values of the definitions, and every backend against them."""

import math
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F

from subnet_kernels import effective_weight, explain, mask, masked_conv2d, masked_linear, random_bits, use_backend
from subnet_kernels.backends import native
from subnet_kernels.masks import (
    NUM_DRAWS,
    Bernoulli,
    Gumbel,
    HardConcrete,
    Threshold,
    TopK,
    keep_thresholds,
    logistic_noise,
)
from subnet_kernels.random import plain_random_bits

KEY = torch.tensor([0x123456789ABCDEF, 41])
BACKENDS = ["reference", pytest.param("cpu", marks=pytest.mark.skipif(not native.is_available(), reason="not built"))]
needs_extension = pytest.mark.skipif(not native.is_available(), reason="not built")


def fixed(kind: Gumbel | HardConcrete, noise: float, logit: float) -> tuple[float, float]:
    """(value, slope) of one score whose noise is this, and its draw that of the nearest."""
    draw = round(NUM_DRAWS / (1 + math.exp(noise)) - 0.5)

    class Given(type(kind)):
        def draws(self, scores):
            return torch.full(scores.shape, draw, dtype=torch.int32)

        def noise(self, scores):
            return torch.full_like(scores, noise)

    given = Given(**{each.name: getattr(kind, each.name) for each in fields(kind)})
    scores = torch.tensor([logit], dtype=torch.float64)
    return given.value(scores, 1.0).item(), given.slope(scores, 1.0).item()


@pytest.mark.parametrize(
    "uniforms, logit, tau, value, slope",
    [((0.5, 0.25), 0.9, 1.0, 1, 0.140400), ((0.5, 0.25), 0.9, 0.5, 1, 0.076220), ((0.25, 0.5), -0.3, 1, 0, 0.197234)],
)
def test_gumbel_values_and_gradients_at_fixed_noise(uniforms, logit, tau, value, slope):
    noise = -math.log(math.log(uniforms[0]) / math.log(uniforms[1]))  # as Csordas draws it
    assert abs(noise) == pytest.approx(0.693147, abs=1e-6)
    got = fixed(Gumbel(tau), noise, logit)
    assert got[0] == value and got[1] == pytest.approx(slope, abs=1e-6)


def test_noise_is_logistic():
    noise = logistic_noise(torch.arange(NUM_DRAWS), torch.float64)
    assert abs(noise.mean().item()) < 1e-12
    assert noise.var(correction=0).item() == pytest.approx(math.pi**2 / 3, abs=5e-4)  # 3.2899; draws are a grid


@pytest.mark.parametrize("tau", [0.1, 1.0])
@pytest.mark.parametrize("logit, probability", [(-2, 0.1192), (0, 0.5), (0.9, 0.7109), (2, 0.8808)])
def test_a_gumbel_mask_keeps_with_the_logits_probability_whatever_tau(tau, logit, probability):
    scores = torch.full((1000, 400), float(logit))
    kept = mask(scores, 1.0, kind=Gumbel(tau), key=KEY)
    spread = (probability * (1 - probability) / scores.numel()) ** 0.5
    assert kept.mean().item() == pytest.approx(probability, abs=4 * spread + 5e-5)
    assert torch.equal(kept, mask(scores, 1.0, kind=Gumbel(7.0), key=KEY))  # the hard sample does not depend on tau


def test_expected_soft_samples_and_slopes_of_gumbel():
    noise = logistic_noise(torch.arange(NUM_DRAWS), torch.float64)
    for logit, mean in [(0.0, 0.5), (0.9, 0.6461), (2.0, 0.7945)]:
        assert torch.sigmoid(logit + noise).mean().item() == pytest.approx(mean, abs=6e-5)
    for logit, mean in [(0.0, 1 / 6), (2.0, 0.1133)]:
        y = torch.sigmoid(logit + noise)
        assert (y * (1 - y)).mean().item() == pytest.approx(mean, abs=6e-5)


@pytest.mark.parametrize(
    "logit, nonzero, one, mean, at_test",
    [(-2, 0.4010, 0.0266, 0.1426, 0.0430), (0, 0.8318, 0.1682, 0.5, 0.5), (2, 0.9734, 0.5990, 0.8573, 0.9570)],
)
def test_hard_concrete_probabilities(logit, nonzero, one, mean, at_test):
    scores = torch.full((2000, 1000), float(logit), dtype=torch.float64)
    values = mask(scores, 1.0, kind="hard_concrete", key=KEY)
    assert (values > 0).double().mean().item() == pytest.approx(nonzero, abs=1e-3)
    assert (values == 1).double().mean().item() == pytest.approx(one, abs=1e-3)
    assert values.mean().item() == pytest.approx(mean, abs=1e-3)
    kind, s = HardConcrete(), torch.tensor([logit], dtype=torch.float64)
    assert kind.penalty(s, 1.0).item() == pytest.approx(nonzero, abs=5e-5)
    assert kind.penalty(s, 1.0).item() == pytest.approx(torch.sigmoid(s + 1.598597).item(), abs=1e-6)
    assert kind.mean_value(s, 1.0).item() == pytest.approx(at_test, abs=5e-5)


def test_hard_concrete_has_no_slope_where_it_is_clipped():
    kind = HardConcrete()
    assert fixed(kind, 9.0, 2.0) == (1.0, 0.0) and fixed(kind, -9.0, -2.0) == (0.0, 0.0)
    value, slope = fixed(kind, 0.0, 0.3)
    assert 0 < value < 1 and slope > 0.1
    for logit, expected in [(-2.397896, 0.0), (2.397896, 1.0)]:
        assert kind.mean_value(torch.tensor([logit]), 1.0).item() == expected


def test_edge_popup_by_hand():
    w, c = torch.tensor([[1.0, -2, 3, -4]]), torch.tensor([[0.4, -0.3, 0.2, -0.1]], requires_grad=True)
    out, _ = masked_linear(torch.ones(1, 4), w, c, 1.0, kind=TopK(0.5))
    out.sum().backward()
    assert mask(c, 1.0, kind=TopK(0.5)).tolist() == [[1, 1, 0, 0]] and out.item() == -1
    assert c.grad is not None and c.grad.tolist() == [[1, 2, 3, 4]]  # x * w * sign(c)
    for kept in (0.1, 0.3, 0.5, 0.95, 1.0):
        n = 37
        assert mask(torch.randn(n), 1.0, kind=TopK(kept)).sum() == n - int((1 - kept) * n)


@pytest.mark.parametrize("kept", [0.01, 0.2, 0.5, 0.9, 1.0])
def test_topk_drops_the_first_of_equal_scores(kept: float) -> None:
    for scores in (torch.tensor([2.0, -1, 1, 0, 2, -2, 1]), torch.zeros(3, 4), torch.randn(40, 25).mul(2).round()):
        sizes = scores.abs().flatten()
        expected = torch.ones_like(sizes)
        expected[sizes.sort(stable=True).indices[: int((1 - kept) * sizes.numel())]] = 0
        assert torch.equal(mask(scores, 1.0, kind=TopK(kept)).flatten(), expected)


def test_piggyback_by_hand():
    w, r = torch.tensor([[2.0, -3.0]]), torch.tensor([[6e-3, 5e-3]], requires_grad=True)
    out, penalty = masked_linear(torch.tensor([[5.0, 7.0]]), w, r, 1.0, kind="threshold")
    (3 * out.sum() + penalty).backward()
    assert out.item() == 10 and penalty.item() == 1 and r.grad is not None and r.grad.tolist() == [[30.0, -63.0]]


# --- draws -----------------------------------------------------------------------------------------------------------


@needs_extension
def test_ten_million_draws_are_those_of_plain_pytorch():
    seed, step = torch.tensor(-5), torch.tensor(2**33 + 7)
    fast = random_bits(seed, step, (1000, 1250), num_samples=8, first_sample=3)
    assert fast.numel() == 10**7
    for sample in (0, 7):
        plain = plain_random_bits(seed, step, 1, 1000, 1250, first_sample=3 + sample)[0]
        assert torch.equal(fast[sample].to(torch.int32), plain.to(torch.int32))
    assert torch.equal(  # all of them, by their sum weighted by place
        (fast.to(torch.int64).flatten(1) * torch.arange(1250000)).sum(1),
        (plain_random_bits(seed, step, 8, 1000, 1250, 3).to(torch.int64).flatten(1) * torch.arange(1250000)).sum(1),
    )


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 129), (2, 2051), (300, 260), (4, 3, 3, 3), (13,)], ids=str)
def test_decisions_equal_the_definitions(shape):
    pytest.importorskip("subnet_kernels._C", reason="the extension is not built")
    from tests.kernels.native_inputs import CAPABILITIES, capability

    generator, ops = torch.Generator().manual_seed(1), torch.ops.subnet_native
    scores = torch.randn(shape, generator=generator) * 4
    weight, grad, given = (torch.randn(shape, generator=generator) for _ in range(3))
    beta, kind = torch.tensor(1.3), Gumbel(0.7, samples=3, sample=9).at(KEY)
    for name in CAPABILITIES:
        with capability(name):
            thresholds = torch.empty(shape, dtype=torch.uint16)
            ops.keep_thresholds(scores, beta, thresholds)
            w_eff, sums = torch.full(shape, math.nan), given.clone()
            ops.sampled_weight(weight, thresholds, KEY, 9, w_eff)
            ops.sampled_grad_scores(grad, weight, scores, beta, KEY, 9, 0.7, True, sums)
        difference = thresholds.to(torch.int32) - keep_thresholds(scores, beta).to(torch.int32)
        assert difference.abs().max() <= 1 and (difference != 0).float().mean() < 0.02  # a sigmoid rounded twice
        kept = kind.draws(scores) < thresholds.to(torch.int32)
        assert torch.equal(w_eff, torch.where(kept, weight, torch.zeros(())))
        expected = given.double() + grad.double() * weight.double() * kind.slope(scores.double(), beta.double())
        torch.testing.assert_close(sums.double(), expected, rtol=2e-6, atol=1e-6)


def test_thresholds_decide_as_the_noise_does():
    logits = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    thresholds = keep_thresholds(logits, 1.0).to(torch.int64)
    noise = logistic_noise(torch.arange(NUM_DRAWS), torch.float64)
    by_noise = torch.searchsorted(-noise, logits)  # how many draws have z + n > 0; noise falls with the draw
    assert (thresholds - by_noise.clamp(max=NUM_DRAWS - 1)).abs().max() == 0
    assert keep_thresholds(torch.tensor([-200.0, 200.0]), 1.0).tolist() == [0, NUM_DRAWS - 1]


# --- ops -------------------------------------------------------------------------------------------------------------


def truth(x, weight, scores, bias, kind, beta, grad_out, lam, conv=None):
    """Outputs and gradients by autograd in fp64, straight through each sample."""
    x, weight, scores, bias = (
        None if t is None else t.detach().double().requires_grad_() for t in (x, weight, scores, bias)
    )
    outs = []
    for part, one in zip(x.chunk(kind.samples), kind.each(), strict=True):
        m, slope = one.value(scores.detach().float(), beta).double(), one.slope(scores.detach(), beta)
        m = m + slope * (scores - scores.detach())
        outs.append(F.linear(part, weight * m, bias) if conv is None else F.conv2d(part, weight * m, bias, **conv))
    out = torch.cat(outs)
    penalty = kind.penalty(scores, beta).sum()
    ((out * grad_out.double()).sum() + lam * penalty).backward()
    return out.detach(), penalty.detach(), [t.grad for t in (x, weight, scores, bias)]


KINDS = [Gumbel(0.6, samples=4), Gumbel(), Bernoulli(samples=2), HardConcrete(samples=2)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("conv", [None, dict(stride=2, padding=1, groups=2)], ids=["linear", "conv2d"])
def test_outputs_and_gradients_against_fp64(backend, kind, conv):
    torch.manual_seed(0)
    if conv is None:
        x, weight = torch.randn(8, 3, 37), torch.randn(19, 37)
    else:
        x, weight = torch.randn(8, 4, 9, 9), torch.randn(6, 2, 3, 3)
    scores, bias = torch.randn_like(weight), torch.randn(weight.shape[0])
    leaves = [t.requires_grad_() for t in (x, weight, scores, bias)]
    if backend == "cpu" and kind.name == "hard_concrete":
        pytest.skip("drawn by the reference")
    bound = kind.at(KEY)
    with use_backend(backend):
        if conv is None:
            out, penalty = masked_linear(x, weight, scores, 1.5, bias, kind=kind, key=KEY)
        else:
            out, penalty = masked_conv2d(x, weight, scores, 1.5, bias, **conv, kind=kind, key=KEY)
        grad_out = torch.randn_like(out)
        ((out * grad_out).sum() + 0.3 * penalty).backward()
    expected_out, expected_penalty, grads = truth(x, weight, scores, bias, bound, 1.5, grad_out, 0.3, conv)
    torch.testing.assert_close(out.double(), expected_out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(penalty.double(), expected_penalty, rtol=1e-6, atol=1e-6)
    for leaf, grad in zip(leaves, grads, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad.double(), grad, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rows_result_is_that_of_its_sample_alone(backend):
    torch.manual_seed(0)
    x, weight, scores = torch.randn(12, 50), torch.randn(40, 50), torch.randn(40, 50)
    with use_backend(backend):
        together, _ = masked_linear(x, weight, scores, 1.0, kind=Gumbel(samples=4), key=KEY)
        for row in range(12):
            alone = Gumbel(sample=row * 4 // 12)
            out, _ = masked_linear(x[row : row + 1], weight, scores, 1.0, kind=alone, key=KEY)
            torch.testing.assert_close(out[0], together[row], rtol=1e-5, atol=1e-5)
        masks, _ = effective_weight(torch.ones_like(weight), scores, 1.0, kind=Gumbel(samples=4), key=KEY)
    agreement = [(masks[i] == masks[j]).float().mean().item() for i in range(4) for j in range(i)]
    p = torch.sigmoid(scores)
    assert all(a == pytest.approx((p * p + (1 - p) ** 2).mean().item(), abs=0.03) for a in agreement)  # independent


@needs_extension
def test_nothing_of_a_masks_size_is_kept_for_backward():
    weight, scores, x = torch.randn(64, 64), torch.randn(64, 64, requires_grad=True), torch.randn(16, 64)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        masked_linear(x, weight, scores, 1.0, kind=Gumbel(samples=8), key=KEY)
    given = {t.data_ptr() for t in (x, weight, scores)}
    own = [t for t in kept if t.data_ptr() not in given and t.numel() > 2]
    assert [(t.dtype, t.shape) for t in own] == [(torch.uint16, (64, 64))]  # thresholds of all eight


def test_compiled_equals_eager():
    torch.manual_seed(0)
    x, weight, scores = torch.randn(8, 20), torch.randn(6, 20), torch.randn(6, 20, requires_grad=True)

    def loss(scores):
        return masked_linear(x, weight, scores, 1.0, kind=Gumbel(samples=4), key=KEY)[0].square().sum()

    (eager,) = torch.autograd.grad(loss(scores), scores)
    (compiled,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(scores), scores)
    torch.testing.assert_close(compiled, eager)


def test_a_changed_key_is_noticed_before_backward():
    key = KEY.clone()
    scores = torch.randn(6, 20, requires_grad=True)
    out, _ = masked_linear(torch.randn(8, 20), torch.randn(6, 20), scores, 1.0, kind="gumbel", key=key)
    key[1] += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@needs_extension
def test_explain_says_who_draws():
    args = torch.randn(8, 20), torch.randn(6, 20), torch.randn(6, 20), 1.0
    assert "backend cpu" in explain("masked_linear", *args, kind="gumbel")
    assert "backend reference" in explain("masked_linear", *args, kind="hard_concrete")


BAD = [
    (lambda: Gumbel(0.0), ValueError, r"tau, the temperature, must be finite and > 0 \(1e-6 at least\), got 0.0"),
    (lambda: Gumbel(math.nan), ValueError, "tau, the temperature"),
    (lambda: HardConcrete(-1.0), ValueError, "tau, the temperature"),
    (lambda: HardConcrete(gamma=0.1), ValueError, "gamma < 0 and zeta > 1"),
    (lambda: TopK(0.0), ValueError, r"must be in \(0, 1\], got 0.0"),
    (lambda: TopK(1.5), ValueError, r"must be in \(0, 1\], got 1.5"),
    (lambda: Threshold(math.inf), ValueError, "at must be finite"),
    (lambda: Gumbel(samples=0), ValueError, "samples must be from 1 to 4096, got 0"),
    (lambda: call(kind="gumbel"), ValueError, r"give key=, int64 \[seed, step\]"),
    (lambda: call(kind="gumbel", key=torch.tensor([1.0, 2.0])), TypeError, "got torch.float32"),
    (lambda: call(kind="gumbel", key=3), TypeError, "got int"),
    (lambda: call(kind="sigmoid", key=KEY), ValueError, "draws nothing; leave key out"),
    (lambda: call(kind=Gumbel(samples=3), key=KEY), ValueError, "must divide by the 3 samples"),
    (lambda: call(kind="gumbel", key=KEY, plan="cached"), NotImplementedError, "keeps no effective weight"),
    (lambda: call(scores=torch.zeros(2, 6, 20), kind="gumbel", key=KEY), NotImplementedError, "scores of one mask"),
]


def call(scores=None, **kwargs):
    scores = torch.zeros(6, 20) if scores is None else scores
    return masked_linear(torch.randn(8, 20), torch.randn(6, 20), scores, 1.0, **kwargs)


@pytest.mark.parametrize("bad, error, message", BAD, ids=[message for _, _, message in BAD])
def test_bad_input_is_refused(bad, error, message):
    with pytest.raises(error, match=message):
        bad()
