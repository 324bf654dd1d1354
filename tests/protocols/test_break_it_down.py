"""Break It Down: on a network whose parts are known weight by weight, and on the authors' published accuracies."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from subnets import Subnet, mask_model
from subnets.protocols import BreakItDown, Subroutine, break_it_down, choose_by_quality, confusion_row
from subnets.protocols.accuracies import function_accuracies
from subnets.subnet_file import weights_hash
from torch import nn

CLASSES = 4


def two_parts():
    """Inputs: f's and g's answer, one-hot. Output: the answer. Hidden units 0-3 carry f's, 4-7 g's."""
    first, second = nn.Linear(2 * CLASSES, 2 * CLASSES, bias=False), nn.Linear(2 * CLASSES, CLASSES, bias=False)
    with torch.no_grad():
        first.weight.copy_(torch.eye(2 * CLASSES))
        second.weight.copy_(torch.cat([torch.eye(CLASSES), torch.eye(CLASSES)], 1))
    return nn.Sequential(first, second)


def masks():
    """The weights of f and of g: half the network each."""
    f = {"0.weight": torch.zeros(8, 8, dtype=torch.bool), "1.weight": torch.zeros(4, 8, dtype=torch.bool)}
    f["0.weight"][:4], f["1.weight"][:, :4] = True, True
    f = Subnet(f)
    return {"f": f, "g": ~f}


def test_of(which):
    """Accuracy on data that this function alone decides: the other one's inputs are zero."""
    answers = torch.arange(CLASSES)
    x = torch.zeros(CLASSES, 2 * CLASSES)
    x[answers, answers + (0 if which == "f" else CLASSES)] = 1.0

    def accuracy(model):
        with torch.no_grad():
            return (model(x).argmax(1) == answers).float().mean()  # a network at a loss says class 0: chance

    return accuracy


test_of.__test__ = False  # type: ignore[attr-defined]
TESTS = {"f": test_of("f"), "g": test_of("g")}


def test_a_network_of_two_parts_is_compositional_and_random_weights_are_not():
    model, before = two_parts(), weights_hash(dict(two_parts().named_parameters()))
    noise = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 4, bias=False))
    with torch.no_grad():
        for parameter in noise.parameters():
            parameter.zero_()
    seen = []

    def train(base):
        seen.append(base)
        return masks()

    found = break_it_down(model, masks(), TESTS, chance=0.25, random_model=noise, random_subnets=train)
    for name in ("f", "g"):
        one = found[name]
        assert (one.own, one.delta_sub, one.delta_abl, one.quality) == (1, 0.75, -0.75, 0.75)  # Q's largest value
        assert one.accuracy("subnet", "other") == 0.25 and one.density == 0.5
        assert found.is_compositional(name) is True and found.verdict(name) == "yes"
    assert seen == [noise] and found.whole == {"f": 1, "g": 1}
    assert found.control is not None and found.control["f"].delta_sub == 0 == found.control["f"].delta_abl
    assert found.sharing is not None and found.sharing.overlap("f").shared() == 0
    assert weights_hash(dict(model.named_parameters())) == before  # the weights are what they were
    # without a control the question is open; with one that shows the same, the answer is no
    alone = break_it_down(model, masks(), TESTS, chance=0.25)
    assert alone.is_compositional("f") is None and "no control" in alone.verdict("f")
    same = break_it_down(model, masks(), TESTS, chance=0.25, random_model=two_parts(), random_subnets=masks())
    assert same.is_compositional("f") is False and same.verdict("f") == "no: random weights show it too"


def test_the_table_shows_raw_and_clipped_values():
    found = break_it_down(two_parts(), masks(), TESTS, chance=0.5)
    row = found.rows()[0]
    assert (row["sub_target"], row["sub_other"], row["abl_target"], row["abl_other"]) == (1, 0.25, 0.25, 1)
    assert (row["delta_sub"], row["delta_sub_raw"], row["delta_abl"], row["delta_abl_raw"]) == (0.5, 0.75, -0.5, -0.75)
    assert row["base"] == "trained" and row["quality"] == 0.5
    raw = break_it_down(two_parts(), masks(), TESTS, chance=0.5, clip=False)["f"]
    assert (raw.delta_sub, raw.delta_abl, raw.quality) == (0.75, -0.75, 0.75)
    assert "open: no control" in found.table().text()


