"""The networks of the vision experiment, transformers' ResNet-18 and ViT, and the roles of their parameters."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from subnets.training.files import read_json

FORMAT = "subnets vision classifier 1"  # of saved networks
ARCHITECTURES = ("resnet18", "vit")
_SAME = (  # what decides a network's function beside its parameters
    "num_attention_heads", "hidden_act", "layer_norm_eps", "qkv_bias", "layer_type", "downsample_in_first_stage",
)  # fmt: skip
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class NetworkShape:
    """Which network, how wide, for which images.

    Args:
        architecture: "resnet18" or "vit".
        width: channels of the first ResNet stage (64 is ResNet-18); hidden size of the ViT (a multiple of its heads).
        image_size: pixels.
        num_classes: outputs.
        patch, depth, heads: of the ViT.
        mean, std: of the colours, per channel, in fractions of 255; :func:`colours_of` a published network.
    """

    architecture: str = "resnet18"
    width: int = 64
    image_size: int = 64
    num_classes: int = 16
    patch: int = 8
    depth: int = 6
    heads: int = 4
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise ValueError(
                f"NetworkShape: architecture must be one of {', '.join(ARCHITECTURES)}, got {self.architecture!r}"
            )
        if self.architecture == "vit" and (self.image_size % self.patch or self.width % self.heads):
            raise ValueError(
                f"NetworkShape: patch must divide image_size and heads width, got {self.image_size} / {self.patch} "
                f"and {self.width} / {self.heads}"
            )


class Classifier(nn.Module):
    """uint8 images [B, 3, H, W] -> logits [B, classes]: colours less ``mean`` over ``std`` (fractions of 255, per
    channel), then transformers' network as it is."""

    def __init__(
        self, network: nn.Module, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
    ) -> None:
        super().__init__()
        self.network = network
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) * 255, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits; images are uint8, or floating point in [0, 255]."""
        pixels = (images.to(self.mean.dtype) - self.mean) / self.std
        return self.network(pixel_values=pixels.contiguous(memory_format=torch.channels_last)).logits


def build(shape: NetworkShape, seed: int) -> Classifier:
    """A fresh network: transformers' own initialisation, drawn from ``seed``; the caller's random state stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _network(shape)
    return Classifier(network, shape.mean, shape.std).to(memory_format=torch.channels_last).eval()  # pyright: ignore


def _network(shape: NetworkShape) -> nn.Module:
    try:
        import transformers
    except ImportError:
        raise ValueError(
            "the vision experiment's networks come from transformers, which is not installed: "
            "pip install 'subnet-kernels[vision]'"
        ) from None
    common: dict[str, Any] = {"num_labels": shape.num_classes}
    if shape.architecture == "resnet18":
        widths = [shape.width << i for i in range(4)]
        return transformers.ResNetForImageClassification(transformers.ResNetConfig(
            embedding_size=shape.width, hidden_sizes=widths, depths=[2, 2, 2, 2], layer_type="basic", **common,
        ))  # fmt: skip
    return transformers.ViTForImageClassification(transformers.ViTConfig(
        hidden_size=shape.width, num_hidden_layers=shape.depth, num_attention_heads=shape.heads,
        intermediate_size=4 * shape.width, image_size=shape.image_size, patch_size=shape.patch,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **common,
    ))  # fmt: skip


def colours_of(checkpoint: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of the colours that a transformers checkpoint expects, from its preprocessor_config.json; ImageNet's
    where there is none."""
    path = checkpoint / "preprocessor_config.json"
    recipe = read_json(path) if path.exists() else {}
    return tuple(recipe.get("image_mean", IMAGENET_MEAN)), tuple(recipe.get("image_std", IMAGENET_STD))


def load_pretrained(model: Classifier, folder: Path) -> None:
    """Everything but the head from a transformers checkpoint (config.json, model.safetensors) of the same network.

    Raises ValueError if the folder holds none or one of another architecture or size.
    """
    network = model.network
    try:
        loaded = type(network).from_pretrained(  # pyright: ignore
            folder, local_files_only=True, use_safetensors=True, num_labels=network.config.num_labels,  # pyright: ignore
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        expected = f"a transformers checkpoint of {type(network).__name__} in safetensors"
        raise ValueError(f"load_pretrained: {folder} must be {expected}: {error}") from None
    for key in _SAME:
        ours, theirs = (getattr(one.config, key, None) for one in (network, loaded))
        if ours != theirs:
            raise ValueError(f"load_pretrained: {folder} must have {key}={ours!r}, as the config says, got {theirs!r}")
    old = {name: value for name, value in loaded.state_dict().items() if not name.startswith("classifier.")}
    new = {name: value for name, value in network.state_dict().items() if not name.startswith("classifier.")}
    differing = sorted(
        n for n in old.keys() | new.keys() if n not in old or n not in new or old[n].shape != new[n].shape
    )
    if differing:
        raise ValueError(
            f"load_pretrained: {folder} must hold a {type(network).__name__} of the config's width and depth; "
            f"{len(differing)} parameters differ, {differing[0]} first"
        )
    network.load_state_dict({**network.state_dict(), **old})


def norm_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> every batch norm and layer norm."""
    kinds = (nn.BatchNorm2d, nn.LayerNorm)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def norm_state(model: nn.Module) -> set[str]:
    """Names in the state dict that belong to norms: weights, biases, running statistics."""
    inside = tuple(f"{name}." for name in norm_layers(model))
    return {name for name in model.state_dict() if name.startswith(inside)}


def head_state(model: Classifier) -> set[str]:
    """Names in the state dict that belong to the output head."""
    return {name for name in model.state_dict() if name.startswith("network.classifier.")}


def freeze_norms(model: nn.Module) -> None:
    """Norm layers stay as they are: in eval mode, their parameters without gradient. Call again after `train()`."""
    for module in norm_layers(model).values():
        module.eval().requires_grad_(False)


def embedding_state(model: nn.Module) -> set[str]:
    """Names in the state dict of the CLS token and the position embeddings."""
    return {name for name in model.state_dict() if name.endswith(("cls_token", "position_embeddings"))}


def masked_targets(shape: NetworkShape) -> str:
    """What discovery masks, as `mask_model` takes it: every convolution of a ResNet, but not its head; every linear
    layer of a ViT with its head, and its patch convolution."""
    return "all-conv" if shape.architecture == "resnet18" else r".*"


def model_metadata(shape: NetworkShape, run: str, source: str) -> dict[str, str]:
    """What a saved network's file says of itself: enough to build it again, and where its images came from."""
    return {"format": FORMAT, "run": run, "images": source, "network": json.dumps(dataclasses.asdict(shape))}
