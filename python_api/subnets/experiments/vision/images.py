"""ImageSet: images in memory (or mapped from a file) with the class of their shape and the class of their texture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageSet:
    """N labelled images; ``shape`` is what a network is trained on, ``texture`` differs from it under cue conflict.

    Args:
        images: uint8 [N, 3, H, W], RGB.
        shape, texture: int64 [N], ids into ``classes``. Equal where both cues belong to one class.
        classes: names, in the fixed order that ids refer to.
        names: one name per image (file or generator), for messages and tables; empty: none.

    Raises:
        ValueError, TypeError: other shapes or dtypes, ids outside ``classes``.
    """

    images: Tensor
    shape: Tensor
    texture: Tensor
    classes: tuple[str, ...]
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.dim() != 4 or self.images.shape[1] != 3:
            got = f"{self.images.dtype} {list(self.images.shape)}"
            raise ValueError(f"ImageSet: images must be torch.uint8 [N, 3, H, W], got {got}")
        for name in ("shape", "texture"):
            ids = getattr(self, name)
            if ids.dtype != torch.int64 or list(ids.shape) != [len(self.images)]:
                got = f"{ids.dtype} {list(ids.shape)}"
                raise ValueError(f"ImageSet: {name} must be torch.int64 [{len(self.images)}], got {got}")
            if len(ids) and not (0 <= int(ids.min()) and int(ids.max()) < len(self.classes)):
                raise ValueError(
                    f"ImageSet: {name} must hold ids from 0 to {len(self.classes) - 1}, got {int(ids.min())} to "
                    f"{int(ids.max())}"
                )
        if self.names and len(self.names) != len(self.images):
            raise ValueError(f"ImageSet: names must be empty or {len(self.images)}, got {len(self.names)}")

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: Tensor | Sequence[int]) -> ImageSet:
        """The images at ``indices``, in that order."""
        where = torch.as_tensor(indices, dtype=torch.int64)
        names = tuple(self.names[i] for i in where.tolist()) if self.names else ()
        return ImageSet(self.images[where], self.shape[where], self.texture[where], self.classes, names)
