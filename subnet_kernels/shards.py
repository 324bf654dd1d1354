"""Sharded tensors, torch's DTensor as FSDP2 makes them: each rank holds a part. What is asked of one is asked here."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor. Nothing is imported: without torch.distributed.tensor there are none."""
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def shard_of(tensor: Tensor) -> Tensor:
    """This rank's part, the same tensor object at each call; what is not sharded is its own."""
    return tensor._local_tensor if is_sharded(tensor) else tensor  # type: ignore[attr-defined]  # to_local() makes new ones


def whole(tensor: Tensor) -> Tensor:
    """All of it, on every rank: each must ask. Needed before a value is read: ``int(sum)`` of a DTensor is the rank's
    own sum."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
