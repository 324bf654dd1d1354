"""MaskAdamW(in_backward=True) and bf16 moments in a model: the same trajectory, nothing stale, and what is refused."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from subnets import mask_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from subnet_kernels import use_backend
from subnet_kernels.backends import native
from subnet_kernels.in_backward import SpentGradient

U = 2.0**-24
needs_cpu = pytest.mark.skipif(not native.is_available(), reason="the extension is not built")
BACKENDS = ["reference", pytest.param("cpu", marks=needs_cpu)]


def conv1d(n: int, k: int) -> nn.Module:
    """transformers' layer with a transposed weight; an ordinary one where that library is missing."""
    try:
        from transformers.pytorch_utils import Conv1D
    except ImportError:
        return nn.Linear(k, n)
    return Conv1D(n, k)


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(100, 8), nn.ReLU(), conv1d(16, 8), nn.ReLU(),
        nn.Linear(16, 3, bias=False),
    ).to(dtype)  # fmt: skip


def random_scores(name: str, weight: Tensor) -> Tensor:
    return torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name) + weight.numel()))


def image(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(6, 2, 5, 5, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(steps: int, dtype=torch.float32, *, lam=0.02, loss_of=None, unit=None, torchs=False, **how):
    """Train; the scores at the end."""
    model = network(dtype)
    masks = mask_model(model, init=random_scores if unit is None else None, unit=unit or "weight")
    masks.anneal(start=1.0, to=4.0, steps=max(steps - 5, 1))
    if torchs:
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(masks.scores().values(), lr=0.01, fused=True)
    else:
        optimizer = masks.adamw(lr=0.01, lam=lam, **how)
    for step in range(steps):
        x = image(step, dtype)
        loss = model(x).pow(2).mean() if loss_of is None else loss_of(model, masks, x)
        if torchs:
            loss = loss + lam * sum(torch.sigmoid(la.beta * la.scores).sum() for la in masks.layers.values())
        loss.backward()
        optimizer.step()
        if torchs:
            masks.step()
        masks.check_fresh()
        optimizer.zero_grad()
    return [scores.detach().double() for scores in masks.scores().values()]


@functools.cache
def torchs_1000_steps(dtype):
    return run(1000, dtype, torchs=True)


def assert_near(got, other, bound):
    for a, b in zip(got, other, strict=True):
        assert (a - b).abs().max() <= bound, f"{(a - b).abs().max():.3g} > {bound:.3g}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("in_backward", [False, True])
def test_1000_steps_equal_torchs_adamw_within_rounding(backend, in_backward):
    """Truth: torch's AdamW in fp64 on the loss with its penalty. The bound: three times the largest error of torch's
    own in fp32, and four roundings."""
    true, plain = torchs_1000_steps(torch.float64), torchs_1000_steps(torch.float32)
    with use_backend(backend):
        ours = run(1000, in_backward=in_backward)
    error = max((a - b).abs().max() for a, b in zip(plain, true, strict=True))
    assert min((t - s).abs().mean() for t, s in zip(true, run(0), strict=True)) > 0.1  # it did move
    assert error < 1e-3
    assert_near(ours, true, 3 * error + 4 * U * max(t.abs().max() for t in true))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lam", [0.0, 0.02])
def test_a_step_in_backward_is_the_ordinary_one(backend, lam):
    with use_backend(backend):
        assert_near(run(40, lam=lam, in_backward=True), run(40, lam=lam), 40 * 16 * U)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("in_backward", [False, True])
def test_bf16_moments_end_where_fp32_ones_do_but_for_their_rounding(backend, in_backward):
    """A bf16 moment is wrong by at most 1/128 of itself, so that a step is by about 1.2 %, and right on average: over
    100 steps of 0.01 a drift beyond 100 * .01 * .02 would be none of rounding's."""
    with use_backend(backend):
        short = run(100, in_backward=in_backward, moment_dtype=torch.bfloat16)
        exact = run(100, in_backward=in_backward)
    assert_near(short, exact, 0.02)
    assert max((a - b).abs().max() for a, b in zip(short, exact, strict=True)) > 1e-5  # they are in use
    if native.is_available():
        with use_backend("reference" if backend == "cpu" else "cpu"):
            other = run(20, in_backward=in_backward, moment_dtype=torch.bfloat16)
        with use_backend(backend):
            assert_near(run(20, in_backward=in_backward, moment_dtype=torch.bfloat16), other, 1e-3)


def test_bf16_moments_are_half_as_large_and_survive_a_checkpoint():
    def make():
        masks = mask_model(network(), init=random_scores)
        return masks, masks.adamw(lr=0.01, lam=0.02, moment_dtype=torch.bfloat16)

    def train(masks, optimizer, steps):
        for step in steps:
            masks.model(image(step)).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    masks, optimizer = make()
    train(masks, optimizer, range(5))
    states = [optimizer.state[scores] for scores in masks.scores().values()]
    assert all(state[name].dtype == torch.bfloat16 for state in states for name in ("exp_avg", "exp_avg_sq"))
    saved = copy.deepcopy((masks.model.state_dict(), masks.state_dict(), optimizer.state_dict()))
    train(masks, optimizer, range(5, 9))
    other, second = make()
    other.model.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    second.load_state_dict(saved[2])
    train(other, second, range(5, 9))
    for a, b in zip(masks.scores().values(), other.scores().values(), strict=True):
        assert torch.equal(a, b)
    assert second.state[next(iter(other.scores().values()))]["exp_avg"].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="moment_dtype must be None, .* or torch.bfloat16, got torch.float16"):
        masks.adamw(moment_dtype=torch.float16)


@needs_cpu
def test_no_gradient_is_stored_and_the_next_effective_weight_is_there():
    masks = mask_model(network(), init=random_scores)
    masks.anneal(start=1.0, to=20.0, steps=4)
    optimizer = masks.adamw(lr=0.05, lam=1e-3, in_backward=True)
    for step in range(6):
        before = {name: scores.detach().clone() for name, scores in masks.scores().items()}
        masks.model(image(step)).pow(2).mean().backward()
        for name, scores in masks.scores().items():
            assert isinstance(scores.grad, SpentGradient) and scores.grad.shape == scores.shape
            assert not torch.equal(scores, before[name])  # stepped in the backward pass
        optimizer.step()
        for layer in masks.layers.values():
            if layer._slot.w_eff is not None and not layer._slot.is_made_in_product:
                weight, scores = layer.weight, layer.scores
                if layer.passes_transposed:
                    weight, scores = weight.t(), scores.t()
                kind, dtype = layer.current_kind, layer.weight.dtype
                assert layer._slot.is_fresh(weight, scores, layer.beta, kind, dtype), step
        masks.check_fresh()
        assert masks.beta == pytest.approx(20.0 ** (min(step + 1, 4) / 4), rel=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same(reentrant):
    def loss_of(model, masks, x):
        hidden = model[:3](x.requires_grad_())
        return model[6:](checkpoint(model[3:6], hidden, use_reentrant=reentrant)).pow(2).mean()

    assert_near(run(10, loss_of=loss_of, in_backward=True), run(10), 10 * 16 * U)


@pytest.mark.parametrize("unit", ["row"])
def test_coarse_scores_go_torchs_way_in_the_backward_pass_too(unit):
    assert_near(run(10, unit=unit, in_backward=True), run(10, unit=unit), 10 * 16 * U)
    short = run(10, unit=unit, moment_dtype=torch.bfloat16)
    assert_near(run(10, unit=unit, in_backward=True, moment_dtype=torch.bfloat16), short, 10 * 16 * U)


def test_the_penalty_in_the_loss_works_and_a_layer_without_gradient_is_still_pushed():
    def with_penalty(model, masks, x):
        with masks.collect_penalty() as penalty:
            loss = model(x).pow(2).mean()
        return loss + 0.02 * penalty()

    assert_near(run(10, lam=0.0, loss_of=with_penalty, in_backward=True), run(10, lam=0.02), 10 * 16 * U)

    def skips_the_last(model, masks, x):
        return model[:6](x).pow(2).mean()

    assert_near(run(10, loss_of=skips_the_last, in_backward=True), run(10, loss_of=skips_the_last), 10 * 16 * U)


def test_other_parameters_and_trained_weights_get_their_gradients():
    def one(in_backward):
        model = network()
        masks = mask_model(model, init=random_scores)
        layer, conv = model[3], model[0]
        layer.bias.requires_grad_()
        layer.weight.requires_grad_()
        conv.weight.requires_grad_()
        masks.adamw(lr=0.01, lam=0.02)
        optimizer = masks.adamw(lr=0.01, lam=0.02, in_backward=in_backward)
        x = image(0).requires_grad_()
        model(x).pow(2).mean().backward()
        optimizer.step()
        return [x.grad, layer.bias.grad, layer.weight.grad, conv.weight.grad, *masks.scores().values()]

    for a, b in zip(one(True), one(False), strict=True):
        assert (a - b).abs().max() <= 16 * U * b.abs().max()


def test_a_compiled_model_is_stepped_by_step():
    torch._dynamo.reset()

    def loss_of(model, masks, x):
        compiled = model.__dict__.setdefault("_compiled", torch.compile(model[3:], backend="aot_eager"))
        return compiled(model[:3](x)).pow(2).mean()

    assert_near(run(6, loss_of=loss_of, in_backward=True), run(6), 6 * 16 * U)


# --- refused --------------------------------------------------------------------------------------------------------


def started(**how):
    masks = mask_model(network(), init=random_scores)
    return masks, masks.adamw(lr=0.01, lam=0.02, in_backward=True, **how)


def passed(masks, seed=0):
    return masks.model(image(seed)).pow(2).mean()


def test_accumulation_is_refused_before_the_second_step():
    masks, _ = started()
    passed(masks).backward()
    before = [scores.detach().clone() for scores in masks.scores().values()]
    with pytest.raises(RuntimeError, match="no accumulation over backward passes"):
        passed(masks, 1).backward()
    assert torch.equal(before[-1], list(masks.scores().values())[-1])


def test_a_layer_that_runs_twice_in_a_pass_is_refused_before_any_step_of_it():
    masks, _ = started()
    last = masks.model[7]
    hidden = masks.model[:7](image(0))
    before = last.scores.detach().clone()
    with pytest.raises(RuntimeError, match="another forward pass of the same masked layer is waiting"):
        (last(hidden) + last(hidden * 2)).sum().backward()
    assert torch.equal(last.scores, before)


def test_a_second_backward_pass_over_the_same_graph_is_refused():
    masks, _ = started()
    loss = passed(masks)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already stepped|modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("clip", ["clip_grad_norm_", "clip_grad_value_"])
def test_clipping_is_refused(clip):
    masks, _ = started()
    passed(masks).backward()
    with pytest.raises(RuntimeError, match="clipping, accumulation, GradScaler and reading gradients"):
        getattr(torch.nn.utils, clip)(masks.scores().values(), 1.0)


def test_arithmetic_with_the_spent_gradient_is_refused_and_its_shape_may_be_asked_for():
    masks, optimizer = started()
    passed(masks).backward()
    grad = next(iter(masks.scores().values())).grad
    assert list(grad.shape) == [4, 2, 3, 3] and grad.dtype == torch.float32 and "SpentGradient" in repr(grad)
    zeros = torch.zeros(4, 2, 3, 3)
    for read in (lambda: grad + 1, lambda: grad.norm(), lambda: grad.clone(), lambda: zeros.add_(grad)):
        with pytest.raises(RuntimeError, match="stepped in the backward pass"):
            read()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    passed(masks, 1).backward()
    optimizer.step()


def test_a_grad_scaler_is_refused():
    masks, optimizer = started()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(passed(masks)).backward()
    with pytest.raises(RuntimeError, match="in_backward"):
        scaler.step(optimizer)


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_scores_are_refused(register):
    masks, _ = started()
    scores = masks.model[7].scores
    getattr(scores, register)(lambda *_: None)
    before = scores.detach().clone()
    with pytest.raises(RuntimeError, match="no gradient that a hook on scores could see"):
        passed(masks).backward()
    assert torch.equal(scores, before)


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="can't work in several processes"):
        started()


def test_step_again_without_a_backward_pass_is_refused():
    masks, optimizer = started()
    passed(masks).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="without a backward pass in between"):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.step()  # the penalty alone, as ever


