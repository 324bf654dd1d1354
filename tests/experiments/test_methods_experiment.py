"""All methods side by side, in miniature: the density rule, every finder end to end, resuming, refusals."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from subnets.cli import main
from subnets.discovery import METHODS as PRESETS
from subnets.experiments.arithmetic import data
from subnets.experiments.arithmetic.plan import Run
from subnets.experiments.arithmetic.stages import Depth
from subnets.experiments.methods.config import BASELINES, MASK_METHODS, METHODS, MethodsConfig, make_config
from subnets.experiments.methods.density import at_density
from subnets.experiments.methods.finders import Setting, mask_method, nearest_union
from subnets.experiments.methods.results import Results
from subnets.experiments.methods.run import run
from subnets.experiments.methods.stages import build_members, facts_of, find_stage, subnet_path
from subnets.subnet import Subnet
from subnets.training import files
from subnets.training.files import load_tensors, read_csv

TINY = {
    "width": "16", "heads": "2", "layers": "1", "base_pairs": "300", "base_epochs": "20", "base_lr": "0.01",
    "discovery_pairs": "200",
    "discovery_epochs": "4", "discovery_batch": "50", "discovery_lr": "0.05", "transfer_epochs": "2", "sizes": "10",
    "transfer_seeds": "1", "num_ambiguous": "60", "num_held_out": "50", "mask_seeds": "2", "csordas_samples": "2",
    "num_clusters": "3", "csordas_lr": "0.3", "hard_concrete_lr": "0.3", "piggyback_lr": "0.003",
}  # fmt: skip  # the network learns that answers are 0 to 6, so that accuracies are not all 0
NUM_WEIGHTS = 12 * 16**2


def tiny(**changes: str) -> MethodsConfig:
    return make_config("standard", {**TINY, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "finished"
    run(tiny(), folder)
    return folder


@pytest.fixture(scope="module")
def setting(finished: Path) -> Setting:
    config = tiny(device="cpu")
    source = load_tensors(finished / "layers1" / "base.safetensors")[0]
    return Setting(config, Depth(config, 1, finished / "layers1"), source)


# --- the rule of equal density


def test_equal_density_keeps_the_highest_scores_of_all_layers_together_and_the_first_of_equal_ones() -> None:
    scores = {
        "a": torch.tensor([[0.5, -1.0], [3.0, 0.25]]),
        "b": torch.tensor([-0.5, 0.5, 0.5, 4.0, -9.0, -2.0]),
    }
    subnet = at_density(scores, 0.4)  # 4 of 10: 4.0, 3.0, and two of the three 0.5
    assert subnet.masks["a"].tolist() == [[True, False], [True, False]]
    assert subnet.masks["b"].tolist() == [False, True, False, True, False, False]
    assert subnet.density() == 0.4
    assert at_density(scores, 0.6).masks["a"].tolist() == [[True, False], [True, True]]  # .25 is the sixth
    assert torch.equal(at_density({"a": torch.zeros(1000)}, 0.2).masks["a"], torch.arange(1000) < 200)


def test_equal_density_refuses_diverged_scores_and_densities_that_keep_nothing() -> None:
    with pytest.raises(ValueError, match="scores must be finite"):
        at_density({"a": torch.tensor([1.0, float("nan")])}, 0.5)
    with pytest.raises(ValueError, match=r"density 0\.2 of 2 weights leaves none"):
        at_density({"a": torch.zeros(2)}, 0.2)


def test_the_union_of_clusters_is_the_one_nearest_to_the_density() -> None:
    parts = [Subnet({"w": torch.arange(10) // size == place}) for size, place in ((2, 0), (2, 1), (5, 1))]
    assert [nearest_union(parts, density).density() for density in (0.1, 0.29, 0.31, 0.6, 0.7)] == [
        0.2, 0.2, 0.4, 0.4, 0.9,
    ]  # fmt: skip


def test_every_method_ends_at_the_density_by_its_own_rule(finished: Path) -> None:
    rows = {(row["method"], int(row["seed"])): row for row in read_csv(finished / "results.csv")}
    assert set(rows) == {(name, seed) for name in METHODS for seed in (0, 1)}
    for (name, seed), row in rows.items():
        subnet = Subnet.load(finished / "layers1" / "methods" / f"{name}_{seed}.safetensors")
        kept = {key: int(mask.sum()) for key, mask in subnet.masks.items()}
        if name == "edge_popup":  # all of each layer but int((1 - k) n)
            assert kept == {key: mask.numel() - int(0.8 * mask.numel()) for key, mask in subnet.masks.items()}
        elif name == "clusters":
            assert 0 < subnet.density() < 1 and all(".mlp." in key for key in kept)
        elif name == "magnitude_pruning":
            assert abs(sum(kept.values()) - 0.2 * NUM_WEIGHTS) < 2
        else:
            assert sum(kept.values()) == round(0.2 * NUM_WEIGHTS), name
        assert float(row["density"]) == pytest.approx(subnet.density(), abs=1e-6)


# --- what is measured


@pytest.mark.parametrize("name", METHODS)
def test_accuracies_are_those_of_the_saved_weights_in_and_outside_the_subnet(setting: Setting, name: str) -> None:
    facts, path = facts_of(setting, name, 0), subnet_path(setting, name, 0)
    subnet = Subnet.load(path)
    rows = data.held_out_set(data.S1, "test", setting.config.seed, setting.config.num_held_out)
    assert subnet.weights is not None
    for key, mode in (("s1_accuracy", "keep"), ("complement_s1", "ablate")):
        model, state = setting.model(), dict(setting.source)
        for weight, mask in subnet.masks.items():
            if mode == "keep":
                state[weight] = torch.zeros(mask.shape).masked_scatter(mask, subnet.weights[weight])
            else:
                state[weight] = state[weight] * ~mask
        model.load_state_dict(state)
        right = model(rows[:, :-1])[:, -1].argmax(-1) == rows[:, -1]
        assert facts[key] == pytest.approx(right.double().mean().item(), abs=1e-6), key


def test_accuracies_tell_methods_apart(finished: Path) -> None:
    rows = read_csv(finished / "results.csv")
    assert len({row["s1_accuracy"] for row in rows}) > 4 and len({row["complement_s1"] for row in rows}) > 2


def test_only_methods_that_train_weights_have_other_values_than_the_t1_network(setting: Setting) -> None:
    for name in METHODS:
        subnet = Subnet.load(subnet_path(setting, name, 0))
        assert subnet.weights is not None
        same = [torch.equal(subnet.weights[key], setting.source[key][mask]) for key, mask in subnet.masks.items()]
        assert all(same) != (name in ("magnitude_pruning", "sparse_finetuning")), name


def test_seeds_change_what_is_trained_and_random_subnets_have_the_first_methods_layer_sizes(setting: Setting) -> None:
    for name in METHODS:
        one, two = (Subnet.load(subnet_path(setting, name, seed)) for seed in (0, 1))
        assert (one.iou(two) == 1.0) == (name == "magnitude" or (one.iou(two) == 1.0 and name == "clusters")), name
    like, random = (Subnet.load(subnet_path(setting, name, 1)) for name in (METHODS[0], "random"))
    assert random.density(per_layer=True) == like.density(per_layer=True) and random.iou(like) < 0.5


def test_overlap_and_its_expectation_follow_their_formulas(setting: Setting) -> None:
    left = Subnet({"a": torch.arange(10) < 4, "b": torch.arange(10) < 0})
    right = Subnet({"a": (torch.arange(10) >= 2) & (torch.arange(10) < 7)})  # chooses from "a" alone
    results = Results(setting.config, {}, {}, {("l", 0): left, ("r", 0): right}, [])
    assert results.iou(("l", 0), ("r", 0)) == pytest.approx(2 / 7)
    assert results.expected_iou(("l", 0), ("r", 0)) == pytest.approx((4 * 5 / 10) / (4 + 5 - 2))


def test_the_first_subnet_is_planted_with_its_values_and_frozen_in_an_otherwise_fresh_network(setting: Setting) -> None:
    names = ("sparse_finetuning", "clusters", "random_init", "full_model")
    members = dict(zip(names, build_members(setting, [Run(name, 10, 0) for name in names])[0], strict=True))
    fresh = members["random_init"].state
    for name in names[:2]:
        subnet = Subnet.load(subnet_path(setting, name, 0))
        assert subnet.weights is not None
        for key in setting.names:
            mask = subnet.masks.get(key, torch.zeros_like(fresh[key], dtype=torch.bool))
            state, frozen = members[name].state[key], members[name].frozen[key]
            assert torch.equal(frozen, mask) and torch.equal(state[~mask], fresh[key][~mask])
            assert key not in subnet.masks or torch.equal(state[mask], subnet.weights[key])
    assert torch.equal(members["full_model"].state[setting.names[0]], setting.source[setting.names[0]])
    assert not torch.equal(fresh[setting.names[0]], setting.source[setting.names[0]])
    assert torch.equal(fresh["wte.weight"], setting.source["wte.weight"])
    assert not members["full_model"].frozen and not members["random_init"].frozen


def test_the_standard_preset_trains_masks_with_the_authors_rates() -> None:
    config = make_config("standard")
    for name in MASK_METHODS[1:]:
        ours, authors = mask_method(config, name), PRESETS[name]
        assert ours is not None and ours.settings()["lr"] == authors.settings()["lr"], name
        assert ours.settings().get("optimizer") == authors.settings().get("optimizer"), name


# --- the run


def test_the_page_and_tables_hold_every_method_and_baseline(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transfers = read_csv(finished / "transfer.csv")
    assert {row["condition"] for row in transfers} == {*METHODS, *BASELINES} and len(transfers) == 13
    assert len(read_csv(finished / "iou.csv")) == 22 * 21 / 2
    shown = (finished / "report.html").read_text(encoding="utf-8")
    assert all(name in shown for name in METHODS) and shown.count("data:image/png") == 3
    assert not list(finished.rglob("*checkpoint*")) and not list(finished.rglob("*scores*"))
    assert main(["report", str(finished)]) == 0
    assert "Subnets at density 0.2, mean ± std over 2 seeds" in capsys.readouterr().out


def test_a_run_killed_at_any_write_goes_on_to_the_same_numbers(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every start gets three files further than the one before, then dies before the next rename."""
    names = "continuous_sparsification,csordas,edge_popup,magnitude_pruning,random,random_init"
    config, folder, rename = tiny(conditions=names, mask_seeds="1"), tmp_path / "broken", os.replace
    deaths = 0
    while not list(folder.rglob("transfer_*.json")):
        _die_after(3, rename, monkeypatch)
        try:
            run(config, folder)
        except KeyboardInterrupt:
            deaths += 1
        monkeypatch.setattr(files.os, "replace", rename)
    run(config, folder)
    assert deaths >= 6
    numbers = []
    for place in (folder, finished):
        rows = [
            row for row in read_csv(place / "results.csv") if row["method"] in names.split(",") and row["seed"] == "0"
        ]
        numbers.append([{key: value for key, value in row.items() if key != "seconds"} for row in rows])
        assert all(float(row["seconds"]) >= 0 for row in rows)
    assert len(numbers[0]) == 5 and numbers[0] == numbers[1]


