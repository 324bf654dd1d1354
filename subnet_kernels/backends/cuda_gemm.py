"""The CUDA backend's own matrix products: which serves a call, why none does, the launch.

Score gradients inside their product are on CUTLASS (csrc/cuda/gemm); linear layers with few rows of x, whose mask is
made inside the product, are csrc/cuda/masked_linear.cu.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..masks import MaskKind
from .native import is_available

TILES = ("pingpong", "wide", "stream_k")  # csrc/cuda/gemm/score_gradient_sm90.cu says what they are
TILE = 128  # rows and columns of [N, K] that a tile has; "wide" ones have twice the columns
MOST_ROWS = 256  # of x in masked_linear.cu; beyond, the effective weight is better made once, in memory
ROW_BYTES = 16  # rows are multiples of this: TMA and 16-byte copies
# Shares of the chip that whole waves of tiles must keep busy: below the first, all processors share the last wave's
# sum over tokens (stream_k) instead; the larger tile, which moves fewer bytes per FLOP, is taken from the second on.
# Both by arithmetic: no GPU has run these kernels yet, and benchmarks/gpu_check.py times every one of them.
FEWEST_BUSY, FEWEST_BUSY_WIDE = 0.75, 0.9


class Gpu(NamedTuple):
    """What the choice asks of a GPU."""

    capability: int  # 90 for compute capability 9.0
    num_processors: int


@functools.cache
def gpu(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    return Gpu(10 * properties.major + properties.minor, properties.multi_processor_count)


@functools.cache
def kernels() -> tuple[str, ...]:
    """Names of the kernels that were compiled (setup.py's GEMMS); none where the build found no CUTLASS or no nvcc."""
    if not is_available() or not hasattr(torch.ops.subnet_native, "score_gradient_kernels"):
        return ()
    return tuple(torch.ops.subnet_native.score_gradient_kernels().split())


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}.get(dtype, str(dtype))


def served(dtype: torch.dtype, weight_dtype: torch.dtype, on: Gpu, built: tuple[str, ...]) -> list[str]:
    """Those of the kernels that run on the GPU for these dtypes of factors and weight, whatever the sizes."""
    dtypes = _short(dtype) if dtype == weight_dtype else f"{_short(dtype)}_{_short(weight_dtype)}"
    archs = [90, 80] if on.capability == 90 else [80] if on.capability >= 80 else []
    return [name for arch in archs for tile in TILES if (name := f"sm{arch}_{dtypes}_{tile}") in built]


