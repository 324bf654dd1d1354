"""Compiles every Triton kernel with every shipped config for sm_80 and sm_90, without a GPU, and says what came out."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from subnet_kernels.backends.triton import (
    configs,
    convolution,
    elementwise,
    linear_step,
    mask_adamw,
    masked_product,
    sampled,
    score_gradient,
    units,
)
from tests.kernels.compiled_table import Row, products_of

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHS = (80, 90)
ODD = "odd sizes"  # no size or stride is known to be a multiple of 16
AUTOCAST = "fp32 weight"
CHANNELS_LAST = "channels_last"
BF16_MOMENTS = "bf16 moments"
MASKED = ("masked_product_kernel", "masked_conv_kernel")  # their left operand is the masked weight, in registers
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
TL_NAMES = {"fp32": triton.language.float32, "fp16": triton.language.float16, "bf16": triton.language.bfloat16}


@dataclass(frozen=True)
class Build:
    """One compilation: kernel, the dtype of weight and x, and everything that is fixed at compile time."""

    kernel: Any
    label: str
    dtype: str
    constants: dict[Any, Any]  # by argument, or by (argument, place) in a tuple
    num_warps: int
    num_stages: int = 3
    is_gemm: bool = False

    @property
    def name(self) -> str:
        return self.kernel.__name__ + (f" ({self.label})" if self.label else "")


def builds() -> Iterator[Build]:
    """Every kernel in every shipped config."""
    flat, warps = {"BLOCK": configs.ELEMENTWISE.block}, configs.ELEMENTWISE.num_warps
    epilogue = {"HAS_PENALTY": True, "WANTS_WEIGHT": False, "KIND": 0}
    for dtype, tl in TL_NAMES.items():
        yield Build(elementwise.effective_weight_kernel, "", dtype, {**flat, "KIND": 0}, warps)
        many = {**flat, "KIND": 0, "W_DTYPE": tl, "O_DTYPE": tl, "IS_ALIGNED": True}
        yield Build(elementwise.effective_weights_kernel, "", dtype, many, warps)
        many = {**flat, "KIND": 0, "G_DTYPE": tl, "W_DTYPE": tl, "IS_ALIGNED": True}
        yield Build(elementwise.grad_scores_of_many_kernel, "", dtype, many, warps)
        yield Build(units.effective_weight_unit_kernel, "", dtype, {**flat, "KIND": 0}, warps)
        sums = configs.SCORE_SUMS
        yield Build(units.score_sums_kernel, "", dtype, {"BLOCK": sums.block}, sums.num_warps)
        wanted = {"HAS_GRAD": True, "HAS_PENALTY": True, "WANTS_SCORES": True, "WANTS_WEIGHT": True, "KIND": 0}
        yield Build(elementwise.grad_scores_kernel, "", dtype, {**flat, **wanted}, warps)
        yield Build(score_gradient.add_parts_kernel, "", dtype, {**flat, **epilogue}, warps)
        for precision in ("tf32", "ieee") if dtype == "fp32" else ("ieee",):
            label = precision if dtype == "fp32" else ""
            product = {"PRECISION": precision, "UPCAST": False, "x_column": 1}
            torch_dtype = _torch_dtype(dtype)
            for is_split, wants_weight in ((False, False), (False, True), (True, False)):
                tables = configs.SCORE_GRADIENT_SMALL if wants_weight else configs.SCORE_GRADIENT
                for config in tables[torch_dtype.itemsize]:
                    constants = {
                        **epilogue, **product, **_tile(config, "BN", "BK", "BM"), "WANTS_WEIGHT": wants_weight,
                        "IS_SPLIT": is_split, "grad_out_column": 1,
                    }  # fmt: skip
                    what = "split" if is_split else "with weight gradient" if wants_weight else ""
                    labels = label, _size(config), what
                    yield _gemm(score_gradient.score_gradient_kernel, labels, dtype, constants, config)
                    if dtype == "bf16" and wants_weight:  # the tiles of everything that is not plain
                        constants = {**constants, "WANTS_WEIGHT": False}
                        for special in (AUTOCAST, ODD):
                            labels = _size(config), special
                            yield _gemm(score_gradient.score_gradient_kernel, labels, dtype, constants, config)
            of_masks = {**product, "HAS_PENALTY": True, "KIND": 0, "grad_out_column": 1}
            for config in configs.SCORE_GRADIENT[torch_dtype.itemsize]:
                constants = {**of_masks, **_tile(config, "BN", "BK", "BM")}
                is_small = config in configs.SCORE_GRADIENT_SMALL[2]
                for special in ("", AUTOCAST, ODD) if dtype == "bf16" and is_small else ("",):
                    labels = label, _size(config), special
                    yield _gemm(score_gradient.score_gradients_of_masks_kernel, labels, dtype, constants, config)
            tiles = configs.MASKED_PRODUCT if torch_dtype.itemsize == 2 else configs.MASKED_PRODUCT_WIDE
            for config in tiles.values():
                constants = {
                    **product, **_tile(config, "BN", "BM", "BK"), "HAS_BIAS": True, "KIND": 0, "WANTS_SUM": True,
                    "IS_COARSE": False, "weight_column": 1,
                }  # fmt: skip
                what = f"{config.columns} rows of x"
                for special in ("", ODD, AUTOCAST) if dtype == "bf16" else ("",):
                    if special != AUTOCAST or config.columns <= 64:
                        labels = label, what, special
                        yield _gemm(masked_product.masked_product_kernel, labels, dtype, constants, config)
                backward = {k: v for k, v in constants.items() if k != "weight_column"}
                backward |= {"HAS_BIAS": False, "WANTS_SUM": False, "weight_row": 1}
                labels = label, what, "backward"
                yield _gemm(masked_product.masked_product_kernel, labels, dtype, backward, config)
                if config is not configs.MASKED_PRODUCT[128]:
                    coarse = {**constants, "IS_COARSE": True}
                    yield _gemm(masked_product.masked_product_kernel, (label, what, "rows"), dtype, coarse, config)
            yield from _convolutions(dtype, label, {**product, "x_column": None})
        yield from _steps(dtype)
        yield from _sampled(dtype)
    finish = {**flat, "HAS_PENALTY": True, "KIND": 0}
    yield Build(units.finish_scores_kernel, "", "fp32", finish, warps)
    yield Build(sampled.keep_thresholds_kernel, "", "fp32", flat, warps)
    for reads_lam in (False, True):
        label = "lam on the device" if reads_lam else ""
        constants = {**flat, "KIND": 0, "READS_LAM": reads_lam}
        yield Build(elementwise.add_penalty_grad_kernel, label, "fp32", constants, warps)
    yield Build(elementwise.add_up_kernel, "", "fp32", {"BLOCK": configs.ADD_UP.block}, configs.ADD_UP.num_warps)


def _sampled(dtype: str) -> Iterator[Build]:
    """Effective weights and score gradients of sampled masks."""
    flat, warps = {"BLOCK": configs.SAMPLED.block}, configs.SAMPLED.num_warps
    for special in ("", ODD) if dtype == "bf16" else ("",):
        yield Build(sampled.sampled_weight_kernel, special, dtype, flat, warps)
        for kind in ("gumbel", "bernoulli"):
            label = ", ".join(part for part in (kind, special) if part)
            constants = {**flat, "HAS_NOISE": kind == "gumbel"}
            yield Build(sampled.sampled_grad_scores_kernel, label, dtype, constants, warps)


def _steps(dtype: str) -> Iterator[Build]:
    """The optimizer's kernels: on the scores' gradients, and, with bf16 moments, on those of effective weights; and
    inside the score gradient's product, with moments of both dtypes."""
    flat, warps, tl = {"BLOCK": configs.ELEMENTWISE.block}, configs.ELEMENTWISE.num_warps, TL_NAMES[dtype]
    adamw = {"KIND": 0, "READS_LR": False, "READS_LAM": False, "WRITES": True}
    many = {**flat, **adamw, "W_DTYPE": tl, "O_DTYPE": tl, "IS_ALIGNED": True}
    for of_w_eff, label, m_dtype in ((False, "", "fp32"), (True, f"of w_eff, {BF16_MOMENTS}", "bf16")):
        of = {"OF_W_EFF": of_w_eff, "HAS_PENALTY": of_w_eff}
        yield Build(mask_adamw.mask_adamw_kernel, label, dtype, {**flat, **adamw, **of, "READS_LAM": True}, warps)
        dtypes = {"G_DTYPE": tl if of_w_eff else TL_NAMES["fp32"], "M_DTYPE": TL_NAMES[m_dtype]}
        yield Build(mask_adamw.mask_adamw_of_many_kernel, label, dtype, {**many, **of, **dtypes}, warps)
    if dtype == "fp32":  # its products go to the vendor
        return
    adamw["HAS_PENALTY"] = True
    product = {"PRECISION": "ieee", "UPCAST": False, "x_column": 1, "grad_out_column": 1}
    for moments in ("", BF16_MOMENTS) if dtype == "bf16" else (BF16_MOMENTS,):
        yield Build(linear_step.step_of_parts_kernel, moments, dtype, {**flat, **adamw}, warps)
        specials = ("", AUTOCAST) if dtype == "bf16" else ("",)
        tiles = [(config, special) for config in configs.LINEAR_STEP for special in specials]
        if dtype == "bf16":
            tiles += [(config, ODD) for config in configs.LINEAR_STEP_ODD]
        for config, special in tiles:
            constants = {**adamw, **product, **_tile(config, "BN", "BK", "BM")}
            labels = _size(config), special, moments
            yield _gemm(linear_step.linear_step_kernel, labels, dtype, constants, config)


