"""`Subnet`: algebra and controls on masks made by hand, and networks that get their weights back."""

import math

import pytest
import torch
from subnets.subnet import Subnet
from torch import nn


def subnet_of(rows: dict[str, list], **kwargs) -> Subnet:
    return Subnet({name: torch.tensor(row, dtype=torch.bool) for name, row in rows.items()}, **kwargs)


A = subnet_of({"a": [[1, 1, 0], [0, 0, 0]], "b": [1, 0, 0, 0]})
B = subnet_of({"a": [[0, 1, 1], [0, 0, 1]], "b": [1, 1, 0, 0]})


def lists(subnet: Subnet) -> dict[str, list]:
    return {name: mask.int().tolist() for name, mask in subnet.masks.items()}


def test_density_is_kept_over_all_weights_and_per_layer():
    assert A.num_kept() == 3 and A.density() == 3 / 10
    assert A.density(per_layer=True) == {"a": 2 / 6, "b": 1 / 4}
    assert subnet_of({"a": [[]]}).density() == 0.0


def test_set_algebra_by_hand():
    assert lists(A & B) == {"a": [[0, 1, 0], [0, 0, 0]], "b": [1, 0, 0, 0]}
    assert lists(A | B) == {"a": [[1, 1, 1], [0, 0, 1]], "b": [1, 1, 0, 0]}
    assert lists(A - B) == {"a": [[1, 0, 0], [0, 0, 0]], "b": [0, 0, 0, 0]}
    assert lists(B - A) == {"a": [[0, 0, 1], [0, 0, 1]], "b": [0, 1, 0, 0]}
    assert lists(~A) == {"a": [[0, 0, 1], [1, 1, 1]], "b": [0, 1, 1, 1]}


def test_iou_by_hand():
    assert A.iou(B) == 2 / 6 and B.iou(A) == 2 / 6
    assert A.iou(A) == 1.0 and A.iou(~A) == 0.0
    assert (A - A).iou(B - B) == 1.0


def test_algebra_remembers_where_its_sides_come_from_and_a_common_base_only():
    left = subnet_of({"a": [1, 0]}, provenance={"task": "S1"}, base_hash="x")
    right = subnet_of({"a": [1, 1]}, provenance={"task": "S2"}, base_hash="x")
    assert (left & right).provenance == {"operation": "and", "of": [{"task": "S1"}, {"task": "S2"}]}
    assert (left - right).base_hash == "x" and (~left).base_hash == "x"
    assert (left | subnet_of({"a": [1, 1]}, base_hash="y")).base_hash is None


def test_what_is_made_of_subnets_of_one_model_says_so():
    known = {"base_model": "gpt2", "architecture": "GPT2LMHeadModel", "seed": 1}
    left, right = (subnet_of({"a": [1, 0, 0]}, provenance=known | {"seed": seed}) for seed in (1, 2))
    base = {name: known[name] for name in ("base_model", "architecture")}
    for made in (left | right, ~left, left.sample_like(generator(0))):
        assert base.items() <= made.provenance.items() and "seed" not in made.provenance
    other = subnet_of({"a": [1, 0, 0]}, provenance={"base_model": "bert", "architecture": "GPT2LMHeadModel"})
    assert (left & other).provenance.keys() == {"architecture", "operation", "of"}


def test_algebra_over_different_parameters_is_refused_with_the_names():
    with pytest.raises(ValueError, match=r"these differ: b \(\[4\] and absent\), c \(absent and \[1\]\)"):
        _ = A & subnet_of({"a": [[0, 0, 0], [0, 0, 0]], "c": [1]})
    with pytest.raises(ValueError, match=r"a \(\[2, 3\] and \[3, 2\]\)"):
        A.iou(subnet_of({"a": [[0, 0], [0, 0], [0, 0]], "b": [1, 0, 0, 0]}))
    with pytest.raises(TypeError):
        _ = A & {"a": 1}
    with pytest.raises(TypeError, match="must be a Subnet, got dict"):
        A.iou({})


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def big() -> Subnet:
    masks = {"w": torch.rand(40, 50, generator=generator(1)) < 0.1, "v": torch.rand(70, generator=generator(2)) < 0.4}
    return Subnet(masks, {"task": "S1"}, base_hash="x")


