"""Where the heads lie in attention weights, by the names that models give them."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

# Whole parameter names (regex) -> the dimension along which the heads lie one after the other.
HEADS_ALONG: dict[str, int] = {
    r"(.*\.)?(q_proj|k_proj|v_proj|qkv_proj|q_lin|k_lin|v_lin|query|key|value|query_key_value)\.weight": 0,  # nn.Linear
    r"(.*\.)?(q|k|v|to_q|to_k|to_v|qkv|Wqkv|attention\.w[qkv])\.weight": 0,  # T5, diffusers, timm, Llama's own
    r"(.*\.)?in_proj_weight": 0,  # nn.MultiheadAttention
    r"(.*attn\.|.*attention\.)?(o_proj|out_proj|out_lin)\.weight": 1,
    r"(.*\.)?(o|to_out\.0|attn\.proj|attention\.wo)\.weight": 1,
    r"(.*\.)?attention\.(output\.)?dense\.weight": 1,  # BERT, ViT, GPT-NeoX
    r"(.*\.)?(c_attn|q_attn)\.weight": 1,  # transformers' Conv1D holds [in, out]
    r"(.*\.)?(attn|crossattention)\.c_proj\.weight": 0,
}
_RAW = re.compile(r"(.*\.)?_?W_[QKVO]")  # TransformerLens: [heads, ...]
_FUSED = re.compile(r"(.*\.)?(c_attn\.weight|in_proj_weight|qkv\.weight|Wqkv\.weight|qkv_proj\.weight)")


def head_dimension(name: str, masks: Mapping[str, Tensor], along: Mapping[str, int] | None = None) -> int | None:
    """Return the dimension along which the heads of a parameter lie, by its name; None where it is not known to hold
    any. GPT-2's c_attn tells by its shape whether it is a Conv1D's [in, 3*in] or a Linear's [3*in, in], and with it
    the c_proj beside it."""
    if _RAW.fullmatch(name) and masks[name].ndim == 3:
        return 0
    if dims := [dim for pattern, dim in (along or {}).items() if re.fullmatch(pattern, name)]:
        return dims[-1]
    dims = [dim for pattern, dim in HEADS_ALONG.items() if re.fullmatch(pattern, name)]
    if not dims or masks[name].ndim != 2:
        return None
    if name.split(".")[-2:-1] in (["c_attn"], ["c_proj"]):
        fused = masks.get(name.replace("c_proj", "c_attn"))
        if fused is not None and fused.shape[0] == 3 * fused.shape[1]:
            return 1 - dims[-1]
    return dims[-1]


def num_parts(name: str, mask: Tensor) -> int:
    """Return 3 for a parameter that holds query, key and value one after the other, all of one width; 1 for others."""
    is_threefold = mask.ndim == 2 and max(mask.shape) == 3 * min(mask.shape)
    return 3 if is_threefold and _FUSED.fullmatch(name) else 1


def head_densities(
    masks: Mapping[str, Tensor], head_size: int, along: Mapping[str, int] | None, caller: str
) -> dict[str, Tensor]:
    """See `Subnet.density_per_head`."""
    if not isinstance(head_size, int) or isinstance(head_size, bool) or head_size < 1:
        raise ValueError(f"{caller}: head_size must be an integer >= 1, got {head_size!r}")
    found: dict[str, Tensor] = {}
    for name, mask in masks.items():
        dim = head_dimension(name, masks, along)
        if dim is not None and _RAW.fullmatch(name):
            found[name] = mask.double().mean((1, 2))
        elif dim is not None:
            found[name] = _along(name, mask, dim, head_size, caller)
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
