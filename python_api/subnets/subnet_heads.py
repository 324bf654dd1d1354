"""Where the heads lie in attention weights, by the names that models give them."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

# Whole parameter names (regex) -> the dimension along which the heads lie one after the other.
HEADS_ALONG: dict[str, int] = {
    r"(.*\.)?(q_proj|k_proj|v_proj|qkv_proj|q_lin|k_lin|v_lin|query|key|value|query_key_value)\.weight": 0,  # nn.Linear
    r"(.*\.)?in_proj_weight": 0,  # nn.MultiheadAttention
    r"(.*attn\.|.*attention\.)?(o_proj|out_proj|out_lin)\.weight": 1,
    r"(.*\.)?attention\.(output\.)?dense\.weight": 1,  # BERT, ViT, GPT-NeoX
    r"(.*\.)?(c_attn|q_attn)\.weight": 1,  # transformers' Conv1D holds [in, out]
    r"(.*\.)?(attn|crossattention)\.c_proj\.weight": 0,
}
_RAW = re.compile(r"(.*\.)?W_[QKVO]")  # TransformerLens: [heads, ...]


def head_densities(
    masks: Mapping[str, Tensor], head_size: int, along: Mapping[str, int] | None, caller: str
) -> dict[str, Tensor]:
    """See `Subnet.density_per_head`."""
    if not isinstance(head_size, int) or isinstance(head_size, bool) or head_size < 1:
        raise ValueError(f"{caller}: head_size must be an integer >= 1, got {head_size!r}")
    table = {**HEADS_ALONG, **(along or {})}
    found: dict[str, Tensor] = {}
    for name, mask in masks.items():
        dims = [dim for pattern, dim in table.items() if re.fullmatch(pattern, name)]
        if dims:
            found[name] = _along(name, mask, dims[-1], head_size, caller)
        elif _RAW.fullmatch(name) and mask.ndim == 3:
            found[name] = mask.double().mean((1, 2))
    if not found:
        raise ValueError(
            f"{caller}: no parameter is known to hold heads, of {list(masks)[:8]}; pass along={{regex: dimension}}"
        )
    return found


def _along(name: str, mask: Tensor, dim: int, head_size: int, caller: str) -> Tensor:
    if not -mask.ndim <= dim < mask.ndim or mask.shape[dim] % head_size:
        raise ValueError(
            f"{caller}: {name} has shape {list(mask.shape)}, and its dimension {dim} must divide into heads of "
            f"{head_size}"
        )
    rows = mask.movedim(dim, 0).reshape(mask.shape[dim] // head_size, -1)
    return rows.double().mean(1) if rows.numel() else torch.zeros(len(rows), dtype=torch.float64)