def test_samples_have_the_subnets_count_in_every_parameter():
    subnet = big()
    for draw in (subnet.sample_like, subnet.complement_sample):
        sample = draw(generator(3))
        assert {n: int(m.sum()) for n, m in sample.masks.items()} == {n: int(m.sum()) for n, m in subnet.masks.items()}
        assert list(sample.masks) == list(subnet.masks) and sample.base_hash == "x"
    assert subnet.sample_like(generator(3)).provenance == {"control": "sample_like", "of": [{"task": "S1"}]}


def test_samples_follow_the_seed_and_not_the_order_of_the_masks():
    subnet = big()
    turned = Subnet(dict(reversed(subnet.masks.items())))
    for method in ("sample_like", "complement_sample"):
        first, again, other = (getattr(subnet, method)(generator(seed)) for seed in (3, 3, 4))
        assert first.iou(again) == 1.0 and first.iou(other) < 0.5
        assert first.iou(getattr(turned, method)(generator(3))) == 1.0
    shared = generator(3)
    assert subnet.sample_like(shared).iou(subnet.sample_like(shared)) < 0.5


def test_sample_like_overlaps_by_chance_and_complement_sample_never():
    subnet = big()
    draws = generator(5)
    overlap = [int((subnet.sample_like(draws).masks["w"] & subnet.masks["w"]).sum()) for _ in range(50)]
    kept = int(subnet.masks["w"].sum())
    expected = kept * kept / 2000  # hypergeometric mean and spread
    spread = math.sqrt(expected * (1 - kept / 2000) ** 2 / 50)
    assert abs(sum(overlap) / 50 - expected) < 4 * spread
    assert all((subnet & subnet.complement_sample(draws)).num_kept() == 0 for _ in range(10))


def test_every_position_is_equally_likely_in_a_sample():
    subnet = subnet_of({"a": [1, 1, 0, 0, 0]})
    draws = generator(0)
    like = sum(subnet.sample_like(draws).masks["a"].int() for _ in range(2000)) / 2000
    outside = sum(subnet.complement_sample(draws).masks["a"].int() for _ in range(2000)) / 2000
    assert torch.allclose(like, torch.full((5,), 0.4), atol=0.05)
    assert torch.allclose(outside, torch.tensor([0, 0, 2 / 3, 2 / 3, 2 / 3]), atol=0.05)


def test_complement_sample_above_half_density_raises_with_both_counts():
    half = subnet_of({"a": [1, 1, 0, 0]})
    assert lists(half.complement_sample(generator(0))) == {"a": [0, 0, 1, 1]}
    with pytest.raises(ValueError, match=r"b \(3 inside, 1 outside\)"):
        subnet_of({"a": [1, 0, 0, 0], "b": [1, 1, 1, 0]}).complement_sample(generator(0))
    with pytest.raises(TypeError, match="generator must be a CPU torch.Generator, got 3"):
        half.sample_like(3)


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Conv2d(1, 2, 3).to(memory_format=torch.channels_last))


def net_subnet() -> Subnet:
    return Subnet(
        {"0.weight": torch.rand(4, 3, generator=generator(0)) < 0.5, "1.weight": torch.rand(2, 1, 3, 3) < 0.5}
    )


def bits(net: nn.Module) -> list[list[int]]:
    return [p.detach().contiguous().view(torch.uint8).tolist() for p in net.parameters()]


@pytest.mark.parametrize("mode", ["keep", "ablate"])
def test_applied_zeroes_one_side_and_restores_bit_for_bit(mode):
    net, subnet = make_net(), net_subnet()
    with torch.no_grad():
        net[0].weight[0, 0] = -0.0
        net[0].weight[1, 1] = float("nan")
    before, weight = bits(net), net[0].weight.detach().clone()
    kept = subnet.masks["0.weight"] if mode == "keep" else ~subnet.masks["0.weight"]
    with subnet.applied(net, mode=mode) as inside:
        assert inside is net
        assert (net[0].weight[~kept] == 0).all()
        assert torch.equal(net[0].weight[kept].nan_to_num(9), weight[kept].nan_to_num(9))
        assert net[1].weight.is_contiguous(memory_format=torch.channels_last)
    assert bits(net) == before
    subnet.apply_(net, mode)
    assert (net[0].weight[~kept] == 0).all() and bits(net)[1] == before[1]


