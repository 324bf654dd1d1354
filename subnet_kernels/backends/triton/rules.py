"""Which tiles a kernel gets, and where a kernel is worth its while: from sizes, dtypes and the GPU alone.

What was measured on a GPU stands in its table (tables/<gpu>.json, written by ``subnets bench --tune``, shipped as data)
and wins; elsewhere a model decides, in whole waves of tiles. Nothing is timed at run time, so the same call always runs
the same way.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from .configs import (
    CONV_SCORE_GRADIENT,
    LINEAR_STEP,
    LINEAR_STEP_ODD,
    MASKED_CONV,
    MASKED_CONV_CONTIGUOUS,
    MASKED_PRODUCT,
    MASKED_PRODUCT_WIDE,
    SCORE_GRADIENT,
    SCORE_GRADIENT_SMALL,
    Gemm,
)

TABLES = Path(__file__).with_name("tables")


# --- which GPU -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chip:
    """What the rules ask of a GPU."""

    name: str
    num_processors: int
    flops: float  # per second, of 16-bit matrix products
    bytes: float  # per second, of a copy, read and written
    shared: int  # bytes of shared memory that a block can have


H200 = Chip("NVIDIA H200", 132, 788e12, 4.3e12, 227 * 1024)


@functools.cache
def chip(device: torch.device) -> Chip:
    """The GPU; an H200 stands in where there is none (the interpreter). Its rates are an H200's by its number of
    multiprocessors: the rules need their ratio alone."""
    if device.type != "cuda":
        return H200
    properties = torch.cuda.get_device_properties(device)
    share = properties.multi_processor_count / H200.num_processors
    return Chip(
        properties.name, properties.multi_processor_count, share * H200.flops, share * H200.bytes,
        properties.shared_memory_per_block_optin,
    )  # fmt: skip


# --- what was measured -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """One entry of a GPU's table: the best tiles of a kernel for weights of [N, K] and up to ``m`` rows, in how many
    parts its sum is cut, its time, and that of the plan without it."""

    config: Gemm
    num_parts: int
    us: float
    other_us: float


def bucket(m: int) -> int:
    """Rows (for the choice of a backend, weights) are looked up by the next power of two."""
    return 1 << max(m - 1, 0).bit_length()


def table_path(name: str) -> Path:
    """Where the table of the GPU of that name is, if there is one."""
    return TABLES / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json")


@functools.cache
def preferred_backends(name: str) -> dict[tuple[str, str, int], str]:
    """The backend that was measured to be the fastest on the GPU of that name, by op, dtype and bucket of weights.

    Raises:
        ValueError: the file can't be read as a table.
    """
    path = table_path(name)
    if not path.exists():
        return {}
    try:
        entries = json.loads(path.read_text()).get("backends", [])
        return {(e["op"], e["dtype"], e["num_weights"]): e["backend"] for e in entries}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a table of backends ({error!r}); write it anew: subnets bench --tune") from None


@functools.cache
def table(name: str) -> dict[tuple[str, str, int, int, int], Measured]:
    """What ``subnets bench --tune`` wrote for the GPU of that name, by kernel, dtype, N, K and bucket of rows.

    Raises:
        ValueError: the file can't be read as a table.
    """
    path = table_path(name)
    if not path.exists():
        return {}
    try:
        entries = json.loads(path.read_text())["entries"]
        return {
            (e["kernel"], e["dtype"], e["n"], e["k"], e["m"]): Measured(
                Gemm(**e["config"], reason="measured"), e["num_parts"], e["us"], e["other_us"]
            )
            for e in entries
        }  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a table of tiles ({error!r}); write it anew: subnets bench --tune") from None


def measured(kernel: str, dtype: torch.dtype, m: int, n: int, k: int, on: Chip) -> Measured | None:
    """The table's entry for this call."""
    return table(on.name).get((kernel, str(dtype).removeprefix("torch."), n, k, bucket(m)))


# --- rules -----------------------------------------------------------------------------------------------------------


