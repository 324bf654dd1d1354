"""Tiles of the Triton kernels, apart from the kernels: what there is to choose from, and why; rules.py chooses.

None of these has been timed on a GPU yet: they are the largest tiles that compile without spills for sm_80 and sm_90
where sizes are multiples of 16 (tests/kernels/test_triton_ahead.py checks every one; its table says what odd sizes
cost).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Elementwise:
    """A kernel over a flat range. block: elements of a program; of SAMPLED, groups of eight."""

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
SAMPLED = Elementwise(128, 4, "groups of eight columns: one Philox call and 16-byte accesses a thread and mask")
SCORE_SUMS = Elementwise(512, 4, "one program adds the weights of one score, or a part of them")
ADD_UP = Elementwise(256, 4, "one program adds a tensor's partial sums")

SCORE_GRADIENT = {
    2: (
        Gemm(128, 128, 64, 8, 3, "128x256 spills; 128x128 with 8 warps leaves registers for the epilogue's W and s"),
        Gemm(64, 128, 64, 8, 3, "where 128x128 leaves a last wave of tiles half empty"),
        Gemm(64, 64, 64, 4, 4, "small weights"),
    ),
    4: (Gemm(64, 64, 32, 4, 3, "fp32 operands take twice the shared memory"),),
}  # by bytes of an operand
SCORE_GRADIENT_SMALL = {
    2: SCORE_GRADIENT[2][1:],  # a second result, fp32 weights under autocast, or rows of odd length: 128x128 spills
    4: SCORE_GRADIENT[4],
}

LINEAR_STEP = (  # 16-bit operands
    Gemm(128, 128, 64, 8, 3, "as the score gradient; one block a processor, its registers are full"),
    Gemm(64, 128, 64, 4, 3, "two blocks a processor: one may step while the other multiplies"),
    Gemm(64, 64, 64, 4, 4, "small weights"),
)
LINEAR_STEP_ODD = (Gemm(64, 128, 64, 8, 3, "rows of odd length: the others spill"),)

MASKED_PRODUCT = {
    16: Gemm(64, 16, 64, 4, 4, "rows: of weight; columns: rows of x; the masked weight is the register operand"),
    32: Gemm(64, 32, 64, 4, 4, "as 16"),
    64: Gemm(128, 64, 64, 8, 3, "as 16, two warp groups"),
    128: Gemm(128, 128, 64, 8, 3, "as 64"),
}  # by columns: the least that hold all rows of x, else the largest
MASKED_PRODUCT_WIDE = {
    columns: Gemm(64, columns, 16, 8, 3, "fp32: twice the shared memory an operand; deeper steps spill without TF32")
    for columns in (16, 32)
}

MASKED_CONV = {
    2: Gemm(64, 128, 32, 8, 3, "rows: of weight; columns: pixels; depth: channels of one kernel position"),
    4: Gemm(64, 64, 16, 8, 3, "deeper steps spill without TF32"),
}  # by bytes of an operand, for images in channels_last
MASKED_CONV_CONTIGUOUS = {
    2: Gemm(64, 64, 32, 8, 3, "an address per value takes registers: 64x128 spills in Triton 3.6"),
    4: MASKED_CONV[4],
}  # for all others
CONV_SCORE_GRADIENT = {
    2: Gemm(64, 128, 32, 8, 3, "addresses of pixels take registers: 128x128, and deeper steps in Triton 3.6, spill"),
    4: Gemm(64, 64, 16, 4, 3, "deeper steps spill without TF32 on sm_80"),
}
