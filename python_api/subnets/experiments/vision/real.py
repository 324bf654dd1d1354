"""Saved classifiers on the real cue-conflict images of Geirhos et al.: shape and texture decisions, shape bias."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from subnets.experiments.vision.classes import CLASSES, outputs
from subnets.experiments.vision.classifier_training import predict
from subnets.experiments.vision.folders import list_cue_conflict
from subnets.experiments.vision.images import ImageSet
from subnets.experiments.vision.models import FORMAT, Classifier, NetworkShape, build, colours_of
from subnets.experiments.vision.packing import pack
from subnets.experiments.vision.stages import decisions, rounded
from subnets.training.files import load_tensors, read_json, write_json
from subnets.training.run_folder import read_config


class SixteenWay(nn.Module):
    """A classifier of ImageNet's 1,000 classes as one of 16: each class's score is the mean probability of its outputs
    (the decision rule of Geirhos et al., ICLR 2019)."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier
        self.members = [torch.tensor(outputs()[name]) for name in CLASSES]

    def forward(self, images: Tensor) -> Tensor:
        """Scores [B, 16]."""
        probabilities = self.classifier(images).float().softmax(1)
        means = [probabilities[:, members.to(images.device)].mean(1) for members in self.members]
        return torch.stack(means, 1)


def load_classifier(path: Path) -> tuple[nn.Module, int]:
    """A saved network with 16 outputs and the pixels of the images it takes.

    Raises:
        ValueError: nothing readable there, or a number of classes that is neither 16 nor 1,000.
    """
    model, size = _from_checkpoint(path) if path.is_dir() else _from_run(path)
    count = model.network.config.num_labels  # pyright: ignore
    if count == 1000:
        return SixteenWay(model), size
    if count != len(CLASSES):
        raise ValueError(f"load_classifier: {path} must have {len(CLASSES)} or 1000 outputs, got {count}")
    return model, size


def _from_run(path: Path) -> tuple[Classifier, int]:
    if not path.exists():
        raise ValueError(f"load_classifier: {path} must be a .safetensors file or a checkpoint folder, there is none")
    state, metadata = load_tensors(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"load_classifier: {path} must be a network that `subnets run vision` saved in transfers/, got a file of "
            f"format {metadata.get('format')!r}"
        )
    if metadata["images"] != "folders":
        raise ValueError(
            f"load_classifier: {path} must be a network trained on folders of photographs (preset imagenet), got one "
            f"of {metadata['images']} images: its classes are others, or it has seen the cue-conflict set"
        )
    given: dict[str, Any] = json.loads(metadata["network"])
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    shape = NetworkShape(**values)
    model = build(shape, 0)
    model.load_state_dict(state)
    return model.eval(), shape.image_size


def _from_checkpoint(path: Path) -> tuple[Classifier, int]:
    import transformers

    try:
        network = transformers.AutoModelForImageClassification.from_pretrained(
            path, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"load_classifier: {path} must be a transformers checkpoint in safetensors: {error}") from None
    return Classifier(network, *colours_of(path)).eval(), int(getattr(network.config, "image_size", 224))


def evaluate_models(
    models: Sequence[Path], images: Path, cache: Path, load: Callable[[Path], tuple[nn.Module, int]] = load_classifier
) -> list[dict[str, Any]]:
    """One row per model: shape and texture decisions and shape bias over the images whose cues differ, and accuracy of
    shape over all of them."""
    missing = [str(path) for path in models if not path.exists()]
    if missing:
        raise ValueError(
            f"evaluate_models: models must be files or folders that exist, there is no {', '.join(missing)}"
        )
    entries = list_cue_conflict(images)
    sets: dict[int, ImageSet] = {}
    rows = []
    for path in models:
        model, size = load(path)
        if size not in sets:
            sets[size] = pack(entries, size, cache / str(size), crop=1.0)
        predicted = predict(model, sets[size], bf16=False)
        accuracy = (predicted == sets[size].shape).float().mean().item()
        found = {**decisions(predicted, sets[size]), "shape_accuracy": accuracy}
        condition, _, rest = path.name.removesuffix(".safetensors").partition("-n")  # subnet-n4096-base0-seed1
        rows.append({"condition": condition, "seed": rest, **rounded(found), "num_images": len(entries)})
    return rows


def record(run: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes the rows into the run folder's real.json, in the place of those of the same models."""
    read_config(run, "vision")
    path = run / "real.json"
    old = read_json(path) if path.exists() else []
    names = {(row["condition"], row["seed"]) for row in rows}
    write_json(path, [row for row in old if (row["condition"], row["seed"]) not in names] + list(rows))
