"""mask, effective_weight and effective_weights; and the mask functions themselves."""

from __future__ import annotations

import math

import pytest
import torch

import subnet_kernels as sk
from subnet_kernels.backends.base import Call
from subnet_kernels.dispatch import BACKENDS, choose
from subnet_kernels.masks import Hard, Sigmoid, as_kind, expand_scores, sum_to_scores, weights_per_score


def test_sigmoid_has_the_published_values_and_slopes():
    beta, s = torch.tensor(200.0, dtype=torch.float64), torch.tensor([0.0, 0.05, -0.05], dtype=torch.float64)
    value, slope = Sigmoid().value(s, beta), Sigmoid().slope(s, beta)
    assert value.tolist() == pytest.approx([0.5, 1 / (1 + math.exp(-10)), 1 / (1 + math.exp(10))], rel=1e-14)
    assert slope.tolist() == pytest.approx([50.0, 0.009079, 0.009079], rel=1e-4)  # beta/4 at 0
    assert Sigmoid().slope(s[1:], torch.tensor(1.0)).tolist() == pytest.approx([0.249844] * 2, rel=1e-5)


def test_one_minus_the_mask_keeps_its_digits_where_the_mask_is_nearly_one():
    slope = Sigmoid().slope(torch.tensor(20.0), torch.tensor(1.0)).item()
    assert slope == pytest.approx(math.exp(-20) / (1 + math.exp(-20)) ** 2, rel=1e-6)  # m * (1 - m) would give 0


def test_expanding_scores_and_summing_weights_are_transposes():
    torch.manual_seed(0)
    for shape, scores_shape in [((6, 8), (3, 2)), ((4, 6, 3, 3), (4, 1, 1, 1)), ((5, 7), (5, 7)), ((8,), (2,))]:
        s, w = torch.randn(scores_shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
        summed = (s * sum_to_scores(w, scores_shape)).sum().item()
        assert (expand_scores(s, shape) * w).sum().item() == pytest.approx(summed)
        assert weights_per_score(shape, scores_shape) == w.numel() // s.numel()
    assert expand_scores(torch.tensor([[1.0, 2.0]]), (2, 4)).tolist() == [[1, 1, 2, 2]] * 2


@pytest.mark.parametrize("kind", ["sigmoid", "hard"])
def test_mask_equals_its_definition_and_a_score_of_zero_is_out_when_hard(kind):
    s = torch.tensor([-1.0, -0.0, 0.0, 1e-30, 0.3], requires_grad=True)
    m = sk.mask(s, 3.0, kind=kind)
    expected = torch.sigmoid(3 * s) if kind == "sigmoid" else torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0])
    torch.testing.assert_close(m.detach(), expected.detach(), rtol=1e-6, atol=0)
    m.sum().backward() if m.requires_grad else None
    if kind == "sigmoid":
        torch.testing.assert_close(s.grad, Sigmoid().slope(s.detach(), 3.0))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_effective_weight_is_rounded_once_from_fp32(backend, dtype, weight_dtype):
    torch.manual_seed(1)
    w, s = torch.randn(33, 65).to(weight_dtype), torch.randn(33, 65)
    with sk.use_backend(backend):
        w_eff, penalty = sk.effective_weight(w, s, 4.0, dtype=dtype)
    exact = w.double() * torch.sigmoid(4 * s.double())
    assert w_eff.dtype == (dtype or weight_dtype)
    u = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[w_eff.dtype]
    tiny = 6e-8 if w_eff.dtype == torch.float16 else 1e-38  # half a subnormal step
    assert ((w_eff.double() - exact).abs() <= u * 1.001 * exact.abs() + tiny).all()
    assert penalty.item() == pytest.approx(torch.sigmoid(4 * s.double()).sum().item(), rel=1e-6)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_effective_weights_of_many_equal_each_alone(backend):
    torch.manual_seed(2)
    weights = [torch.randn(8, 6), torch.randn(5, 3), torch.randn(4, 2, 3, 3), torch.randn(0, 4), torch.randn(7, 5).t()]
    scores = [torch.randn(8, 1), torch.randn(5, 3), torch.randn(4, 1, 1, 1), torch.randn(0, 4), torch.randn(7, 5).t()]
    with sk.use_backend(backend):
        together, penalty = sk.effective_weights(weights, scores, 2.0)
        alone = [sk.effective_weight(w, s, 2.0) for w, s in zip(weights, scores, strict=True)]
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, (b, _) in zip(together, alone, strict=True))
    assert penalty.item() == pytest.approx(sum(p.item() for _, p in alone), rel=1e-6)


