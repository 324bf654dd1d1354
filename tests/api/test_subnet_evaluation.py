"""`evaluate_subnet` against scores counted by hand."""

import pytest
import torch
from subnets.evaluation import evaluate_subnet
from subnets.subnet import Subnet
from torch import nn


def make() -> tuple[nn.Linear, Subnet]:
    net = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0, 10.0, 100.0, 1000.0]]))
    return net, Subnet({"weight": torch.tensor([[True, False, False, False]])})


def total(net: nn.Module) -> float:
    return net.weight.sum().item()


def test_each_condition_sees_the_weights_it_names():
    net, subnet = make()
    table = evaluate_subnet(net, subnet, {"sum": total, "half": lambda m: m.weight.sum() / 2}, controls=4)
    assert table.value("full_model", "sum") == 1111 and table.value("subnet", "sum") == 1
    assert table.value("complement", "sum") == 1110 and table.value("complement", "half") == 555
    assert total(net) == 1111 and table.notes == []
    draws = [net.weight[sample.masks["weight"]].item() for sample in samples(subnet, "sample_like", 4)]
    row = next(row for row in table.rows if row["condition"] == "sampled" and row["test"] == "sum")
    mean = sum(draws) / 4
    assert row["runs"] == 4 and row["mean"] == mean and row["density"] == 0.25
    assert row["std"] == pytest.approx((sum((d - mean) ** 2 for d in draws) / 4) ** 0.5)
    outside = [net.weight[sample.masks["weight"]].item() for sample in samples(subnet, "complement_sample", 4)]
    assert table.value("sampled_complement", "sum") == sum(outside) / 4 and 1.0 not in outside


def samples(subnet: Subnet, method: str, count: int) -> list[Subnet]:
    return [getattr(subnet, method)(torch.Generator().manual_seed(1_000_003 * i)) for i in range(count)]


def test_seeds_repeat_and_differ():
    net = nn.Linear(50, 50)
    subnet = Subnet({"weight": torch.rand(50, 50, generator=torch.Generator().manual_seed(0)) < 0.1})
    first, again, other = (evaluate_subnet(net, subnet, {"sum": total}, seed=seed).rows for seed in (0, 0, 1))
    assert first == again
    assert [row["mean"] for row in first[:3]] == [row["mean"] for row in other[:3]]
    assert first[3]["mean"] != other[3]["mean"] and first[4]["mean"] != other[4]["mean"]


def test_a_dense_subnet_has_no_complement_sample_and_the_table_says_so():
    net, subnet = make()
    table = evaluate_subnet(net, ~subnet, {"sum": total}, controls=2)
    assert [row["condition"] for row in table.rows] == ["full_model", "subnet", "complement", "sampled"]
    assert "sampled_complement is left out" in table.notes[0] and "3 inside, 1 outside" in table.notes[0]
    assert table.notes[0] in str(table)
    with pytest.raises(KeyError, match="no row"):
        table.value("sampled_complement", "sum")


def test_the_text_is_one_line_per_condition():
    net, subnet = make()
    lines = str(evaluate_subnet(net, subnet, {"sum": total}, controls=0)).splitlines()
    assert [line.split() for line in lines] == [
        ["condition", "density", "sum"],
        ["full_model", "1.0000", "1111.0000"],
        ["subnet", "0.2500", "1.0000"],
        ["complement", "0.7500", "1110.0000"],
    ]
    assert " +- " in str(evaluate_subnet(net, subnet, {"sum": total}, controls=2))


def test_bad_arguments_are_refused_and_weights_come_back_when_a_test_fails():
    net, subnet = make()
    with pytest.raises(TypeError, match="tests must map names to functions"):
        evaluate_subnet(net, subnet, {})
    with pytest.raises(TypeError, match="test 'sum' must return a float, got str"):
        evaluate_subnet(net, subnet, {"sum": lambda m: "many"})
    with pytest.raises(ValueError, match="controls must be an integer >= 0, got -1"):
        evaluate_subnet(net, subnet, {"sum": total}, controls=-1)
    with pytest.raises(ValueError, match="evaluate_subnet: the subnet does not fit"):
        evaluate_subnet(nn.Linear(3, 1), subnet, {"sum": total})
    calls = []

    def fails_late(model: nn.Module) -> float:
        calls.append(1)
        return 1 / (3 - len(calls))

    with pytest.raises(ZeroDivisionError):
        evaluate_subnet(net, subnet, {"late": fails_late})
    assert total(net) == 1111
