"""supermask: masks read off a trained network; signed_constant_: weights of one size."""

from __future__ import annotations

import math

import pytest
import torch
from subnets import mask_model, transfer
from subnets.methods import signed_constant_, supermask
from torch import nn

INITIAL = [[1.0, -1.0, 2.0, -3.0, 0.5, 1.0], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]]
FINAL = [[4.0, 2.0, 1.0, -3.5, -0.6, 1.2], [-6.0, 5.0, 4.0, 0.1, 0.2, 0.3]]


def pair() -> tuple[nn.Module, nn.Module]:
    initial, trained = nn.Linear(6, 2), nn.Linear(6, 2)
    with torch.no_grad():
        initial.weight.copy_(torch.tensor(INITIAL))
        trained.weight.copy_(torch.tensor(FINAL))
    return initial, trained


# of 12 weights the highest 6: sizes 6 5 4 4 3.5 2; growths 5 4 3 3 1 .5; same signs 5 4 4 3.5 1.2 1
@pytest.mark.parametrize("criterion, kept", [
    ("large_final", [[1, 1, 0, 1, 0, 0], [1, 1, 1, 0, 0, 0]]),
    ("magnitude_increase", [[1, 1, 0, 1, 0, 0], [1, 1, 1, 0, 0, 0]]),
    ("large_final_same_sign", [[1, 0, 1, 1, 0, 1], [0, 1, 1, 0, 0, 0]]),
])  # fmt: skip
def test_the_criteria_on_a_planted_pair(criterion, kept):
    subnet = supermask(*pair(), criterion, keep=0.5)
    assert subnet.masks["weight"].int().tolist() == kept
    assert subnet.provenance["criterion"] == criterion and subnet.provenance["keep"] == 0.5


def test_growth_and_size_differ_where_a_weight_was_large_before():
    initial, trained = pair()  # -6 becomes -6.5: sizes are 6.5 6 5 4 4, growths 5 4 3 3, of equal ones the first goes
    with torch.no_grad():
        initial.weight[0, 3], trained.weight[0, 3] = -6.0, -6.5
    by_size = supermask(initial, trained, "large_final", keep=0.25).masks["weight"]
    by_growth = supermask(initial, trained, "magnitude_increase", keep=0.25).masks["weight"]
    assert by_size.nonzero().tolist() == [[0, 3], [1, 0], [1, 1]]
    assert by_growth.nonzero().tolist() == [[1, 0], [1, 1], [1, 2]]


@pytest.mark.parametrize("keep", [0.05, 0.3, 0.5, 0.99, 1.0])
def test_counts_are_n_minus_int_of_1_minus_keep_n_but_never_a_changed_sign(keep):
    assert supermask(*pair(), keep=keep).num_kept() == 12 - int((1 - keep) * 12)
    same = supermask(*pair(), "large_final_same_sign", keep=keep)
    assert same.num_kept() == min(12 - int((1 - keep) * 12), 9)
    assert not same.masks["weight"][(torch.tensor(INITIAL) * torch.tensor(FINAL)) < 0].any()


def test_each_layer_is_ranked_alone_and_may_have_its_own_fraction():
    torch.manual_seed(0)
    initial, trained = (nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 5)) for _ in range(2))
    with torch.no_grad():
        trained[1].weight.mul_(100)
    subnet = supermask(initial, trained.state_dict(), keep={"0.weight": 0.2, "1.weight": 0.5})
    assert subnet.density(per_layer=True) == {"0.weight": 0.2, "1.weight": 0.5}
    sizes = trained[0].weight.detach().abs()
    assert sizes[subnet.masks["0.weight"]].min() > sizes[~subnet.masks["0.weight"]].max()


def test_the_subnet_plants_initial_values_and_rescaled_ones_if_asked():
    initial, trained = pair()
    before = initial.weight.detach().clone()
    for rescale, factor in ((False, 1.0), (True, 12 / 6)):
        subnet = supermask(initial, trained, keep=0.5, rescale=rescale)
        target = transfer(subnet, None, nn.Linear(6, 2))
        kept = subnet.masks["weight"]
        assert torch.equal(target.weight.detach()[kept], before[kept] * factor)
    assert torch.equal(initial.weight, before)


@pytest.mark.parametrize("change, error, message", [
    (dict(criterion="largest"), ValueError, r"criterion must be one of \['large_final', .*\], got 'largest'"),
    (dict(keep=0.0), ValueError, r"keep, the fraction of a layer that stays, must be in \(0, 1\], got 0.0"),
    (dict(keep=1.1), ValueError, r"must be in \(0, 1\], got 1.1"),
    (dict(keep={"bias": 0.5}), ValueError, "keep has no fraction for weight, only for bias"),
    (dict(trained=nn.Linear(2, 2)), ValueError, r"weight of shape \[2, 6\] is of shape \[2, 2\]"),
    (dict(trained={}), ValueError, r"weight of shape \[2, 6\] is not there"),
    (dict(initial="mlp"), TypeError, r"initial must be a torch.nn.Module, got str"),
    (dict(trained={"weight": torch.full((2, 6), math.nan)}), ValueError, "weight has NaN or infinite values"),
])  # fmt: skip
def test_bad_input_is_refused_in_one_sentence(change, error, message):
    initial, trained = pair()
    with pytest.raises(error, match=message):
        supermask(**{"initial": initial, "trained": trained, **change})


def test_a_masked_network_is_refused():
    initial, trained = pair()
    mask_model(initial)
    for call in (lambda: supermask(initial, trained), lambda: signed_constant_(initial)):
        with pytest.raises(ValueError, match="masked"):
            call()


def test_signed_constants_keep_signs_and_have_the_size_of_their_layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(50, 4))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert signed_constant_(model) is model
    for name, inputs in (("0.weight", 27), ("2.weight", 50)):
        expected = before[name].sign() * math.sqrt(2 / inputs)
        torch.testing.assert_close(model.get_parameter(name).detach(), expected, rtol=1e-6, atol=0)
    assert torch.equal(model[0].bias, before["0.bias"])
    signed_constant_(model, ["2"], kept=0.25)
    assert model[2].weight.abs().max().item() == pytest.approx(math.sqrt(2 / (0.25 * 50)))
    assert model[0].weight.abs().max().item() == pytest.approx(math.sqrt(2 / 27))


def test_signed_constants_of_the_standard_deviation_are_those_of_each_layer():
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 3.0], [-1.0, -3.0]]))
    signed_constant_(model, size="std")
    assert model.weight.tolist() == [[pytest.approx(5**0.5)] * 2, [pytest.approx(-(5**0.5))] * 2]


def test_signed_constants_of_transformers_conv1d_go_by_its_inputs():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.Sequential(conv1d(6, 50))  # 50 inputs, weight [50, 6]
    signed_constant_(model)
    assert model[0].weight.abs().unique().tolist() == [pytest.approx(math.sqrt(2 / 50))]


@pytest.mark.parametrize("change, message", [
    (dict(size="one"), "size must be 'kaiming' or 'std', got 'one'"),
    (dict(kept=0), r"kept, the fraction that a mask will keep, must be in \(0, 1\], got 0"),
    (dict(targets=["bias"]), r"bias of shape \[2\] has no inputs per unit"),
])  # fmt: skip
def test_signed_constant_refuses_bad_input(change, message):
    model = pair()[0]
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match=message):
        signed_constant_(model, **change)
    assert torch.equal(model.weight, before)
