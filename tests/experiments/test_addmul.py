"""Additions and multiplications: exact encodings, what the copied network does, the pattern, a killed run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from subnets.experiments.addmul import data, stages
from subnets.experiments.addmul.config import AddMulConfig, make_config
from subnets.experiments.addmul.report import KEEPS, Found, failures
from subnets.experiments.addmul.run import run
from subnets.experiments.addmul.stages import Task, base_stage, mask_stage, settings
from subnets.experiments.mlp import mlp
from subnets.subnet import Subnet
from subnets.training.files import read_json

TINY = AddMulConfig(
    problems=("add_mul",), hidden=(12, 8), batch=8, base_steps=30, mask_steps=12, mask_epoch=4, cs_epochs=2, cs_steps=3
)


def places_of(row):
    return row.nonzero().flatten().tolist()


# --------------------------------------------------------------------------- data


def test_a_number_is_its_two_digits_one_of_ten_each_and_the_lower_first():
    assert places_of(data.places(torch.tensor(37))) == [7, 13]
    assert data.digits(torch.tensor([0, 9, 40, 99])).tolist() == [[0, 0], [9, 0], [0, 4], [9, 9]]


def test_the_42_inputs_are_the_places_of_both_numbers_and_of_the_operation():
    problem = data.make_problem("add_mul")
    assert (problem.num_inputs, problem.num_outputs) == (42, 20)
    row = 37 * 100 + 85
    assert places_of(problem.inputs[0, row]) == [7, 13, 20 + 5, 30 + 8, 40]  # a = 37, b = 85, +
    assert places_of(problem.inputs[1, row]) == [7, 13, 20 + 5, 30 + 8, 41]
    assert problem.answers[:, row].tolist() == [[2, 2], [5, 4]]  # 122 and 3,145 mod 100, the lower digit first


def test_every_pair_is_there_once_and_40_pairs_have_the_same_sum_and_product():
    problem = data.make_problem("add_mul")
    assert len({tuple(places_of(row)) for row in problem.inputs[0]}) == 10_000
    assert (problem.answers[0] == problem.answers[1]).all(1).sum() == 40


def test_double_addition_shows_one_pair_and_reads_its_own_20_outputs():
    problem = data.make_problem("double_addition")
    assert (problem.num_inputs, problem.num_outputs, problem.slots) == (80, 40, (0, 1))
    row = 37 * 100 + 85
    assert places_of(problem.inputs[0, row]) == [7, 13, 25, 38]
    assert places_of(problem.inputs[1, row]) == [40 + 7, 40 + 13, 40 + 25, 40 + 38]
    table = torch.zeros(1, 40)
    table[0, [2, 12, 20 + 2, 20 + 15]] = 1  # the first slot says 22, the second 52

    def model(inputs):
        return table.expand(len(inputs), -1)

    sums = [(a + b) % 100 for a in range(100) for b in range(100)]
    for function, says in (("first", 22), ("second", 52)):
        assert data.accuracy(model, problem.everything(function)) == pytest.approx(sums.count(says) / 10_000)


def test_loss_is_the_cross_entropy_of_a_digit_and_chance_is_one_in_a_hundred():
    problem = data.make_problem("add_mul")
    batch = problem.everything("mul")

    def flat(inputs):
        return torch.zeros(len(inputs), 20)

    assert data.loss(flat, batch).item() == pytest.approx(2.302585, abs=1e-5)  # ln 10
    assert data.accuracy(flat, problem.everything("add")) == pytest.approx(0.01)  # it says 00
    assert data.accuracy(flat, batch) == pytest.approx(0.052)  # 520 of the products are 0 mod 100


def test_batches_are_of_the_functions_asked_for():
    problem = data.make_problem("add_mul")
    generator = torch.Generator().manual_seed(0)
    assert problem.batch(("mul",), 50, generator).inputs[:, 41].sum() == 50
    both = problem.batch(("add", "mul"), 1000, generator).inputs[:, 40].sum()
    assert 420 < both < 580


def test_copied_weights_send_both_pairs_through_the_same_hidden_units():
    problem = data.make_problem("double_addition_copied")
    model = mlp((80, 12, 8, 40), 0)
    first, second = (problem.everything(name) for name in problem.functions)
    hidden = model[:-1]
    assert not torch.allclose(hidden(first.inputs), hidden(second.inputs), atol=1e-3)
    data.copy_first_to_second(model)
    torch.testing.assert_close(hidden(first.inputs), hidden(second.inputs), rtol=0, atol=1e-6)
    torch.testing.assert_close(data.logits(model, first), data.logits(model, second), rtol=0, atol=1e-6)


# ------------------------------------------------------------------------ settings


def test_the_official_numbers_are_the_authors():
    config = make_config("official")
    csordas, epochs, steps = settings(config, "add_mul", "csordas")
    assert epochs * steps == 20_000 and csordas.config().lam == 1e-4 / 128
    assert settings(config, "double_addition", "csordas")[0].config().lam == 4e-4 / 128
    lepori, epochs, steps = settings(config, "add_mul", "continuous_sparsification")
    assert (epochs, steps, lepori.config().beta_end, lepori.config().lam) == (90, 100, 200, 1e-8)


@pytest.mark.parametrize("changes, says", [
    ({"problems": ("add",)}, "problems must list different ones of add_mul"),
    ({"methods": ("csordas", "csordas")}, "methods must list different ones"),
    ({"batch": 6}, "divisible by 4"),
    ({"mask_steps": 10, "mask_epoch": 4}, "multiple of mask_epoch"),
    ({"hidden": ()}, "hidden must be at least 1"),
])  # fmt: skip
def test_contradictions_are_refused_in_a_sentence(changes, says):
    with pytest.raises(ValueError, match=says):
        AddMulConfig(**changes)


# ----------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a finished run, and its text."""
    folder = tmp_path_factory.mktemp("addmul")
    return folder, run(TINY, folder)