def split(num_tiles: int, num_steps: int, num_processors: int) -> int:
    """Into how many parts the sum over tokens is cut so that the tiles fill the chip once; each part keeps at least
    four steps, and the result depends on sizes and device alone, never on timing."""
    if num_tiles >= num_processors or num_steps < 8:
        return 1
    return max(1, min(num_processors // num_tiles, num_steps // 4))


def waves(num_programs: int, num_processors: int) -> int:
    """How often the chip is filled."""
    return -(-num_programs // num_processors)


def product_seconds(config: Gemm, m: int, n: int, k: int, num_parts: int, on: Chip, num_masks: int = 1) -> float:
    """Time of a score gradient's product (for several masks: of all) by a model: whole waves of tiles at a rate that
    grows with the tile (128x128: .85 of the vendor's), and 8 bytes a weight and part where the sum is cut."""
    tiles = num_masks * -(-n // config.rows) * -(-k // config.columns)
    steps = -(-m // config.depth)
    rate = 0.85 * min(1.0, (config.rows * config.columns / 128**2) ** 0.25) * on.flops / on.num_processors
    wave = -(-steps // num_parts) * config.depth * 2 * config.rows * config.columns / rate
    return waves(tiles * num_parts, on.num_processors) * wave + (num_parts > 1) * num_parts * 8 * n * k / on.bytes


@functools.lru_cache(maxsize=4096)
def score_gradient(
    dtype: torch.dtype, m: int, n: int, k: int, is_plain: bool, on: Chip
) -> tuple[Gemm, int] | None:
    """(tiles, parts of the sum) of the score gradient inside its product, or None where the vendor's product and one
    pass over it are the faster way: measured, else by the model. is_plain: one result, weight in x's dtype, N and K
    multiples of 16. Products of fp32 go to the vendor: Triton's, without TF32, use no tensor cores."""
    if dtype.itemsize != 2:
        return None
    known = measured("score_gradient", dtype, m, n, k, on)
    if known is not None and is_plain:
        return (known.config, known.num_parts) if known.us < known.other_us else None
    config, num_parts = fastest_score_gradient(dtype, m, n, k, is_plain, on)
    return (config, num_parts) if _beats_vendor(config, num_parts, m, n, k, on) else None


def fastest_score_gradient(
    dtype: torch.dtype, m: int, n: int, k: int, is_plain: bool, on: Chip
) -> tuple[Gemm, int]:
    """(tiles, parts) that the model finds fastest among those that compile without spills."""
    return _fastest((SCORE_GRADIENT if is_plain else SCORE_GRADIENT_SMALL)[dtype.itemsize], m, n, k, on)


@functools.lru_cache(maxsize=4096)
def score_gradients_of_masks(
    dtype: torch.dtype, num_masks: int, m: int, n: int, k: int, is_plain: bool, on: Chip
) -> Gemm | None:
    """Tiles of the score gradients of several masks over one weight inside their products, or None where the vendor's
    batched product and one pass are the faster way by the model; nobody has measured either. Sums are whole: the masks
    fill the chip where the weight's tiles do not."""
    if dtype.itemsize != 2:
        return None
    config = fastest_score_gradients_of_masks(dtype, num_masks, m, n, k, is_plain, on)
    return config if _beats_vendor(config, 1, m, n, k, on, num_masks) else None


def fastest_score_gradients_of_masks(
    dtype: torch.dtype, num_masks: int, m: int, n: int, k: int, is_plain: bool, on: Chip
) -> Gemm:
    """Tiles of them that the model finds fastest among those that compile without spills."""
    tiles = (SCORE_GRADIENT if is_plain else SCORE_GRADIENT_SMALL)[dtype.itemsize]
    return min(tiles, key=lambda config: (product_seconds(config, m, n, k, 1, on, num_masks), -config.rows))


@functools.lru_cache(maxsize=4096)
def linear_step(
    dtype: torch.dtype, m: int, n: int, k: int, is_plain: bool, on: Chip
) -> tuple[Gemm, int] | None:
    """The same for a linear layer's step inside its score gradient's product. What the optimizer reads and writes is
    the same either way; that one block's step may hide behind another's product is not counted before it is measured.
    is_plain: N and K are multiples of 16. Where the score gradient inside its product was measured to be slower than
    the vendor's way, so is this."""
    if dtype.itemsize != 2:
        return None
    known = measured("score_gradient", dtype, m, n, k, on)
    if known is not None and is_plain and known.us >= known.other_us:
        return None
    config, num_parts = fastest_linear_step(dtype, m, n, k, is_plain, on)
    return (config, num_parts) if _beats_vendor(config, num_parts, m, n, k, on) else None


def fastest_linear_step(
    dtype: torch.dtype, m: int, n: int, k: int, is_plain: bool, on: Chip
) -> tuple[Gemm, int]:
    """(tiles, parts) of it that the model finds fastest; of 16-bit operands."""
    return _fastest(LINEAR_STEP if is_plain else LINEAR_STEP_ODD, m, n, k, on)


def _fastest(tiles: tuple[Gemm, ...], m: int, n: int, k: int, on: Chip) -> tuple[Gemm, int]:
    best = []
    for config in tiles:
        num_tiles = -(-n // config.rows) * -(-k // config.columns)
        num_parts = split(num_tiles, -(-m // config.depth), on.num_processors)
        for parts in {1, num_parts}:
            best.append((product_seconds(config, m, n, k, parts, on), -config.rows, parts, config))
    _, _, num_parts, config = min(best, key=lambda entry: entry[:3])
    return config, num_parts


def _beats_vendor(config: Gemm, num_parts: int, m: int, n: int, k: int, on: Chip, num_masks: int = 1) -> bool:
    """Whether our product, with what follows it inside, beats the vendor's and a pass over it, by the model: the vendor
    writes the product, 16 bits each, and the pass reads it; one launch more."""
    vendor = num_masks * (2 * m * n * k / on.flops + 4 * n * k / on.bytes) + 2e-6
    return product_seconds(config, m, n, k, num_parts, on, num_masks) < vendor


def has_room(on: Chip) -> bool:
    """Whether the tiles of masked products fit into a block's shared memory."""
    return on.shared >= 160 * 1024


@functools.lru_cache(maxsize=4096)
def masked_product(
    dtype: torch.dtype, m: int, n: int, k: int, weight_dtype: torch.dtype, on: Chip, is_coarse: bool = False
) -> Gemm:
    """Tiles of a masked product of plan "fused"."""
    known = measured("masked_product", dtype, m, n, k, on)
    is_wide = dtype.itemsize == 2 and (weight_dtype.itemsize == 4 or is_coarse)
    if known is not None and not is_wide:
        return known.config
    configs = MASKED_PRODUCT if dtype.itemsize == 2 else MASKED_PRODUCT_WIDE  # by columns
    columns = sorted(configs)
    if is_wide:
        columns = columns[:-1]  # fp32 weights take twice the shared memory, coarse scores more registers
    best = configs[next((c for c in columns if c >= m), columns[-1])]
    for c in reversed(columns):  # fewer rows of x a program where half of the chip would stay empty
        if c < best.columns and 2 * -(-n // best.rows) * -(-m // best.columns) <= on.num_processors:
            best = configs[c]
    return best


@functools.lru_cache(maxsize=4096)
def fuses_product(dtype: torch.dtype, m: int, n: int, k: int, on: Chip) -> bool:
    """Whether a call that leaves the plan open, and whose effective weight nobody keeps, runs fused: where it was
    measured to be faster than an effective weight and the vendor's product; nowhere before that."""
    known = measured("masked_product", dtype, m, n, k, on)
    return known is not None and known.us < known.other_us


def score_parts(num_scores: int, per_score: int, num_processors: int) -> tuple[int, int]:
    """(parts, weights per part) in which the weights of each score are added: enough programs to fill the chip four
    times, parts of 4,096 weights at least; from sizes and device alone."""
    wanted = -(-4 * num_processors // num_scores)
    num_parts = max(1, min(wanted, per_score // 4096))
    per_part = -(-per_score // num_parts)
    return -(-per_score // per_part), per_part


def masked_conv(dtype: torch.dtype, is_channels_last: bool) -> Gemm:
    """Tiles of a masked convolution of plan "fused"."""
    return (MASKED_CONV if is_channels_last else MASKED_CONV_CONTIGUOUS)[dtype.itemsize]


def conv_score_gradient(
    dtype: torch.dtype, num_pixels: int, num_tiles_of: Callable[[Gemm], int], on: Chip
) -> tuple[Gemm, int]:
    """(tiles, parts of the sum over pixels) of a convolution's score gradient. num_tiles_of: tiles by config."""
    config = CONV_SCORE_GRADIENT[dtype.itemsize]
    return config, split(num_tiles_of(config), -(-num_pixels // config.depth), on.num_processors)


def forget_decisions() -> None:
    """Decide anew: after a table in memory was changed."""
    for function in (score_gradient, score_gradients_of_masks, linear_step, masked_product, fuses_product):
        function.cache_clear()


def forget() -> None:
    """Read tables and decide anew: after a table was written."""
    table.cache_clear()
    preferred_backends.cache_clear()
    forget_decisions()