def test_a_gradient_that_is_there_already_is_refused_before_the_step():
    masks, _ = started()
    last = masks.model[7].scores
    last.grad = torch.ones_like(last)
    before = last.detach().clone()
    with pytest.raises(RuntimeError, match="scores.grad already holds a gradient"):
        passed(masks).backward()
    assert torch.equal(last, before)


@pytest.mark.parametrize("name", ["lr", "lam", "weight_decay"])
def test_rates_that_change_between_backward_and_step_are_refused(name):
    masks, optimizer = started()
    passed(masks).backward()
    optimizer.param_groups[0][name] = 0.5
    with pytest.raises(RuntimeError, match="were changed between the backward pass"):
        optimizer.step()
    masks, optimizer = started()
    optimizer.param_groups[0]["lam"] = lam = torch.tensor(0.1)
    passed(masks).backward()
    lam.fill_(0.2)
    with pytest.raises(RuntimeError, match="were changed between the backward pass"):
        optimizer.step()


def test_a_pass_that_does_not_want_the_scores_gradient_steps_nothing():
    masks, _ = started()
    bias = masks.model[3].bias.requires_grad_()
    before = [scores.detach().clone() for scores in masks.scores().values()]
    x = image(0).requires_grad_()
    loss = masks.model(x).pow(2).mean()
    (grad,) = torch.autograd.grad(loss, x, retain_graph=True)
    loss.backward(inputs=[bias], retain_graph=True)
    assert grad.abs().sum() > 0 and bias.grad.abs().sum() > 0
    assert all(torch.equal(a, b) for a, b in zip(masks.scores().values(), before, strict=True))
    with pytest.raises(RuntimeError, match="autograd.grad"):
        torch.autograd.grad(loss, list(masks.scores().values()), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(masks.scores().values(), before, strict=True))
    loss.backward()
    assert not any(torch.equal(a, b) for a, b in zip(masks.scores().values(), before, strict=True))


