"""The masked layers against plain PyTorch, and what they keep through copies, files, casts and optimizer steps."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from subnets import MaskedConv2d, MaskedHFConv1D, MaskedLinear, mask_model, masks_of
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call

import subnet_kernels as sk
from subnet_kernels.masks import expand_scores
from subnet_kernels.testing import Case, conv_case, error_bound, linear_case, worst_errors

BETA = 3.0
UNITS_LINEAR = {"weight": (12, 20), "row": (12, 1), "column": (1, 20), "head:4": (4, 1), (3, 5): (4, 4)}
UNITS_CONV = {
    "weight": (6, 4, 3, 3), "row": (6, 1, 1, 1), "column": (1, 4, 1, 1), "head:2": (2, 1, 1, 1),
    (3, 2, 3, 1): (2, 2, 1, 3),
}  # fmt: skip


def spread_scores(layer: nn.Module, seed: int = 0) -> None:
    """Scores on both sides of zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.scores.copy_(torch.randn(layer.scores.shape, generator=generator, dtype=torch.float64))


def layer_op(layer: nn.Module):
    """The layer, with the case's tensors as its parameters, as an op that gives (out, penalty)."""
    masks = masks_of(layer)

    def op(case: Case) -> tuple[Tensor, Tensor]:
        masks.beta = case.beta
        is_transposed = isinstance(layer, MaskedHFConv1D)
        tensors = {name: t for name, t in case.tensors().items() if name != "x"}
        if is_transposed:
            tensors["weight"], tensors["scores"] = tensors["weight"].t(), tensors["scores"].t()
        with masks.collect_penalty() as penalty:
            return functional_call(layer, tensors, case.x), penalty()

    return op


def assert_within_bound(case: Case, op) -> None:
    worst = worst_errors(case, op)
    assert max(worst.values()) <= 1, worst


