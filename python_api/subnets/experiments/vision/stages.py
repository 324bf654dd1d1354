"""The stages before transfer: base network and discovery. Each returns what its file holds if the file is there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from subnets.discovery import DiscoveryConfig, discover
from subnets.evaluation import evaluate_subnet
from subnets.experiments.vision.classifier_training import (
    Recipe,
    Trained,
    autocast,
    class_averaged_accuracy,
    class_weights,
    predict,
    train,
)
from subnets.experiments.vision.config import VisionConfig
from subnets.experiments.vision.data import Data
from subnets.experiments.vision.images import ImageSet
from subnets.experiments.vision.models import (
    Classifier,
    build,
    head_state,
    load_pretrained,
    masked_targets,
    model_metadata,
)
from subnets.metrics import shape_bias
from subnets.subnet import Subnet
from subnets.training.files import load_tensors, save_tensors, write_json
from subnets.training.seeds import seed_for, torch_generator


@dataclass(frozen=True)
class Replicate:
    """One base network: its config (whose seed is this network's), its images and the folder of its files."""

    config: VisionConfig
    data: Data
    folder: Path

    def model(self, state: dict[str, Tensor] | None = None, seed: int | None = None) -> Classifier:
        """A network of the config on its device, fresh or holding `state`; in eval mode."""
        own = seed_for(self.config.seed, "vision", "base") if seed is None else seed
        model = build(self.config.network(), own % 2**31)
        if state is not None:
            model.load_state_dict(state)
        return model.to(self.config.torch_device()).eval()


def replicates(config: VisionConfig, data: Data, folder: Path) -> list[Replicate]:
    """The base networks."""
    return [
        Replicate(config.of_replicate(r), data.of_replicate(r), place)
        for r, place in enumerate(config.places(folder))
    ]


# ------------------------------------------------------------------------- evaluation


def evaluate(model: nn.Module, tests: dict[str, ImageSet], bf16: bool) -> dict[str, float]:
    """`results.MEASURE_TITLES` of a network: class-averaged accuracy on natural and mean-pooled images; on cue-conflict
    images whose cues differ the fractions decided by shape and by texture, and `metrics.shape_bias` (nan: none)."""
    measures = {
        kind: class_averaged_accuracy(predict(model, tests[kind], bf16), tests[kind].shape)
        for kind in ("natural", "mean_pooled")
    }
    return {**measures, **decisions(predict(model, tests["conflict"], bf16), tests["conflict"])}


def decisions(predicted: Tensor, conflict: ImageSet) -> dict[str, float]:
    """Shape and texture decisions as fractions of the images whose cues differ, and the shape bias."""
    differ = conflict.shape != conflict.texture
    by_shape = (predicted == conflict.shape)[differ].float().mean().item()
    by_texture = (predicted == conflict.texture)[differ].float().mean().item()
    bias = (
        shape_bias(predicted.tolist(), conflict.shape.tolist(), conflict.texture.tolist())
        if by_shape + by_texture > 0
        else float("nan")
    )
    return {"shape_decisions": by_shape, "texture_decisions": by_texture, "shape_bias": bias}


def rounded(values: dict[str, Any]) -> dict[str, Any]:
    """Floats to six digits, for files."""
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in values.items()}


def train_shown(
    title: str, show: bool, model: nn.Module, data: ImageSet, recipe: Recipe, *args: Any, **kw: Any
) -> Trained:
    """`train` with a progress bar over images."""
    bar = tqdm(total=recipe.epochs * len(data), desc=title, unit="image", disable=not show, mininterval=0.5)
    try:
        return train(model, data, recipe, *args, report=bar.update, **kw)
    finally:
        bar.close()


# ------------------------------------------------------------------------------- base


def base_stage(replicate: Replicate, show: bool = False) -> Classifier:
    """The base network, from `base.safetensors` or trained now on natural images (`base.json`: accuracy, curve)."""
    config, folder = replicate.config, replicate.folder
    weights, facts = folder / "base.safetensors", folder / "base.json"
    if weights.exists() and facts.exists():
        return replicate.model(load_tensors(weights)[0])
    model, checkpoint = replicate.model(), folder / "base.checkpoint.safetensors"
    if config.base_model is not None:
        load_pretrained(model, Path(config.base_model))
        head = head_state(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in head)
    recipe = Recipe(
        config.base_epochs, config.base_batch, config.base_lr, weight_decay=1e-2, optimizer="adamw", decay=True,
        norms_frozen=config.base_model is not None, bf16=config.bf16,
    )  # fmt: skip
    trained = train_shown(
        "base network", show, model, replicate.data.base, recipe, (config.seed, "vision", "base"), checkpoint=checkpoint
    )
    model.requires_grad_(True)
    save_tensors(weights, model.state_dict(), model_metadata(config.network(), "base", config.source))
    write_json(facts, {
        **rounded(evaluate(model, replicate.data.tests, config.bf16)), "curve": trained.curve,
        "seconds": trained.seconds, "images_per_second": trained.images_per_second,
    })  # fmt: skip
    checkpoint.unlink(missing_ok=True)
    return model