def _convolutions(dtype: str, label: str, product: dict[str, Any]) -> Iterator[Build]:
    """Kernels of size 3x3, stride 1, padding 1, over images in both memory formats."""
    itemsize = _torch_dtype(dtype).itemsize
    product = {k: v for k, v in product.items() if v is not None}
    window = {("window", at): 1 for at in range(6)}
    for layout in (CHANNELS_LAST, ""):
        one = 1 if layout else 3  # which stride of an image or weight is 1
        images = {(name, one): 1 for name in ("x_strides", "out_strides", "grad_strides")}
        config = (configs.MASKED_CONV if layout else configs.MASKED_CONV_CONTIGUOUS)[itemsize]
        for is_backward in (False, True):
            constants = {
                **product, **_tile(config, "BN", "BP", "BD"), **window, **images, "HAS_BIAS": not is_backward,
                "WANTS_SUM": not is_backward, "IS_BACKWARD": is_backward, "IS_COARSE": False, "KIND": 0,
                ("weight_strides", 0 if layout and is_backward else one): 1,
            }  # fmt: skip
            labels = label, "backward" if is_backward else "", layout
            yield _gemm(convolution.masked_conv_kernel, labels, dtype, constants, config)
        config = configs.CONV_SCORE_GRADIENT[itemsize]
        for is_split in (False, True):
            constants = {
                **product, **_tile(config, "BN", "BK", "BP"), **window, **images, "HAS_PENALTY": True,
                "WANTS_WEIGHT": False, "KIND": 0, "IS_SPLIT": is_split, ("weight_strides", one): 1,
            }  # fmt: skip
            labels = label, "split" if is_split else "", layout
            yield _gemm(convolution.conv_score_gradient_kernel, labels, dtype, constants, config)