def test_applied_restores_after_an_exception_and_after_training_inside():
    net, subnet = make_net(), net_subnet()
    before = bits(net)
    with pytest.raises(KeyError), subnet.applied(net):
        raise KeyError
    assert bits(net) == before
    with subnet.applied(net):
        net[0](torch.randn(2, 3)).sum().backward()
        torch.optim.SGD([net[0].weight], lr=1.0).step()
    assert bits(net) == before


def test_nested_applied_unwinds():
    net, subnet = make_net(), net_subnet()
    before = bits(net)
    with subnet.applied(net), subnet.applied(net, mode="ablate"):
        assert (net[0].weight == 0).all() and (net[1].weight == 0).all()
    assert bits(net) == before


def test_a_version_counter_moves_with_each_write_so_that_caches_notice():
    net, subnet = make_net(), net_subnet()
    start = net[0].weight._version
    with subnet.applied(net):
        inside = net[0].weight._version
    assert start < inside < net[0].weight._version


def test_an_unknown_mode_and_a_model_that_does_not_fit_change_nothing():
    net, subnet = make_net(), net_subnet()
    before = bits(net)
    with pytest.raises(ValueError, match="mode must be 'keep' or 'ablate', got 'drop'"), subnet.applied(net, "drop"):
        pass
    with pytest.raises(ValueError, match="mode must be"):
        subnet.apply_(net, "drop")
    odd = Subnet({**subnet.masks, "2.weight": torch.ones(1, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"Subnet.apply_: .* missing from the model: 2.weight"):
        odd.apply_(net)
    with pytest.raises(TypeError, match="must be a torch.nn.Module, got dict"):
        subnet.apply_({})
    assert bits(net) == before


def test_masks_are_copied_so_that_later_writes_do_not_reach_the_subnet():
    mask = torch.tensor([True, False])
    provenance = {"list": [1]}
    subnet = Subnet({"a": mask}, provenance)
    mask[1] = True
    provenance["list"].append(2)
    assert subnet.density() == 0.5 and subnet.provenance == {"list": [1]}


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (({},), ValueError, "at least one parameter"),
        ((torch.ones(2).bool(),), TypeError, "dict of parameter name to bool tensor, got Tensor"),
        (({"a": torch.ones(2)},), TypeError, r"mask of 'a' must be a bool tensor, got torch.float32"),
        (({"a": [True]},), TypeError, "got list"),
        (({1: torch.ones(2).bool()},), TypeError, "mask of 1"),
        (({"a": torch.ones(2).bool()}, {"x": object()}), TypeError, "only what JSON can"),
        (({"a": torch.ones(2).bool()}, {"x": float("nan")}), TypeError, "only what JSON can"),
        (({"a": torch.ones(2).bool()}, "S1"), TypeError, "provenance must be a dict, got str"),
    ],
)
def test_bad_construction_is_refused_in_words(arguments, error, words):
    with pytest.raises(error, match=words):
        Subnet(*arguments)


def test_values_must_match_the_masks():
    masks = {"a": torch.tensor([True, False, True])}
    assert Subnet(masks, weights={"a": torch.ones(2)}).weights["a"].tolist() == [1, 1]
    for values in (torch.ones(3), torch.ones(1, 2), torch.ones(2).long()):
        with pytest.raises(ValueError, match="must be 2 floating-point numbers in one dimension"):
            Subnet(masks, weights={"a": values})
    with pytest.raises(ValueError, match="same parameters as masks"):
        Subnet(masks, weights={"b": torch.ones(2)})


def test_repr_says_size_and_density():
    assert repr(A) == "Subnet(2 parameters, 3 of 10 weights, density 0.3000, provenance={})"
