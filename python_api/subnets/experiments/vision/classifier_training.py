"""Training and evaluating one image classifier; resumable at every epoch."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subnets.experiments.vision.images import ImageSet
from subnets.experiments.vision.models import freeze_norms
from subnets.experiments.vision.style_noise import style_noise
from subnets.training.files import load_tensors, save_tensors
from subnets.training.seeds import torch_generator

OPTIMIZERS = ("sgd", "adamw")
_EVALUATION_BATCH = 256


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained.

    Args:
        epochs, batch: passes over the images, images per step (a last smaller batch is taken too).
        optimizer: "sgd" with momentum .9, or "adamw".
        lr, weight_decay: of the optimizer; constant, or falling to 0 along half a cosine with ``decay``.
        decay: see lr.
        norms_frozen: norm layers keep their statistics and parameters.
        flip: mirror half of the images.
        style: give every image style noise (:func:`style_noise`) with this probability.
        bf16: forward pass under bf16 autocast.
    """

    epochs: int
    batch: int
    lr: float
    weight_decay: float = 1e-4
    optimizer: str = "sgd"
    decay: bool = False
    norms_frozen: bool = True
    flip: bool = True
    style: float = 0.0
    bf16: bool = True


@dataclass(frozen=True)
class Trained:
    """What training left: a row per epoch of the curve; images a second; seconds, if all was trained in one go those
    it took, else those of the epochs done now scaled to all."""

    curve: list[dict[str, float]]
    images_per_second: float | None
    seconds: float


Report = Callable[[int], object]


def train(
    model: nn.Module, data: ImageSet, recipe: Recipe, seed: tuple[int | str, ...], *,
    checkpoint: Path | None = None, report: Report | None = None,
) -> Trained:  # fmt: skip
    """Trains ``model`` in place on ``data``'s shape classes by cross entropy weighted by class (the mean weight of an
    image is 1; a class that is twice as frequent weighs half).

    Args:
        model: uint8 images -> logits, on its device; parameters that do not require grad stay.
        data: training images, on the CPU.
        recipe: see :class:`Recipe`.
        seed: names the random streams (order, mirroring, style); every epoch has its own.
        checkpoint: a file that is written after every epoch; a killed training goes on there.
        report: called after every step with its number of images.

    Raises:
        ValueError: no images, or a loss that is not finite.
    """
    if len(data) == 0:
        raise ValueError("train: data must hold at least one image, got none")
    device = next(model.parameters()).device
    weights = class_weights(data).to(device)
    optimizer = _optimizer(model, recipe)
    steps = -(-len(data) // recipe.batch) * recipe.epochs
    curve = _resume(checkpoint, model, optimizer)
    seconds, done = 0.0, 0
    for epoch in range(len(curve), recipe.epochs):
        model.train()
        if recipe.norms_frozen:
            freeze_norms(model)
        began = time.perf_counter()
        losses, counts = [], []
        step = epoch * -(-len(data) // recipe.batch)
        for images, target in _batches(data, recipe, (*seed, epoch), device):
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * (0.5 + 0.5 * math.cos(math.pi * step / steps) if recipe.decay else 1.0)
            with autocast(device, recipe.bf16):
                logits = model(images)
            loss = F.cross_entropy(logits.float(), target, weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            losses.append(loss.detach() * len(images))
            counts.append(len(images))
            if report:
                report(len(images))
        mean = float(torch.stack(losses).sum()) / sum(counts)
        seconds, done = seconds + time.perf_counter() - began, done + len(data)
        if not math.isfinite(mean):
            raise ValueError(f"train: the loss of epoch {epoch + 1} must be finite, got {mean}; lower lr={recipe.lr:g}")
        model.eval()
        curve.append({"epoch": epoch + 1, "loss": mean})
        if checkpoint:
            _save(checkpoint, model, optimizer, curve)
    model.eval()
    rate = done / seconds if seconds else None
    return Trained(curve, rate, round(len(data) * recipe.epochs / rate, 2) if rate else 0.0)


def class_weights(data: ImageSet) -> Tensor:
    """fp32 [classes]: N / (number of classes that occur * images of the class); 0 for a class without images."""
    counts = torch.bincount(data.shape, minlength=len(data.classes))
    occurring = int((counts > 0).sum())
    return torch.where(counts > 0, len(data) / (occurring * counts.clamp(min=1)), 0.0).float()


def predict(model: nn.Module, data: ImageSet, bf16: bool = True) -> Tensor:
    """Predicted class ids int64 [N], on the CPU; the model is in eval mode meanwhile."""
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    found = []
    with torch.no_grad(), autocast(device, bf16):
        for start in range(0, len(data), _EVALUATION_BATCH):
            found.append(model(data.images[start : start + _EVALUATION_BATCH].to(device)).argmax(1).cpu())
    model.train(was_training)
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64)


def class_averaged_accuracy(predicted: Tensor, target: Tensor) -> float:
    """Mean over the classes that occur of the fraction of their images that is predicted right."""
    if len(target) == 0:
        raise ValueError("class_averaged_accuracy: target must hold at least one class id, got none")
    counts = torch.bincount(target)
    right = torch.bincount(target[predicted == target], minlength=len(counts))
    return float((right[counts > 0] / counts[counts > 0]).mean())


def autocast(device: torch.device, bf16: bool) -> contextlib.AbstractContextManager[Any]:
    """bf16 autocast of ``device``, or nothing."""
    return torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(trained, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    return torch.optim.SGD(trained, lr=recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay, fused=True)


def _batches(
    data: ImageSet, recipe: Recipe, seed: tuple[int | str, ...], device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """The epoch's batches in an order of its own, mirrored and styled, on the device."""
    order = torch.randperm(len(data), generator=torch_generator(*seed, "order"))
    generator = torch_generator(*seed, "augmentation")
    for where in order.split(recipe.batch):
        images, target = data.images[where].to(device), data.shape[where].to(device)
        if recipe.flip:
            is_mirrored = torch.rand(len(images), generator=generator).lt(0.5).to(device)
            images = torch.where(is_mirrored[:, None, None, None], images.flip(3), images)
        if recipe.style:
            images = style_noise(images, recipe.style, generator)
        yield images, target


def _save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, curve: list[dict[str, float]]) -> None:
    """Model, optimizer state and curve in one safetensors file."""
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{name}": value for name, value in state.items() if value is not None}
    save_tensors(path, tensors, {"curve": json.dumps(curve)})


def _resume(path: Path | None, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, float]]:
    """Puts a checkpoint's state back and returns its curve; an empty one without a checkpoint."""
    if path is None or not path.exists():
        return []
    tensors, metadata = load_tensors(path)
    model.load_state_dict({n.removeprefix("model/"): v for n, v in tensors.items() if n.startswith("model/")})
    states: dict[int, dict[str, Tensor]] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, value in tensors.items():
        if name.startswith("optimizer/"):
            _, index, key = name.split("/")
            parameter = parameters[int(index)]
            if value.shape == parameter.shape:  # fused optimizers need the parameter's strides, which no file keeps
                value = torch.empty_like(parameter).copy_(value)
            states.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
    return json.loads(metadata["curve"])
