"""Lottery-ticket sparse fine-tuning and its differences: what is chosen, what stays frozen, sums, files."""

from __future__ import annotations

import os
import zipfile

import numpy as np
import pytest
import torch
from subnets.methods import Change, SparseDifference, lottery_ticket_sparse_finetuning
from subnets.transfer.anchor import _anchors
from torch import nn
from torch.nn import functional as F


def small(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 17), nn.Tanh(), nn.Linear(17, 3))


NUM = 6 * 17 + 17 + 17 * 3 + 3


def steps(model: nn.Module, penalty=None) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.3)
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(20, 6, generator=generator), torch.randint(0, 3, (20,), generator=generator)
    for _ in range(5):
        loss = F.cross_entropy(model(x), y)
        (loss + penalty() if penalty else loss).backward()
        optimizer.step()
        optimizer.zero_grad()


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.fixture(autouse=True)
def nothing_is_held_afterwards():
    yield
    assert _anchors == {}


def watched(train=steps):
    """``train``, and the list of the model's values before and after each call."""
    seen: list[dict[str, torch.Tensor]] = []

    def watching(model: nn.Module, *args) -> None:
        seen.append(values(model))
        train(model, *args)
        seen.append(values(model))

    return watching, seen


# --- the two phases


def test_the_k_weights_that_moved_most_train_alone_from_theta_0():
    model, (train, seen) = small(), watched()
    before = values(model)
    found = lottery_ticket_sparse_finetuning(model, train, 40)
    start, full, again, tuned = seen
    assert_equal(start, before)
    assert_equal(again, before)
    assert_equal(values(model), before)
    moved = torch.cat([(full[n] - before[n]).abs().flatten() for n in before])
    expected = (moved >= moved.sort(descending=True).values[39]).split([before[n].numel() for n in before])
    for (name, mask), its in zip(found.subnet.masks.items(), expected, strict=True):
        assert torch.equal(mask.flatten(), its)
        assert torch.equal(tuned[name][~mask], before[name][~mask])  # AdamW's decay does not reach them
        assert (tuned[name][mask] != before[name][mask]).all()
    assert found.subnet.num_kept() == 40 and found.difference.num_changed() == 40
    found.difference.apply_to(model)
    for name, tensor in values(model).items():
        torch.testing.assert_close(tensor, tuned[name], rtol=1.2e-7, atol=1e-8)
        assert torch.equal(tensor[~found.subnet.masks[name]], before[name][~found.subnet.masks[name]])


def test_what_moved_most_is_chosen_and_not_what_is_largest():
    model = nn.Linear(3, 1, bias=False)

    def train(model: nn.Module) -> None:
        model.weight.grad = torch.tensor([[1.0, 3.0, 2.0]])
        torch.optim.SGD(model.parameters(), lr=0.1).step()

    with torch.no_grad():
        model.weight.copy_(torch.tensor([[100.0, 0.01, -5.0]]))
    found = lottery_ticket_sparse_finetuning(model, train, 1)
    assert found.subnet.masks["weight"].tolist() == [[False, True, False]]
    assert found.difference.changes["weight"].values.tolist() == pytest.approx([-0.3], rel=1e-6)


def test_equal_changes_at_the_threshold_are_all_chosen():
    model = nn.Linear(4, 1, bias=False)

    def train(model: nn.Module) -> None:
        model.weight.grad = torch.tensor([[1.0, -2.0, 2.0, 4.0]])
        torch.optim.SGD(model.parameters(), lr=0.5).step()

    with torch.no_grad():
        model.weight.zero_()
    chosen = [lottery_ticket_sparse_finetuning(model, train, k).subnet.num_kept() for k in (1, 2, 3, 4)]
    assert chosen == [1, 3, 3, 4]


def test_k_of_all_weights_is_plain_fine_tuning_and_k_of_none_is_theta_0():
    train, seen = watched()
    model, plain = small(), small()
    steps(plain)
    found = lottery_ticket_sparse_finetuning(model, train, NUM)
    assert_equal(seen[3], values(plain))
    assert found.subnet.density() == 1
    found = lottery_ticket_sparse_finetuning(model, steps, 0)
    assert found.subnet.num_kept() == found.difference.num_changed() == 0
    assert_equal(values(found.difference.apply_to(model)), values(small()))


def test_a_share_is_rounded_down_as_the_authors_do():
    assert lottery_ticket_sparse_finetuning(small(), steps, 0.1).subnet.num_kept() == 17  # of 173


