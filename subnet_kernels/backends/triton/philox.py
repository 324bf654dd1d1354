"""The draws of :mod:`subnet_kernels.random`, for Triton kernels: their one translation, the same to the bit."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def random_eights(key, row, group, sample):
    """int32 [BLOCK, 8]: the draws of the eight columns of each group, of one call of Philox4x32-10. key: where seed and
    step are; row and group int32 [BLOCK]; sample a scalar."""
    seed, step = tl.load(key), tl.load(key + 1)
    word_0, word_1, word_2, word_3 = tl.philox(
        seed, row, group, tl.zeros_like(row) + sample.to(tl.int32), tl.zeros_like(row) + step.to(tl.int32)
    )
    words = tl.join(tl.join(word_0, word_2), tl.join(word_1, word_3))  # [BLOCK, 2, 2], in their order
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), (row.shape[0], 8)).to(tl.int32)