@pytest.mark.parametrize("unit", UNITS_LINEAR, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masked_linear_and_every_gradient_equal_the_plain_expression_for_each_unit(unit, dtype):
    layer = MaskedLinear(20, 12, unit=unit, dtype=dtype)
    assert tuple(layer.scores.shape) == UNITS_LINEAR[unit]
    assert_within_bound(linear_case(7, 12, 20, dtype, scores_shape=UNITS_LINEAR[unit], beta=BETA), layer_op(layer))


@pytest.mark.parametrize("unit", UNITS_LINEAR, ids=str)
def test_masked_hf_conv1d_names_roles_and_equals_the_plain_expression_for_each_unit(unit):
    layer = MaskedHFConv1D(12, 20, unit=unit)
    assert tuple(layer.scores.t().shape) == UNITS_LINEAR[unit]
    case = linear_case(7, 12, 20, scores_shape=UNITS_LINEAR[unit], beta=BETA, is_transposed=True)
    assert_within_bound(case, layer_op(layer))


@pytest.mark.parametrize("unit", UNITS_CONV, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masked_conv2d_and_every_gradient_equal_the_plain_expression_for_each_unit(unit, dtype):
    layer = MaskedConv2d(4, 6, 3, stride=2, padding=1, unit=unit, dtype=dtype)
    assert tuple(layer.scores.shape) == UNITS_CONV[unit]
    case = conv_case((2, 4, 9, 7), (6, 4, 3, 3), dtype, scores_shape=UNITS_CONV[unit], beta=BETA, stride=2, padding=1)
    assert_within_bound(case, layer_op(layer))


@pytest.mark.parametrize("unit", ["weight", "row", (1, 2)], ids=str)
def test_gradients_in_fp64_pass_gradcheck_also_where_the_layer_runs_twice(unit):
    layer = MaskedLinear(4, 4, unit=unit, dtype=torch.float64)
    spread_scores(layer)
    masks = masks_of(layer)
    masks.beta = BETA

    def twice(x: Tensor, scores: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        tensors = {"scores": scores, "weight": weight, "bias": bias}
        masks.invalidate()  # gradcheck moves its inputs through .data, which leaves no trace
        with masks.collect_penalty() as penalty:
            out = functional_call(layer, tensors, functional_call(layer, tensors, x).tanh())
            return out, penalty()

    inputs = [torch.randn(3, 4, dtype=torch.float64), layer.scores, layer.weight, layer.bias]
    assert torch.autograd.gradcheck(twice, [tensor.detach().clone().requires_grad_() for tensor in inputs])


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [0, (2, 1), "same", "valid"], ids=str)
@pytest.mark.parametrize("is_batched", [True, False])
def test_masked_conv2d_pads_as_nn_conv2d_does_in_every_mode(mode, padding, is_batched):
    torch.manual_seed(0)
    arguments = dict(padding=padding, dilation=2, groups=2, padding_mode=mode, dtype=torch.float64)
    layer, plain = MaskedConv2d(4, 6, (3, 2), **arguments), nn.Conv2d(4, 6, (3, 2), **arguments)
    spread_scores(layer)
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64) if is_batched else torch.randn(4, 9, 8, dtype=torch.float64)
    with torch.no_grad():
        plain.weight.copy_(layer.weight * torch.sigmoid(layer.scores))
        plain.bias.copy_(layer.bias)
        expected = plain(x)
        size = F.conv2d(F.pad(x.abs(), (4,) * 4), plain.weight.abs(), dilation=2, groups=2).max()
        size += plain.bias.abs().max()
    out = layer(x)
    assert out.shape == expected.shape
    assert bool(((out - expected).abs() <= error_bound(0.0, size, torch.float64, False)).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_the_dtype_and_the_rounding_of_the_plain_layer(dtype):
    torch.manual_seed(0)
    for layer, plain, x in [
        (MaskedLinear(20, 12), nn.Linear(20, 12), torch.randn(5, 20)),
        (MaskedConv2d(4, 6, 3), nn.Conv2d(4, 6, 3), torch.randn(2, 4, 6, 6)),
    ]:
        spread_scores(layer)
        with torch.no_grad():
            plain.weight.copy_(plain_twin(layer, hard=False).weight)
            plain.bias.copy_(layer.bias)
        with torch.autocast("cpu", dtype):
            out, expected = layer(x), plain(x)
        assert out.dtype == expected.dtype == dtype
        # both round the same effective weight to dtype; the mask may differ in its last fp32 digit
        u = 2.0**-8 if dtype is torch.bfloat16 else 2.0**-11
        with torch.no_grad():
            function = F.linear if isinstance(plain, nn.Linear) else F.conv2d
            size = function(x.abs(), plain.weight.abs(), plain.bias.abs())
        assert bool(((out - expected).abs() <= 4 * u * size).all())
        out.float().sum().backward()
        assert layer.scores.grad.dtype == layer.weight.grad.dtype == torch.float32


def test_autocast_refuses_nothing_that_the_plain_layer_takes_and_gives_scores_fp32_gradients():
    layer = MaskedLinear(8, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(torch.randn(2, 8))
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert layer.scores.grad.dtype == torch.float32 and bool(torch.isfinite(layer.scores.grad).all())
    with pytest.raises(TypeError, match="masked_linear: x"):
        layer(torch.randn(2, 8))


LAYERS = {
    "linear": (lambda: MaskedLinear(6, 4), (3, 6)),
    "conv": (lambda: MaskedConv2d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 5, 5)),
    "hf_conv1d": (lambda: MaskedHFConv1D(4, 6), (2, 3, 6)),
}
each_layer = pytest.mark.parametrize("kind", LAYERS)


def made(kind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    new, x_shape = LAYERS[kind]
    layer = new()
    spread_scores(layer)
    return layer, torch.randn(x_shape)


def plain_twin(layer: nn.Module, hard: bool = True) -> nn.Module:
    return (layer.to_linear if isinstance(layer, nn.Linear) else layer.to_conv2d)(hard)


@each_layer
def test_disabled_gives_the_base_output_bit_for_bit_and_the_mask_comes_back(kind):
    layer, x = made(kind)
    masks, masked = masks_of(layer), layer(x)
    base = {
        "linear": lambda: F.linear(x, layer.weight, layer.bias),
        "conv": lambda: nn.Conv2d.forward(layer, x),
        "hf_conv1d": lambda: torch.addmm(layer.bias, x.view(-1, 6), layer.weight).view(2, 3, 4),
    }[kind]()
    with masks.disabled():
        assert torch.equal(layer(x), base)
    assert torch.equal(layer(x), masked) and not torch.equal(masked, base)


@each_layer
def test_hard_keeps_exactly_the_positive_scores_and_gives_scores_no_gradient(kind):
    layer, x = made(kind)
    with torch.no_grad():
        layer.scores.view(-1)[:2] = torch.tensor([0.0, -0.0])  # out, both of them
    masks = masks_of(layer)
    with masks.hard():
        out = layer(x)
        assert torch.equal(layer.mask(), (layer.scores > 0).float())
    out.sum().backward()
    assert layer.scores.grad is None or not layer.scores.grad.any()
    with torch.no_grad():
        layer.weight.mul_((layer.scores > 0).float())
    with masks.disabled():
        assert torch.equal(out, layer(x))
    assert not masks.is_hard


def test_a_hard_and_a_soft_plain_twin_compute_what_the_layer_computes():
    for kind in ("linear", "conv"):
        layer, x = made(kind)
        masks = masks_of(layer)
        masks.beta = BETA
        hard, soft = plain_twin(layer), plain_twin(layer, False)
        assert type(hard) in (nn.Linear, nn.Conv2d) and hard.weight is not layer.weight
        with masks.hard():
            assert torch.equal(hard(x), layer(x))
        kept = layer.weight * torch.sigmoid(BETA * layer.scores)
        assert torch.allclose(soft.weight, kept, rtol=2.0**-22, atol=0)  # two fp32 roundings
        assert isinstance(layer, (MaskedLinear, MaskedConv2d)) and not hasattr(hard, "scores")


def test_from_linear_shares_parameters_keeps_the_original_and_refuses_subclasses_and_nan():
    linear = nn.Linear(3, 2)
    layer = MaskedLinear.from_linear(linear, score_init=torch.tensor([[1.0, -1, 1], [-1, 1, -1]]))
    assert layer.weight is linear.weight and layer.bias is linear.bias and type(linear) is nn.Linear
    assert layer.mask().argmax(1).tolist() == [0, 1] and "scores" not in dict(linear.named_parameters())
    with pytest.raises(TypeError, match="needs exactly a Linear"):
        MaskedLinear.from_linear(layer)
    with pytest.raises(TypeError, match=r"unknown arguments \['unitt'\]"):
        MaskedLinear.from_linear(linear, unitt="row")
    with pytest.raises(ValueError, match="NaN or infinite"), torch.no_grad():
        linear.weight[0, 0] = float("nan")
        MaskedLinear.from_linear(linear)


@pytest.mark.parametrize("bad, message", [
    (dict(score_init=float("nan")), "score_init must be finite"), (dict(kind="soft"), "kind must be one of"),
    (dict(unit="head:3"), "rows that divide into heads"), (dict(unit=(2, 4)), "must divide"),
    (dict(unit="neuron"), "unit must be"), (dict(unit=(2,)), "unit must be"),
])  # fmt: skip
def test_a_bad_argument_is_refused_in_words(bad, message):
    with pytest.raises(ValueError, match=message):
        MaskedLinear(6, 4, **bad)


# --- casts, copies, files --------------------------------------------------------------------------------------------


@each_layer
def test_half_casts_the_weight_and_never_the_scores_or_beta(kind):
    layer, x = made(kind)
    masks_of(layer).beta = BETA
    before, identity = layer.scores.detach().clone(), id(layer.scores)
    layer(x)
    layer.bfloat16()
    assert layer.weight.dtype == torch.bfloat16 and layer.scores.dtype == layer.beta.dtype == torch.float32
    assert torch.equal(layer.scores, before) and id(layer.scores) == identity and float(layer.beta) == BETA
    out = layer(x.bfloat16())
    expected = (layer.weight.float() * torch.sigmoid(BETA * layer.scores)).bfloat16()
    assert out.dtype == torch.bfloat16
    made_now = layer._slot.w_eff.t() if kind == "hf_conv1d" else layer._slot.w_eff
    assert bool(((made_now - expected).abs() <= 2.0**-7 * expected.abs()).all())  # one bf16 step
    layer.double()
    assert layer.scores.dtype == torch.float64 and torch.equal(layer.scores, before.double())
    assert layer(x.double()).dtype == torch.float64


def test_scores_lie_in_memory_as_the_weight_does_and_follow_a_change_of_memory_format():
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).to(memory_format=torch.channels_last)
    masks = mask_model(model)
    assert model[0].scores.stride() == model[0].weight.stride() != torch.empty(4, 3, 3, 3).stride()
    x = torch.randn(1, 3, 5, 5)
    spread_scores(model[0])
    out = model(x)
    model.to(memory_format=torch.contiguous_format)
    assert model[0].scores.stride() == model[0].weight.stride() == torch.empty(4, 3, 3, 3).stride()
    torch.testing.assert_close(model(x), out)
    masks.check_fresh()


@each_layer
def test_a_deep_copy_computes_the_same_and_shares_nothing(kind):
    layer, x = made(kind)
    masks = masks_of(layer)
    masks.beta = BETA
    optimizer = masks.adamw(lam=1e-3)  # binds scores to weight, beta and slot
    out = layer(x)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), out)
    assert twin._slot is not layer._slot and twin.beta is not layer.beta
    with torch.no_grad():
        twin.scores.neg_()
    assert not torch.equal(twin(x), out) and torch.equal(layer(x), out)
    masks_of(twin).beta = 7.0
    assert masks.beta == BETA
    layer(x).sum().backward()
    optimizer.step()
    assert not torch.equal(layer(x), out)
    masks.check_fresh()


