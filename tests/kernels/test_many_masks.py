"""G masks over one weight: values and gradients against fp64, against G calls, by vmap, and stepped by MaskAdamW."""

from __future__ import annotations

import pytest
import torch

import subnet_kernels as sk
from subnet_kernels.optim import MaskAdamW, bind_masks
from subnet_kernels.testing import UNIT_ROUNDOFF, conv_case, linear_case, ours, worst_errors

BACKENDS = ["reference", "cpu", None]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def by(backend):
    return lambda case: ours(case, backend=backend)


def assert_within_bound(case, backend):
    worst = worst_errors(case, by(backend))
    assert max(worst.values()) <= 1, worst


def scores_of(num, shape, seed=0):
    return torch.randn(num, *shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


# --- values and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_masks", [1, 3, 8])
@pytest.mark.parametrize("shared_input", [False, True])
def test_linear_is_within_the_error_bound(backend, dtype, num_masks, shared_input):
    assert_within_bound(linear_case(5, 17, 129, dtype, num_masks=num_masks, shared_input=shared_input), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("scores_shape", [(24, 1), (1, 36), (1, 1), (6, 12), (24, 36)], ids=str)
def test_units_and_transposed_weights_are_within_the_error_bound(backend, scores_shape, is_transposed):
    for dtype in DTYPES:
        case = linear_case(4, 24, 36, dtype, scores_shape=scores_shape, is_transposed=is_transposed, num_masks=3)
        assert_within_bound(case, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shared_input", [False, True])
@pytest.mark.parametrize("is_channels_last", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_convolution_is_within_the_error_bound(backend, shared_input, is_channels_last, groups):
    for scores_shape in (None, (6, 1, 1, 1)):
        case = conv_case(
            (2, 4, 7, 6), (6, 4 // groups, 3, 3), num_masks=3, shared_input=shared_input, scores_shape=scores_shape,
            is_channels_last=is_channels_last, groups=groups, padding=1, stride=2,
        )  # fmt: skip
        assert_within_bound(case, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (3, 4099)], ids=str)
def test_empty_and_odd_sizes_are_within_the_error_bound(backend, shape):
    assert_within_bound(linear_case(2, *shape, num_masks=2), backend)
    assert_within_bound(linear_case(0, *shape, num_masks=2), backend)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("shape", [(3, 5), (70, 4096), (4, 3, 3, 3)], ids=str)
def test_many_masks_give_the_bits_of_one_call_per_mask(backend, shape):
    """Also in the penalty and the gradient, whatever the order in which the pieces of the weight are taken."""
    weight, scores = torch.randn(shape), scores_of(5, shape)
    upstream, penalties = torch.randn(5, *shape), torch.arange(1.0, 6.0)
    with sk.use_backend(backend):
        w_eff, penalty = sk.effective_weight(weight, scores, 3.0)
        together = torch.autograd.grad((w_eff, penalty), scores, (upstream, penalties))[0]
        for mask in range(5):
            alone = scores[mask].detach().requires_grad_()
            one, sum_of_one = sk.effective_weight(weight, alone, 3.0)
            assert torch.equal(one, w_eff[mask]) and torch.equal(sum_of_one, penalty[mask])
            gradient = torch.autograd.grad((one, sum_of_one), alone, (upstream[mask], penalties[mask]))[0]
            assert torch.equal(gradient, together[mask])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_batched_result_is_the_same_twice_and_poisoned_memory_is_never_read(backend):
    weight, scores = torch.randn(64, 300), scores_of(6, (64, 300))
    results = []
    for _ in range(2):
        poison = [torch.full((6, 64, 300), float("nan")) for _ in range(4)]
        del poison
        with sk.use_backend(backend):
            w_eff, penalty = sk.effective_weight(weight, scores, 2.0, dtype=torch.bfloat16)
        results.append((w_eff, penalty, *torch.autograd.grad(w_eff.float().square().sum() + penalty.sum(), scores)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(bool(t.isfinite().all()) for t in results[0])


def test_gradcheck_in_fp64():
    weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    scores = torch.randn(2, 3, 1, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: sk.masked_linear(*t, 1.7), (x, weight, scores))
    assert torch.autograd.gradcheck(lambda *t: sk.masked_linear(*t, 1.7, shared_input=True), (x, weight, scores))


def test_double_backward_is_refused():
    scores = scores_of(2, (3, 4))
    out, _ = sk.masked_linear(torch.randn(2, 4), torch.randn(3, 4), scores, 1.0)
    with pytest.raises(RuntimeError, match="double backward|once_differentiable|does not require grad"):
        (gradient,) = torch.autograd.grad(out.square().sum(), scores, create_graph=True)
        gradient.sum().backward()


@pytest.mark.parametrize("shared_input", [False, True])
def test_compiled_without_a_break_it_is_the_same(shared_input):
    weight, scores, bias = torch.randn(6, 8), scores_of(3, (6, 8)), torch.randn(6)
    x = torch.randn(6, 2, 8)

    def step(x, scores):
        out, penalty = sk.masked_linear(x, weight, scores, 2.0, bias, shared_input=shared_input)
        return out.square().sum() + penalty @ torch.arange(3.0)

    eager = torch.autograd.grad(step(x, scores), scores)[0]
    compiled = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(x, scores), scores)[0]
    torch.testing.assert_close(compiled, eager)


def test_opcheck_of_the_registered_op_with_masks():
    weight, scores = torch.randn(6, 8), scores_of(3, (6, 8))
    args = (weight, scores, torch.tensor(2.0), "sigmoid", [], None, torch.float32, None)
    torch.library.opcheck(torch.ops.subnet_kernels.effective_weight.default, args)


def test_autocast_casts_x_and_keeps_scores():
    weight, scores, x = torch.randn(6, 8), scores_of(3, (6, 8)), torch.randn(6, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, penalty = sk.masked_linear(x, weight, scores, 2.0)
    assert out.dtype == torch.bfloat16 and penalty.dtype == torch.float32
    expected = [sk.masked_linear(p.bfloat16(), weight.bfloat16(), s, 2.0)[0] for p, s in zip(x.chunk(3), scores)]
    error = (out.float() - torch.cat(expected).float()).abs().max()
    assert error <= 8 * UNIT_ROUNDOFF[torch.bfloat16] * out.abs().max()


# --- vmap ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_vmap_over_scores_is_the_same_call(backend, monkeypatch):
    """And reaches the backend once, with all masks."""
    weight, scores, x = torch.randn(6, 8), scores_of(4, (6, 8)), torch.randn(4, 3, 8)
    calls = []
    for name in ("reference", "cpu"):
        made = type(sk.dispatch.BACKENDS[name]).effective_weight_of_masks
        monkeypatch.setattr(
            sk.dispatch.BACKENDS[name], "effective_weight_of_masks",
            lambda *args, made=made, name=name: calls.append((name, args[1].shape)) or made(
                sk.dispatch.BACKENDS[name], *args
            ),
        )  # fmt: skip
    with sk.use_backend(backend):
        out, penalty = torch.func.vmap(lambda s, x: sk.masked_linear(x, weight, s, 2.0))(scores, x)
        assert calls == [(backend, (4, 6, 8))]
        grouped, penalties = sk.masked_linear(x.flatten(0, 1), weight, scores, 2.0)
    torch.testing.assert_close(out.flatten(0, 1), grouped)
    assert torch.equal(penalty, penalties)
    upstream = torch.randn_like(out)
    ours_, theirs = (
        torch.autograd.grad((o, p), scores, (u, torch.ones(4)))[0]
        for o, p, u in ((out, penalty, upstream), (grouped, penalties, upstream.flatten(0, 1)))
    )
    torch.testing.assert_close(ours_, theirs)


def test_vmap_with_other_dims_weights_per_member_and_nested():
    weight, scores = torch.randn(6, 8), scores_of(4, (6, 8)).detach()
    expected = torch.stack([weight * torch.sigmoid(2 * s) for s in scores])
    last = torch.func.vmap(lambda s: sk.effective_weight(weight, s, 2.0), in_dims=2)(scores.movedim(0, 2))
    torch.testing.assert_close(last[0], expected)
    weights = torch.randn(4, 6, 8)
    each = torch.func.vmap(lambda w, s: sk.effective_weight(w, s, 2.0))(weights, scores)
    torch.testing.assert_close(each[0], weights * torch.sigmoid(2 * scores))
    torch.testing.assert_close(each[1], torch.sigmoid(2 * scores).sum((1, 2)))
    betas = torch.tensor([1.0, 2.0])
    by_beta = torch.func.vmap(lambda b: sk.effective_weight(weight, scores[0], b))(betas)
    torch.testing.assert_close(by_beta[0][1], expected[0])
    nested = torch.func.vmap(torch.func.vmap(lambda s: sk.effective_weight(weight, s, 2.0)))(scores.view(2, 2, 6, 8))
    torch.testing.assert_close(nested[0].flatten(0, 1), expected)
    of_many = torch.func.vmap(lambda s: sk.effective_weight(weight, s, 2.0))(scores.view(2, 2, 6, 8))
    torch.testing.assert_close(of_many[0].flatten(0, 1), expected)
    unbatched = torch.func.vmap(lambda x: sk.masked_linear(x, weight, scores[0], 2.0)[0])(torch.eye(8)[:, None])
    torch.testing.assert_close(unbatched[:, 0].t(), expected[0])


def test_other_transforms_still_take_the_plain_expression():
    weight, scores = torch.randn(6, 8), scores_of(4, (6, 8)).detach()

    def loss(s):
        w_eff, penalty = sk.effective_weight(weight, s, 2.0)
        return w_eff.square().sum() + penalty

    gradients = torch.func.vmap(torch.func.grad(loss))(scores)
    leaf = scores.clone().requires_grad_()
    expected = torch.autograd.grad(sum(loss(s) for s in leaf), leaf)[0]
    torch.testing.assert_close(gradients, expected)


# --- MaskAdamW -------------------------------------------------------------------------------------------------------

LRS, LAMS = (1e-2, 3e-2, 1e-1), (0.0, 1e-2, 0.5)


def train(backend, weight, scores, lr, lam, steps=25, unit_masks=(), **settings):
    """Scores after some steps of MaskAdamW on a loss of the effective weights, with beta that grows."""
    beta = torch.tensor(1.0)
    scores = scores.detach().clone().requires_grad_()
    bind_masks(scores, weight, beta)
    optimizer = MaskAdamW([scores], lr=lr, lam=lam, weight_decay=0.1, **settings)
    targets = torch.randn(weight.shape, generator=torch.Generator().manual_seed(7))
    with sk.use_backend(backend):
        for _ in range(steps):
            w_eff, _ = sk.effective_weight(weight, scores, beta)
            (w_eff - targets).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            beta.mul_(1.1)
    return scores.detach(), optimizer


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("shape", [(6, 8), (6, 1)], ids=["weight", "row"])
@pytest.mark.parametrize("form", ["floats", "tensor"])
@pytest.mark.parametrize("moment_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_mask_is_stepped_as_alone_with_its_own_rate_and_lam(backend, shape, form, moment_dtype):
    weight, scores = torch.randn(6, 8), scores_of(3, shape)
    lr, lam = (LRS, LAMS) if form == "floats" else (torch.tensor(LRS), torch.tensor(LAMS))
    together, optimizer = train(backend, weight, scores, lr, lam, moment_dtype=moment_dtype)
    assert float(optimizer.state[optimizer.param_groups[0]["params"][0]]["step"]) == 25
    for mask in range(3):
        alone, _ = train(backend, weight, scores[mask], lr[mask], lam[mask], moment_dtype=moment_dtype)
        assert torch.equal(together[mask], alone)
        assert not torch.equal(together[mask], scores[mask])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_masks_follow_torchs_adamw_in_fp64(backend):
    """25 steps against torch.optim.AdamW on loss + lam * sum of the mask, in fp64; the bound is three times what the
    same in fp32 is off."""
    weight, scores = torch.randn(6, 8), scores_of(3, (6, 8))
    together, _ = train(backend, weight, scores, LRS, LAMS)

    def by_torch(dtype, mask):
        leaf = scores[mask].detach().to(dtype).requires_grad_()
        optimizer = torch.optim.AdamW([leaf], lr=LRS[mask], weight_decay=0.1)
        targets = torch.randn(weight.shape, generator=torch.Generator().manual_seed(7)).to(dtype)
        for step in range(25):
            m = torch.sigmoid(1.1**step * leaf)
            ((weight.to(dtype) * m - targets).square().sum() + LAMS[mask] * m.sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
        return leaf.detach()

    for mask in range(3):
        true = by_torch(torch.float64, mask)
        error = (by_torch(torch.float32, mask).double() - true).abs().max()
        assert (together[mask].double() - true).abs().max() <= 3 * error


def test_state_goes_through_a_state_dict():
    weight, scores = torch.randn(6, 8), scores_of(3, (6, 8))
    _, optimizer = train("cpu", weight, scores, LRS, LAMS)
    fresh = scores.detach().clone().requires_grad_()
    bind_masks(fresh, weight, torch.tensor(1.0))
    other = MaskAdamW([fresh])
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == LRS and other.param_groups[0]["lam"] == LAMS
    assert other.state[fresh]["exp_avg"].shape == (3, 6, 8)


def test_bad_numbers_per_mask_are_refused():
    weight, scores, plain = torch.randn(6, 8), scores_of(3, (6, 8)), torch.zeros(6, 8, requires_grad=True)
    beta = torch.tensor(1.0)
    bind_masks(scores, weight, beta)
    bind_masks(plain, weight, beta)
    for name in ("lr", "lam"):
        for value in ((0.1, 0.2), torch.tensor([0.1, 0.2])):
            with pytest.raises(ValueError, match=f"2 values of {name}, one per mask, need scores of 2 masks"):
                MaskAdamW([scores], **{name: value})
            with pytest.raises(ValueError, match="no dimension of masks"):
                MaskAdamW([plain], **{name: value})
        with pytest.raises(ValueError, match=f"{name} must be finite and >= 0"):
            MaskAdamW([scores], **{name: (0.1, -0.2, 0.3)})
    with pytest.raises(ValueError, match="sizes that divide it"):
        bind_masks(scores, weight.t(), beta)


# --- large weights, explain -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared_input", [False, True])
def test_a_weight_so_large_that_masks_are_taken_in_turn_is_within_the_error_bound(shared_input, monkeypatch):
    monkeypatch.setattr(sk.backends.native, "_LARGE", 64)
    for dtype in DTYPES:
        assert_within_bound(linear_case(3, 9, 31, dtype, num_masks=3, shared_input=shared_input), "cpu")
    assert_within_bound(linear_case(3, 9, 31, num_masks=2, scores_shape=(9, 1), shared_input=shared_input), "cpu")


def test_explain_says_how_masks_run():
    x, weight = torch.randn(6, 8), torch.randn(4, 8)
    text = sk.explain("masked_linear", x, weight, torch.randn(3, 4, 8), 1.0)
    assert "backend cpu" in text and "one pass for all 3 masks over the weight" in text
