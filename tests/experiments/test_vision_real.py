"""Saved classifiers on cue-conflict photographs: what is loaded, how 1,000 outputs become 16, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from subnets import cli
from subnets.experiments.vision.classes import CLASSES, outputs, synsets
from subnets.experiments.vision.config import make_config
from subnets.experiments.vision.models import NetworkShape, build, model_metadata
from subnets.experiments.vision.real import SixteenWay, evaluate_models, load_classifier, record
from subnets.training.files import read_json, save_tensors
from subnets.training.run_folder import open_run_folder

TINY = NetworkShape(width=4, image_size=32)


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Twenty images of 48 pixels; three of them with equal cues."""
    from PIL import Image

    for i in range(20):
        shape, texture = CLASSES[i % 16], CLASSES[(i + (i > 2)) % 16]
        (tmp_path / "images" / shape).mkdir(parents=True, exist_ok=True)
        name = f"{shape}{i // 16 + 1}-{texture}1.png"
        Image.new("RGB", (48, 48), (i * 10, 20, 30)).save(tmp_path / "images" / shape / name)
    return tmp_path / "images"


def test_a_thousand_outputs_become_sixteen_by_mean_probability():
    logits = torch.zeros(2, 1000)
    logits[0, 404] = 5.0  # airliner, the only airplane
    logits[1, outputs()["dog"]] = 1.0
    scores = SixteenWay(lambda images: logits)(torch.zeros(2, 3, 8, 8))  # pyright: ignore
    probabilities = logits.double().softmax(1)
    assert scores[0, 0].item() == pytest.approx(probabilities[0, 404].item())
    assert scores[1, CLASSES.index("dog")].item() == pytest.approx(probabilities[1, 151 + 5].item())
    assert scores.argmax(1).tolist() == [CLASSES.index("airplane"), CLASSES.index("dog")]


def test_outputs_stand_for_the_synsets_in_sorted_order():
    """Synsets and outputs were written down apart; ILSVRC-2012 numbers its synsets in sorted order."""
    pairs = []
    for name, members in synsets().items():
        more = ["n03345487", "n03770679", "n03930630", "n03977966", "n04461696"] if name == "truck" else []
        pairs += zip(sorted([*members, *more]), outputs()[name], strict=True)
    places = [place for _, place in sorted(pairs)]
    assert places == sorted(places) and len(set(places)) == 207


def test_a_network_of_a_run_and_a_checkpoint_give_the_same_row(photographs: Path, tmp_path: Path):
    model = build(TINY, 3)
    save_tensors(tmp_path / "own.safetensors", model.state_dict(), model_metadata(TINY, "own", "folders"))
    model.network.config.image_size = 32
    model.network.save_pretrained(tmp_path / "checkpoint")
    again, size = load_classifier(tmp_path / "own.safetensors")
    x = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert size == 32 and torch.equal(again(x), model(x))
    own, checkpoint = evaluate_models(
        [tmp_path / "own.safetensors", tmp_path / "checkpoint"], photographs, tmp_path / "c"
    )
    assert (own.pop("condition"), checkpoint.pop("condition")) == ("own", "checkpoint")
    assert own == checkpoint and own["num_images"] == 20
    recipe = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (tmp_path / "checkpoint" / "preprocessor_config.json").write_text(json.dumps(recipe))
    pixels = (x / 255 - 0.5) / 0.25
    other, _ = load_classifier(tmp_path / "checkpoint")
    assert torch.allclose(other(x), model.network(pixel_values=pixels).logits, atol=1e-5)


def test_a_constant_network_has_the_decisions_one_can_count(photographs: Path, tmp_path: Path):
    class Always(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.eye(16)[3].expand(len(images), -1) + self.weight

    [row] = evaluate_models([tmp_path], photographs, tmp_path / "c", load=lambda path: (Always(), 32))
    # class 3 is the shape of images 3 and 19, the texture of none whose cues differ but of 18 (i = 18: 2 -> 3)
    assert row["shape_decisions"] == pytest.approx(2 / 17, abs=1e-6)
    assert row["texture_decisions"] == pytest.approx(1 / 17, abs=1e-6)
    assert row["shape_bias"] == pytest.approx(2 / 3, abs=1e-6) and row["shape_accuracy"] == pytest.approx(0.1)


def test_the_command_prints_the_table_and_the_run_remembers_it(photographs: Path, tmp_path: Path, capsys):
    save_tensors(tmp_path / "own.safetensors", build(TINY, 3).state_dict(), model_metadata(TINY, "own", "folders"))
    open_run_folder(tmp_path / "run", "vision", make_config("quick").to_json())
    words = [
        "shape-bias",
        str(tmp_path / "own.safetensors"),
        "--images",
        str(photographs),
        "--cache",
        str(tmp_path / "c"),
    ]
    for _ in range(2):  # the second time in the place of the first
        assert cli.main([*words, "--run", str(tmp_path / "run")]) == 0
    assert "people" in capsys.readouterr().out
    assert [row["condition"] for row in read_json(tmp_path / "run" / "real.json")] == ["own"]
    record(tmp_path / "run", [{"condition": "other", "seed": ""}])
    assert [row["condition"] for row in read_json(tmp_path / "run" / "real.json")] == ["own", "other"]


KINDS = ["missing", "not a network", "wrong number of classes", "not a checkpoint", "generated images"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_classifier_is_refused_in_words(kind: str, tmp_path: Path):
    path = tmp_path / "model.safetensors"
    expected = {
        "missing": "there is none", "not a network": "that `subnets run vision` saved",
        "wrong number of classes": "16 or 1000 outputs, got 5", "not a checkpoint": "must be a transformers checkpoint",
        "generated images": "got one of generated images: its classes are others",
    }[kind]  # fmt: skip
    if kind == "not a network":
        save_tensors(path, {"a": torch.zeros(1)})
    elif kind == "wrong number of classes":
        shape = NetworkShape(width=4, image_size=32, num_classes=5)
        save_tensors(path, build(shape, 0).state_dict(), model_metadata(shape, "x", "folders"))
    elif kind == "not a checkpoint":
        path = tmp_path
    elif kind == "generated images":
        save_tensors(path, build(TINY, 0).state_dict(), model_metadata(TINY, "x", "generated"))
    with pytest.raises(ValueError, match=expected):
        load_classifier(path)
