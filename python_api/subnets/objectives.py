"""Objectives for :func:`subnets.discover`: (model, batch) -> 0-d loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .masking import masks_of


def kl_to_unmasked(model: nn.Module, batch: Any) -> Tensor:
    """KL(p_unmasked || p_masked), mean over rows and positions, in nats: how far the masks move the network's output.

    ``p = softmax(logits)`` over the last dimension, in fp32. Equals ``F.kl_div(log_softmax(masked),
    log_softmax(unmasked), log_target=True)`` summed over classes. Needs no labels.

    Args:
        model: a masked model that returns logits [..., classes], alone, as ``.logits``, or first in a tuple.
        batch: a tensor, ``model(batch)``; a tuple or list whose first item is the input (the rest is not used); or a
            mapping, ``model(**batch)`` without "labels". Positions where a mapping's "attention_mask" of the logits'
            leading shape is 0 do not count.

    Returns:
        0-d fp32 (fp64 for fp64 logits), >= 0 up to rounding; its gradient reaches the masked network alone.

    Raises:
        ValueError: the model has no masked layer, or the batch is empty.
        TypeError: the model returns no logits.
    """
    with torch.no_grad(), masks_of(model).disabled():
        unmasked = _log_probabilities(model, batch)
    # F.kl_div's own expression: torch.func.vmap has no batching rule for F.kl_div
    divergence = (unmasked.exp() * (unmasked - _log_probabilities(model, batch))).sum(-1)
    counted = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if isinstance(counted, Tensor) and counted.shape == divergence.shape:
        weights = counted.to(divergence.dtype)
        return (divergence * weights).sum() / weights.sum().clamp(min=1)  # nothing counted: no divergence
    if divergence.numel() == 0:
        raise ValueError("kl_to_unmasked: the batch is empty, so there is no divergence to average; leave it out")
    return divergence.mean()


def _log_probabilities(model: nn.Module, batch: Any) -> Tensor:
    if isinstance(batch, Mapping):
        output = model(**{key: value for key, value in batch.items() if key != "labels"})
    else:
        output = model(batch[0] if isinstance(batch, (tuple, list)) else batch)
    logits = getattr(output, "logits", output)
    if isinstance(logits, (tuple, list)) and logits:
        logits = logits[0]
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.dim() == 0:
        raise TypeError(f"kl_to_unmasked: the model must return logits [..., classes], got {type(output).__name__}")
    return F.log_softmax(logits, -1, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)
