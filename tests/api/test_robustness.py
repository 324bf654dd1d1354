"""What masks must survive: copies, parts, replaced parameters, misspelt names, layers that can't go back."""

from __future__ import annotations

import copy
import dataclasses
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from subnets import MaskedHFConv1D, MaskedLinear, mask_model, masks_of
from torch import nn

import subnet_kernels as sk
from subnet_kernels.optim import MaskAdamW


def test_a_bare_mask_adamw_finds_what_the_scores_belong_to():
    for model in (nn.Sequential(nn.Linear(4, 3)), nn.Sequential(MaskedLinear(4, 3, score_init=0.0))):
        if not isinstance(model[0], MaskedLinear):
            mask_model(model, score_init=0.0)
        for copied in (model, copy.deepcopy(model)):
            scores = copied[0].scores
            optimizer = MaskAdamW([scores], lr=0.1, lam=10.0, weight_decay=0.0)
            optimizer.step()
            assert torch.allclose(scores, torch.full_like(scores, -0.1))  # Adam's first step is lr along the sign
    with pytest.raises(ValueError, match="lam=0.5 needs masked layers' scores, this group has none"):
        MaskAdamW([nn.Parameter(torch.zeros(3))], lam=0.5)


def test_scores_are_saved_as_plain_tensors_after_an_optimizer_was_made(tmp_path):
    masks = mask_model(nn.Sequential(nn.Linear(4, 3)))
    masks.adamw(lam=1e-3)
    torch.save(masks.scores(), tmp_path / "scores.pt")
    assert torch.equal(torch.load(tmp_path / "scores.pt", weights_only=True)["0.scores"], masks.scores()["0.scores"])


def test_looking_at_a_part_of_the_model_leaves_the_penalty_of_the_whole_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 100))
    masks = mask_model(model)
    for _ in range(2):
        with masks.collect_penalty() as penalty:
            model(torch.randn(2, 4))
        assert penalty().item() == pytest.approx(416 * torch.tensor(-0.1).sigmoid().item(), rel=1e-5)
        masks_of(model[1]).density()


def test_replaced_scores_and_weights_are_never_mistaken_for_the_old_ones():
    layer, x = MaskedLinear(64, 64), torch.randn(2, 64)
    with torch.no_grad():
        for _ in range(10):
            layer(x)
            for _ in range(2):  # the second takes the address of the one before the first
                layer.scores = nn.Parameter(torch.randn(64, 64))
                layer.weight = nn.Parameter(torch.randn(64, 64))
            expected = F.linear(x, layer.weight * torch.sigmoid(layer.scores), layer.bias)
            torch.testing.assert_close(layer(x), expected)
            scores = torch.randn(64, 64)
            expected = F.linear(x, layer.weight * torch.sigmoid(scores), layer.bias)
            torch.testing.assert_close(torch.func.functional_call(layer, {"scores": scores}, (x,)), expected)
            del scores, expected


def test_beta_changed_in_place_is_noticed_by_fp64_layers_too():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).double()
    mask_model(model, score_init=0.3)
    x = torch.randn(2, 8, dtype=torch.float64)
    with torch.no_grad():
        for beta in (1.0, 2.0, 3.0, 50.0, 4.0):
            model[0].beta.fill_(beta)
            expected = x
            for layer in model:
                expected = F.linear(expected, layer.weight * torch.sigmoid(beta * layer.scores), layer.bias)
            torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_unmask_of_the_whole_puts_back_the_flags_of_a_part_that_was_masked():
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), nn.Linear(3, 2))
    model[0][1].bias.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    mask_model(model[0])
    masks_of(model).unmask()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_unmask_changes_nothing_if_one_layer_can_not_go_back():
    model = nn.Sequential(MaskedLinear(3, 3), MaskedHFConv1D(3, 3))
    with pytest.raises(TypeError, match="1.weight: was not made from an ordinary layer"):
        masks_of(model).unmask()
    assert isinstance(model[0], MaskedLinear)


def test_misspelt_names_in_init_and_exclude_are_refused():
    net = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"init names \['0.wieght'\], which are not masked here"):
        mask_model(net, init={"0.wieght": torch.ones(3, 3)})
    with pytest.raises(ValueError, match=r"exclude \['nope'\] match nothing"):
        mask_model(net, exclude=["nope"])
    with pytest.raises(ValueError, match="exclude='nope' matches no whole module name"):
        mask_model(net, exclude="nope")
    with pytest.raises(TypeError, match="init must be a mapping or a function"):
        mask_model(net, init=5)
    with pytest.raises(ValueError, match="kind 'hard' trains no scores"):
        mask_model(net, kind="hard")
    assert type(net[0]) is nn.Linear


def test_layers_made_on_meta_get_a_mask_when_they_get_memory():
    layer = MaskedLinear(3, 2, device="meta").to_empty(device="cpu")
    assert layer.scores.device.type == "cpu" and layer.beta.item() == 1.0


def test_a_twin_has_hooks_of_its_own():
    linear = nn.Linear(3, 2)
    twin = MaskedLinear.from_linear(linear)
    calls = []
    twin.register_forward_hook(lambda *_: calls.append(1))
    linear(torch.ones(1, 3))
    assert calls == [] and twin(torch.ones(1, 3)) is not None and calls == [1]


def test_a_subnet_is_not_applied_to_a_masked_model():
    model = nn.Sequential(nn.Linear(3, 3))
    masks = mask_model(model, score_init=0.1)
    subnet = masks.subnet()
    with pytest.raises(ValueError, match="the model is masked"):
        subnet.apply_(model)


def test_a_mask_kind_of_ones_own_runs_everywhere_on_the_reference(monkeypatch):
    monkeypatch.setattr(sk.masks, "KINDS", dict(sk.masks.KINDS))  # other tests list the kinds that there are

    @dataclasses.dataclass(frozen=True)
    class Clipped(sk.MaskKind):
        name = "clipped"
        width: float = 2.0

        def value(self, scores, beta):
            return (0.5 + beta * scores / self.width).clamp(0, 1)

        def slope(self, scores, beta):
            m = 0.5 + beta * scores / self.width
            return torch.where((m > 0) & (m < 1), beta / self.width, torch.zeros_like(scores))

    model = nn.Sequential(nn.Linear(4, 3))
    masks = mask_model(model, kind=Clipped(4.0), score_init=0.4)
    assert model[0].mask().unique().item() == pytest.approx(0.6)
    with masks.collect_penalty() as penalty:
        pass
    total = penalty()
    total.backward()
    assert total.item() == pytest.approx(12 * 0.6) and model[0].scores.grad.unique().item() == pytest.approx(0.25)
    assert sk.mask(torch.zeros(1), 1.0, kind="clipped").item() == 0.5


def test_a_masked_model_that_nobody_holds_is_freed_with_its_scores():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    masks = mask_model(model)
    optimizer = masks.adamw(lam=1e-3)
    model(torch.randn(2, 8)).sum().backward()
    optimizer.step()
    dead = [weakref.ref(tensor) for tensor in model.parameters()]
    del model, masks, optimizer
    gc.collect()
    assert all(reference() is None for reference in dead)