def test_a_layer_that_one_pass_leaves_out_goes_on_without_zero_grad():
    masks, optimizer = started()
    other = mask_model(network(), init=random_scores)
    plain = other.adamw(lr=0.01, lam=0.02)
    for step, parts in enumerate((8, 7, 8)):
        for m, o in ((masks, optimizer), (other, plain)):
            m.model[:parts](image(step)).pow(2).mean().backward()
            o.step()
            o.zero_grad(set_to_none=m is other)
    for a, b in zip(masks.scores().values(), other.scores().values(), strict=True):
        assert (a - b).abs().max() <= 64 * U * b.abs().max()


def test_a_parameter_added_in_the_middle_of_a_pass_and_a_load_after_a_failed_one():
    masks, optimizer = started()
    passed(masks).backward()
    extra = nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [extra], "lam": 0.0})
    optimizer.step()
    optimizer.zero_grad()
    saved = copy.deepcopy(optimizer.state_dict())
    passed(masks, 1).backward()
    optimizer.load_state_dict(saved)
    optimizer.zero_grad()
    passed(masks, 2).backward()
    optimizer.step()


@pytest.mark.parametrize("sizes", [(8, 0), (0, 8)])
def test_empty_layers_are_stepped_too(sizes):
    masks = mask_model(nn.Linear(*sizes))
    optimizer = masks.adamw(in_backward=True)
    for _ in range(2):
        masks.model(torch.ones(3, sizes[0])).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_zeroing_a_list_of_gradients_leaves_placeholders_alone():
    masks, _ = started()
    bias = masks.model[3].bias.requires_grad_()
    passed(masks).backward()
    torch._foreach_zero_([bias.grad, *(scores.grad for scores in masks.scores().values())])
    assert not bias.grad.any()


