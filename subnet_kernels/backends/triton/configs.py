"""Tiles of the Triton kernels, apart from the kernels: what was chosen, and why. Nothing is tuned at run time.

None of these has been timed on a GPU yet: they are the largest tiles that compile without spills for sm_80 and sm_90
where sizes are multiples of 16 (tests/kernels/test_triton_ahead.py checks every one; its table says what odd sizes
cost).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Elementwise:
    """A kernel over a flat range."""

    block: int
    num_warps: int
    reason: str


@dataclass(frozen=True)
class Gemm:
    """A kernel with a product. rows, columns: tile of the result; depth: step of the sum."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int
    reason: str


ELEMENTWISE = Elementwise(1024, 4, "8 values a thread: 16-byte accesses where sizes are multiples of 16; few registers")
SCORE_SUMS = Elementwise(512, 4, "one program adds the weights of one score, or a part of them")
ADD_UP = Elementwise(256, 4, "one program adds a tensor's partial sums")

SCORE_GRADIENT = {
    2: Gemm(128, 128, 64, 8, 3, "128x256 spills; 128x128 with 8 warps leaves registers for the epilogue's W and s"),
    4: Gemm(64, 64, 32, 4, 3, "fp32 operands take twice the shared memory"),
}  # by bytes of an operand
SCORE_GRADIENT_SMALL = {
    2: Gemm(64, 128, 64, 8, 3, "a second result, fp32 weights under autocast, or rows of odd length: 128x128 spills"),
    4: SCORE_GRADIENT[4],
}

SMALL_M = {
    16: Gemm(64, 16, 64, 4, 4, "rows: of weight; columns: rows of x; the masked weight is the register operand"),
    32: Gemm(64, 32, 64, 4, 4, "as 16"),
    64: Gemm(128, 64, 64, 8, 3, "as 16, two warp groups"),
    128: Gemm(128, 128, 64, 8, 3, "as 64"),
}  # by columns: the least that hold all rows of x, else the largest


def score_gradient(dtype: torch.dtype, is_plain: bool) -> Gemm:
    """is_plain: one result, weight in x's dtype, rows of a multiple of 16 weights."""
    return (SCORE_GRADIENT if is_plain else SCORE_GRADIENT_SMALL)[dtype.itemsize]


def small_m(num_rows: int, dtype: torch.dtype, weight_dtype: torch.dtype) -> Gemm:
    if dtype.itemsize == 2 and weight_dtype.itemsize == 4:
        num_rows = min(num_rows, 64)  # fp32 weights under autocast: twice the shared memory for them
    best = SMALL_M[next((columns for columns in SMALL_M if columns >= num_rows), 128)]
    if dtype.itemsize == 4:  # twice the shared memory an operand
        return Gemm(64, min(best.columns, 64), 32, 8, 3, "4 warps spill without TF32")
    return best


def split(num_tiles: int, num_steps: int, num_processors: int) -> int:
    """Into how many parts the sum over tokens is cut so that the tiles fill the chip once; each part keeps at least
    four steps, and the result depends on sizes and device alone, never on timing."""
    if num_tiles >= num_processors or num_steps < 8:
        return 1
    return max(1, min(num_processors // num_tiles, num_steps // 4))


def fuses_score_gradient(num_tokens: int, dtype: torch.dtype) -> bool:
    """Whether the score gradient is made inside its product, or by cuBLAS and one pass. By a model, not yet by a
    measurement: beyond some 8,000 tokens the saved bytes count less than cuBLAS's better rate, and Triton's fp32
    product without TF32 does not use tensor cores."""
    return dtype.itemsize == 2 and num_tokens <= 8192


def score_parts(num_scores: int, per_score: int, num_processors: int) -> tuple[int, int]:
    """(parts, weights per part) in which the weights of each score are added: enough programs to fill the chip four
    times, parts of 4,096 weights at least; from sizes and device alone."""
    wanted = -(-4 * num_processors // num_scores)
    num_parts = max(1, min(wanted, per_score // 4096))
    per_part = -(-per_score // num_parts)
    return -(-per_score // per_part), per_part


def num_processors(device: torch.device) -> int:
    """Multiprocessors of the GPU (132 stands in where there is none: the interpreter)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
