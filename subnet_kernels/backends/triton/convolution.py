"""2-D convolutions with weight * m whose mask is made inside (plan "fused"): implicit matrix products, both ways, and
the score gradient.

Neither image patches nor the masked weight are ever written: a tile of outputs walks over the kernel's positions (i, j)
and, at each, over blocks of channels, and reads what it needs. Every tensor is addressed by its strides, so that both
memory formats are served; in channels_last the channels of a position are neighbours. As in masked_product.py the
masked weight is the left operand and the first step is peeled off the loop.

Tuples: sizes (height and width of the pixels walked over, height and width of the image read, kernel height and width);
window (stride, padding, dilation, each by height and width); strides of images (batch, channel, row, column), of weight
and scores (row of the product, summed channel, i, j). Pixels are numbered (batch*height + row)*width + column.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .masked_product import masked_tile
from .score_gradient import epilogue


@triton.jit
def source_pixels(row, column, i, j, sizes, window, IS_BACKWARD: tl.constexpr):
    """(row, column, whether it exists) of the pixel that kernel position (i, j) couples to this one: of the input, or,
    IS_BACKWARD, of the output."""
    if IS_BACKWARD:
        down, right = row + window[2] - i * window[4], column + window[3] - j * window[5]
        row, column = down // window[0], right // window[1]
        is_there = (down >= 0) & (right >= 0) & (row * window[0] == down) & (column * window[1] == right)
    else:
        row, column = row * window[0] - window[2] + i * window[4], column * window[1] - window[3] + j * window[5]
        is_there = (row >= 0) & (column >= 0)
    return row, column, is_there & (row < sizes[2]) & (column < sizes[3])


@triton.jit
def masked_conv_step(
    step, x, weight, scores, row, column, is_pixel, is_row, depth, channels, first_channel, inverse_temperature, sizes,
    window, x_strides, weight_strides, score_strides, score_groups, IS_BACKWARD: tl.constexpr,
    IS_COARSE: tl.constexpr, KIND: tl.constexpr, ROUND: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """(masked weight [rows, channels], image values [channels, pixels], sum of m) of one step of the sum."""
    channel_steps = tl.cdiv(channels, BD)
    position = step // channel_steps
    i, j = position // sizes[5], position % sizes[5]
    c = step % channel_steps * BD + depth
    is_channel = c < channels
    at = (c.to(tl.int64) * weight_strides[1] + i * weight_strides[2] + j * weight_strides[3])[None, :]
    if IS_COARSE:
        at_score = ((first_channel + c) // score_groups[1]).to(tl.int64) * score_strides[1]
        at_score += i // score_groups[2] * score_strides[2] + j // score_groups[3] * score_strides[3]
        score = scores + at_score[None, :]
    else:
        score = scores + at
    inside = is_row[:, None] & is_channel[None, :]
    w_eff, mask_sum = masked_tile(weight + at, score, inside, inverse_temperature, KIND, ROUND)
    row, column, is_there = source_pixels(row, column, i, j, sizes, window, IS_BACKWARD)
    here = x + (row * x_strides[2] + column * x_strides[3])[None, :] + c.to(tl.int64)[:, None] * x_strides[1]
    return w_eff, tl.load(here, mask=is_channel[:, None] & (is_there & is_pixel)[None, :], other=0.0), mask_sum


@triton.jit
def masked_conv_kernel(
    x, weight, scores, beta, bias, out, partials, num_pixels, rows_per_group, channels, weight_group, sizes, window,
    x_strides, weight_strides, score_strides, score_groups, out_strides, HAS_BIAS: tl.constexpr,
    WANTS_SUM: tl.constexpr, IS_BACKWARD: tl.constexpr, IS_COARSE: tl.constexpr, KIND: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Program (pixels of out, group and rows): rows are the weight's outputs and the sum goes over its inputs, or,
    IS_BACKWARD (x is then grad_out, out the gradient of x), the other way round.

    rows_per_group, channels: results of one group, channels summed over. weight_group: from one group's weights to the
    next's. IS_COARSE: a score governs score_groups weights along each dimension; else scores have weight's strides.
    partials[group and rows] = sum of m over them, by the first pixels, if WANTS_SUM."""
    pixels = tl.program_id(0) * BP + tl.arange(0, BP)
    tiles = tl.cdiv(rows_per_group, BN)
    group = tl.program_id(1) // tiles
    rows, depth = tl.program_id(1) % tiles * BN + tl.arange(0, BN), tl.arange(0, BD)
    ROUND: tl.constexpr = x.dtype.element_ty
    DTYPE: tl.constexpr = tl.float32 if UPCAST else ROUND
    is_pixel, is_row = pixels < num_pixels, rows < rows_per_group
    column, rest = pixels % sizes[1], pixels // sizes[1]
    row, batch = rest % sizes[0], rest // sizes[0]
    first_row, first_channel = group * rows_per_group, group * channels
    x += batch.to(tl.int64)[None, :] * x_strides[0] + first_channel.to(tl.int64) * x_strides[1]
    from_first = group.to(tl.int64) * weight_group + rows.to(tl.int64)[:, None] * weight_strides[0]
    weight += from_first
    if IS_COARSE:  # dimension 1 of weight counts within a group, dimension 0 over all
        if IS_BACKWARD:
            scores += (rows // score_groups[0]).to(tl.int64)[:, None] * score_strides[0]
        else:
            scores += ((first_row + rows) // score_groups[0]).to(tl.int64)[:, None] * score_strides[0]
            first_channel = 0
    else:
        scores += from_first
    inverse_temperature = tl.load(beta)
    w_eff, v, mask_sum = masked_conv_step(
        0, x, weight, scores, row, column, is_pixel, is_row, depth, channels, first_channel, inverse_temperature, sizes,
        window, x_strides, weight_strides, score_strides, score_groups, IS_BACKWARD, IS_COARSE, KIND, ROUND, BD,
    )  # fmt: skip
    product = tl.dot(w_eff.to(DTYPE), v.to(DTYPE), input_precision=PRECISION)
    for step in range(1, sizes[4] * sizes[5] * tl.cdiv(channels, BD)):
        w_eff, v, tile_sum = masked_conv_step(
            step, x, weight, scores, row, column, is_pixel, is_row, depth, channels, first_channel,
            inverse_temperature, sizes, window, x_strides, weight_strides, score_strides, score_groups, IS_BACKWARD,
            IS_COARSE, KIND, ROUND, BD,
        )  # fmt: skip
        if WANTS_SUM:
            mask_sum += tile_sum
        product = tl.dot(w_eff.to(DTYPE), v.to(DTYPE), product, input_precision=PRECISION)
    result = first_row + rows
    if HAS_BIAS:
        product += tl.load(bias + result, mask=is_row, other=0.0).to(tl.float32)[:, None]
    out += (batch.to(tl.int64) * out_strides[0] + row * out_strides[2] + column * out_strides[3])[None, :]
    out += result.to(tl.int64)[:, None] * out_strides[1]
    tl.store(out, product.to(out.dtype.element_ty), mask=is_row[:, None] & is_pixel[None, :])
    if WANTS_SUM:
        if tl.program_id(0) == 0:
            tl.store(partials + tl.program_id(1), mask_sum)


@triton.jit
def pixel_pair(
    grad_out, x, pixels, last, is_row, is_column, i, j, sizes, window, grad_strides, x_strides, UPCAST: tl.constexpr
):
    """(grad_out [outputs, pixels], what position (i, j) of the kernel saw there in x [pixels, channels])."""
    column, rest = pixels % sizes[1], pixels // sizes[1]
    row, batch = rest % sizes[0], rest // sizes[0]
    grad_out += (batch.to(tl.int64) * grad_strides[0] + row * grad_strides[2] + column * grad_strides[3])[None, :]
    row, column, is_there = source_pixels(row, column, i, j, sizes, window, False)
    x += (batch.to(tl.int64) * x_strides[0] + row * x_strides[2] + column * x_strides[3])[:, None]
    is_pixel = pixels < last
    g = tl.load(grad_out, mask=is_row & is_pixel[None, :], other=0.0)
    v = tl.load(x, mask=(is_pixel & is_there)[:, None] & is_column, other=0.0)
    if UPCAST:
        g, v = g.to(tl.float32), v.to(tl.float32)
    return g, v


@triton.jit
def conv_score_gradient_kernel(
    grad_out, x, weight, scores, beta, grad_penalty, grad_scores, grad_weight, parts, num_pixels, num, rows_per_group,
    channels, sizes, window, grad_strides, x_strides, weight_strides, steps_per_part, HAS_PENALTY: tl.constexpr,
    WANTS_WEIGHT: tl.constexpr, KIND: tl.constexpr, IS_SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """As score_gradient_kernel, with output pixels in place of tokens. Program (tile, part): tiles go over groups,
    outputs, kernel positions and input channels. parts fp32 [num_parts, num], in weight's memory order."""
    column_tiles, row_tiles, positions = tl.cdiv(channels, BK), tl.cdiv(rows_per_group, BN), sizes[4] * sizes[5]
    columns, tile = tl.program_id(0) % column_tiles * BK + tl.arange(0, BK), tl.program_id(0) // column_tiles
    position, tile = tile % positions, tile // positions
    rows, group = tile % row_tiles * BN + tl.arange(0, BN), tile // row_tiles
    i, j = position // sizes[5], position % sizes[5]
    is_row, is_column = (rows < rows_per_group)[:, None], (columns < channels)[None, :]
    outputs = group * rows_per_group + rows
    grad_out += outputs.to(tl.int64)[:, None] * grad_strides[1]
    x += (group * channels + columns).to(tl.int64)[None, :] * x_strides[1]
    part, pixels = tl.program_id(1), tl.arange(0, BP)
    first = part * steps_per_part * BP
    last = tl.minimum(num_pixels, first + steps_per_part * BP)
    g, v = pixel_pair(
        grad_out, x, first + pixels, last, is_row, is_column, i, j, sizes, window, grad_strides, x_strides, UPCAST
    )
    product = tl.dot(g, v, input_precision=PRECISION)
    for start in range(first + BP, last, BP):
        g, v = pixel_pair(
            grad_out, x, start + pixels, last, is_row, is_column, i, j, sizes, window, grad_strides, x_strides, UPCAST
        )
        product = tl.dot(g, v, product, input_precision=PRECISION)
    inside = is_row & is_column
    at = outputs.to(tl.int64)[:, None] * weight_strides[0] + columns.to(tl.int64)[None, :] * weight_strides[1]
    at += i * weight_strides[2] + j * weight_strides[3]
    if IS_SPLIT:
        tl.store(parts + part.to(tl.int64) * num + at, product, mask=inside)
    else:
        epilogue(
            product, at, inside, weight, scores, beta, grad_penalty, grad_scores, grad_weight, HAS_PENALTY,
            WANTS_WEIGHT, KIND,
        )  # fmt: skip