def test_mask_and_ablation_mask_are_all_ones_and_a_score_of_zero_is_ablated():
    model = nn.Linear(3, 1, bias=False)
    weight = model.weight.detach().clone()
    scores = torch.tensor([[-0.05, 0.0, 0.05]])
    found = mask_model(model, init=lambda name, w: scores)
    found.beta = 200.0
    soft = next(iter(found.layers.values())).mask().detach()
    found.harden()
    subnet = found.subnet()
    assert subnet.masks["weight"].tolist() == [[False, False, True]]
    # sigma(200 * .05) = .9999546: training and evaluation differ by less than 5e-5 where |s| >= .05
    decided = (soft - subnet.masks["weight"].float())[scores != 0].abs()
    assert decided.tolist() == pytest.approx([1 / (1 + math.exp(10))] * 2, rel=1e-3) and float(decided.max()) < 5e-5
    assert soft[0, 1] == 0.5
    found.unmask()
    with subnet.applied(model):
        kept = model.weight.detach().clone()
    with subnet.applied(model, "ablate"):
        removed = model.weight.detach().clone()
    assert torch.equal(kept + removed, weight) and removed[0, 1] == weight[0, 1] and kept[0, 2] == weight[0, 2]
    assert torch.equal(model.weight, weight)


def test_a_mask_of_ones_is_the_network_bit_for_bit():
    model, x = nn.Linear(7, 5), torch.randn(3, 7)
    expected = model(x)
    ones = Subnet({"weight": torch.ones(5, 7, dtype=torch.bool)})
    with ones.applied(model):
        assert torch.equal(model(x), expected)
    with (~ones).applied(model, "ablate"):
        assert torch.equal(model(x), expected)


def measured(own, sub, abl, chance=0.25, clip=True, name="i"):
    target_other = (name, "j" if name == "i" else "i")
    sub, abl = (dict(zip(target_other, values, strict=True)) for values in (sub, abl))
    return Subroutine(name, 0.1, own, sub, abl, chance, clip)


def test_rounding_of_fp32_accuracies_decides_nothing():
    tenth = torch.tensor(0.1).item()  # .100000001
    one = measured(1, (1, 0.1), (0.1, tenth), chance=0.1)
    assert one.delta_abl < 0 and not one.is_selective
    grid = {"first": BreakItDown({"i": measured(1, (1, 0.1), (0.1, 0.1), chance=0.1)}, {}, "zero")}
    grid["second"] = BreakItDown({"i": one}, {}, "zero")
    assert choose_by_quality(grid) == {"i": "first"} and grid["second"].verdict("i") == "no: delta_abl >= 0"
    assert "-0.0000" not in grid["second"].table().text()
    assert measured(torch.tensor(0.9).item(), (1, 0.1), (0.1, 0.5)).quality > 0  # .899999976 is .9


def test_a_difference_up_to_the_margin_counts_as_none():
    model, noise = two_parts(), BreakItDown({"f": measured(1, (1, 0.24), (0.24, 0.27), name="i")}, {}, "zero")
    assert noise["f"].is_selective  # 27 % against 25 % by chance
    one = Subroutine("i", 0.1, 1.0, {"i": 1, "j": 0.24}, {"i": 0.24, "j": 0.27}, 0.25, True, 0.05)
    assert not one.is_selective and one.lacking == ["delta_abl >= -0.05"]
    assert break_it_down(model, masks(), TESTS, chance=0.25, margin=0.74)["f"].is_selective
    found = break_it_down(model, masks(), TESTS, chance=0.25, margin=0.75)
    assert found.verdict("f") == "no: delta_sub <= 0.75 and delta_abl >= -0.75"


def test_quality_by_hand():
    assert measured(0.89, (1, 0), (0.1, 1)).quality == 0  # fails its own task
    assert measured(0.90, (1, 0), (0.1, 1)).quality == 0.75 == measured(1, (1, 0), (0.1, 1)).quality
    assert measured(0.95, (1, 0), (0.1, 1), clip=False).quality == 0.9
    assert measured(0.95, (1, 0), (0.8, 0.5)).quality == pytest.approx(-0.3)  # may be negative
    assert measured(0.95, (1, 0), (0.1, 0.2)).quality == 0 and measured(0.95, (1, 0), (0.2, 1), 0.5).quality == 0.5