def test_iterations_choose_k_over_n_more_each_and_go_on_from_the_last():
    train, seen = watched()
    found = lottery_ticket_sparse_finetuning(small(), train, 41, iterations=2)
    assert [(row["iteration"], row["phase"]) for row in found.history] == [
        (0, "full"), (0, "sparse"), (1, "full"), (1, "sparse"),
    ]  # fmt: skip
    assert_equal(seen[4], seen[3])  # the second full phase starts from the first theta_2, and so does its sparse phase
    assert_equal(seen[6], seen[3])
    after = [sum(int((state[n] != seen[0][n]).sum()) for n in state) for state in (seen[3], seen[7])]
    assert after == [20, 40] and found.subnet.num_kept() == 40
    assert all(((seen[3][n] != seen[0][n]) <= mask).all() for n, mask in found.subnet.masks.items())


def test_dense_parameters_train_in_both_phases_and_are_kept_whole():
    train, seen = watched()
    model = small()
    found = lottery_ticket_sparse_finetuning(model, train, 10, dense=["2"])
    assert list(found.subnet.masks) == ["0.weight", "0.bias"] and found.subnet.num_kept() == 10
    assert torch.equal(seen[2]["2.weight"], seen[0]["2.weight"])
    assert_equal(found.difference.dense, {n: seen[3][n] for n in ("2.weight", "2.bias")})
    with found.difference.applied(model):
        assert torch.equal(model[2].weight, seen[3]["2.weight"])
    assert_equal(values(model), seen[0])
    with found.difference.applied(model, dense=False):
        assert torch.equal(model[2].weight, seen[0]["2.weight"]) and (model[0].weight != seen[0]["0.weight"]).any()


def test_frozen_parameters_are_not_eligible():
    model = small()
    model[0].requires_grad_(False)
    assert list(lottery_ticket_sparse_finetuning(model, steps, 5).subnet.masks) == ["2.weight", "2.bias"]


def test_the_sparse_phase_may_have_a_train_of_its_own_and_scores_are_kept():
    calls = []

    def named(name):
        return lambda model: (calls.append(name), steps(model), name)[-1]

    found = lottery_ticket_sparse_finetuning(
        small(), named("full"), 9, train_sparse=named("sparse"), evaluate=lambda model: len(calls)
    )
    assert calls == ["full", "sparse"]
    assert [(row["trained"], row["score"]) for row in found.history] == [("full", 1), ("sparse", 2)]


def test_l1_is_lambda_over_n_times_the_distance_from_theta_0():
    model = nn.Linear(2, 1, bias=False)
    seen = []

    def train(model: nn.Module, penalty) -> None:
        assert penalty().item() == 0
        with torch.no_grad():
            model.weight.add_(torch.tensor([[1.0, -2.0]]))
        loss = penalty()
        loss.backward()
        seen.append((loss.item(), model.weight.grad.tolist()))

    with torch.no_grad():
        model.weight.fill_(7.0)
    lottery_ticket_sparse_finetuning(model, train, 2, l1=0.1)
    assert seen[0] == (pytest.approx(0.15, rel=1e-6), [pytest.approx([0.05, -0.05], rel=1e-6)])


def test_l1_draws_weights_to_theta_0():
    distance = {}
    for l1 in (0.0, 50.0):
        train, seen = watched()
        lottery_ticket_sparse_finetuning(small(), train, NUM, l1=l1)
        distance[l1] = sum(float((seen[3][n] - seen[0][n]).abs().sum()) for n in seen[0])
    assert distance[50.0] < 0.7 * distance[0.0]


# --- differences


def pair() -> tuple[SparseDifference, SparseDifference]:
    """Two differences of `small`; both change (0, 1) of the first weight."""
    left = Change((17, 6), torch.tensor([1, 8]), torch.tensor([0.5, -2.0]))
    right = Change((17, 6), torch.tensor([1, 90]), torch.tensor([0.25, 1.0]))
    bias = Change((3,), torch.tensor([2]), torch.tensor([4.0]))
    return SparseDifference({"0.weight": left}), SparseDifference({"0.weight": right, "2.bias": bias})


