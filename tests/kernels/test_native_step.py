"""The CPU step from gradients of effective weights and of a linear layer's output, and with bf16 moments."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("subnet_kernels._C", reason="the extension is not built")
from subnet_kernels.backends import native
from subnet_kernels.backends.base import AdamW, Backend, linear_grad_w_eff
from subnet_kernels.backends.native import NativeBackend
from subnet_kernels.masks import as_kind
from subnet_kernels.rounding import round_to_bf16, rounding_bits
from tests.kernels.native_inputs import CAPABILITIES, DTYPES, assert_within, capability, nan_like, ops, randn

U = 2.0**-24
CPU, SIGMOID = NativeBackend("cpu"), as_kind("sigmoid")
BETA, NEXT_BETA = torch.tensor(3.5), torch.tensor(4.25)
NUMBERS = AdamW(lr=0.03, beta1=0.8, beta2=0.95, eps=1e-3, weight_decay=0.7, lam=0.11)


def slope_of(scores, beta):
    return beta * torch.sigmoid(beta * scores) * torch.sigmoid(-beta * scores)


class Layer:
    """Scores, moments, weight and slot of one layer; step number 3."""

    def __init__(self, shape, weight_dtype=torch.float32, moment_dtype=torch.float32, dtype=torch.float32, order=None):
        self.scores, self.exp_avg, self.weight = (randn(shape, i, order) for i in range(3))
        self.exp_avg_sq = (randn(shape, 3, order).square() + 0.1).to(moment_dtype)
        self.exp_avg, self.weight = self.exp_avg.to(moment_dtype), self.weight.to(weight_dtype)
        self.step = torch.tensor(3.0)
        self.slot = None if dtype is None else (nan_like(self.weight, dtype), torch.tensor(float("nan")))

    def clone(self):
        other = object.__new__(Layer)
        keep = {name: value.clone() for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        vars(other).update(keep, slot=self.slot and (self.slot[0].clone(), self.slot[1].clone()))
        return other

    def written(self):
        return [self.scores, self.exp_avg, self.exp_avg_sq, *(self.slot or ())]


def step(layer, grad, grad_penalties=None, numbers=NUMBERS):
    CPU.mask_adamw_(
        [layer.scores], [grad], [layer.exp_avg], [layer.exp_avg_sq], [layer.step], [layer.weight], [layer.slot], BETA,
        NEXT_BETA, SIGMOID, numbers, grad_penalties,
    )  # fmt: skip


def linear_step(layer, grad_out, x, grad_penalty, backend=CPU, method=NativeBackend.linear_step_):
    method(
        backend, grad_out, x, grad_penalty, layer.scores, layer.exp_avg, layer.exp_avg_sq, layer.step, layer.weight,
        layer.slot, BETA, NEXT_BETA, SIGMOID, NUMBERS,
    )  # fmt: skip


def check(layer, before, grad, grad_error):
    """Against fp64 AdamW with the gradient ``grad`` of the scores, known to ``grad_error``."""
    s, m, v = before.scores.double(), before.exp_avg.double(), before.exp_avg_sq.double()
    n, t = NUMBERS, before.step.item()
    m_size = m.abs() + (1 - n.beta1) * (grad.abs() + m.abs())
    m = m + (1 - n.beta1) * (grad - m)
    m_error = (1 - n.beta1) * grad_error + 4 * U * m_size
    v = n.beta2 * v + (1 - n.beta2) * grad * grad
    v_error = (1 - n.beta2) * 2 * grad.abs() * grad_error + 6 * U * v
    assert_within(layer.exp_avg, m, m_error, "exp_avg")
    assert_within(layer.exp_avg_sq, v, v_error, "exp_avg_sq")
    root_scale, scale = (1 - n.beta2**t) ** -0.5, n.lr / (1 - n.beta1**t)
    denominator = v.sqrt() * root_scale + n.eps
    d_error = v_error / (2 * v.sqrt()) * root_scale + 8 * U * denominator
    update, update_error = scale * m / denominator, scale * (m_error + m.abs() * d_error / denominator) / denominator
    truth = s - n.lr * n.weight_decay * s - update
    size = s.abs() * (1 + n.lr * n.weight_decay) + update.abs()
    assert_within(layer.scores, truth, update_error + 4 * U * size, "scores")
    if layer.slot is not None:
        again, total = nan_like(layer.slot[0]), torch.tensor(float("nan"))
        ops.effective_weight(layer.weight, layer.scores, NEXT_BETA, 0, again, total)
        assert torch.equal(again, layer.slot[0])
        assert layer.slot[1].item() == pytest.approx(total.item(), rel=2 * U)


@pytest.mark.parametrize("name", CAPABILITIES)
@pytest.mark.parametrize("grad_penalty", [None, 0.3])
@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_a_step_from_the_effective_weights_gradient_matches_fp64(name, weight_dtype, grad_dtype, grad_penalty):
    for shape, order in (((67, 33), None), ((1,), None), ((2, 3, 5, 7), (0, 2, 3, 1)), ((5000,), None), ((0, 3), None)):
        before = Layer(shape, weight_dtype, order=order)
        layer, grad = before.clone(), randn(shape, 9, order).to(grad_dtype)
        with capability(name):
            step(layer, grad, [None if grad_penalty is None else torch.tensor(grad_penalty)])
        s, w, g = before.scores.double(), before.weight.double(), grad.double()
        slope, pushed = slope_of(s, BETA.double()), (grad_penalty or 0.0) + NUMBERS.lam
        with capability(name):
            check(layer, before, (g * w + pushed) * slope, 12 * U * ((g * w).abs() + pushed) * slope)
        assert torch.equal(layer.weight, before.weight)


@pytest.mark.parametrize("name", CAPABILITIES)
@pytest.mark.parametrize("of_w_eff", [False, True])
def test_bf16_moments_are_the_fp32_ones_rounded_by_the_definition_to_the_bit(name, of_w_eff):
    for shape in ((1,), (63,), (64,), (65,), (70, 60), (40_000,)):
        short = Layer(shape, moment_dtype=torch.bfloat16)
        exact = short.clone()
        exact.exp_avg, exact.exp_avg_sq = short.exp_avg.float(), short.exp_avg_sq.float()
        with capability(name):
            for layer in (short, exact):
                step(layer, randn(shape, 9), [None] if of_w_eff else None)
        assert torch.equal(short.scores, exact.scores) and torch.equal(short.slot[0], exact.slot[0])
        random = rounding_bits(short.scores.numel(), 3).view(shape)
        assert torch.equal(short.exp_avg, round_to_bf16(exact.exp_avg, random & 0xFFFF))
        assert torch.equal(short.exp_avg_sq, round_to_bf16(exact.exp_avg_sq, random >> 16))


SHAPES = [(1, 1, 1), (7, 5, 3), (64, 48, 16), (96, 100, 70), (33, 49, 129), (5, 300, 64), (97, 40, 30), (200, 101, 130)]


@pytest.mark.parametrize("name", CAPABILITIES)
@pytest.mark.parametrize("has_slot", [True, False])
@pytest.mark.parametrize("moment_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_a_linear_layers_step_matches_fp64_in_one_product_and_in_blocks(
    name, m, n, k, moment_dtype, has_slot, monkeypatch
):
    monkeypatch.setattr(native, "_STEP_BLOCK", 8192)  # several blocks
    before = Layer((n, k), moment_dtype=moment_dtype, dtype=torch.float32 if has_slot else None)
    grad_out, x, grad_penalty = randn((m, n), 10), randn((m, k), 11), torch.tensor(0.3)
    layer, plain = before.clone(), before.clone()
    with capability(name):
        linear_step(layer, grad_out, x, grad_penalty)
        linear_step(plain, grad_out, x, grad_penalty, method=Backend.linear_step_)
    s, w = before.scores.double(), before.weight.double()
    slope, pushed = slope_of(s, BETA.double()), 0.3 + NUMBERS.lam
    product = grad_out.double().t() @ x.double()
    size = grad_out.double().abs().t() @ x.double().abs()
    error = ((m + 2) * U * size * w.abs() + 12 * U * (size * w.abs() + pushed)) * slope
    if moment_dtype == torch.float32:
        with capability(name):
            check(layer, before, (product * w + pushed) * slope, error)
    else:  # the same roundings, by the place in the whole weight; one may fall the other way
        for got, expected in zip(layer.written(), plain.written(), strict=True):
            difference = (got.double() - expected.double()).abs()
            assert (difference <= 2**-7 * expected.double().abs() + 1e-30).all()
            assert (difference > 1e-5 * (expected.double().abs() + 1e-3)).double().mean() < 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_linear_layer_in_16_bits_rounds_its_product_once_and_nothing_else(dtype):
    n, k, m = 40, 72, 24
    before = Layer((n, k), dtype, dtype=dtype)
    layer, grad_out, x = before.clone(), randn((m, n), 10).to(dtype), randn((m, k), 11).to(dtype)
    linear_step(layer, grad_out, x, None)
    product = linear_grad_w_eff(grad_out, x, layer.weight).double()
    s, w = before.scores.double(), before.weight.double()
    slope = slope_of(s, BETA.double())
    grad = (product * w + NUMBERS.lam) * slope
    check(layer, before, grad, 12 * U * ((product * w).abs() + NUMBERS.lam) * slope)


def test_a_transposed_weight_is_stepped_as_it_lies():
    before = Layer((40, 72), order=(1, 0))
    layer, grad_out, x = before.clone(), randn((24, 40), 10), randn((24, 72), 11)
    linear_step(layer, grad_out, x, None)
    straight = Layer((40, 72))
    for name in ("scores", "exp_avg", "exp_avg_sq", "weight"):
        setattr(straight, name, getattr(before, name).contiguous())
    linear_step(straight, grad_out, x, None)
    for got, expected in zip(layer.written()[:4], straight.written()[:4], strict=True):
        assert_within(got, expected.double(), 1e-5 * (1 + expected.double().abs()))
    assert layer.scores.stride() == (1, 40)


def test_results_are_the_same_bits_for_every_number_of_threads(monkeypatch):
    threads, results = torch.get_num_threads(), []
    before, grad_out, x = Layer((700, 200), moment_dtype=torch.bfloat16), randn((64, 700), 10), randn((64, 200), 11)
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        layer = before.clone()
        linear_step(layer, grad_out, x, None)
        results.append(layer.written())
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_versions_of_what_is_written_change():
    for m in (24, 200):
        layer, grad_out, x = Layer((40, 72)), randn((m, 40), 10), randn((m, 72), 11)
        versions = [tensor._version for tensor in layer.written()]
        linear_step(layer, grad_out, x, None)
        assert all(tensor._version > old for tensor, old in zip(layer.written(), versions, strict=True))


@pytest.mark.parametrize(
    ("message", "bad"),
    [
        ("exp_avgs? and exp_avg_sqs? must be float32 or bfloat16, both alike", {"exp_avg": torch.ones(4, 6).half()}),
        ("x must have 1 to 96 rows, got 97", {"x": torch.ones(97, 6), "grad_out": torch.ones(97, 4)}),
        ("grad_out must be contiguous with 12 elements", {"grad_out": torch.ones(3, 5)}),
        ("steps count from 1, got 0", {"step": 0.0}),
        ("w_eff must be contiguous with 24 elements", {"w_eff": torch.ones(6, 4).t()}),
        ("scores must have the shape of weight", {"scores": torch.ones(4, 1)}),
        ("penalty must be 0-d", {"penalty": torch.ones(2)}),
    ],
)
def test_bad_input_is_refused_in_words(message, bad):
    given = dict(
        grad_out=torch.ones(3, 4), grad_penalty=None, x=torch.ones(3, 6), scores=torch.ones(4, 6),
        exp_avg=torch.ones(4, 6), exp_avg_sq=torch.ones(4, 6), weight=torch.ones(4, 6), w_eff=torch.ones(4, 6),
        penalty=torch.ones(()), step=1.0, beta=BETA, next_beta=BETA, lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8,
        weight_decay=0.0, lam=0.1,
    ) | bad  # fmt: skip
    with pytest.raises(RuntimeError, match="linear_step: (" + message + ")"):
        ops.linear_step(*given.values())