# -------------------------------------------------------------------------- discovery


def discovery_stage(replicate: Replicate, base: Classifier, show: bool = False) -> Subnet:
    """The shape subnet of the base, from `subnet.safetensors` or discovered now (`discovery.json`: facts)."""
    config, folder, tests = replicate.config, replicate.folder, replicate.data.tests
    path, facts = folder / "subnet.safetensors", folder / "discovery.json"
    if path.exists() and facts.exists():
        return Subnet.load(path)
    images, held_out = replicate.data.discovery, replicate.data.discovery_held_out
    checkpoint, device = folder / "discovery.checkpoint.safetensors", config.torch_device()
    weights = class_weights(images).to(device)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        with autocast(device, config.bf16):
            logits = model(batch[0])
        return F.cross_entropy(logits.float(), batch[1], weights)

    epochs: list[int] = []  # those of this call: fewer than all where it goes on from a checkpoint
    began = time.perf_counter()
    found = discover(
        base, shuffled(images, config.discovery_batch, (config.seed, "vision", "discovery"), device), loss,
        discovery_config(config, len(images), checkpoint), progress=show,
        callbacks=[lambda row, masks: epochs.append(row["epoch"])],
        evaluate=lambda model: class_averaged_accuracy(predict(model, held_out, config.bf16), held_out.shape),
    )  # fmt: skip
    each = (time.perf_counter() - began) / len(epochs) if epochs else 0.0
    found.subnet.provenance.update({"task": "shape (mean-pooled images)", "architecture": config.architecture})
    found.subnet.save(path, weights=base)
    write_json(facts, {
        "density": found.subnet.density(),
        "density_per_layer": found.subnet.density(per_layer=True),
        "history": found.history,
        "table": subtask_table(base, found.subnet, tests, config),
        "seconds": round(each * config.discovery_epochs, 2),
        "images_per_second": round(len(images) / each, 1) if each else None,
    })  # fmt: skip
    checkpoint.unlink(missing_ok=True)
    return found.subnet


def discovery_config(config: VisionConfig, num_images: int, checkpoint: Path | None = None) -> DiscoveryConfig:
    """The settings of `discover`."""
    return DiscoveryConfig(
        epochs=config.discovery_epochs,
        steps_per_epoch=-(-num_images // config.discovery_batch),
        lr=config.discovery_lr,
        weight_decay=0.01,
        lam=config.lam,
        score_init=config.score_init,
        beta_end=config.beta_end,
        targets=masked_targets(config.network()),
        seed=seed_for(config.seed, "vision", "discovery") % 2**31,
        checkpoint=checkpoint,
        cuda_graph=config.torch_device().type == "cuda",
    )


def shuffled(
    images: ImageSet, batch: int, seed: tuple[int | str, ...], device: torch.device
) -> Callable[[int], Iterator[tuple[Tensor, Tensor]]]:
    """epoch -> batches (images, shape ids) in an order of that epoch, on the device."""

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(images), generator=torch_generator(*seed, "order", epoch))
        return ((images.images[where].to(device), images.shape[where].to(device)) for where in order.split(batch))

    return batches


def subtask_table(
    base: Classifier, subnet: Subnet, tests: dict[str, ImageSet], config: VisionConfig
) -> dict[str, dict[str, float]]:
    """`results.MEASURE_TITLES` of the subnet in the base, its complement, size-matched random subnets, and the base.

    What is not masked (norm layers, the ResNet's head) stays in every row.
    """

    def accuracy(kind: str) -> Callable[[nn.Module], float]:
        return lambda model: class_averaged_accuracy(predict(model, tests[kind], config.bf16), tests[kind].shape)

    def decided(by: str) -> Callable[[nn.Module], float]:
        return lambda model: decisions(predict(model, tests["conflict"], config.bf16), tests["conflict"])[by]

    measures = {kind: accuracy(kind) for kind in ("natural", "mean_pooled")}
    measures |= {by: decided(by) for by in ("shape_decisions", "texture_decisions")}
    table = evaluate_subnet(base, subnet, measures, controls=config.subnet_controls, seed=config.seed)
    rows: dict[str, dict[str, float]] = {}
    for row in table.rows:
        rows.setdefault(row["condition"], {})[row["test"]] = round(row["mean"], 6)
    for row in rows.values():
        both = row["shape_decisions"] + row["texture_decisions"]
        row["shape_bias"] = row["shape_decisions"] / both if both else float("nan")
    return rows