def test_a_sum_adds_values_where_both_change_and_commutes():
    a, b = pair()
    for both in (a + b, b + a):
        assert both.changes["0.weight"].positions.tolist() == [1, 8, 90]
        assert both.changes["0.weight"].values.tolist() == [0.75, -2.0, 1.0]
        assert both.num_changed() == 4
    one, other = small(), small()
    (a + b).apply_to(one)
    a.apply_to(b.apply_to(other))
    for name, tensor in values(one).items():
        torch.testing.assert_close(tensor, values(other)[name], rtol=1.2e-7, atol=1e-7)
    disjoint = SparseDifference({"2.bias": b.changes["2.bias"]})
    assert_equal(values((a + disjoint).apply_to(small())), values(a.apply_to(disjoint.apply_to(small()))))


def test_applied_restores_to_the_bit_and_revert_to_rounding():
    (a, _), model = pair(), small()
    with a.applied(model):
        assert model[0].weight[1, 2] == small()[0].weight[1, 2] - 2.0  # position 8 of rows of 6
        assert int((model[0].weight != small()[0].weight).sum()) == 2
    assert_equal(values(model), values(small()))
    a.revert_from(a.apply_to(model))
    torch.testing.assert_close(model[0].weight, small()[0].weight, rtol=0, atol=2.4e-7)


def test_its_subnet_is_the_set_of_changed_weights():
    subnet = pair()[1].subnet()
    assert subnet.masks["0.weight"].nonzero().tolist() == [[0, 1], [15, 0]]
    assert subnet.masks["2.bias"].tolist() == [False, False, True]


def test_a_difference_of_half_precision_is_exact():
    before = {"w": torch.tensor([1.0, 2.0, -3.0, 0.1]).to(torch.bfloat16)}
    after = {"w": torch.tensor([1.0078125, 2.0, 5.0, 0.2]).to(torch.bfloat16)}
    phi = SparseDifference.between(before, after)
    assert phi.changes["w"].values.dtype == torch.float32 and phi.changes["w"].positions.tolist() == [0, 2, 3]
    model = nn.Module()
    model.w = nn.Parameter(before["w"].clone())
    assert torch.equal(phi.apply_to(model).w.data, after["w"])


def test_changes_of_at_most_the_threshold_are_left_out():
    before = {"w": torch.zeros(3, dtype=torch.float64)}
    after = {"w": torch.tensor([1e-7, -1.1e-7, 0.0], dtype=torch.float64)}
    assert SparseDifference.between(before, after).changes["w"].positions.tolist() == [1]
    assert SparseDifference.between(before, after, threshold=0).changes["w"].positions.tolist() == [0, 1]


def test_parameters_in_any_memory_order_and_of_no_dimension():
    model = nn.Module()
    model.a = nn.Parameter(torch.zeros(3, 2, 4, 4).to(memory_format=torch.channels_last))
    model.b = nn.Parameter(torch.tensor(1.0))
    phi = SparseDifference(
        {"a": Change((3, 2, 4, 4), torch.tensor([5, 37]), torch.tensor([1.0, 2.0])),
         "b": Change((), torch.tensor([0]), torch.tensor([3.0]))}
    )  # fmt: skip
    phi.apply_to(model)
    assert model.a.flatten().nonzero().tolist() == [[5], [37]] and model.b == 4


# --- files