def _size(config: configs.Gemm) -> str:
    return f"{config.rows}x{config.columns}"


def _tile(config: configs.Gemm, rows: str, columns: str, depth: str) -> dict[str, int]:
    return {rows: config.rows, columns: config.columns, depth: config.depth}


def _gemm(kernel: Any, labels: tuple[str, ...], dtype: str, constants: dict[str, Any], config: configs.Gemm) -> Build:
    label = ", ".join(part for part in labels if part)
    return Build(kernel, label, dtype, constants, config.num_warps, config.num_stages, True)


def _torch_dtype(name: str) -> Any:
    import torch

    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]


_POINTERS = {
    "weight": "W", "w_eff": "W", "grad_w_eff": "W", "grad_weight": "W", "x": "W", "grad_out": "W", "bias": "W",
    "out": "W", "scores": "fp32", "beta": "fp32", "partials": "fp32", "sums": "fp32", "grad_penalty": "fp32",
    "lam": "fp32", "grad_scores": "fp32", "grads": "fp32", "parts": "fp32", "table": "i64", "block_tensor": "i32",
    "block_first": "i64", "places": "i64", "exp_avg": "fp32", "exp_avg_sq": "fp32", "next_beta": "fp32", "step": "fp32",
    "thresholds": "u16", "key": "i64",
}  # fmt: skip


