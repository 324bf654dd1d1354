"""What subnets share, against counts: a published-size pair of masks, and three small ones by hand."""

from __future__ import annotations

import math

import pytest
import torch
from subnets import Subnet
from subnets.report.comparison import Comparison
from subnets.sharing import Overlap, shared_weights

# A run of Csordas' add/mul network (400-400-200) at full length: layer -> (shape, kept by add, by mul, by both)
ADD_MUL = {
    "0.weight": ((400, 42), 5869, 11103, 4895),
    "2.weight": ((400, 400), 8170, 27919, 4281),
    "4.weight": ((200, 400), 4653, 13495, 2657),
    "6.weight": ((20, 200), 1471, 1829, 1213),
}


def add_and_mul():
    """Masks with exactly these counts, side by side in memory."""
    masks = {"add": {}, "mul": {}}
    for name, (shape, add, mul, both) in ADD_MUL.items():
        place = torch.arange(math.prod(shape)).view(shape)
        masks["add"][name] = place < add
        masks["mul"][name] = (place >= add - both) & (place < add - both + mul)
    return {name: Subnet(its) for name, its in masks.items()}


def test_a_whole_run_of_add_and_mul_has_its_figures():
    subnets = add_and_mul()
    sharing = shared_weights(subnets)
    pairs = sharing.pairs["add", "mul"].values()
    assert [round(o.iou(), 3) for o in pairs] == [0.405, 0.135, 0.172, 0.581]
    assert [round(o.io_min(), 3) for o in pairs] == [0.834, 0.524, 0.571, 0.825]
    assert [round(o.shared(), 3) for o in sharing.with_others["add"].values()] == [0.834, 0.524, 0.571, 0.825]
    by_chance = [round(o.shared_by_chance(), 3) for o in sharing.with_others["add"].values()]
    assert by_chance == [0.661, 0.174, 0.169, 0.457]  # the densities of mul
    totals = {name: sharing.overlap(name) for name in subnets}
    assert round(totals["add"].shared(), 3) == 0.647 and round(totals["mul"].shared(), 3) == 0.240
    assert round(totals["add"].shared_by_chance(), 3) == 0.335
    # the total weighs each layer by the mask's own weights there
    weighted = [o.first * o.shared() for o in sharing.with_others["add"].values()]
    assert totals["add"].shared() == pytest.approx(sum(weighted) / 20163, abs=1e-15)
    assert round(totals["mul"].first / totals["add"].first, 2) == 2.70
    assert [round(row["density"], 3) for row in sharing.rows() if row["parameter"] == "all"] == [0.077, 0.208]
    # |m| + |not m| = N
    assert all(s.num_kept() + (~s).num_kept() == 260_800 for s in subnets.values())


def test_a_mask_of_three_is_compared_with_the_union_of_the_others():
    kept = {"a": [0, 1, 2, 3], "b": [0, 1, 8], "c": [1, 2, 9], "full": [0, 1, 2, 3, 4, 5, 6, 7]}
    subnets = {name: Subnet({"w": torch.zeros(10).index_fill_(0, torch.tensor(its), 1).bool()})
               for name, its in kept.items()}  # fmt: skip
    full = subnets.pop("full")
    sharing = shared_weights(subnets, full)
    assert sharing.overlap("a") == Overlap(first=4, second=5, both=3, expected=2.0)  # b | c = {0, 1, 2, 8, 9}
    assert sharing.overlap("b").shared() == 2 / 3 and sharing.overlap("c", "w").shared() == 2 / 3
    assert sharing.iou().tolist() == [[1, 2 / 5, 2 / 5], [2 / 5, 1, 1 / 5], [2 / 5, 1 / 5, 1]]
    assert sharing.iou_by_chance()[0, 1] == pytest.approx(1.2 / 5.8)
    row = sharing.rows()[0]
    assert row == {"subnet": "a", "parameter": "w", "weights": 10, "kept": 4, "density": 0.4, "of_full": 0.5,
                   "shared": 0.75, "shared_by_chance": 0.5}  # fmt: skip
    assert [r["io_min"] for r in sharing.pair_rows() if r["parameter"] == "all"] == [2 / 3, 2 / 3, 1 / 3]
    assert "0.7500" in sharing.table().text()


def test_an_empty_mask_shares_nothing_that_could_be_counted():
    empty, some = (Subnet({"w": torch.tensor(mask).bool()}) for mask in ([0, 0, 0, 0], [1, 0, 1, 1]))
    sharing = shared_weights({"empty": empty, "some": some}, full=empty)
    assert math.isnan(sharing.overlap("empty").shared()) and sharing.overlap("some").shared() == 0
    assert sharing.overlap("empty").io_min() == 1 and sharing.overlap("empty").iou() == 0
    assert [row["shared"] for row in sharing.rows()] == [None, None, 0, 0]
    assert {row["of_full"] for row in sharing.rows()} == {None}


def test_diff_and_sharing_and_iou_agree():
    subnets = add_and_mul()
    first, second = subnets.values()
    sharing, comparison = shared_weights(subnets), Comparison.of(first, second)
    assert comparison.overlaps == sharing.pairs["add", "mul"] and comparison.total() == sharing.overlap("add")
    assert sharing.iou()[0, 1] == first.iou(second) == comparison.total().iou()


def test_what_can_not_be_compared_is_refused():
    a = Subnet({"w": torch.ones(2, 3, dtype=torch.bool)})
    with pytest.raises(ValueError, match="two or more subnets, got 1"):
        shared_weights({"a": a})
    with pytest.raises(ValueError, match=r"'a' and 'b': both sides .* the same parameters.*w \(\[2, 3\] and \[3\]"):
        shared_weights({"a": a, "b": Subnet({"w": torch.ones(3, dtype=torch.bool)})})
    with pytest.raises(ValueError, match=r"'a' and 'full'.*v \(absent and \[2, 3\]\)"):
        shared_weights({"a": a, "b": a}, full=Subnet({"v": torch.ones(2, 3, dtype=torch.bool)}))
    with pytest.raises(TypeError, match="'b' must be a Subnet, got dict"):
        shared_weights({"a": a, "b": {}})  # type: ignore[dict-item]