def test_the_setting_of_highest_quality_is_chosen_the_first_on_ties():
    def result(quality_i, quality_j):
        one, other = (measured(1.0, (1, 0), (0.25, 0.25 + q), name=n) for n, q in (("i", quality_i), ("j", quality_j)))
        return BreakItDown({"i": one, "j": other}, {}, "zero")

    grid = {(1e-2, 0.1): result(0.1, 0.5), (1e-2, 0.0): result(0.5, 0.25), (1e-4, 0.1): result(0.5, 0.5)}
    assert choose_by_quality(grid) == {"i": (1e-2, 0.0), "j": (1e-2, 0.1)}
    with pytest.raises(ValueError, match="one result or more"):
        choose_by_quality({})
    with pytest.raises(ValueError, match="the same subroutines"):
        choose_by_quality({1: result(0, 0), 2: BreakItDown({"i": measured(1, (1, 0), (1, 0))}, {}, "zero")})


def test_swapping_target_and_other_flips_the_sign_of_both_differences():
    for sub, abl, clip in itertools.product([(0.9, 0.3), (0.1, 0.2)], [(0.3, 0.7), (0.6, 0.05)], [True, False]):
        one, swapped = measured(1, sub, abl, clip=clip), measured(1, sub[::-1], abl[::-1], clip=clip)
        assert one.delta_sub == -swapped.delta_sub and one.delta_abl == -swapped.delta_abl


# Published: accuracies Sub target, Sub other, Abl target, Abl other (mean of 9 runs; none of them clipped at 1/4), and
# the authors' mean differences of clipped accuracies.
PUBLISHED = {
    "Inside-Contact WRN50, Contact": ((0.998, 0.280, 0.540, 0.872), (0.717, -0.332)),
    "Inside-Number RN50, Inside": ((1.0, 0.397, 0.385, 0.573), (0.603, -0.187)),
    "Inside-Number RN50, Number": ((0.999, 0.461, 0.729, 0.848), (0.538, -0.119)),
    "Number-Contact RN50, Contact": ((0.997, 0.454, 0.549, 0.866), (0.543, -0.317)),
}


@pytest.mark.parametrize("row", PUBLISHED)
def test_the_authors_accuracies_give_the_authors_differences(row):
    (sub_target, sub_other, abl_target, abl_other), published = PUBLISHED[row]
    one = measured(1, (sub_target, sub_other), (abl_target, abl_other))
    assert (one.delta_sub, one.delta_abl) == pytest.approx(published, abs=1.01e-3)  # figures of three digits


def test_add_and_mul_have_delta_sub_but_hardly_delta_abl():
    # Csordas' small network at full length: each mask does its own operation alone, and either's removal kills both
    add = Subroutine("add", 0.077, 1.0, {"add": 1.0, "mul": 0.007}, {"add": 0.011, "mul": 0.047}, 0.01)
    mul = Subroutine("mul", 0.208, 1.0, {"add": 0.007, "mul": 1.0}, {"add": 0.008, "mul": 0.004}, 0.01)
    assert add.delta_sub == mul.delta_sub == 0.99
    assert add.delta_abl == pytest.approx(-0.036) and mul.delta_abl == 0 and add.quality == pytest.approx(0.036)
    found = BreakItDown({"add": add, "mul": mul}, {"add": 1.0, "mul": 1.0}, "zero")
    assert found.verdict("mul") == "no: delta_abl >= 0" and found.is_compositional("mul") is False
    assert found.rows()[1]["delta_abl_raw"] == pytest.approx(-0.004)  # what clipping hides


def test_more_than_two_functions_are_averaged_after_clipping():
    one = Subroutine("f", 0.1, 1.0, {"f": 0.9, "g": 0.1, "h": 0.5}, {"f": 0.2, "g": 0.9, "h": 0.4}, 0.25)
    assert one.delta_sub == pytest.approx(0.9 - (0.25 + 0.5) / 2) and one.delta_abl == pytest.approx(0.25 - 0.65)
    assert one.accuracy("subnet", "other") == pytest.approx(0.3)


