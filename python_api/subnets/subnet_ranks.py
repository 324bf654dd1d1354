"""Ranks of a subnet's weights by score, in 8 bits: enough to say which part of it is the highest-scored.

The rank of a kept weight is ``256 * (kept weights of lower score) // (kept weights)``, counted over all parameters
together: one beta serves all layers, so scores compare across them. Equal scores, such as those of the weights that one
row's score governs, have equal ranks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from subnet_kernels.masks import expand_scores

NUM_RANKS = 256


def ranks_of(masks: Mapping[str, Tensor], scores: Mapping[str, Tensor], caller: str) -> dict[str, Tensor]:
    """Return parameter name -> uint8 ``[kept]``, the ranks of the kept weights in the C order of the mask, on the CPU.

    Args:
        masks: parameter name to bool tensor.
        scores: the same names; of the mask's shape, or of a unit that governs several weights (``[rows, 1]``).
        caller: begins the error message.

    Raises:
        ValueError: other names or shapes than the masks', or scores that are not finite.
    """
    if set(scores) != set(masks):
        odd = sorted(set(scores) ^ set(masks))
        raise ValueError(f"{caller}: scores must name the same parameters as the masks, these differ: {odd[:8]}")
    kept = {name: _kept_scores(name, mask.cpu(), scores[name], caller) for name, mask in masks.items()}
    in_order = torch.cat(list(kept.values())).sort().values
    # Rank k and above: at least ceil(k * kept / 256) lower scores, so the last of these is lower.
    last = -(-torch.arange(1, NUM_RANKS) * in_order.numel() // NUM_RANKS) - 1
    thresholds = in_order[last] if in_order.numel() else in_order
    return {name: torch.bucketize(its, thresholds, out_int32=True).to(torch.uint8) for name, its in kept.items()}


def _kept_scores(name: str, mask: Tensor, scores: Tensor, caller: str) -> Tensor:
    fits = scores.ndim == mask.ndim and all(s > 0 and m % s == 0 for m, s in zip(mask.shape, scores.shape, strict=True))
    if not fits and scores.shape != mask.shape:
        raise ValueError(
            f"{caller}: the scores of {name} must have the mask's shape {list(mask.shape)} or sizes that divide it, "
            f"got {list(scores.shape)}"
        )
    values = expand_scores(scores.detach().cpu(), tuple(mask.shape))[mask]
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{caller}: the scores of {name} must be finite where the mask keeps a weight")
    return values


def top_parts(ranks: Mapping[str, Tensor], fraction: float) -> dict[str, Tensor]:
    """Return parameter name -> bool ``[kept]``: the weights of highest rank, as many whole ranks as come nearest to
    ``fraction`` of all, and at least the highest one."""
    counts = sum((torch.bincount(its.int(), minlength=NUM_RANKS) for its in ranks.values()), torch.zeros(NUM_RANKS))
    from_top = counts.flip(0).cumsum(0).double()  # [i]: weights of the i + 1 highest ranks
    total = float(from_top[-1])
    from_top[from_top == 0] = float("inf")  # no weight has so high a rank
    lowest = NUM_RANKS - 1 - int((from_top - fraction * total).abs().argmin())
    return {name: its >= lowest for name, its in ranks.items()}