@each_layer
def test_torch_save_and_load_bring_back_scores_beta_and_hardness(kind):
    layer, x = made(kind)
    masks = masks_of(layer)
    masks.adamw(lam=1e-3)
    masks.beta = BETA
    soft = layer(x)
    for is_hard in (False, True):
        masks.harden() if is_hard else masks.soften()
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
        assert torch.equal(again(x), layer(x)) and float(again.beta) == BETA and masks_of(again).is_hard == is_hard
    assert not torch.equal(again(x), soft)


@each_layer
def test_state_dict_holds_the_base_keys_and_the_scores_and_loads_into_a_fresh_layer(kind):
    layer, x = made(kind)
    out, state = layer(x), layer.state_dict()
    assert set(state) == {"weight", "bias", "scores"}
    other, _ = made(kind)
    with torch.no_grad():
        other.scores.zero_()
        other.weight.zero_()
    other(x)
    other.load_state_dict(state)
    assert torch.equal(other(x), out)
    masks_of(other).check_fresh()
    with torch.no_grad():
        other.scores.zero_()
    other(x)
    other.load_state_dict({name: value.clone() for name, value in state.items()}, assign=True)
    assert torch.equal(other(x), out)


def test_scores_that_are_not_finite_are_refused_on_load_and_nothing_of_the_layer_changes():
    layer, _ = made("linear")
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    bad = {name: value.clone() + 1 for name, value in before.items()}
    bad["scores"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="scores has NaN or infinite"):
        layer.load_state_dict(bad)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_an_empty_batch_gives_an_empty_output_and_zero_gradients():
    for layer, x in [(MaskedLinear(6, 4), torch.empty(0, 6)), (MaskedConv2d(3, 4, 3), torch.empty(0, 3, 5, 5))]:
        out = layer(x)
        assert out.shape[0] == 0
        out.sum().backward()
        assert not layer.scores.grad.any()