_ANY_NUMBER = {
    "steps_per_part", "num_parts", "num_scores", "per_score", "per_part",
    *(f"{what}_{d}" for what in ("size", "group") for d in range(4)), "group_row", "group_column", "score_row",
    "score_column", "num_pixels", "num_masks", "groups", "num_groups", "first_sample",
}  # fmt: skip  # arguments that are no multiples of 16 as a rule


_SIZES = {
    "m", "n", "k", "num", "columns", "x_row", "grad_out_row", "weight_row", "weight_column", "x_mask", "grad_out_mask",
}
_TUPLES = {
    "sizes": 6, "window": 6, "x_strides": 4, "out_strides": 4, "grad_strides": 4, "weight_strides": 4,
    "score_strides": 4, "score_groups": 4, "numbers": 7,
}  # fmt: skip  # arguments that are tuples, and how long


def _type_of(name: str, build: Build) -> str:
    if name in build.constants:
        return "constexpr"
    if name == "lr" or (name == "lam" and not build.constants.get("READS_LAM")):
        return "fp32"
    if name in ("scale", "tau") or (name == "per_score" and "HAS_PENALTY" in build.constants):
        return "fp32"
    if name in ("exp_avg", "exp_avg_sq") and BF16_MOMENTS in build.label:
        return "*bf16"
    if name == "grads" and build.constants.get("OF_W_EFF"):
        return "*" + build.dtype
    if name in _POINTERS:
        if name in ("weight", "grad_weight") and AUTOCAST in build.label:
            return "*fp32"
        return "*" + (build.dtype if _POINTERS[name] == "W" else _POINTERS[name])
    return "i32"  # sizes and strides


def compile_ahead(build: Build, arch: int) -> Row:
    names = build.kernel.arg_names
    constants = {(names.index(n),) if isinstance(n, str) else (names.index(n[0]), n[1]): v
                 for n, v in build.constants.items() if (n if isinstance(n, str) else n[0]) in names}  # fmt: skip
    any_number = _ANY_NUMBER | (_SIZES if ODD in build.label else set())
    signature: dict[str, Any] = {}
    multiples: list[tuple[int, ...]] = []
    for at, name in enumerate(names):
        if name in _TUPLES:
            parts = range(_TUPLES[name])
            number = "fp32" if name == "numbers" else "i32"
            signature[name] = tuple("constexpr" if (at, part) in constants else number for part in parts)
            # rows of channels_last images and weights hold multiples of 16 values
            if CHANNELS_LAST in build.label and name.endswith("_strides") and name != "score_strides":
                multiples += [(at, part) for part in parts if (at, part) not in constants]
            continue
        signature[name] = _type_of(name, build)
        if signature[name] not in ("constexpr", "fp32") and name not in any_number:
            multiples.append((at,))
    attrs = {path: [["tt.divisibility", 16]] for path in multiples}
    source = ASTSource(build.kernel, signature, constexprs=constants, attrs=attrs)
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, spilled, report = _assemble(compiled.asm["ptx"], arch)
    return Row(
        "triton", build.name, build.dtype, arch, registers, spilled, compiled.metadata.shared,
        _products(compiled.asm["cubin"]) if build.is_gemm else "", "C7515" in report or "serialized" in report,
    )  # fmt: skip


def _assemble(ptx: str, arch: int) -> tuple[int, int, str]:
    """(registers, spilled bytes, ptxas's report)"""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        name = "sm_90a" if arch == 90 else f"sm_{arch}"
        command = [TOOLS / "ptxas", "-v", "--gpu-name", name, path, "-o", Path(folder) / "kernel.cubin"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    report = done.stdout + done.stderr
    spilled = sum(int(number) for number in re.findall(r"(\d+) bytes spill", report))
    return int(re.search(r"Used (\d+) registers", report)[1]), spilled, report  # type: ignore[index]


def _products(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([TOOLS / "nvdisasm", file.name], capture_output=True, text=True, check=True).stdout
    return products_of(text)
