"""Layers whose masks are of another kind than sigmoid: what they keep, what they draw, what they remember."""

import copy
import pickle

import pytest
import torch
from subnets import mask_model, masks_of
from torch import nn

from subnet_kernels import Bernoulli, Gumbel, HardConcrete, Threshold, TopK

KINDS = [Gumbel(samples=4), Bernoulli(samples=2), HardConcrete(), TopK(0.3), Threshold(0.5)]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 3))


def masked(kind, seed=7):
    masks = mask_model(network(), kind=kind, score_init=0.5, seed=seed)
    with torch.no_grad():
        for scores in masks.scores().values():
            scores.add_(torch.randn(scores.shape, generator=torch.Generator().manual_seed(1)), alpha=0.3)
    return masks


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_training_copies_and_the_subnet(kind):
    masks, x = masked(kind), torch.randn(8, 10)
    model, optimizer = masks.model, masks.adamw(0.5, lam=1e-4)
    before = model(x)
    assert torch.equal(before, model(x))  # one step, one mask
    model(x).square().mean().backward()
    optimizer.step()
    assert not torch.equal(before, model(x))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
        masks_of(twin).step()
        if kind.is_sampled:
            assert not torch.equal(twin(x), model(x))  # a key of its own
    rows = masks.audit(x)
    assert [row["runs"] for row in rows] == [1, 1]
    with masks.hard():
        hard = model(x)
    with pytest.warns(UserWarning, match="undecided") if masks.undecided() > 0.05 else torch.no_grad():
        subnet = masks.subnet(ranks=True)
    assert subnet.density() == masks.density() and 0 < subnet.density() < 1
    masks.unmask()
    with subnet.applied(model):
        torch.testing.assert_close(model(x), hard)


def test_layers_draw_apart_and_a_look_at_a_part_changes_no_draws():
    model = nn.ModuleDict({"enc": nn.Linear(64, 64), "dec": nn.Linear(64, 64)})
    masks = mask_model(model, kind="gumbel", score_init=0.0)

    def agreement():
        first, second = (layer.mask() for layer in masks.layers.values())
        return (first == second).float().mean().item(), first, second

    share, *before = agreement()
    assert share == pytest.approx(0.5, abs=0.04)
    assert masks_of(model["dec"]).density() == 0
    assert all(torch.equal(a, b) for a, b in zip(before, agreement()[1:], strict=True))


@pytest.mark.parametrize("kind", [TopK(0.5), Gumbel()], ids=lambda kind: kind.name)
def test_transposed_layers_keep_and_show_the_mask_that_runs(kind):
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.Sequential(conv1d(5, 4))
    nn.init.ones_(model[0].weight)
    masks = mask_model(model, ["0"], kind=kind, score_init=0.1)  # all scores are tied
    runs = model(torch.eye(4)) - model[0].bias
    assert torch.equal(runs, model[0].mask()) and 0 < runs.sum() < 20
    if kind.name == "topk":
        assert torch.equal(runs.bool(), masks.kept()["0.weight"])


def test_ranks_are_by_what_a_kind_keeps_by():
    model = nn.Linear(4, 1, bias=False)
    masks = mask_model(model, kind=TopK(0.5), init={"weight": torch.tensor([[-4.0, 3.0, 0.1, 0.2]])})
    assert masks.subnet(ranks=True).top(0.5).masks["weight"].tolist() == [[True, False, False, False]]


def test_the_key_is_saved_and_bad_ones_change_nothing():
    masks = masked(Gumbel(), seed=9)
    masks.step()
    state = masks.state_dict()
    assert state["key"] == [9, 1]
    other = masked(Gumbel(), seed=3)
    other.load_state_dict({name: value for name, value in state.items() if name != "key"})
    assert other.state_dict()["key"] == [3, 0]  # of before there were keys
    for bad in (None, ["a", 1], [2**70, 0], [1]):
        with pytest.raises(ValueError, match=r"key must be \[seed, step\], two ints of 64 bits"):
            other.load_state_dict({**state, "is_hard": True, "key": bad})
        assert not other.is_hard
    other.load_state_dict(state)
    x = torch.randn(4, 10)
    assert torch.equal(other.model(x), masks.model(x))
    with pytest.raises(ValueError, match="seed must be an int of 64 bits, got 1.5"):
        mask_model(network(), kind="gumbel", seed=1.5)


def test_masks_over_reads_draw_one_mask_for_the_batch():
    model = nn.Sequential(nn.Embedding(7, 5))
    with pytest.raises(ValueError, match="use samples=1"):
        mask_model(model, ["0"], kind=Gumbel(samples=2))
    masks = mask_model(model, ["0"], kind=Gumbel(), score_init=0.0)
    first = model[0].weight
    assert torch.equal(first, model[0].weight) and 0 < (first == 0).float().mean() < 1
    masks.step()
    assert not torch.equal(first, model[0].weight)