def test_train_and_eval_change_nothing():
    layer, x = made("linear")
    assert torch.equal(layer.train()(x), layer.eval()(x))


def test_double_backward_raises():
    layer, x = made("linear")
    (grad,) = torch.autograd.grad(layer(x.requires_grad_()).pow(2).sum(), layer.scores, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


# --- effective weights are never stale -------------------------------------------------------------------------------


def expected_linear(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        w_eff, _ = sk.effective_weight(layer.weight, layer.scores, float(layer.beta))
        return F.linear(x, w_eff, layer.bias)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.5, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.5, fused=True),
    "adam foreach": lambda p: torch.optim.Adam(p, lr=0.5, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.5),
    "lbfgs": None,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_forward_pass_after_a_step_of_any_optimizer_sees_the_new_scores(name):
    layer, x = made("linear")
    before = layer(x)
    if name == "lbfgs":
        optimizer = torch.optim.LBFGS([layer.scores], max_iter=2)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = layer(x).pow(2).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
    else:
        before.pow(2).sum().backward()
        OPTIMIZERS[name]([layer.scores]).step()
    out = layer(x)
    assert torch.equal(out, expected_linear(layer, x)) and not torch.equal(out, before)
    masks_of(layer).check_fresh()


CHANGES = {
    "beta": lambda masks, layer: setattr(masks, "beta", 9.0),
    "beta in place": lambda masks, layer: layer.beta.fill_(9.0),
    "scores in place": lambda masks, layer: layer.scores.requires_grad_(False).neg_(),
    "scores.data": lambda masks, layer: (layer.scores.data.neg_(), masks.invalidate()),
    "weight": lambda masks, layer: nn.init.ones_(layer.weight),
    "load_state_dict": lambda masks, layer: layer.load_state_dict({k: -v for k, v in layer.state_dict().items()}),
    "assign": lambda masks, layer: layer.load_state_dict({k: -v for k, v in layer.state_dict().items()}, assign=True),
    "new parameter": lambda masks, layer: setattr(layer, "scores", nn.Parameter(-layer.scores.detach())),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_forward_pass_after_a_change_sees_it(name):
    layer, x = made("linear")
    masks = masks_of(layer)
    before = layer(x)
    CHANGES[name](masks, layer)
    out = layer(x)
    assert torch.equal(out, expected_linear(layer, x)) and not torch.equal(out, before)
    masks.check_fresh()


def test_harden_soften_and_refresh_leave_no_stale_effective_weight():
    layer, x = made("linear")
    masks = masks_of(layer)
    soft = layer(x)
    masks.harden()
    assert torch.equal(layer(x), F.linear(x, layer.weight * (layer.scores > 0), layer.bias))
    masks.soften()
    assert torch.equal(layer(x), soft)
    masks.beta = BETA
    masks.refresh()
    filled = layer._slot.w_eff.data_ptr()
    assert torch.equal(layer(x), expected_linear(layer, x)) and layer._slot.w_eff.data_ptr() == filled
    masks.check_fresh()


def test_a_write_through_data_is_found_by_check_fresh_and_cured_by_invalidate():
    layer, x = made("linear")
    masks = masks_of(layer)
    before = layer(x)
    masks.check_fresh()
    layer.scores.data.neg_()
    with pytest.raises(RuntimeError, match=r"stale effective weights in weight.*invalidate"):
        masks.check_fresh()
    masks.invalidate()
    masks.check_fresh()
    assert not torch.equal(layer(x), before) and torch.equal(layer(x), expected_linear(layer, x))


@each_layer
def test_a_pending_backward_pass_keeps_the_effective_weight_of_its_forward_pass(kind):
    layer, x = made(kind)
    x = x.clone().requires_grad_()
    wanted = torch.autograd.grad(layer(x).pow(2).sum(), [x, layer.scores])
    pending = layer(x).pow(2).sum()
    with masks_of(layer).hard():  # another effective weight is made while the backward pass above is pending
        hard = layer(x)
    layer(x)
    assert not torch.equal(hard, layer(x))
    for given, right in zip(torch.autograd.grad(pending, [x, layer.scores]), wanted, strict=True):
        assert torch.equal(given, right)


def test_a_pending_backward_pass_keeps_its_scores_where_the_parameter_is_given_new_ones():
    layer, x = made("linear")
    scores = layer.scores
    (wanted,) = torch.autograd.grad(layer(x).pow(2).sum(), scores)
    pending = layer(x).pow(2).sum()
    layer.scores = nn.Parameter(-scores.detach())
    assert torch.equal(layer(x), expected_linear(layer, x))
    assert torch.equal(torch.autograd.grad(pending, scores)[0], wanted)


@pytest.mark.parametrize("changed", ["scores", "weight", "beta"])
def test_a_backward_pass_after_a_change_in_place_raises_instead_of_being_wrong(changed):
    layer, x = made("linear")
    loss = layer(x).sum()
    with torch.no_grad():
        getattr(layer, changed).add_(1)
    layer(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_several_uses_between_two_steps_make_one_effective_weight():
    layer, x = made("linear")
    layer(x).sum().backward()
    made_once = (layer._slot.w_eff.data_ptr(), layer._slot.w_eff._version)
    layer(x).sum().backward()
    assert (layer._slot.w_eff.data_ptr(), layer._slot.w_eff._version) == made_once


@pytest.mark.parametrize("unfused", [False, True])
def test_fake_tensors_fill_no_slot(unfused):
    model = nn.Sequential(nn.Linear(4, 3))
    mask_model(model, fused=not unfused)
    x = torch.ones(2, 4)
    with torch.no_grad():
        expected = model(x)
        mask_model(other := nn.Sequential(nn.Linear(4, 3)), fused=not unfused)
        other.load_state_dict(model.state_dict())
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            assert other(fake.from_tensor(x)).shape == (2, 3)
        assert torch.equal(other(x), expected)


def test_inference_mode_fills_no_slot_and_training_goes_on_after_it():
    layer, x = made("linear")
    with torch.inference_mode():
        out = layer(x)
    assert layer._slot.w_eff is None
    trained = layer(x)
    assert torch.equal(trained, out)
    trained.sum().backward()
    assert layer.scores.grad.abs().sum() > 0


def test_a_coarse_mask_repeats_each_score_over_the_weights_it_governs():
    layer = MaskedLinear(4, 2, unit=(1, 2), score_init=0.0)
    with torch.no_grad():
        layer.scores.copy_(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
    with masks_of(layer).hard():
        assert layer.mask().tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]
    assert layer.weights_per_score == 2 and masks_of(layer).density() == 0.5
    assert torch.equal(layer.mask(), expand_scores(torch.sigmoid(layer.scores.detach()), (2, 4)))


def test_setting_a_layers_beta_checks_it_and_changes_it_for_all_layers_of_the_model():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    masks = mask_model(model)
    before = model(torch.ones(1, 3))
    model[0].beta = 30.0
    assert masks.beta == 30.0 and model[1].beta is model[0].beta
    assert not torch.equal(model(torch.ones(1, 3)), before)
    for bad in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="MaskedLinear.beta: beta must be finite and >= 0"):
            model[0].beta = bad
    assert masks.beta == 30.0
