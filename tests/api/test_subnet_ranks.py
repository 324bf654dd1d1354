"""Ranks of a subnet's weights, the part of it that they single out, and its planting."""

import pytest
import torch
from subnets import Subnet, transfer
from torch import nn


def scored(seed: int = 0, shape: tuple[int, ...] = (9, 7)) -> tuple[Subnet, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    scores = {name: torch.randn(shape, generator=generator) for name in ("b", "a")}
    return Subnet({name: s > 0 for name, s in scores.items()}, {"task": "t"}, base_hash="x").with_ranks(scores), scores


def test_ranks_count_the_lower_scores_over_all_parameters():
    masks = {"a": torch.tensor([[True, False, True]]), "b": torch.tensor([True, True])}
    ranks = Subnet(masks).with_ranks({"a": torch.tensor([[0.3, -1.0, 0.1]]), "b": torch.tensor([0.2, 0.9])}).ranks
    assert {name: its.tolist() for name, its in ranks.items()} == {"a": [128, 0], "b": [64, 192]}
    assert ranks["a"].dtype == torch.uint8


def test_equal_scores_have_equal_ranks_so_that_a_unit_is_not_cut():
    mask = torch.tensor([[True] * 3, [False] * 3, [True] * 3, [True] * 3])
    subnet = Subnet({"a": mask}).with_ranks({"a": torch.tensor([[0.5], [-1.0], [0.2], [0.9]])})
    assert subnet.ranks["a"].tolist() == [85, 85, 85, 0, 0, 0, 170, 170, 170]
    assert subnet.top(0.4).masks["a"].any(1).tolist() == [False, False, False, True]
    assert subnet.top(0.6).masks["a"].all(1).tolist() == [True, False, False, True]
    assert subnet.top(0.001).num_kept() == 3  # at least the highest rank


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.52, 0.77, 1.0])
def test_top_is_the_part_of_highest_score(fraction):
    subnet, scores = scored()
    top = subnet.top(fraction)
    count = round(fraction * subnet.num_kept())
    threshold = torch.cat([s.flatten() for s in scores.values()]).sort(descending=True).values[count - 1]
    for name, mask in top.masks.items():
        assert torch.equal(mask, scores[name] >= threshold)
    assert top.base_hash == "x" and top.provenance["fraction"] == fraction and top.provenance["of"] == [{"task": "t"}]


def test_top_of_a_large_subnet_is_right_to_a_256th():
    subnet, scores = scored(shape=(300, 200))
    for fraction in (0.03, 0.5, 0.901):
        top = subnet.top(fraction)
        assert abs(top.num_kept() / subnet.num_kept() - fraction) <= 0.5 / 256 + 1e-4
        lowest_in = min(scores[n][m].min() for n, m in top.masks.items())
        rest = subnet - top
        assert lowest_in > max(scores[n][m].max() for n, m in rest.masks.items())
    again = subnet.top(0.5).top(0.5)
    assert abs(again.num_kept() / subnet.num_kept() - 0.25) < 0.5 / 128


def test_ranks_and_values_go_through_the_file_and_through_top(tmp_path):
    torch.manual_seed(0)
    net, scores = nn.Linear(7, 9), torch.randn(9, 7)
    subnet = Subnet({"weight": scores > 0}).with_ranks({"weight": scores}).with_weights(net)
    subnet.save(tmp_path / "s")
    loaded = Subnet.load(tmp_path / "s")
    assert torch.equal(loaded.ranks["weight"], subnet.ranks["weight"])
    top = loaded.top(0.31)
    assert torch.equal(top.weights["weight"], net.weight[top.masks["weight"]])
    fresh = nn.Linear(7, 9)
    before = fresh.weight.detach().clone()
    transfer(loaded, None, fresh, fraction=0.31)
    assert torch.equal(fresh.weight, torch.where(top.masks["weight"], net.weight, before))
    assert 0 < top.num_kept() == round(0.31 * subnet.num_kept())


def test_a_file_without_ranks_keeps_the_first_version_so_that_older_readers_take_it(tmp_path):
    from safetensors import safe_open

    subnet, _ = scored()
    versions = []
    for its in (subnet, Subnet(subnet.masks)):
        its.save(tmp_path / "s")
        with safe_open(tmp_path / "s", "pt") as file:
            versions.append(file.metadata()["format_version"])
    assert versions == ["2", "1"] and Subnet.load(tmp_path / "s").ranks is None


def test_bad_ranks_scores_and_fractions_are_refused():
    subnet, scores = scored()
    plain = Subnet(subnet.masks)
    with pytest.raises(ValueError, match="Subnet.top: the subnet has no ranks"):
        plain.top(0.5)
    with pytest.raises(ValueError, match=r"scores must name the same parameters as the masks, these differ: \['b'\]"):
        plain.with_ranks({"a": scores["a"]})
    with pytest.raises(ValueError, match=r"scores of b must have the mask's shape \[9, 7\] or sizes that divide it"):
        plain.with_ranks({**scores, "b": torch.ones(9, 2)})
    scores["a"][plain.masks["a"]] = float("nan")
    with pytest.raises(ValueError, match="scores of a must be finite"):
        plain.with_ranks(scores)
    for fraction in (0, 1.5, -1, float("nan"), True, "half"):
        with pytest.raises(ValueError, match=r"Subnet.top: fraction must be a number in \(0, 1\]"):
            subnet.top(fraction)
    with pytest.raises(ValueError, match=r"ranks of 'a' must be \d+ uint8 numbers"):
        Subnet(plain.masks, ranks={**subnet.ranks, "a": subnet.ranks["a"][1:]})
