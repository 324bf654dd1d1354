"""Measures of what a network decides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    Classes = Sequence[object] | np.ndarray[Any, Any] | Tensor


def shape_bias(predicted: Classes, shape: Classes, texture: Classes) -> float:
    """Return ``shape decisions / (shape decisions + texture decisions)`` on cue-conflict images.

    A shape decision is ``predicted == shape``, a texture decision ``predicted == texture``. Images whose two cues agree
    (``shape == texture``) say nothing and are left out, as are predictions of any third class.

    Args:
        predicted, shape, texture: one entry per image: class names, or integer ids (lists, arrays, 1-D tensors).

    Returns:
        A fraction from 0 (texture alone) to 1 (shape alone). Published: people 0.959, ResNet-50 0.221.

    Raises:
        TypeError: names in one sequence and ids in another, or a bare string as a sequence.
        ValueError: sequences of different lengths, or no shape or texture decision among images with different cues.

    Source: Geirhos et al., "ImageNet-trained CNNs are biased towards texture" (ICLR 2019), section 2.3.

    >>> shape_bias(["cat", "dog", "cat", "car"], shape=["cat"] * 4, texture=["dog", "dog", "cat", "dog"])
    0.5
    """
    columns = {"predicted": _classes(predicted, "predicted"), "shape": _classes(shape, "shape")}
    columns["texture"] = _classes(texture, "texture")
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"shape_bias: predicted, shape and texture must have one entry per image each, got {lengths}")
    kinds = {name: type(column[0]).__name__ for name, column in columns.items() if column}
    if len(set(kinds.values())) > 1:
        raise TypeError(f"shape_bias: classes must be names everywhere or ids everywhere, got {kinds}")
    conflicts = [(p, s, t) for p, s, t in zip(*columns.values(), strict=True) if s != t]
    num_shape = sum(p == s for p, s, _ in conflicts)
    num_texture = sum(p == t for p, _, t in conflicts)
    if num_shape + num_texture == 0:
        raise ValueError(
            f"shape_bias: at least one image must be decided by shape or by texture, got none among {len(conflicts)} "
            f"images whose cues differ (of {lengths['shape']}); check that all three use the same class names"
        )
    return num_shape / (num_shape + num_texture)


def _classes(values: Any, argument: str) -> list[Any]:
    """Return the classes (a sequence, array or tensor) as a list of plain str or int."""
    if isinstance(values, (str, bytes)):
        raise TypeError(f"shape_bias: {argument} must be a sequence of classes, got the single text {values!r}")
    listed = values.tolist() if hasattr(values, "tolist") else list(values)
    listed = [value.item() if hasattr(value, "item") else value for value in listed]
    kinds = {type(value) for value in listed}
    if kinds - {str, int} or len(kinds) > 1:
        got = sorted(kind.__name__ for kind in kinds)
        raise TypeError(f"shape_bias: {argument} must hold class names (str) or ids (int), got {', '.join(got)}")
    return listed