def test_a_run_that_was_killed_in_a_mask_goes_on_and_ends_in_the_same_numbers(whole, tmp_path, monkeypatch):
    rows = []

    def killed(*arguments, **settings):
        def callback(row, masks):
            rows.append(row)
            if len(rows) == 6:  # after the second of three epochs of the second mask, before its checkpoint
                raise KeyboardInterrupt

        return discover(*arguments, callbacks=[callback], **settings)

    discover = stages.discover
    monkeypatch.setattr(stages, "discover", killed)
    with pytest.raises(KeyboardInterrupt):
        run(TINY, tmp_path)
    assert (tmp_path / "add_mul/csordas/mul.checkpoint.safetensors").exists()
    monkeypatch.setattr(stages, "discover", discover)
    run(TINY, tmp_path)
    for file in ("accuracies.csv", "weights.csv", "overlaps.csv"):
        text = (whole[0] / file).read_text()
        assert text == (tmp_path / file).read_text() and len(text.splitlines()) > 4
    assert not list(tmp_path.rglob("*.checkpoint*"))


def test_a_finished_run_trains_nothing_again_and_reports_what_is_there(whole, monkeypatch):
    folder, text = whole
    for name in ("discover", "train_steps", "function_accuracies"):
        monkeypatch.setattr(stages, name, None)
    assert run(TINY, folder) == text
    weights = (folder / "weights.csv").read_text().splitlines()
    assert weights[0].startswith("problem,method,subnet,parameter") and len(weights) == 1 + 2 * 2 * 4
    history = read_json(folder / "add_mul/csordas/add.json")["history"]
    assert [row["step"] for row in history] == [4, 8, 12]


def test_a_control_mask_is_trained_on_both_functions():
    task = Task.of(dataclasses.replace(TINY, full_mask=True), "add_mul", Path("nowhere"))
    assert task.masked_functions() == {"add": ("add",), "mul": ("mul",), "full": ("add", "mul")}


def test_masks_leave_the_base_network_as_it_is_and_biases_unmasked(tmp_path):
    task = Task.of(TINY, "add_mul", tmp_path)
    before = {name: value.clone() for name, value in base_stage(task).state_dict().items()}
    subnet = mask_stage(task, "csordas", "add")
    assert list(subnet.masks) == ["0.weight", "2.weight", "4.weight"]
    assert all(torch.equal(value, before[name]) for name, value in base_stage(task).state_dict().items())


# --------------------------------------------------------------------------- verdict


def found(keeps, destroys, hidden, problem="add_mul"):
    """Two subnets of a network 4-4-4-4 whose ends are alike; of the hidden layer they share `hidden` weights of 8."""
    ends = torch.ones(4, 4, dtype=torch.bool)
    places = torch.arange(16).view(4, 4)
    first = {"0.weight": ends, "2.weight": places < 8, "4.weight": ends}
    second = {"0.weight": ends, "2.weight": (places >= 8 - hidden), "4.weight": ends}
    measures = {
        "whole": {"add": 1.0, "mul": 1.0}, "ablated": {}, "confusion": {},
        "subnet": {"add": {"add": keeps, "mul": destroys}, "mul": {"add": destroys, "mul": keeps}},
    }  # fmt: skip
    return Found(problem, "csordas", {"add": Subnet(first), "mul": Subnet(second)}, {}, measures)


def test_the_verdict_names_each_part_of_the_pattern_that_is_missing():
    assert failures(found(1.0, 0.01, hidden=2)) == ["multiplication takes only 1.05 times the weights of addition"]
    assert len(failures(found(KEEPS - 0.01, 0.01, hidden=2))) == 3
    assert "above 0.1" in failures(found(1.0, 0.2, hidden=2))[0]
    assert "not above twice" in failures(found(1.0, 0.01, hidden=8))[0]


def test_copied_weights_must_be_shared_in_the_hidden_layers():
    assert failures(found(1.0, 0.01, hidden=8, problem="double_addition_copied")) == []
    said = failures(found(1.0, 0.01, hidden=6, problem="double_addition_copied"))
    assert said == ["of the hidden weights only 0.75 are shared, though both sums need the same"]
