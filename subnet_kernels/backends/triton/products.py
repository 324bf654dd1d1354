"""Launches of the kernels with a product: linear layers and convolutions, forward and backward, and the score gradient
inside its product. What these do not serve (plan "cached", empty tensors) goes to the vendor's products in base.py."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from torch._prims_common import suggest_memory_format

from ...masks import MaskKind
from ..base import KIND_CODES, AdamW, ConvArgs, Needs, conv2d_backward, keeps_w_eff
from ..layout import aligned, is_dense
from . import configs, rules
from .configs import Gemm
from .convolution import conv_score_gradient_kernel, masked_conv_kernel
from .launch import IS_INTERPRETED, TritonElementwise, on_device_of, step_arguments
from .linear_step import linear_step_kernel, step_of_parts_kernel
from .masked_product import masked_product_kernel
from .sampled import TritonSampled
from .score_gradient import add_parts_kernel, score_gradient_kernel, score_gradients_of_masks_kernel


def dot_options(dtype: torch.dtype) -> dict[str, Any]:
    """How products are computed: torch's own TF32 switch decides for fp32; the interpreter multiplies in fp32."""
    allows_tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {"PRECISION": "tf32" if allows_tf32 else "ieee", "UPCAST": IS_INTERPRETED}


def conv_options(dtype: torch.dtype) -> dict[str, Any]:
    """The same for convolutions, which have a switch of their own."""
    allows_tf32 = dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32"  # pyright: ignore
    return {"PRECISION": "tf32" if allows_tf32 else "ieee", "UPCAST": IS_INTERPRETED}


def launch_options(config: Gemm) -> dict[str, int]:
    return {"num_warps": config.num_warps, "num_stages": config.num_stages}


def whole_parts(num_steps: int, num_parts: int) -> tuple[int, int]:
    """(steps of a part, parts) such that none is empty."""
    steps_per_part = triton.cdiv(num_steps, num_parts)
    return steps_per_part, triton.cdiv(num_steps, steps_per_part)


def _num_tiles(config: Gemm, n: int, k: int) -> int:
    return triton.cdiv(n, config.rows) * triton.cdiv(k, config.columns)


def _launch_score_gradient(
    grad_out: Tensor, x: Tensor, config: Gemm, arguments: tuple[Any, ...], steps_per_part: int, num_parts: int,
    options: dict[str, Any],
) -> None:
    (m, n), k = grad_out.shape, x.shape[1]
    score_gradient_kernel[(_num_tiles(config, n, k), num_parts)](
        grad_out, x, *arguments, m, n, k, *grad_out.stride(), *x.stride(), steps_per_part, **options,
        **dot_options(x.dtype), BN=config.rows, BK=config.columns, BM=config.depth, **launch_options(config),
    )  # fmt: skip


def _out_format(x: Tensor, weight: Tensor) -> torch.memory_format:
    """The memory format that torch gives a convolution's result on a GPU."""
    formats = {suggest_memory_format(x), suggest_memory_format(weight)}
    return torch.channels_last if torch.channels_last in formats else torch.contiguous_format


LARGEST_IMAGE = 2**31 - 1  # elements that rows and columns of one image may span: offsets in it have 32 bits


def _is_small(image: Tensor) -> bool:
    (_, _, height, width), (_, _, row, column) = image.shape, image.stride()
    return (height - 1) * row + (width - 1) * column <= LARGEST_IMAGE


def _is_linear(x: Tensor, weight: Tensor, args: ConvArgs) -> bool:
    """Whether the convolution is a linear layer over the pixels, as they lie in memory, and is computed as one."""
    return (
        weight.shape[2:] == (1, 1) and args.stride == (1, 1) and args.padding == (0, 0) and args.groups == 1
        and x.is_contiguous(memory_format=torch.channels_last) and dot_options(x.dtype) == conv_options(x.dtype)
    )  # fmt: skip


def _pixels(image: Tensor) -> Tensor:
    """[B, C, H, W] in channels_last as [B*H*W, C]."""
    return image.permute(0, 2, 3, 1).reshape(-1, image.shape[1])


def _image(pixels: Tensor, like: Tensor) -> Tensor:
    """The way back; like: any image of that batch, height and width."""
    batch, _, height, width = like.shape
    return pixels.view(batch, height, width, pixels.shape[1]).permute(0, 3, 1, 2)


