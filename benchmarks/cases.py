"""The cases, as data: what is timed, at which shapes. --shapes selects by a part of their names."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from subnet_kernels import testing

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BETA = 3.0
LAM = 1e-3  # weight of the penalty: large enough that a missing penalty gradient fails the gate


@dataclass(frozen=True)
class LayerCase:
    """One masked layer. Linear: weight (N, K), x (M, K). Convolution: weight (O, C, KH, KW), x (B, C, H, W)."""

    weight_shape: tuple[int, ...]
    x_shape: tuple[int, ...]
    dtype: str
    conv: dict[str, Any] = field(default_factory=dict)
    is_channels_last: bool = False

    @property
    def is_conv(self) -> bool:
        return len(self.weight_shape) == 4

    @property
    def name(self) -> str:
        weight = "x".join(map(str, self.weight_shape))
        if not self.is_conv:
            return f"linear_{weight}_m{self.x_shape[0]}_{self.dtype}"
        batch, _, height, width = self.x_shape
        layout = "_nhwc" if self.is_channels_last else ""
        return f"conv_{weight}_b{batch}_{height}x{width}{layout}_{self.dtype}"

    @property
    def out_shape(self) -> tuple[int, ...]:
        if not self.is_conv:
            return (self.x_shape[0], self.weight_shape[0])
        stride, padding = self.conv.get("stride", 1), self.conv.get("padding", 0)
        pairs = zip(self.x_shape[2:], self.weight_shape[2:], strict=True)
        return (self.x_shape[0], self.weight_shape[0], *((n + 2 * padding - k) // stride + 1 for n, k in pairs))

    def build(self, device: str = "cpu", seed: int = 0) -> testing.Case:
        """Fixed random inputs, drawn on the device."""
        generator = torch.Generator(device).manual_seed(seed)

        def randn(shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
            values = torch.randn(shape, generator=generator, device=device).mul_(scale).to(dtype)
            is_image = self.is_channels_last and len(shape) == 4
            return values.contiguous(memory_format=torch.channels_last) if is_image else values

        dtype, fan_in = DTYPES[self.dtype], math.prod(self.weight_shape[1:])
        return testing.Case(
            randn(self.x_shape, dtype), randn(self.weight_shape, dtype, fan_in**-0.5),
            randn(self.weight_shape, torch.float32), BETA, randn(self.weight_shape[:1], dtype),
            dict(self.conv) if self.is_conv else None, grad_out=randn(self.out_shape, dtype), grad_penalty=LAM,
            wanted=("grad_x", "grad_scores"),
        )  # fmt: skip

    @property
    def num_weights(self) -> int:
        return math.prod(self.weight_shape)

    def num_outputs(self) -> int:
        return math.prod(self.out_shape)

    def product_flops(self) -> int:
        """Floating point operations of one product: the forward pass; the two of the backward pass cost the same."""
        return 2 * self.num_outputs() * math.prod(self.weight_shape[1:])

    def fewest_bytes(self, phase: str) -> int:
        """Bytes that a phase must move, every tensor read or written once (w_eff made once and read by the product)."""
        value = DTYPES[self.dtype].itemsize
        activations = (math.prod(self.x_shape) + self.num_outputs()) * value
        forward = activations + self.num_weights * (value + 4)  # W, s
        if phase == "forward":
            return forward
        backward = 2 * activations + self.num_weights * (value + 4 + 4)  # W, s, ds
        optimizer = self.num_weights * 28 if phase == "step" else 0  # AdamW reads ds, s, two moments and writes three
        return forward + backward + optimizer

    def working_set(self, phase: str) -> int:
        """Bytes of the tensors that a phase touches, each once: what must fit in a cache for it to stay there."""
        value = DTYPES[self.dtype].itemsize
        activations = (math.prod(self.x_shape) + self.num_outputs()) * value
        per_weight = 2 * value + 4  # W, w_eff, s
        if phase == "forward":
            return activations + self.num_weights * per_weight
        return 2 * activations + self.num_weights * (per_weight + 4 + (8 if phase == "step" else 0))  # ds; moments


@dataclass(frozen=True)
class KernelCase:
    """One op alone over weights of these shapes: elementwise, or with the product of num_tokens rows ("score_gradient",
    "linear_step")."""

    op: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    label: str = ""
    num_tokens: int = 32

    @property
    def name(self) -> str:
        rows = f"_m{self.num_tokens}" if self.op in ("score_gradient", "linear_step") else ""
        return f"{self.op}_{self.label or 'x'.join(map(str, self.shapes[0]))}{rows}_{self.dtype}"

    @property
    def num_weights(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)


def _linears(sizes: dict[tuple[int, int], tuple[int, ...]]) -> list[LayerCase]:
    return [
        LayerCase(weight, (m, weight[1]), dtype)
        for weight, rows in sizes.items() for m in rows for dtype in DTYPES
    ]  # fmt: skip


LINEAR_CASES = _linears({(3072, 768): (64, 256, 1024), (512, 128): (256, 10240), (4096, 4096): (256,)})
CONV_CASES = [
    LayerCase(weight, x, dtype, conv)
    for weight, x, conv in (
        ((64, 64, 3, 3), (8, 64, 28, 28), {"padding": 1}),
        ((256, 256, 3, 3), (2, 256, 14, 14), {"padding": 1}),
        ((512, 512, 3, 3), (2, 512, 7, 7), {"padding": 1}),
        ((256, 64, 1, 1), (2, 64, 28, 28), {}),
    )
    for dtype in DTYPES
]
GPU_LINEAR_CASES = [
    LayerCase(weight, (m, weight[1]), "bf16")
    for weight, m in (
        ((768, 3072), 1024), ((768, 3072), 10240), ((4096, 11008), 4096), ((512, 128), 10240), ((512, 128), 256),
        ((768, 3072), 64), ((4096, 11008), 64), ((8192, 28672), 16384),
    )
] + [LayerCase((768, 3072), (1024, 3072), "fp32")]  # fmt: skip


def _resnet18_convolutions(batch: int) -> list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]]:
    """(weight, x, geometry) of the distinct convolutions of ResNet-18 at 224x224."""
    found = [((64, 3, 7, 7), (batch, 3, 224, 224), {"stride": 2, "padding": 3})]
    for channels, size in ((64, 56), (128, 28), (256, 14), (512, 7)):
        found.append(((channels, channels, 3, 3), (batch, channels, size, size), {"padding": 1}))
        if channels > 64:  # the first block of a stage halves the image
            narrow = (batch, channels // 2, 2 * size, 2 * size)
            found.append(((channels, channels // 2, 3, 3), narrow, {"stride": 2, "padding": 1}))
            found.append(((channels, channels // 2, 1, 1), narrow, {"stride": 2}))
    return found


GPU_CONV_CASES = [
    LayerCase(weight, x, "bf16", conv, is_channels_last)
    for is_channels_last in (True, False) for weight, x, conv in _resnet18_convolutions(256)
]  # fmt: skip

_GPT2_BLOCK = ((768, 2304), (768, 768), (768, 3072), (3072, 768))
_ARITHMETIC_BLOCK = ((128, 384), (128, 128), (128, 512), (512, 128))
KERNEL_CASES = [
    KernelCase(op, shapes, dtype, label)
    for op, shapes, label in (
        ("effective_weight", ((512, 128),), ""),
        ("effective_weight", ((3072, 768),), ""),
        ("effective_weights", _ARITHMETIC_BLOCK * 4, "arithmetic_gpt2"),
        ("effective_weights", _GPT2_BLOCK * 12, "gpt2"),
        ("grad_scores", ((512, 128),), ""),
        ("grad_scores", ((3072, 768),), ""),
        ("score_gradient", ((512, 128),), ""),
    )
    for dtype in DTYPES
] + [KernelCase(op, ((3072, 768),), "fp32") for op in ("mask", "add_penalty_grad", "pack_mask", "unpack_mask")]
SCORE_GRADIENT_CASES = [  # of a GPU
    KernelCase("score_gradient", (shape,), "bf16", num_tokens=m)
    for shape, m in (((4096, 11008), 4096), ((768, 3072), 1024), ((768, 3072), 10240), ((512, 128), 10240))
]  # fmt: skip
LINEAR_STEP_CASES = [  # of a GPU
    KernelCase("linear_step", (shape,), "bf16", num_tokens=m)
    for shape, m in (
        ((768, 3072), 1024), ((768, 3072), 10240), ((4096, 11008), 1024), ((4096, 11008), 4096), ((512, 128), 10240),
        ((8192, 28672), 16384),
    )
]  # fmt: skip
OVERHEAD_CASES = [LayerCase((8, 8), (8, 8), "fp32")]
QUICK = (
    "linear_512x128_m256", "conv_256x64x1x1", "weight_512x128", "scores_512x128", "gradient_512x128",
    "arithmetic_gpt2", "pack_mask", "8x8_m8", "tiny",
)  # fmt: skip


def select(cases: list[Any], shapes: list[str] | None, quick: bool) -> list[Any]:
    """The cases whose name holds one of ``shapes`` (all if None); of these the small ones if ``quick``."""
    chosen = [c for c in cases if shapes is None or any(part in c.name for part in shapes)]
    return [c for c in chosen if any(part in c.name for part in QUICK)] if quick and shapes is None else chosen