def _busy(n: int, k: int, columns: int, num_processors: int) -> float:
    tiles = -(-n // TILE) * -(-k // columns)
    return tiles / (-(-tiles // num_processors) * num_processors)


def choose(
    n: int, k: int, dtype: torch.dtype, weight_dtype: torch.dtype, on: Gpu, built: tuple[str, ...]
) -> tuple[str | None, str]:
    """(the kernel for a score gradient of [N, K], "") or (None, why there is none): from sizes, dtypes, GPU alone."""
    if not built:
        return None, "the extension was built without CUTLASS (its headers were not found), see docs/kernels.md"
    if on.capability < 80:
        return None, f"compute capability {on.capability / 10} is below 8.0"
    busy = _busy(n, k, TILE, on.num_processors)
    if on.capability != 90:
        tiles = ("stream_k",)
    elif busy < FEWEST_BUSY:
        tiles = ("stream_k", *(("pingpong",) if busy >= 0.5 else ()))
    elif _busy(n, k, 2 * TILE, on.num_processors) >= FEWEST_BUSY_WIDE:
        tiles = ("wide", "pingpong")
    else:
        tiles = ("pingpong",)
    arch, able = "sm90" if on.capability == 90 else "sm80", served(dtype, weight_dtype, on, built)
    for tile in tiles:
        for name in able:
            if name.startswith(arch) and name.endswith(tile):
                return name, ""
    what = f"{_short(dtype)} factors and {_short(weight_dtype)} weights"
    return None, f"no {arch} kernel of tile {' or '.join(tiles)} is built for {what}"


def refusal(grad_out: Tensor, x: Tensor, weight: Tensor, scores: Tensor) -> str | None:
    """Why no product here can make the score gradient of these [M, N], [M, K], [N, K] and [N, K]; None if one can.
    A weight whose transpose is contiguous is served as well, with its factors exchanged."""
    if x.dtype not in (torch.bfloat16, torch.float16) or grad_out.dtype != x.dtype:
        return f"factors of dtypes {_short(grad_out.dtype)} and {_short(x.dtype)} are not 16-bit alike"
    if not x.numel() or not weight.numel():
        return "there is nothing to multiply"
    if scores.shape != weight.shape or scores.stride() != weight.stride() or scores.dtype != torch.float32:
        return "scores are not fp32 of weight's shape and strides"
    if not weight.is_contiguous() and not weight.t().is_contiguous():
        return f"weight's strides are {tuple(weight.stride())}"
    if not grad_out.is_contiguous() or not x.is_contiguous():
        return "grad_out or x is not contiguous"
    unaligned = [size for size in weight.shape if size % (ROW_BYTES // 2)]
    if unaligned or any(tensor.data_ptr() % ROW_BYTES for tensor in (grad_out, x, weight, scores)):
        return f"rows of weight's sizes {list(weight.shape)} or an address are no multiples of {ROW_BYTES} bytes"
    return None


def kernel_for(grad_out: Tensor, x: Tensor, weight: Tensor, scores: Tensor) -> tuple[str | None, str]:
    """``refusal`` and ``choose`` in one: (a kernel's name, "") or (None, why none serves these tensors)."""
    reason = refusal(grad_out, x, weight, scores) if weight.is_cuda else f"weight is on {weight.device}"
    if reason is not None:
        return None, reason
    n, k = weight.shape if weight.is_contiguous() else weight.shape[::-1]
    return choose(n, k, x.dtype, weight.dtype, gpu(weight.device.index), kernels())


def _op() -> Any:
    return torch.ops.subnet_native.score_gradient


def score_gradient(
    grad_out: Tensor, x: Tensor, grad_penalty: Tensor | None, weight: Tensor, scores: Tensor, beta: Tensor, kernel: str
) -> Tensor:
    """((grad_out.T @ x) * weight + grad_penalty) * slope(scores), fp32 in weight's strides, by that kernel. ``refusal``
    must have been None."""
    if not weight.is_contiguous():
        return score_gradient(x, grad_out, grad_penalty, weight.t(), scores.t(), beta, kernel).t()
    grad_scores = torch.empty_like(scores)
    _op().default(grad_out, grad_penalty, x, weight, scores, beta, kernel, grad_scores)
    return grad_scores


def few_rows_refusal(x: Tensor, weight: Tensor, scores: Tensor, kind: MaskKind) -> str | None:
    """Why the kernel for few rows can not compute x [..., K] @ (weight * m).T for a weight [N, K]; None if it can."""
    if kind.name != "sigmoid":
        return f"kind {kind.name!r} is served by an effective weight"
    if x.dtype not in (torch.bfloat16, torch.float16) or weight.dtype != x.dtype:
        return f"x and weight of dtypes {_short(x.dtype)} and {_short(weight.dtype)} are not 16-bit alike"
    if not x.numel() or not weight.numel():
        return "there is nothing to multiply"
    rows = x.numel() // x.shape[-1]
    if rows > MOST_ROWS:
        return f"x has {rows} rows, more than {MOST_ROWS}"
    if scores.shape != weight.shape or scores.dtype != torch.float32:
        return "scores are not fp32 of weight's shape"
    if not all(tensor.is_contiguous() for tensor in (x, weight, scores)):
        return "x, weight or scores are not contiguous"
    if weight.shape[1] % (ROW_BYTES // 2) or any(tensor.data_ptr() % ROW_BYTES for tensor in (x, weight, scores)):
        return f"rows of {weight.shape[1]} weights or an address are no multiples of {ROW_BYTES} bytes"
    return None


def masked_linear(
    ops: Any, x: Tensor, weight: Tensor, scores: Tensor, beta: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(x @ (weight * m).T + bias, sum of m) without an effective weight in memory; ``few_rows_refusal`` must have been
    None."""
    out, penalty = x.new_empty(*x.shape[:-1], weight.shape[0]), torch.empty_like(beta)
    bias = bias if bias is None else bias.contiguous()
    rows, results = x.view(-1, x.shape[-1]), out.view(-1, weight.shape[0])
    ops.masked_linear_few_rows.default(rows, weight, scores, beta, bias, results, penalty)
    return out, penalty