def test_own_accuracy_is_that_of_the_subnet_on_its_own_task():
    model, seen = two_parts(), []

    def own(base):
        seen.append(base[0].weight.detach().diagonal().tolist())
        return 0.89

    found = break_it_down(model, {"f": masks()["f"]}, TESTS, chance=0.25, own={"f": own})
    assert seen == [[1] * 4 + [0] * 4] and found["f"].own == 0.89 and found["f"].quality == 0
    assert found["f"].delta_abl == -0.75 and found.sharing is None


def test_random_ablation_writes_fresh_uniform_values_where_the_subnet_was():
    model = nn.Sequential(nn.Linear(64, 100), nn.Linear(100, 50), nn.Conv2d(4, 8, 5))
    subnet = Subnet({name: torch.rand(p.shape) < 0.6 for name, p in model.named_parameters() if p.ndim > 1})
    before, seen = {name: p.detach().clone() for name, p in model.named_parameters()}, {}

    def test(which):
        def accuracy(base):
            seen.setdefault(which, []).append({name: p.detach().clone() for name, p in base.named_parameters()})
            return 0.5

        return accuracy

    for seed in (0, 0, 1):
        function_accuracies(model, {"m": subnet}, {"a": test(seed)}, ablation="random", seed=seed)
    kept, ablated = seen[0][1:3]
    for name, inputs in (("0.weight", 64), ("1.weight", 100), ("2.weight", 100)):
        mask, bound = subnet.masks[name], 1 / math.sqrt(inputs)  # kaiming_uniform(a=sqrt(5))
        assert torch.equal(kept[name], before[name] * mask)  # the subnet alone has zeros outside
        assert torch.equal(ablated[name][~mask], before[name][~mask])
        fresh = ablated[name][mask]
        assert not bool((fresh == before[name][mask]).any()) and float(fresh.abs().max()) <= bound
        assert float(fresh.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert torch.equal(seen[0][5][name], ablated[name])  # the same seed, the same values
        assert not torch.equal(seen[1][2][name], ablated[name])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_random_ablation_counts_the_inputs_of_hugging_faces_conv1d():
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    model, seen = nn.Sequential(Conv1D(100, 25)), []  # 25 inputs, 100 outputs, stored [25, 100]
    everything = Subnet({"0.weight": torch.ones(25, 100, dtype=torch.bool)})

    def look(base):
        seen.append(float(base[0].weight.detach().abs().max()))
        return 0.0

    function_accuracies(model, {"m": everything}, {"a": look}, ablation="random")
    assert 0.19 < seen[2] <= 0.2


def test_mean_and_reinit_are_the_subnets_own_fills():
    model, seen = nn.Linear(6, 4, bias=False), []
    subnet = Subnet({"weight": torch.rand(4, 6) < 0.5})

    def look(base):
        seen.append(base.weight.detach().clone())
        return 0.0

    for ablation in ("mean", "reinit"):
        function_accuracies(model, {"m": subnet}, {"a": look}, ablation=ablation, seed=3)
    fills: list[dict[str, Any]] = [
        {"fill": "mean"}, {"fill": "reinit", "generator": torch.Generator().manual_seed(3)}
    ]  # fmt: skip
    for found, how in zip(seen[2::3], fills, strict=True):
        with subnet.applied(model, "ablate", **how):
            assert torch.equal(found, model.weight)


def test_the_table_of_functions_and_masks():
    found = function_accuracies(two_parts(), masks(), TESTS)
    assert found.whole == {"f": 1, "g": 1}
    assert found.subnet == {"f": {"f": 1, "g": 0.25}, "g": {"f": 0.25, "g": 1}}
    assert found.ablated == {"f": {"f": 0.25, "g": 1}, "g": {"f": 1, "g": 0.25}}
    assert found.rows()[3] == {"mask": "f", "part": "subnet", "function": "g", "accuracy": 0.25}
    lines = [line.split() for line in found.table().text().splitlines()]
    assert ["g", "ablated", "1.0000", "0.2500"] in lines and ["whole", "1.0000", "1.0000"] in lines


def test_confusion_leaves_out_what_is_the_answer_of_both():
    a, b = torch.meshgrid(torch.arange(100), torch.arange(100), indexing="ij")
    answers = {"+": (a + b).flatten() % 100, "*": (a * b).flatten() % 100}
    assert int((answers["+"] == answers["*"]).sum()) == 40  # (a - 1)(b - 1) = 1 mod 100: as many as units mod 100
    assert confusion_row(answers["+"], answers) == {"+": 1, "*": 0, "neither": 0}
    predicted = torch.where(torch.arange(10_000) < 5_000, answers["*"], torch.full((10_000,), 100))
    tells = answers["+"] != answers["*"]
    share = int(tells[:5000].sum()) / 9960
    assert confusion_row(predicted, answers) == pytest.approx({"+": 0, "*": share, "neither": 1 - share}, abs=1e-15)
    # answers of several digits count only whole
    digits = {name: torch.stack([its % 10, its // 10], 1) for name, its in answers.items()}
    assert confusion_row(digits["*"], digits) == {"+": 0, "*": 1, "neither": 0}
    one_digit = torch.stack([digits["+"][:, 0], torch.full((10_000,), 10)], 1)
    assert confusion_row(one_digit, digits)["neither"] == 1


def test_what_can_not_be_measured_is_refused_in_words():
    model, f = two_parts(), masks()["f"]

    def refused(match, **change):
        given = {"model": model, "subnets": masks(), "evaluate": TESTS, "chance": 0.25, **change}
        with pytest.raises(ValueError, match=match):
            break_it_down(**given)

    refused("accuracy in evaluate, which has \\['f', 'g'\\] and not \\['h'\\]", subnets={"h": f})
    refused("accuracy in own, which has \\['f'\\] and not \\['g'\\]", own={"f": TESTS["f"]})
    refused("ablation must be one of .*'zero'\\], got 'zeros'", ablation="zeros")
    for chance in (1, -0.1, 25, math.nan, "a", True):
        refused("chance must be in \\[0, 1\\)", chance=chance)
    other = Subnet({"0.weight": f.masks["0.weight"]})
    refused("'f' and 'g': both sides must mask the same parameters.*1.weight", subnets={"f": f, "g": other})
    refused("does not fit the model", subnets={"f": Subnet({"w": torch.ones(2, dtype=torch.bool)})})
    refused("from 0 to 1, test 'g' returned 97.5", evaluate={"f": TESTS["f"], "g": lambda model: 97.5})
    refused("test 'f' returned nan", evaluate={"f": lambda model: math.nan, "g": TESTS["g"]})
    refused("the target's test and another one, got only \\['f'\\]", subnets={"f": f}, evaluate={"f": TESTS["f"]})
    refused("margin must be in", margin=-0.1)
    refused("needs both random_model and random_subnets", random_model=two_parts())
    refused("another network than model", random_model=model, random_subnets=masks())
    refused("must have the subroutines .*'g'\\], got \\['f'\\]", random_model=two_parts(), random_subnets={"f": f})
    refused("subnets must map", subnets={})
    with pytest.raises(TypeError, match="evaluate must map names to functions"):
        break_it_down(model, masks(), {"f": 0.5, "g": 0.5}, chance=0.25)  # type: ignore[dict-item]
    bias = Subnet({"bias": torch.ones(2, dtype=torch.bool)})
    with pytest.raises(ValueError, match="two or more dimensions, bias has shape \\[2\\]; use 'zero'"):
        function_accuracies(nn.Linear(3, 2), {"m": bias}, {"a": lambda m: 1.0}, ablation="random")
    with pytest.raises(ValueError, match="none called 'neither'"):
        confusion_row(torch.zeros(3), {"f": torch.zeros(3), "neither": torch.zeros(3)})
    with pytest.raises(ValueError, match="predicted's shape \\[3\\].*'g': \\[2\\]"):
        confusion_row(torch.zeros(3), {"f": torch.zeros(3), "g": torch.zeros(2)})
    with pytest.raises(ValueError, match="they do for none of 3"):
        confusion_row(torch.zeros(3), {"f": torch.zeros(3), "g": torch.zeros(3)})