class TritonKernels(TritonSampled, TritonElementwise):
    """The methods of TritonBackend (what that refuses does not come here)."""

    # --- linear ---------------------------------------------------------------------------------------------------

    def fuses(self, x: Tensor, weight: Tensor, scores: Tensor, plan: str | None) -> bool:
        """Whether masked_linear makes the mask inside its product under this plan, its effective weight not kept.
        Where the plan is open only without gradients: a backward pass would make the mask again."""
        on, (n, k) = rules.chip(x.device), weight.shape
        if plan is not None:
            return not keeps_w_eff(plan) and rules.has_room(on)
        if x.requires_grad or weight.requires_grad or scores.requires_grad or weight.dtype != x.dtype:
            return False
        return rules.fuses_product(x.dtype, x.numel() // max(k, 1), n, k, on)

    def plan_of(self, op: str, x: Tensor, weight: Tensor, scores: Tensor, plan: str | None) -> str:
        is_fused = plan is None and op == "masked_linear" and self.fuses(x, weight, scores, plan)
        return "fused" if is_fused else plan or "cached"

    def masked_linear(
        self, x: Tensor, weight: Tensor, scores: Tensor, beta: Tensor, bias: Tensor | None, kind: MaskKind,
        plan: str | None, buffers: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if buffers is not None or not x.numel() or not weight.numel() or not self.fuses(x, weight, scores, plan):
            return super().masked_linear(x, weight, scores, beta, bias, kind, plan, buffers)
        rows = x.reshape(-1, x.shape[-1])
        out, partials = self._masked_product(rows, weight, scores, beta, bias, kind, True)
        assert partials is not None
        return out.view(*x.shape[:-1], weight.shape[0]), partials.sum(), None

    def linear_grad_x(self, grad_out: Tensor, weight: Tensor, scores: Tensor, beta: Tensor, kind: MaskKind) -> Tensor:
        if not grad_out.numel() or not weight.numel() or not rules.has_room(rules.chip(grad_out.device)):
            return super().linear_grad_x(grad_out, weight, scores, beta, kind)
        return self._masked_product(grad_out, weight.t(), scores.t(), beta, None, kind, False)[0]

    def _masked_product(
        self, x: Tensor, weight: Tensor, scores: Tensor, beta: Tensor, bias: Tensor | None, kind: MaskKind,
        wants_sum: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """(x @ (weight * m).T + bias for rows x, partial sums of m if wanted)."""
        if not is_dense(weight):
            weight = weight.contiguous()
        scores = aligned(weight, scores)
        (m, k), n = x.shape, weight.shape[0]
        is_coarse, on = scores.shape != weight.shape, rules.chip(x.device)
        config = rules.masked_product(x.dtype, m, n, k, weight.dtype, on, is_coarse)
        tiles_n, tiles_m = triton.cdiv(n, config.rows), triton.cdiv(m, config.columns)
        out = x.new_empty(m, n)
        partials = beta.new_empty(tiles_n) if wants_sum else None
        with on_device_of(x):
            masked_product_kernel[(tiles_m, tiles_n)](
                x, weight, scores, beta, out if bias is None else bias.contiguous(), out,
                beta if partials is None else partials, m, n, k, *x.stride(), *weight.stride(), *scores.stride(),
                n // scores.shape[0], k // scores.shape[1], bias is not None, wants_sum, is_coarse,
                KIND_CODES[kind.name], **dot_options(x.dtype), BN=config.rows, BM=config.columns, BK=config.depth,
                **launch_options(config),
            )  # fmt: skip
        return out, partials

    def linear_grad_scores(
        self, grad_out: Tensor | None, x: Tensor | None, grad_penalty: Tensor | None, weight: Tensor, scores: Tensor,
        beta: Tensor, kind: MaskKind, needs_scores: bool, needs_weight: bool, is_fused: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        def by_vendor() -> tuple[Tensor | None, Tensor | None]:
            return super(TritonKernels, self).linear_grad_scores(
                grad_out, x, grad_penalty, weight, scores, beta, kind, needs_scores, needs_weight
            )

        if (
            grad_out is None or x is None or not needs_scores or not kind.is_trainable
            or not x.numel() or not weight.numel() or scores.shape != weight.shape
            or scores.stride() != weight.stride() or grad_out.dtype != x.dtype
        ):  # fmt: skip
            return by_vendor()
        if weight.is_contiguous():
            return self._score_gradient(
                grad_out, x, grad_penalty, weight, scores, beta, kind, needs_weight, is_fused
            ) or by_vendor()
        if weight.t().is_contiguous():  # (grad_out.T @ x).T = x.T @ grad_out
            gradients = self._score_gradient(
                x, grad_out, grad_penalty, weight.t(), scores.t(), beta, kind, needs_weight, is_fused
            )
            if gradients is not None:
                return gradients[0].t(), None if gradients[1] is None else gradients[1].t()
        return by_vendor()

    def _score_gradient(
        self, grad_out: Tensor, x: Tensor, grad_penalty: Tensor | None, weight: Tensor, scores: Tensor, beta: Tensor,
        kind: MaskKind, needs_weight: bool, must_fuse: bool,
    ) -> tuple[Tensor, Tensor | None] | None:
        """(grad_scores, grad_weight) of contiguous weights; None where the vendor's product is the faster way."""
        (m, n), k = grad_out.shape, x.shape[1]
        is_plain = weight.dtype == x.dtype and n % 16 == 0 and k % 16 == 0 and not needs_weight
        choose = rules.fastest_score_gradient if must_fuse else rules.score_gradient
        chosen = choose(x.dtype, m, n, k, is_plain, rules.chip(x.device))
        if chosen is None:
            return None
        config, num_parts = chosen
        return self._in_parts(
            functools.partial(_launch_score_gradient, grad_out, x, config), triton.cdiv(m, config.depth), num_parts,
            weight, scores, beta, grad_penalty, kind, needs_weight,
        )  # fmt: skip

    def linear_grad_scores_of_masks(
        self, grad_out: Tensor, x: Tensor, grad_penalty: Tensor | None, weight: Tensor, scores: Tensor, beta: Tensor,
        kind: MaskKind, is_fused: bool = False,
    ) -> Tensor | None:
        """is_fused: inside the product wherever a kernel for that is built, also where the rules would not."""
        if (
            not kind.is_trainable or not grad_out.numel() or not x.numel() or scores.shape[1:] != weight.shape
            or grad_out.dtype != x.dtype
        ):  # fmt: skip
            return None
        x = x.expand(len(scores), *x.shape[-2:])  # one that is shared: the same for each mask
        if weight.is_contiguous() and scores.is_contiguous():
            return self._score_gradients_of_masks(grad_out, x, grad_penalty, weight, scores, beta, kind, is_fused)
        if weight.t().is_contiguous() and scores.mT.is_contiguous():  # (grad_out.T @ x).T = x.T @ grad_out
            given = x, grad_out, grad_penalty, weight.t(), scores.mT, beta, kind, is_fused
            made = self._score_gradients_of_masks(*given)
            return None if made is None else made.mT
        return None

    def _score_gradients_of_masks(
        self, grad_out: Tensor, x: Tensor, grad_penalty: Tensor | None, weight: Tensor, scores: Tensor, beta: Tensor,
        kind: MaskKind, must_fuse: bool,
    ) -> Tensor | None:
        """linear_grad_scores_of_masks of contiguous weights and scores; None where the rules prefer the vendor."""
        (num_masks, m, n), k = grad_out.shape, x.shape[2]
        is_plain = weight.dtype == x.dtype and n % 16 == 0 and k % 16 == 0
        choose = rules.fastest_score_gradients_of_masks if must_fuse else rules.score_gradients_of_masks
        config = choose(x.dtype, num_masks, m, n, k, is_plain, rules.chip(x.device))
        if config is None:
            return None
        grad_scores = torch.empty_like(scores)
        with on_device_of(weight):
            score_gradients_of_masks_kernel[(_num_tiles(config, n, k) * num_masks,)](
                grad_out, x, weight, scores, beta, beta if grad_penalty is None else grad_penalty.contiguous(),
                grad_scores, num_masks, m, n, k, *grad_out.stride(), *x.stride(), grad_penalty is not None,
                KIND_CODES[kind.name], **dot_options(x.dtype), BN=config.rows, BK=config.columns, BM=config.depth,
                **launch_options(config),
            )  # fmt: skip
        return grad_scores

    def linear_step_(
        self, grad_out: Tensor, x: Tensor, grad_penalty: Tensor | None, scores: Tensor, exp_avg: Tensor,
        exp_avg_sq: Tensor, step: Tensor, weight: Tensor, slot: tuple[Tensor, Tensor] | None, beta: Tensor,
        next_beta: Tensor, kind: MaskKind, numbers: AdamW, is_fused: bool = False,
    ) -> None:
        """is_fused: inside the product wherever a kernel for that is built, also where the rules would not."""
        rest = step, slot, beta, next_beta, kind, numbers, is_fused
        stepped = (scores, exp_avg, exp_avg_sq, weight, weight if slot is None else slot[0])
        is_stepped = False
        if x.numel() and weight.numel() and grad_out.dtype == x.dtype:
            if weight.is_contiguous():
                is_stepped = self._linear_step(grad_out, x, grad_penalty, stepped, *rest)
            elif weight.t().is_contiguous():  # (grad_out.T @ x).T = x.T @ grad_out
                is_stepped = self._linear_step(x, grad_out, grad_penalty, tuple(t.t() for t in stepped), *rest)
        if not is_stepped:
            super().linear_step_(
                grad_out, x, grad_penalty, scores, exp_avg, exp_avg_sq, step, weight, slot, beta, next_beta, kind,
                numbers,
            )  # fmt: skip

    def _linear_step(
        self, grad_out: Tensor, x: Tensor, grad_penalty: Tensor | None, stepped: tuple[Tensor, ...], step: Tensor,
        slot: tuple[Tensor, Tensor] | None, beta: Tensor, next_beta: Tensor, kind: MaskKind, numbers: AdamW,
        must_fuse: bool,
    ) -> bool:
        """linear_step_ on contiguous scores, moments, weight and effective weight; False, and nothing done, where the
        vendor's product and one pass are the faster way."""
        (m, n), k, weight = grad_out.shape, x.shape[1], stepped[3]
        is_plain = n % 16 == 0 and k % 16 == 0
        choose = rules.fastest_linear_step if must_fuse and x.dtype.itemsize == 2 else rules.linear_step
        chosen = choose(x.dtype, m, n, k, is_plain, rules.chip(x.device))
        if chosen is None:
            return False
        config, num_parts = chosen
        steps_per_part, num_parts = whole_parts(triton.cdiv(m, config.depth), num_parts)
        tiles, num, flat = _num_tiles(config, n, k), weight.numel(), configs.ELEMENTWISE
        partials = beta.new_empty(tiles if num_parts == 1 else triton.cdiv(num, flat.block))
        given = beta if grad_penalty is None else grad_penalty, *stepped, partials, step
        rest, flags = step_arguments(beta, next_beta, kind, numbers)
        flags |= {"HAS_PENALTY": grad_penalty is not None, "WRITES": slot is not None}
        with on_device_of(weight):
            if num_parts == 1:
                linear_step_kernel[(tiles,)](
                    grad_out, x, *given, m, n, k, *grad_out.stride(), *x.stride(), *rest, **flags,
                    **dot_options(x.dtype), BN=config.rows, BK=config.columns, BM=config.depth,
                    **launch_options(config),
                )  # fmt: skip
            else:
                parts = beta.new_empty(num_parts * num)
                _launch_score_gradient(
                    grad_out, x, config, (weight, parts, beta, beta, parts, weight, parts), steps_per_part, num_parts,
                    {"HAS_PENALTY": False, "WANTS_WEIGHT": False, "KIND": flags["KIND"], "IS_SPLIT": True},
                )  # fmt: skip
                step_of_parts_kernel[(len(partials),)](
                    parts, *given, num, num_parts, *rest, **flags, BLOCK=flat.block, num_warps=flat.num_warps
                )
        written = stepped[:3]
        if slot is not None:
            torch.sum(partials, 0, out=slot[1])
            written = (*written, slot[0])
        torch.autograd.graph.increment_version(list(written))
        return True

    def _in_parts(
        self, launch: Callable[[tuple[Any, ...], int, int, dict[str, Any]], None], num_steps: int, num_parts: int,
        weight: Tensor, scores: Tensor, beta: Tensor, grad_penalty: Tensor | None, kind: MaskKind, needs_weight: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """(grad_scores, grad_weight): ``launch(results, steps per part, parts, options)`` makes them, or, of more parts
        than one, the parts, which are then added up. weight, scores: dense, of one memory order."""
        steps_per_part, num_parts = whole_parts(num_steps, num_parts)
        grad_scores = torch.empty_like(scores)
        grad_weight = torch.empty_like(weight) if needs_weight else None
        num = weight.numel()
        parts = grad_scores if num_parts == 1 else scores.new_empty(num_parts * num)
        results = (
            weight, scores, beta, grad_penalty if grad_penalty is not None else beta, grad_scores,
            weight if grad_weight is None else grad_weight,
        )  # fmt: skip
        flags = {
            "HAS_PENALTY": grad_penalty is not None, "WANTS_WEIGHT": needs_weight, "KIND": KIND_CODES[kind.name],
        }  # fmt: skip
        with on_device_of(weight):
            launch((*results, parts), steps_per_part, num_parts, flags | {"IS_SPLIT": num_parts > 1})
            if num_parts > 1:
                flat = configs.ELEMENTWISE
                add_parts_kernel[(triton.cdiv(num, flat.block),)](
                    parts, *results, num, num_parts, **flags, BLOCK=flat.block, num_warps=flat.num_warps
                )
        return grad_scores, grad_weight

    # --- convolution ----------------------------------------------------------------------------------------------

    def masked_conv2d(
        self, x: Tensor, weight: Tensor, scores: Tensor, beta: Tensor, bias: Tensor | None, args: ConvArgs,
        kind: MaskKind, plan: str | None, buffers: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if keeps_w_eff(plan) or not x.numel() or not weight.numel() or not _is_small(x):
            return super().masked_conv2d(x, weight, scores, beta, bias, args, kind, plan, buffers)
        if _is_linear(x, weight, args):
            out, penalty, _ = self.masked_linear(
                _pixels(x), weight.flatten(1), scores.flatten(1), beta, bias, kind, plan
            )
            return _image(out, x).contiguous(memory_format=_out_format(x, weight)), penalty, None
        sides = zip(x.shape[2:], weight.shape[2:], args.stride, args.padding, args.dilation, strict=True)
        height, width = ((size + 2 * pad - dil * (k - 1) - 1) // stride + 1 for size, k, stride, pad, dil in sides)
        if height * width * weight.shape[0] > LARGEST_IMAGE:
            return super().masked_conv2d(x, weight, scores, beta, bias, args, kind, plan, buffers)
        out = torch.empty(
            (x.shape[0], weight.shape[0], height, width), dtype=x.dtype, device=x.device,
            memory_format=_out_format(x, weight),
        )  # fmt: skip
        return out, self._masked_conv(x, weight, scores, beta, bias, out, args, kind, False).sum(), None

    def _masked_conv(
        self, x: Tensor, weight: Tensor, scores: Tensor, beta: Tensor, bias: Tensor | None, out: Tensor,
        args: ConvArgs, kind: MaskKind, is_backward: bool,
    ) -> Tensor:
        """Writes out: the convolution of x or, backward, the gradient of its input where x is grad_out. Returns partial
        sums of m (forward)."""
        if not is_dense(weight):
            weight = weight.contiguous()
        scores = aligned(weight, scores)
        config = rules.masked_conv(x.dtype, x.stride(1) == 1)
        outputs, inputs = weight.shape[0] // args.groups, weight.shape[1]
        rows, channels = (inputs, outputs) if is_backward else (outputs, inputs)
        first, second = (1, 0) if is_backward else (0, 1)
        strides, score_strides = weight.stride(), scores.stride()
        groups = [size // count for size, count in zip(weight.shape, scores.shape, strict=True)]
        num_pixels = out.shape[0] * out.shape[2] * out.shape[3]
        tiles = triton.cdiv(rows, config.rows) * args.groups
        partials = beta.new_empty(tiles)
        with on_device_of(x):
            masked_conv_kernel[(triton.cdiv(num_pixels, config.columns), tiles)](
                x, weight, scores, beta, out if bias is None else bias.contiguous(), out, partials, num_pixels, rows,
                channels, outputs * strides[0], (*out.shape[2:], *x.shape[2:], *weight.shape[2:]),
                (*args.stride, *args.padding, *args.dilation), x.stride(),
                (strides[first], strides[second], *strides[2:]),
                (score_strides[first], score_strides[second], *score_strides[2:]),
                (groups[first], groups[second], *groups[2:]), out.stride(), bias is not None, not is_backward,
                is_backward, scores.shape != weight.shape, KIND_CODES[kind.name], **conv_options(x.dtype),
                BN=config.rows, BP=config.columns, BD=config.depth, **launch_options(config),
            )  # fmt: skip
        return partials

    def masked_conv2d_backward(
        self, grad_out: Tensor | None, grad_penalty: Tensor | None, x: Tensor, weight: Tensor, scores: Tensor,
        beta: Tensor, w_eff: Tensor | None, args: ConvArgs, kind: MaskKind, needs: Needs,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        is_ours = w_eff is None and grad_out is not None and x.numel() and grad_out.numel() and weight.numel()
        if not is_ours or grad_out is None or not _is_small(x) or not _is_small(grad_out):
            return super().masked_conv2d_backward(
                grad_out, grad_penalty, x, weight, scores, beta, w_eff, args, kind, needs
            )
        if _is_linear(x, weight, args):
            grad_x, grad_weight, grad_scores, grad_bias = self.masked_linear_backward(
                _pixels(grad_out), grad_penalty, _pixels(x), weight.flatten(1), scores.flatten(1), beta, None, kind,
                needs,
            )  # fmt: skip
            return (
                None if grad_x is None else _image(grad_x, x),
                None if grad_weight is None else grad_weight.view(weight.shape),
                None if grad_scores is None else grad_scores.view(scores.shape), grad_bias,
            )  # fmt: skip
        grad_x = grad_weight = grad_scores = None
        if needs.x:
            grad_x = torch.empty_like(x)
            self._masked_conv(grad_out, weight, scores, beta, None, grad_x, args, kind, True)
        if needs.weight or needs.scores:
            grad_scores, grad_weight = self._conv_grad_scores(
                grad_out, x, grad_penalty, weight, scores, beta, args, kind, needs
            )
        return grad_x, grad_weight, grad_scores, grad_out.sum((0, 2, 3)) if needs.bias else None

    def _conv_grad_scores(
        self, grad_out: Tensor, x: Tensor, grad_penalty: Tensor | None, weight: Tensor, scores: Tensor, beta: Tensor,
        args: ConvArgs, kind: MaskKind, needs: Needs,
    ) -> tuple[Tensor | None, Tensor | None]:
        """(grad_scores, grad_weight) where no effective weight is there."""
        wants_scores = needs.scores and kind.is_trainable
        if not wants_scores and not needs.weight:
            return None, None
        is_ours = wants_scores and is_dense(weight) and weight.shape == scores.shape
        if not is_ours or weight.stride() != scores.stride():
            like_weight = x.new_empty(1).expand(weight.shape)  # its values are not read: its gradient is wanted
            _, grad_w_eff, _ = conv2d_backward(grad_out, x, like_weight, args, (False, True, False))
            return self.grad_scores(
                grad_w_eff, grad_penalty, weight, scores, beta, kind, needs.scores, needs.weight, may_overwrite=True
            )
        rows, channels = weight.shape[0] // args.groups, weight.shape[1]
        kernel_height, kernel_width = weight.shape[2:]
        num_pixels = grad_out.shape[0] * grad_out.shape[2] * grad_out.shape[3]

        def num_tiles(config: Gemm) -> int:
            of_channels = triton.cdiv(rows, config.rows) * triton.cdiv(channels, config.columns)
            return args.groups * kernel_height * kernel_width * of_channels

        config, num_parts = rules.conv_score_gradient(x.dtype, num_pixels, num_tiles, rules.chip(x.device))

        def launch(arguments: tuple[Any, ...], steps_per_part: int, num_parts: int, options: dict[str, Any]) -> None:
            conv_score_gradient_kernel[(num_tiles(config), num_parts)](
                grad_out, x, *arguments, num_pixels, weight.numel(), rows, channels,
                (*grad_out.shape[2:], *x.shape[2:], kernel_height, kernel_width),
                (*args.stride, *args.padding, *args.dilation), grad_out.stride(), x.stride(), weight.stride(),
                steps_per_part, **options, **conv_options(x.dtype), BN=config.rows, BK=config.columns, BP=config.depth,
                **launch_options(config),
            )  # fmt: skip

        return self._in_parts(
            launch, triton.cdiv(num_pixels, config.depth), num_parts, weight, scores, beta, grad_penalty, kind,
            needs.weight,
        )