def test_a_saved_difference_comes_back(tmp_path):
    a, b = pair()
    phi = SparseDifference((a + b).changes, {"2.weight": torch.randn(3, 17)}, {"task": "demo"})
    phi.save(tmp_path / "phi.safetensors")
    back = SparseDifference.load(tmp_path / "phi.safetensors")
    assert_same(back, phi)
    assert back.provenance == {"task": "demo"}
    data = bytearray((tmp_path / "phi.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "bad.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"cannot load .*bad.safetensors: its checksum does not match"):
        SparseDifference.load(tmp_path / "bad.safetensors")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        SparseDifference.load(tmp_path / "absent")


def assert_same(left: SparseDifference, right: SparseDifference) -> None:
    assert left.changes.keys() == right.changes.keys()
    for name, its in left.changes.items():
        other = right.changes[name]
        assert its.shape == other.shape
        assert torch.equal(its.positions, other.positions) and torch.equal(its.values, other.values)
    assert_equal(left.dense, right.dense)


def test_composable_sft_writes_positions_column_by_column(tmp_path):
    phi = SparseDifference.between({"w": torch.zeros(2, 3)}, {"w": torch.tensor([[0, 0.5, 0], [-1.0, 0, 2]])})
    phi.write_composable_sft(tmp_path)
    content = torch.load(tmp_path / "pytorch_diff.bin", weights_only=True)
    assert content["diffs"]["w"]["size"] == torch.Size([2, 3])
    assert content["diffs"]["w"]["index_steps"] == [1, 1, 3]
    assert content["diffs"]["w"]["values"].tolist() == [-1.0, 0.5, 2.0] and content["abs"] == {}


@pytest.mark.parametrize("shape", [(), (7,), (5, 3), (2, 3, 5), (4, 1, 3, 2), (0, 3), (3, 0)])
def test_a_round_trip_through_composable_sft_is_exact(tmp_path, shape):
    after = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * (torch.rand(shape) < 0.6)
    phi = SparseDifference.between({"w": torch.zeros(shape)}, {"w": after})
    phi.write_composable_sft(tmp_path / "some.bin")
    steps = torch.load(tmp_path / "some.bin", weights_only=True)["diffs"]["w"]["index_steps"]
    assert np.cumsum(steps).tolist() == np.flatnonzero(after.numpy().ravel(order="F")).tolist()
    assert_same(SparseDifference.read_composable_sft(tmp_path / "some.bin"), phi)


def sft(steps: list, numbers: list, size=(2, 3)) -> dict:
    return {"size": torch.Size(size), "index_steps": steps, "values": torch.tensor(numbers)}


def test_the_authors_files_are_read_with_the_numpy_integer_that_each_parameter_begins_with(tmp_path):
    diffs = {"a": sft([np.int64(1), 1, 3], [-1.0, 0.5, 2.0]), "b": sft([np.int64(300)], [4.0], (20, 30)),
             "c": sft([], [])}  # fmt: skip
    torch.save({"diffs": diffs, "abs": {"head": nn.Parameter(torch.ones(2))}}, tmp_path / "pytorch_diff.bin")
    phi = SparseDifference.read_composable_sft(tmp_path)
    assert phi.changes["a"].positions.tolist() == [1, 3, 5]
    assert phi.changes["a"].values.tolist() == [0.5, -1.0, 2.0]
    assert phi.changes["b"].positions.tolist() == [15]  # 300 = 0 + 20 * 15: row 0, column 15
    assert phi.changes["c"].positions.tolist() == [] and phi.dense["head"].tolist() == [1.0, 1.0]


class Hostile:
    def __reduce__(self):
        return os.system, ("echo hostile > hostile",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"diffs": {"w": sft([1, 5], [1.0, 2.0])}}, r"positions of 'w' reach 6, beyond the 6 weights of \[2, 3\]"),
        ({"diffs": {"w": sft([1, -1], [1.0, 2.0])}}, "size and steps of integers >= 0"),
        ({"diffs": {"w": sft([1, 0], [1.0, 2.0])}}, "the positions in 'w' must ascend, each once"),
        ({"diffs": {"w": sft([1, 1.5], [1.0, 2.0])}}, "size and steps of integers >= 0"),
        ({"diffs": {"w": sft([1, 2**61, 2**61], [1.0, 2.0, 3.0])}}, "positions of 'w' reach"),
        ({"diffs": {"w": sft([1, 1], [1.0])}}, r"as many values as positions, got \[1\] and 2"),
        ({"diffs": {"w": sft([1], [float("nan")])}}, "values of 'w' must be floating-point and finite"),
        ({"diffs": {"w": torch.ones(3)}}, "must hold 'size', 'index_steps' and 'values'"),
        ({"w": torch.ones(3)}, "it must hold a dict of 'diffs' and 'abs'"),
        ({"diffs": {}, "abs": {"w": [1.0]}}, "the dense value of 'w' must be a tensor"),
        ({"diffs": {"w": sft([np.int32(1)], [1.0])}}, "its numpy scalar must be of type i8, got 'i4'"),
        ({"diffs": {"w": sft([np.float64(1)], [1.0])}}, "its numpy scalar must be of type i8, got 'f8'"),
        ({"diffs": {"w": Hostile()}}, "its pickle names '(posix|nt) system'"),
        ({"diffs": {"w": np.ones(3)}}, "its pickle names 'numpy.* _reconstruct'"),
    ],
)
def test_damaged_foreign_and_hostile_files_are_refused_in_words(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "bad.bin")
    with pytest.raises(ValueError, match=message):
        SparseDifference.read_composable_sft("bad.bin")
    assert not (tmp_path / "hostile").exists()


