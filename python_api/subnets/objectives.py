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


def odd_one_out(model: nn.Module, batch: Any) -> Tensor:
    """Cross-entropy of `odd_one_out_logits`: which of a few items is not like the others, in nats, mean over the batch.

    Args:
        model: ``model(x)`` of items ``[B * items, ...]`` gives embeddings ``[B * items, width]``.
        batch: ``(x, odd)`` with ``x [B, items, ...]``, two items or more, and the odd one's index ``odd [B]``, int64.

    Returns:
        0-d, of `odd_one_out_logits`'s dtype. Chance is ``log(items)``.

    Raises:
        TypeError: the batch is no pair of tensors, or the model returns none.
        ValueError: other shapes.

    Source: Lepori, Serre, Pavlick, "Break It Down" (NeurIPS 2023), with four items.
    """
    is_pair = isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)
    if not is_pair:
        raise TypeError(f"odd_one_out: batch must be a pair (items, odd) of tensors, got {type(batch).__name__}")
    x, odd = batch
    if x.ndim < 2 or odd.shape != x.shape[:1] or not len(x):
        got = f"{list(x.shape)} and {list(odd.shape)}"
        raise ValueError(f"odd_one_out: batch must be items [B, items, ...] and odd [B], B >= 1, got {got}")
    z = model(x.flatten(0, 1))
    if not isinstance(z, Tensor) or z.ndim != 2 or len(z) != x.shape[0] * x.shape[1]:
        got = list(z.shape) if isinstance(z, Tensor) else type(z).__name__
        raise TypeError(f"odd_one_out: the model must return an embedding [width] of each of the items, got {got}")
    return F.cross_entropy(odd_one_out_logits(z.unflatten(0, x.shape[:2])), odd)


def odd_one_out_logits(z: Tensor) -> Tensor:
    """Return ``logit_i = -sum_j cos(z_i, z_j)`` over all items j: largest for the item least like the others.

    The sum includes j = i, which lowers all logits by 1 and changes no probability; a zero embedding has cosine 0.

    Args:
        z: embeddings ``[..., items, width]`` of two items or more, floating-point.

    Returns:
        ``[..., items]``, fp32 (fp64 for fp64).

    Raises:
        ValueError: fewer than two items, or no two dimensions.

    >>> same, other = [1.0, 0.0], [0.0, 1.0]
    >>> odd_one_out_logits(torch.tensor([same, same, other, same]))
    tensor([-3., -3., -1., -3.])
    """
    if z.ndim < 2 or z.shape[-2] < 2:
        raise ValueError(f"odd_one_out_logits: z must be [..., items, width] of two or more items, got {list(z.shape)}")
    unit = F.normalize(z.double() if z.dtype == torch.float64 else z.float(), dim=-1)
    return -(unit @ unit.sum(-2).unsqueeze(-1)).squeeze(-1)


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
