"""MaskAdamW in a model: its trajectory is AdamW's, and layers use the effective weights that it wrote, none stale."""

from __future__ import annotations

import copy

import pytest
import torch
from subnets import mask_model
from torch import Tensor, nn

from subnet_kernels import use_backend
from subnet_kernels.backends import native
from subnet_kernels.backends.native import NativeBackend

U = 2.0**-24
needs_cpu = pytest.mark.skipif(not native.is_available(), reason="the extension is not built")
BACKENDS = ["reference", pytest.param("cpu", marks=needs_cpu)]


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(100, 8), nn.ReLU(), nn.Linear(8, 3)
    ).to(dtype)  # fmt: skip


def random_scores(name: str, weight: Tensor) -> Tensor:
    return torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name) + weight.numel()))


def image(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(6, 2, 5, 5, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lam", [0.0, 0.02])
def test_a_trajectory_is_that_of_torchs_adamw_on_the_loss_with_penalty_within_rounding(lam, backend):
    """Truth: torch's AdamW in fp64. The bound: three times torch's own error in fp32, and four roundings."""

    def trained(way: str, dtype: torch.dtype) -> list[Tensor]:
        model = network(dtype)
        masks = mask_model(model, init=random_scores)
        masks.anneal(start=1.0, to=4.0, steps=15)
        if way == "ours":
            optimizer: torch.optim.Optimizer = masks.adamw(lr=0.02, lam=lam)
        else:
            optimizer = torch.optim.AdamW(masks.scores().values(), lr=0.02, fused=True)
        for step in range(15):
            loss = model(image(step, dtype)).pow(2).mean()
            if way == "torch":
                for layer in masks.layers.values():
                    loss = loss + lam * torch.sigmoid(layer.beta * layer.scores).sum()
            loss.backward()
            optimizer.step()
            if way == "torch":
                masks.step()
            optimizer.zero_grad()
        assert masks.beta == pytest.approx(4.0)
        return [scores.detach().double() for scores in masks.scores().values()]

    true = trained("torch", torch.float64)
    plain = trained("torch", torch.float32)
    with use_backend(backend):
        ours = trained("ours", torch.float32)
    for exact, eager, got in zip(true, plain, ours, strict=True):
        error = (eager - exact).abs().max()
        assert (got - exact).abs().max() <= 3 * error + 4 * U * exact.abs().max()


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_forward_pass_after_a_step_uses_what_the_step_wrote_to_the_bit(dtype, monkeypatch):
    masks = mask_model(network(dtype), init=random_scores)
    masks.anneal(start=1.0, to=20.0, steps=4)
    optimizer = masks.adamw(lr=0.05, lam=1e-3)
    passes = []
    for name in ("effective_weight", "masked_linear", "masked_conv2d"):
        made = getattr(NativeBackend, name)
        monkeypatch.setattr(
            NativeBackend, name, lambda self, *a, _made=made, _name=name: (passes.append(_name), _made(self, *a))[1]
        )
    for step in range(4):
        passes.clear()
        masks.model(image(step, dtype)).pow(2).mean().backward()
        assert bool(passes) == (step == 0)  # afterwards no forward pass makes an effective weight
        optimizer.step()
        masks.check_fresh()
        with torch.no_grad():
            found = masks.model(image(9, dtype))
            with torch.enable_grad(), masks.collect_penalty() as penalty:
                masks.model(image(9, dtype))
            kept = penalty()
            masks.invalidate()
            assert torch.equal(found, masks.model(image(9, dtype)))
        sums = sum(layer.mask().double().sum() for layer in masks.layers.values())
        assert kept.item() == pytest.approx(sums.item(), rel=1e-6)
        optimizer.zero_grad()
        masks.refresh()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_stale_is_used_after_a_foreign_step_an_edit_a_load_or_a_copy(backend):
    with use_backend(backend):
        masks = mask_model(network(), init=random_scores)
        model, optimizer = masks.model, masks.adamw(lr=0.05)
        start = copy.deepcopy(model.state_dict())

        def expected(of: nn.Module) -> Tensor:
            x = image(9)
            for layer in of:
                if hasattr(layer, "scores"):
                    w_eff = layer.weight * torch.sigmoid(layer.beta * layer.scores)
                    is_conv = isinstance(layer, nn.Conv2d)
                    product = nn.functional.conv2d if is_conv else nn.functional.linear
                    x = product(x, w_eff, layer.bias, **({"padding": 1} if is_conv else {}))
                else:
                    x = layer(x)
            return x

        def check(of: nn.Module = model) -> None:
            assert torch.allclose(of(image(9)), expected(of), rtol=1e-5, atol=1e-5)

        def step() -> None:
            model(image(1)).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        check()
        step()
        foreign = torch.optim.SGD(masks.scores().values(), lr=50.0)
        model(image(2)).pow(2).mean().backward()
        foreign.step()
        check()
        step()
        with torch.no_grad():
            model[0].scores.mul_(-3.0)
        check()
        step()
        model.load_state_dict(start)
        check()
        step()
        masks.beta = 7.0
        check()
        step()
        twin = copy.deepcopy(model)
        check(twin)
        with torch.no_grad():
            twin[3].scores.neg_()
        check(twin)
        check()
        step()
        with masks.hard():
            assert not torch.allclose(model(image(9)), expected(model), rtol=1e-3, atol=1e-3)
        check()
        pending = model(image(3))  # a pass that still needs the effective weight of now
        kept = model[3]._slot.w_eff.clone()
        held = model[3]._slot.w_eff
        model(image(1)).pow(2).mean().backward()
        optimizer.step()
        assert torch.equal(held, kept) and pending.grad_fn is not None  # the step wrote elsewhere


@needs_cpu
def test_refresh_leaves_what_a_step_wrote_but_in_the_warm_up_of_a_capture_runs_as_the_capture_will(monkeypatch):
    from subnet_kernels.capturing import capture_scope

    masks = mask_model(network(), init=random_scores)
    optimizer = masks.adamw(lr=0.05)
    calls = []
    many = NativeBackend.effective_weights

    def counted(self, weights, *rest):
        calls.append(len(weights))
        return many(self, weights, *rest)

    monkeypatch.setattr(NativeBackend, "effective_weights", counted)
    masks.refresh()
    masks.model(image(1)).pow(2).mean().backward()
    optimizer.step()
    masks.refresh()
    assert calls == [3]
    with capture_scope():
        masks.refresh()
    assert calls == [3, 3]


@needs_cpu
def test_a_gradient_is_left_as_it_was_and_coarse_scores_go_torchs_way():
    masks = mask_model(network(), init=random_scores)
    optimizer = masks.adamw(lr=0.05, lam=0.1)
    masks.model(image(1)).pow(2).mean().backward()
    before = [scores.grad.clone() for scores in masks.scores().values()]
    optimizer.step()
    assert optimizer.writes_effective_weights
    assert all(torch.equal(s.grad, g) for s, g in zip(masks.scores().values(), before, strict=True))
    coarse = mask_model(network(), unit="row")
    optimizer = coarse.adamw(lr=0.05, lam=0.1)
    coarse.model(image(1)).pow(2).mean().backward()
    before = [scores.grad.clone() for scores in coarse.scores().values()]
    optimizer.step()
    assert all((s.grad > g).all() for s, g in zip(coarse.scores().values(), before, strict=True))  # the penalty's
    coarse.check_fresh()


@needs_cpu
def test_a_transposed_weights_slot_is_written_in_the_layout_that_its_layer_uses():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = nn.Sequential(transformers.pytorch_utils.Conv1D(6, 5))
    masks = mask_model(model, init=random_scores)
    optimizer, x = masks.adamw(lr=0.1, lam=0.01), torch.randn(4, 5)
    for _ in range(3):
        model(x).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        layer = model[0]
        weight, scores = layer.weight.t(), layer.scores.t()
        assert layer._slot.lookup(weight, scores, layer.beta, layer.kind, weight.dtype) is not None
        masks.check_fresh()
        w_eff = layer.weight * torch.sigmoid(layer.beta * layer.scores)
        assert torch.allclose(model(x), x @ w_eff + layer.bias, atol=1e-6)


def test_a_copied_or_unpickled_optimizer_goes_on():
    import pickle

    for copied in (copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))):
        masks = mask_model(network(), init=random_scores)
        optimizer = masks.adamw(lr=0.05, lam=0.1)
        masks.model(image(1)).pow(2).mean().backward()
        optimizer.step()
        twin = copied(optimizer)
        before = [p.detach().clone() for group in twin.param_groups for p in group["params"]]
        for group in twin.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
            group["lam"] = 0.0  # the copies are no layer's scores
        twin.step()
        after = [p for group in twin.param_groups for p in group["params"]]
        assert all((a < b).all() for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hook_that_edits_scores_through_data_after_the_step_is_seen(backend):
    with use_backend(backend):
        masks = mask_model(nn.Linear(6, 4), init=random_scores)
        optimizer, x = masks.adamw(lr=0.1), torch.randn(3, 6)
        layer = masks.model
        optimizer.register_step_post_hook(lambda *_: layer.scores.data.clamp_(-0.1, 0.1))
        for _ in range(3):
            layer(x).pow(2).mean().backward()
            optimizer.step()
            w_eff = layer.weight * torch.sigmoid(layer.beta * layer.scores)
            assert torch.allclose(layer(x), nn.functional.linear(x, w_eff, layer.bias), atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_tied_and_rearranged_scores_are_stepped_as_torchs_adamw_does(backend):
    with use_backend(backend):
        masks = mask_model(nn.Conv2d(2, 3, 2), init=random_scores)
        optimizer, layer = masks.adamw(lr=0.1, lam=1.0), masks.model
        layer(torch.randn(1, 2, 4, 4)).sum().backward()
        optimizer.step()
        for name in ("weight", "scores"):  # behind everybody's back
            tensor = getattr(layer, name)
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
        layer.scores.grad = torch.randn(3, 2, 2, 2)
        optimizer.step()
        x = torch.randn(1, 2, 4, 4)
        w_eff = layer.weight * torch.sigmoid(layer.beta * layer.scores)
        assert torch.allclose(layer(x), nn.functional.conv2d(x, w_eff, layer.bias), atol=1e-5)
        frozen = mask_model(nn.Linear(3, 2), init=random_scores)
        optimizer, layer = frozen.adamw(lr=0.1, weight_decay=0.0, lam=1.0), frozen.model
        layer.scores.requires_grad_(False)
        layer.scores.grad, before = torch.zeros(2, 3), layer.scores.clone()
        optimizer.step()
        assert torch.equal(layer.scores, before)
        tied = mask_model(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
        tied.model[1].scores = tied.model[0].scores
        assert len(tied.adamw().param_groups[0]["params"]) == 1


@pytest.mark.parametrize("name", ["maximize", "amsgrad"])
def test_settings_of_adamw_that_are_not_built_are_refused(name):
    masks = mask_model(nn.Linear(3, 2))
    optimizer = masks.adamw()
    optimizer.param_groups[0][name] = True
    with pytest.raises(ValueError, match="amsgrad and maximize are not built"):
        optimizer.step()
