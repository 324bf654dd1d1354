"""The stability experiment in miniature: its files, a second call that trains nothing, seeds that order the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from subnets import DiscoveryConfig
from subnets.experiments.arithmetic import stability
from subnets.experiments.arithmetic.config import make_config
from subnets.training.files import read_csv, read_json

TINY = {
    "layers": "1", "width": "16", "heads": "2", "base_pairs": "200", "base_epochs": "1", "discovery_pairs": "200",
    "discovery_epochs": "6", "discovery_batch": "50", "num_held_out": "50", "discovery_lr": "0.02", "seeds": "0,7",
    "penalties": "0,1e-3",
}  # fmt: skip


def test_every_seed_and_penalty_gives_a_row_and_a_second_call_trains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = stability.main("quick", TINY, tmp_path / "run", show=False)
    rows = read_csv(tmp_path / "run" / "runs.csv")
    assert [(row["seed"], row["lam"]) for row in rows] == [("0", "0.0"), ("0", "0.001"), ("7", "0.0"), ("7", "0.001")]
    assert rows[0]["density"] != rows[2]["density"]  # another order of the same data
    assert float(rows[1]["density"]) < float(rows[0]["density"])
    groups = read_csv(tmp_path / "run" / "groups.csv")
    assert [float(row["lam"]) for row in groups] == [0.0, 0.001] and 0 < float(groups[0]["iou"]) < 1
    assert float(groups[0]["iou"]) > float(groups[0]["expected_iou"]) and "What all seeds share" in text
    assert (tmp_path / "run" / "report.html").read_text().count("data:image/png") == 4
    monkeypatch.setattr(stability, "discover", None)
    monkeypatch.setattr(stability, "base_stage", lambda depth, show: {})
    assert stability.main("quick", TINY, tmp_path / "run", show=False) == text
    assert stability.write_report(tmp_path / "run") == text


def test_the_order_of_the_data_is_that_of_torchs_random_numbers() -> None:
    batches = stability.batches(make_config("quick", {"discovery_pairs": "40", "discovery_batch": "16"}))
    orders = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        orders.append(torch.cat(list(batches(0))))
    assert torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])
    assert torch.equal(orders[0].sort(0).values, orders[2].sort(0).values)


def test_other_values_are_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"seeds must be ints separated by commas, got 'a,b'"):
        stability.main("quick", {**TINY, "seeds": "a,b"}, tmp_path, show=False)
    with pytest.raises(ValueError, match=r"layers must be one depth, got \(1, 2\)"):
        stability.main("quick", {**TINY, "layers": "1,2"}, tmp_path, show=False)
    with pytest.raises(ValueError, match=r"preset must be one of quick, standard, got 'paper'"):
        stability.main("paper", TINY, tmp_path, show=False)
    for key, text in (("seeds", ""), ("seeds", "0,0"), ("penalties", "1e-7,1e-07"), ("penalties", ",")):
        with pytest.raises(ValueError, match=f"{key} must list one or more different values"):
            stability.main("quick", {**TINY, key: text}, tmp_path, show=False)
    with pytest.raises(ValueError, match=r"penalties must be >= 0"):
        stability.main("quick", {**TINY, "penalties": "-1"}, tmp_path, show=False)
    with pytest.raises(ValueError, match=r"base_seeds must be 1, got 2"):
        stability.main("quick", {**TINY, "base_seeds": "2"}, tmp_path, show=False)
    assert list(tmp_path.iterdir()) == []  # before anything was trained or written
    assert "seeds = quick: 0,1,2" in stability.knobs()


def test_on_a_gpu_batches_are_taken_there_and_no_graph_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as a host can tell: what would be handed to discover, with the moves to the GPU written down instead."""
    asked: dict[str, Any] = {}

    class Asked(Exception):
        pass

    def discover(model: Any, batches: Any, objective: Any, settings: DiscoveryConfig, **more: Any) -> None:
        asked.update(settings=settings, batch=next(iter(batches(0))))
        raise Asked

    moves: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(stability, "discover", discover)
    monkeypatch.setattr(stability, "base_stage", lambda depth, show: None)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: moves.append(device) or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: moves.append(device) or self)
    with pytest.raises(Asked):
        stability.main("quick", {**TINY, "device": "cuda", "stack": "1"}, tmp_path / "run", show=False)
    assert moves[:2] == ["cuda", "cuda"]  # rows and model
    assert asked["settings"].is_bulk and not asked["settings"].cuda_graph and asked["batch"].shape == (50, 4)
    config = read_json(tmp_path / "run" / "config.json")
    assert (config["device"], config["stack"]) == ("cuda", 1)


def test_the_run_folder_says_on_which_device_it_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(stability, "base_stage", fail)
    with pytest.raises(Stop):
        stability.main("quick", {**TINY, "stack": "1"}, tmp_path / "run", show=False)
    assert read_json(tmp_path / "run" / "config.json")["device"] == "cuda"


class Stop(Exception):
    pass


def fail(depth: Any, show: bool) -> None:
    raise Stop