def test_effective_weights_pass_gradients_to_each_score():
    scores = [torch.randn(3, 4, requires_grad=True), torch.randn(2, 2, requires_grad=True)]
    _, penalty = sk.effective_weights([torch.randn(3, 4), torch.randn(2, 2)], scores, 1.0)
    penalty.backward()
    for s in scores:
        torch.testing.assert_close(s.grad, Sigmoid().slope(s.detach(), 1.0))


def test_effective_weights_of_nothing_are_nothing():
    w_effs, penalty = sk.effective_weights([], [], 1.0)
    assert w_effs == [] and penalty.item() == 0


def test_gradcheck_in_fp64():
    w = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    s = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w, s: sk.effective_weight(w, s, 1.3), (w, s))
    assert torch.autograd.gradcheck(lambda s: sk.mask(s, 1.3), (s,))


@pytest.mark.parametrize("kind", ["sigmoid", "hard"])
def test_opcheck(kind):
    w, s, beta = torch.randn(4, 6, requires_grad=True), torch.randn(2, 6, requires_grad=True), torch.tensor(1.5)
    ops = torch.ops.subnet_kernels
    torch.library.opcheck(ops.mask.default, (s, beta, kind, [], None))
    torch.library.opcheck(ops.mask_backward.default, (torch.randn(2, 6), s.detach(), beta, kind, [], None))
    torch.library.opcheck(ops.effective_weight.default, (w, s, beta, kind, [], None, torch.bfloat16, None))
    args = (torch.randn(4, 6), torch.ones(()), w.detach(), s.detach(), beta, kind, [], None, None, True, True)
    torch.library.opcheck(ops.effective_weight_backward.default, args)


def test_wrong_calls_are_refused_in_one_sentence():
    w, s = torch.randn(3, 4), torch.randn(3, 4)
    for call, error, words in [
        (lambda: sk.effective_weight(w, s.t(), 1.0), ValueError, "effective_weight: scores must have weight's shape"),
        (lambda: sk.effective_weight(w, s, 1.0, dtype=torch.int8), TypeError, "dtype must be a floating point dtype"),
        (lambda: sk.effective_weights([w], [s, s], 1.0), ValueError, "lists of one length"),
        (lambda: sk.mask(s.half(), 1.0), TypeError, "mask: scores must be torch.float32 or torch.float64"),
        (lambda: sk.mask(s, 1.0, kind=3), TypeError, "kind must be a mask kind's name"),
        (lambda: sk.explain("linear", w, s), ValueError, "explain: op must be one of"),
        (lambda: sk.explain("masked_linear", w, s), TypeError, "needs the tensor scores"),
    ]:
        with pytest.raises(error, match=words):
            call()


def test_every_backend_answers_every_call_with_a_reason_or_a_promise():
    for op in ("effective_weight", "masked_linear", "masked_conv2d"):
        for device in ("cpu", "cuda", "mps"):
            call = Call(op, device, torch.float32, torch.float32, "sigmoid")
            for backend in BACKENDS.values():
                reason = backend.refuse(call)
                assert reason is None or len(reason) > 10
            assert choose(call).refuse(call) is None


def test_kinds_are_frozen_and_found_by_name():
    assert as_kind("hard") == Hard() and as_kind(Sigmoid()) == Sigmoid() and Sigmoid().params() == []
    with pytest.raises(AttributeError):
        Sigmoid().name_of_something = 1


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_saturated_masks_leave_no_subnormal_weights_or_gradients(backend):
    weight = torch.full((1, 24_001), 1e-3)
    scores = torch.linspace(-1.2, 1.2, 24_001).view(1, -1).requires_grad_()
    with sk.use_backend(backend):
        w_eff, penalty = sk.effective_weight(weight, scores, 100.0)
        (w_eff.sum() + penalty).backward()
    for tensor in (w_eff.detach(), scores.grad):
        assert not ((tensor != 0) & (tensor.abs() < 2.0**-126)).any()
    assert (w_eff == 0).sum() > 4000 and (scores.grad == 0).sum() > 8000