def _die_after(count: int, rename: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    left = [count]

    def dying(source: str, target: str) -> None:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        rename(source, target)

    monkeypatch.setattr(files.os, "replace", dying)


def test_a_finished_stage_is_not_found_again(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subnets.experiments.methods.stages.FINDERS", {})
    assert find_stage(setting, "csordas", 1).density() == pytest.approx(0.2, abs=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"density": "1"}, r"density must be in \(0, 1\), got 1\.0"),
        ({"layers": "1,2"}, r"layers must be one, got \(1, 2\)"),
        ({"base_seeds": "2"}, "base_seeds must be one, got 2"),
        ({"conditions": "subnet"}, r"conditions must be among .* got \['subnet'\]"),
        ({"conditions": "random_init"}, "conditions must hold a method"),
        ({"conditions": "random,csordas"}, "'random' takes its layer sizes from the first method"),
        ({"csordas_samples": "3"}, "discovery_batch must divide discovery_pairs and be a multiple of csordas_samples"),
        ({"pruning_rounds": "4"}, "discovery_epochs must be at least pruning_rounds \\+ 1 = 5, got 4"),
        ({"piggyback_lr": "0"}, r"piggyback_lr must be positive, got 0\.0"),
    ],
)
def test_impossible_configs_are_refused_in_words(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_clusters_without_scikit_learn_are_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)
    with pytest.raises(ValueError, match="'clusters' needs scikit-learn; pip install scikit-learn"):
        run(tiny(), tmp_path / "none")
    assert not (tmp_path / "none").exists()