def test_torchs_own_state_can_be_loaded_and_the_kernels_stay_in_use():
    masks = mask_model(network(), init=random_scores)
    torchs = torch.optim.AdamW(masks.scores().values(), lr=0.01)
    for scores in masks.scores().values():
        scores.grad = torch.ones_like(scores)
    torchs.step()
    torchs.zero_grad()
    optimizer = masks.adamw(lr=0.01, lam=0.02)
    optimizer.load_state_dict(torchs.state_dict())
    assert all(group["fused"] for group in optimizer.param_groups)
    passed(masks).backward()
    optimizer.step()
    masks.check_fresh()


# --- nothing stale ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_tricks_between_backward_and_step_leave_nothing_stale(backend):
    """Each trick is followed by step(), check_fresh() and a pass whose output is that of a model without any slot."""

    def forward_in_between(masks, optimizer):
        with torch.no_grad():
            masks.model(image(5))

    def edit(masks, optimizer):
        with torch.no_grad():
            for scores in masks.scores().values():
                scores.mul_(-1)

    def set_beta(masks, optimizer):
        masks.beta = 2.5

    def anneal_anew(masks, optimizer):
        masks.anneal(start=7.0, to=9.0, steps=3)

    def foreign_step(masks, optimizer):
        weights = [nn.Parameter(torch.ones(2))]
        weights[0].grad = torch.ones(2)
        torch.optim.SGD(weights, lr=1.0).step()

    def load(masks, optimizer):
        state = {name: -value for name, value in masks.model.state_dict().items()}
        masks.model.load_state_dict(state)

    def harden(masks, optimizer):
        masks.harden()

    def other_advance(masks, optimizer):
        optimizer.advance = lambda: masks.layers and setattr(masks, "beta", 3.25)

    def hook(masks, optimizer):
        def post(*_):
            for scores in masks.scores().values():
                scores.data.neg_()

        optimizer.register_step_post_hook(post)

    def to_fp64_and_back(masks, optimizer):
        masks.model.to(torch.float64).to(torch.float32)

    def edit_data_and_invalidate(masks, optimizer):
        for scores in masks.scores().values():
            scores.data.clamp_(-0.1, 0.1)
        masks.invalidate()

    def edit_betas_data_and_invalidate(masks, optimizer):
        masks._state.beta.data.fill_(2.5)
        masks.invalidate()

    def old_style_optimizer_on_the_weights(masks, optimizer):
        class OldStyle(torch.optim.SGD):
            def step(self, closure=None):
                for group in self.param_groups:
                    for weight in group["params"]:
                        weight.data.add_(0.1)

        OldStyle([layer.weight for layer in masks.layers.values()], lr=0.1).step()

    def pre_hook(masks, optimizer):
        def pre(*_):
            for scores in masks.scores().values():
                scores.data.neg_()

        optimizer.register_step_pre_hook(pre)

    tricks = [v for v in locals().values() if callable(v)]
    assert len(tricks) == 14
    with use_backend(backend):
        for trick in tricks:
            masks = mask_model(network(), init=random_scores)
            masks.anneal(start=1.0, to=4.0, steps=15)
            optimizer = masks.adamw(lr=0.05, lam=1e-3, in_backward=True)
            for step in range(3):
                passed(masks, step).backward()
                if step == 1:
                    trick(masks, optimizer)
                optimizer.step()
                if trick.__name__ != "hook":  # its .data edit is seen because the step writes nothing while it is there
                    masks.check_fresh()
                optimizer.zero_grad()
                with torch.no_grad():
                    got = masks.model(image(7))
                    masks.invalidate()
                    assert torch.equal(got, masks.model(image(7))), (trick.__name__, step)


def test_a_copied_model_and_optimizer_go_on_alone():
    masks, optimizer = started()
    passed(masks).backward()
    optimizer.step()
    optimizer.zero_grad()
    twin, second = copy.deepcopy((masks, optimizer))
    before = [scores.detach().clone() for scores in masks.scores().values()]
    passed(twin, 1).backward()
    second.step()
    twin.check_fresh()
    for scores, old in zip(masks.scores().values(), before, strict=True):
        assert torch.equal(scores, old)
    passed(masks, 1).backward()
    optimizer.step()
    for a, b in zip(masks.scores().values(), twin.scores().values(), strict=True):
        assert (a - b).abs().max() <= 16 * U * b.abs().max()


def test_without_its_optimizer_a_model_trains_as_ever():
    masks, optimizer = started()
    del optimizer
    passed(masks).backward()
    assert all(type(scores.grad) is Tensor for scores in masks.scores().values())
