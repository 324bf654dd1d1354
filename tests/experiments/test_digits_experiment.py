"""Digits: splits and variants, units of work, what the summaries say, a killed run."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from subnets.experiments.digits import clusters, data, edge_popup, run, sparse_finetuning, tickets
from subnets.experiments.digits.config import DigitsConfig, make_config
from subnets.experiments.mlp import mlp, shuffled
from subnets.methods.magnitude_pruning import PruningConfig
from torch import nn

pytest.importorskip("sklearn")

TINY = DigitsConfig(
    seeds=1, ticket_levels=(2,), ticket_steps=20, ticket_every=10, kept=(0.3, 0.5), popup_epochs=1, tuning_epochs=1,
    cluster_epochs=1, num_clusters=3, shuffles=2,
)  # fmt: skip


# ------------------------------------------------------------------------------ data


def test_splits_are_disjoint_and_the_seed_decides_them():
    parts = data.splits(0)
    assert [len(part) for part in parts] == [1077, 360, 360]
    together = torch.cat([part.x for part in parts])
    assert len(together.unique(dim=0)) == len(data.all_images().x.unique(dim=0)) == 1797  # no image is there twice
    assert torch.equal(data.splits(0)[2].x, parts[2].x) and not torch.equal(data.splits(1)[2].x, parts[2].x)
    assert float(together.max()) == 1 and float(together.min()) == 0


def test_variants_move_a_pixel_where_they_say():
    image = torch.zeros(1, 64)
    image[0, 8 * 1 + 6] = 1  # row 1, column 6
    images = data.Images(image, torch.zeros(1))

    def place(variant):
        return divmod(int(images.variant(variant).x.argmax()), 8)

    assert place("upright") == (1, 6)
    assert place("rotated") == (1, 1)  # a quarter to the left: the right edge becomes the top
    assert place("mirrored") == (1, 1)
    assert place("shifted") == (3, 0)  # down and right by two, around the edge
    image[0, 0] = 2
    assert place("rotated") == (7, 0) and place("mirrored") == (0, 7)
    with pytest.raises(ValueError, match="one of upright, rotated, mirrored, shifted, got 'left'"):
        images.variant("left")


def test_standardized_pixels_are_scaled_by_the_training_images_alone():
    x = torch.zeros(3, 64)
    x[:, 5] = torch.tensor([1.0, 2.0, 3.0])  # mean 2, deviation 1; all other pixels are constant
    train, other = data.Images(x, torch.zeros(3)), data.Images(torch.full((1, 64), 5.0), torch.zeros(1))
    parts = data.standardized((train, other, train))
    assert parts[0].x[:, 5].tolist() == [-1, 0, 1] and parts[1].x[0, 5] == 3
    assert float(parts[1].x.sum()) == 3


def test_batches_go_through_all_rows_before_any_comes_again():
    batches = list(shuffled(10, 5, 5, 0))
    assert [len(rows) for rows in batches] == [5] * 5
    assert sorted(torch.cat(batches[:2]).tolist()) == sorted(torch.cat(batches[2:4]).tolist()) == list(range(10))
    assert len(list(shuffled(7, 3, 4, 0))) == 4


def test_a_network_comes_from_its_seed_alone_and_leaves_the_random_state():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = mlp((4, 3, 2), 7, "a", dropout=0.5)
    assert torch.equal(torch.rand(1), expected)
    assert [type(part) for part in first] == [nn.Linear, nn.ReLU, nn.Dropout, nn.Linear]
    again, other = mlp((4, 3, 2), 7, "a"), mlp((4, 3, 2), 7, "b")
    assert torch.equal(first[0].weight, again[0].weight) and not torch.equal(first[0].weight, other[0].weight)


# ------------------------------------------------------------------------------ parts


def test_tickets_start_from_glorot_weights_and_are_pruned_by_the_ladder():
    model = tickets.glorot(0, "ticket")
    deviations = [float(model[i].weight.detach().std()) for i in (0, 2, 4)]
    assert deviations == pytest.approx([(2 / (a + b)) ** 0.5 for a, b in ((64, 300), (300, 100), (100, 10))], rel=0.05)
    assert float(model[0].bias.detach().abs().max()) == 0

    pruning = PruningConfig.preset("lottery_ticket", 15)
    assert (pruning.rate, pruning.output_rate) == (0.2, 0.1)
    ladder = {n: (49_200 * 0.8**n + 1_000 * 0.9**n) / 50_200 for n in (7, 9, 15)}
    assert {n: round(100 * value, 1) for n, value in ladder.items()} == {7: 21.5, 9: 13.9, 15: 3.9}


def test_training_stops_where_the_validation_loss_was_least(monkeypatch):
    losses = iter([0.9, 0.4, 0.4, 0.6])
    monkeypatch.setattr(tickets, "evaluate", lambda model, part: (next(losses), 0.0) if part == "val" else (0.0, 0.875))
    config = dataclasses.replace(TINY, ticket_steps=40, ticket_every=10)
    train = data.Images(torch.rand(60, 64), torch.randint(10, (60,)))
    assert tickets.train(mlp((64, 4, 10), 0), config, 0, (train, "val", "test")) == {
        "loss": 0.4, "step": 20, "test_accuracy": 0.875,
    }  # fmt: skip


def ticket_facts(*steps):
    levels = {"0": {"density": 1.0, "ticket": {"loss": 0.1, "step": 100, "test_accuracy": 0.9}}}
    for level, (ticket, reinit) in enumerate(steps, 1):
        starts = {"ticket": ticket, "reinit": reinit}
        levels[str(level)] = {"density": 0.8**level} | {
            start: {"loss": 0.1, "step": step, "test_accuracy": 0.9} for start, step in starts.items()
        }
    return {"levels": levels}


def test_tickets_are_as_expected_from_eight_of_nine_cases_on():
    config = dataclasses.replace(TINY, ticket_levels=(1, 2, 3), seeds=3)
    sooner, level = (50, 100), (100, 100)
    eight = {f"seed{i}": ticket_facts(sooner, sooner, level if i == 0 else sooner) for i in range(3)}
    its = tickets.summary(config, eight)
    assert its.is_as_expected and "8 of 9 cases" in its.verdict
    assert its.table.rows[0] == ["seed0", "100", "50 / 100", "50 / 100", "100 / 100"] and len(its.rows) == 3 * 7
    seven = {**eight, "seed1": ticket_facts(sooner, level, sooner)}
    assert not tickets.summary(config, seven).is_as_expected


@pytest.mark.parametrize("means, whole, holds", [
    ((0.8, 0.95, 0.93), 0.1, True),
    ((0.96, 0.95, 0.93), 0.1, False),  # it only falls
    ((0.8, 0.9, 0.95), 0.1, False),  # it only rises
    ((0.8, 0.95, 0.93), 0.94, False),  # all weights are as good
])  # fmt: skip
def test_the_inverted_u_needs_both_of_its_sides(means, whole, holds):
    config = dataclasses.replace(TINY, kept=(0.1, 0.5, 0.9))
    found = {
        f"k{k}": {"kept": k, "seed": 0, "accuracy": mean, "untrained": whole, "density": k}
        for k, mean in zip(config.kept, means, strict=True)
    }
    assert edge_popup.summary(config, found).is_as_expected is holds


def test_the_task_differs_from_the_digits_and_only_the_summed_difference_counts():
    model = sparse_finetuning.TwoHeads(0)
    with torch.no_grad():
        model.task.weight.zero_()
        model.task.bias.copy_(torch.tensor([1.0, 0.0]))
    images = data.Images(torch.rand(4, 64), torch.tensor([2, 4, 6, 7]))
    assert sparse_finetuning.task_accuracy(model, images) == 0.75  # it says that all are even
    assert sparse_finetuning.task_loss(model, images).item() == pytest.approx(0.563262, abs=1e-5)  # ln(1+1/e) + 1/4
    rows = [{"seed": 0, "variant": name, "task": 0.6, "task_and_variant": 0.9, "upright": 0.95, "shared_positions": 3}
            for name in sparse_finetuning.NEW]  # fmt: skip
    assert sparse_finetuning.summary(TINY, {"seed0": {"rows": rows}}).is_as_expected
    rows[1]["task_and_variant"] = 0.6
    assert "in 2 of 3 cases" in sparse_finetuning.summary(TINY, {"seed0": {"rows": rows}}).verdict


def test_clusters_are_as_expected_where_only_dropout_is_beyond_all_shuffles():
    def found(plain, dropout):
        return {
            kind: {"kind": kind, "seed": 0, "train_accuracy": 1.0, "n_cut": 9.8, "shuffled": 10.0, "z": -9.0, "p": p}
            for kind, p in (("plain", plain), ("dropout", dropout))
        }

    config = make_config("standard")
    assert clusters.summary(config, found(0.5, 1 / 51)).is_as_expected
    assert not clusters.summary(config, found(0.5, 2 / 51)).is_as_expected
    assert not clusters.summary(config, found(1 / 51, 1 / 51)).is_as_expected


# ------------------------------------------------------------------------------- runs


def test_a_killed_run_goes_on_with_the_unit_it_was_at_and_then_does_nothing_again(tmp_path, monkeypatch):
    popup, made = dict(edge_popup.units(TINY)), []

    def units(config):
        def make(unit, its):
            made.append(unit)
            if made == ["k0.3_seed0", "k0.5_seed0"]:
                raise KeyboardInterrupt
            return its()

        return {unit: lambda unit=unit, its=its: make(unit, its) for unit, its in popup.items()}

    monkeypatch.setitem(run.PARTS, "edge_popup", dataclasses.replace(edge_popup.PART, units=units))
    with pytest.raises(KeyboardInterrupt):
        run.run(TINY, tmp_path)
    assert (tmp_path / "tickets/seed0.json").exists() and not (tmp_path / "clusters").exists()
    assert "edge_popup: NOT FINISHED, 1 of 2 networks there." in run.report(tmp_path)
    monkeypatch.setattr(tickets, "train", None)  # what is there is not made again
    text = run.run(TINY, tmp_path)
    assert made == ["k0.3_seed0", "k0.5_seed0", "k0.5_seed0"] and "NOT FINISHED" not in text
    for part in TINY.parts:
        assert len((tmp_path / f"{part}.csv").read_text().splitlines()) > 1
    assert run.run(TINY, tmp_path) == text


@pytest.mark.parametrize("changes, says", [
    ({"parts": ("ticket",)}, "parts must list different ones of tickets"),
    ({"kept": (0.5, 1.0)}, r"different fractions in \(0, 1\)"),
    ({"ticket_levels": (9, 7)}, "ticket_levels must rise"),
    ({"ticket_steps": 75}, "multiple of ticket_every"),
    ({"language_k": 0.0}, "language_k must be in"),
    ({"shuffles": 0}, "shuffles must be at least 1"),
])  # fmt: skip
def test_contradictions_are_refused_in_a_sentence(changes, says):
    with pytest.raises(ValueError, match=says):
        DigitsConfig(**changes)
