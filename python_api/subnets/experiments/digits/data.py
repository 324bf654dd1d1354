"""Scikit-learn's handwritten digits: 1,797 images of 8 by 8 pixels, their splits and their variants."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subnets.experiments.mlp import shuffled
from subnets.training.seeds import torch_generator

SIDE = 8
NUM_PIXELS = SIDE * SIDE
NUM_HELD_OUT = 360  # images in each of validation and test; one accuracy has a standard error of about .009

VARIANTS: dict[str, Callable[[Tensor], Tensor]] = {  # of images [n, 8, 8]
    "upright": lambda images: images,
    "rotated": lambda images: torch.rot90(images, 1, (1, 2)),  # a quarter to the left
    "mirrored": lambda images: images.flip(2),
    "shifted": lambda images: images.roll((2, 2), (1, 2)),  # down and right by two, around the edges
}


@dataclass(frozen=True)
class Images:
    """Pixels fp32 [n, 64] from 0 to 1, and the digits int64 [n]."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, rows: Tensor) -> Images:
        return Images(self.x[rows], self.y[rows])

    def batches(self, batch: int, steps: int, *seed: int | str) -> Iterator[Images]:
        """`steps` batches in shuffled orders that the seed decides; see `mlp.shuffled`."""
        return (self[rows] for rows in shuffled(len(self), batch, steps, *seed))

    def variant(self, name: str) -> Images:
        """The same digits, seen differently; see VARIANTS."""
        if name not in VARIANTS:
            raise ValueError(f"Images.variant: name must be one of {', '.join(VARIANTS)}, got {name!r}")
        return Images(VARIANTS[name](self.x.view(-1, SIDE, SIDE)).reshape(-1, NUM_PIXELS), self.y)


@cache
def all_images() -> Images:
    """All 1,797 images. Raises ImportError, saying what to install, without scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ImportError("subnets run digits needs scikit-learn: pip install scikit-learn") from None
    x, y = load_digits(return_X_y=True)
    return Images(torch.as_tensor(x).float() / 16, torch.as_tensor(y).long())


def splits(seed: int) -> tuple[Images, Images, Images]:
    """Training, validation and test images: 1,077, 360 and 360, disjoint; the seed decides which."""
    every = all_images()
    order = torch.randperm(len(every), generator=torch_generator(seed, "digits", "split"))
    parts = order[: -2 * NUM_HELD_OUT], order[-2 * NUM_HELD_OUT : -NUM_HELD_OUT], order[-NUM_HELD_OUT:]
    train, validation, test = (every[rows] for rows in parts)
    return train, validation, test


def standardized(parts: tuple[Images, Images, Images]) -> tuple[Images, Images, Images]:
    """The same images, each pixel with mean 0 and deviation 1 over the training images; constant pixels are 0."""
    mean, deviation = parts[0].x.mean(0), parts[0].x.std(0)
    scale = torch.where(deviation > 0, 1 / deviation, 0.0)
    train, validation, test = (Images((part.x - mean) * scale, part.y) for part in parts)
    return train, validation, test


def loss(model: nn.Module, images: Images) -> Tensor:
    """Cross entropy, averaged over the images."""
    return F.cross_entropy(model(images.x), images.y)


@torch.no_grad()
def evaluate(model: nn.Module, images: Images) -> tuple[float, float]:
    """Loss and accuracy, in eval mode."""
    model.eval()
    scores = model(images.x)
    return F.cross_entropy(scores, images.y).item(), (scores.argmax(1) == images.y).double().mean().item()