def test_a_file_that_is_no_archive_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="read_composable_sft: there is no file"):
        SparseDifference.read_composable_sft(tmp_path)
    with zipfile.ZipFile(tmp_path / "pytorch_diff.bin", "w") as archive:
        archive.writestr("readme", "no")
    with pytest.raises(ValueError, match="it is an archive, but not one of torch.save"):
        SparseDifference.read_composable_sft(tmp_path)


# --- bad input


def test_a_difference_of_another_model_is_refused_and_nothing_is_written():
    a, b = pair()
    model = nn.Sequential(nn.Linear(6, 17), nn.Tanh(), nn.Linear(17, 4))
    before = values(model)
    with pytest.raises(ValueError, match=r"does not fit the model, in 2.bias \[3\] \(model: \[4\]\); pass the model"):
        (a + b).apply_to(model)
    assert_equal(values(model), before)
    with pytest.raises(ValueError, match=r"applied: .* 0.weight \[17, 6\] \(model: absent\)"), a.applied(nn.Tanh()):
        pass
    other = SparseDifference({"0.weight": Change((6, 17), torch.tensor([0]), torch.tensor([1.0]))})
    with pytest.raises(ValueError, match=r"'0.weight' has shapes \[17, 6\] and \[6, 17\]"):
        a + other
    with pytest.raises(ValueError, match="both sides hold dense tensors of 2.bias"):
        SparseDifference({}, {"2.bias": torch.ones(3)}) + SparseDifference({}, {"2.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match="2.bias must be changed or dense, not both"):
        b + SparseDifference({}, {"2.bias": torch.ones(3)})


@pytest.mark.parametrize(
    ("positions", "numbers", "message"),
    [
        ([1, 6], [1.0, 2.0], r"positions in 'w' must lie in \[0, 6\).*got 1 to 6"),
        ([-1], [1.0], r"positions in 'w' must lie in \[0, 6\).*got -1 to -1"),
        ([2, 1], [1.0, 2.0], "the positions in 'w' must ascend"),
        ([1], [1.0, 2.0], r"int64 positions \[n\] and values \[n\]"),
        ([1], [float("inf")], "must be floating-point and finite"),
    ],
)
def test_positions_and_values_are_checked(positions, numbers, message):
    with pytest.raises(ValueError, match=f"SparseDifference: .*{message}"):
        SparseDifference({"w": Change((2, 3), torch.tensor(positions), torch.tensor(numbers))})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": NUM + 1}, f"k must be at most the {NUM} weights to choose from, got {NUM + 1}"),
        ({"k": 1.5}, r"k as a float is a share in \(0, 1\], got 1.5"),
        ({"k": 0.0}, r"k as a float is a share in \(0, 1\], got 0.0"),
        ({"k": -1}, "k must be at most"),
        ({"k": 1, "iterations": 2}, f"k=1 of {NUM} weights leaves none for each of 2 iterations"),
        ({"k": 5, "iterations": 0}, "iterations must be an integer >= 1, got 0"),
        ({"k": 5, "l1": -0.1}, "l1 must be a finite number >= 0, got -0.1"),
        ({"k": 5, "dense": ["3"]}, r"dense \['3'\] must name modules or parameters"),
        ({"k": 5, "dense": ["0", "2"]}, "some parameter outside dense must require a gradient"),
    ],
)
def test_settings_are_refused_with_the_value(settings, message):
    with pytest.raises(ValueError, match=f"lottery_ticket_sparse_finetuning: {message}"):
        lottery_ticket_sparse_finetuning(small(), steps, **settings)


def test_a_train_that_does_not_train_is_refused_and_the_model_is_left_alone():
    def idle(model: nn.Module, penalty=None) -> None:
        model(torch.randn(3, 6))

    def writes(model: nn.Module) -> None:
        with torch.no_grad():
            model[0].weight.add_(torch.rand(17, 6))

    model = small()
    for train, settings, message in (
        (idle, {}, "train changed nothing in 0.weight"),
        (writes, {}, "weights of 0.weight that were not chosen changed in the sparse phase"),
        (lambda model, penalty: steps(model), {"l1": 0.1}, r"train of the full phase never called penalty\(\)"),
    ):
        with pytest.raises(ValueError, match=f"lottery_ticket_sparse_finetuning: .*{message}"):
            lottery_ticket_sparse_finetuning(model, train, 9, **settings)
        assert_equal(values(model), values(small()))
    with pytest.raises(TypeError, match=r"train is called as train\(model, penalty\)"):
        lottery_ticket_sparse_finetuning(model, lambda model: None, 9, l1=0.1)
