"""The Triton backend. Triton is imported when the backend is first considered for a GPU.

mask.py: the mask functions; rounding.py: rounding to bf16; philox.py: draws. Kernels: elementwise.py, units.py (coarse
scores), sampled.py, mask_adamw.py, masked_product.py, score_gradient.py, linear_step.py, convolution.py. configs.py:
their tiles; rules.py: which tiles, and where a kernel is used. launch.py, products.py and sampled.py call them.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

from ..base import KERNEL_DTYPES, KIND_CODES, SAMPLED, Backend, Call, sampled_refusal


@functools.cache
def load_error() -> str | None:
    """None if Triton can be imported, else why not."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton is not installed ({error}); it comes with PyTorch's CUDA builds"
    return None


@functools.cache
def _gpu_refusal(plan: str | None, index: int) -> str | None:
    """What that GPU lacks, if anything."""
    from . import rules

    device = torch.device("cuda", index)
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than the kernels' least architecture, sm_80"
    on = rules.chip(device)
    if plan == "fused" and not rules.has_room(on):
        return f"plan 'fused' needs 160 KB of shared memory a block, {on.name} has {on.shared // 1024}"
    return None


@functools.cache
def _kernels() -> Backend:
    from .products import TritonKernels

    return TritonKernels()


class TritonBackend(Backend):
    """Says what Triton serves, and hands it to products.TritonKernels."""

    name = "triton"
    has_mask_adamw = True

    def refuse(self, call: Call) -> str | None:
        if call.device != "cuda" and not self._is_interpreted():
            return f"weight is on {call.device}"
        if call.device == "cuda" and not torch.cuda.is_available():
            return "torch can use no GPU here"
        if call.device == "cuda" and (reason := _gpu_refusal(call.plan, torch.cuda.current_device())) is not None:
            return reason
        if (reason := load_error()) is not None:
            return reason
        if call.weight_dtype not in KERNEL_DTYPES or call.compute_dtype not in KERNEL_DTYPES:
            return f"{call.weight_dtype} weight computed in {call.compute_dtype} is not among its dtypes"
        if call.op == SAMPLED:
            return sampled_refusal(call)
        if call.kind not in KIND_CODES:
            return f"kind {call.kind!r} is not built here yet"
        if call.num_dims > 4 and not call.is_same_shape:
            return f"coarse scores over a weight with {call.num_dims} dimensions are not built here (up to 4 are)"
        return None

    @staticmethod
    @functools.cache
    def _is_interpreted() -> bool:
        """Whether Triton's own switch TRITON_INTERPRET=1 makes the kernels run on the CPU (for tests)."""
        if load_error() is not None:
            return False
        from triton import knobs

        return bool(knobs.runtime.interpret)


def _hand_over(name: str) -> Any:
    def method(self: TritonBackend, *args: Any, **kwargs: Any) -> Any:
        return getattr(_kernels(), name)(*args, **kwargs)

    method.__name__ = name
    return method


for _name in (
    "effective_weight", "effective_weights", "grad_scores", "grad_scores_of_many", "add_penalty_grad_",
    "mask_adamw_", "linear_step_", "plan_of", "masked_linear", "linear_grad_x", "linear_grad_scores",
    "linear_grad_scores_of_masks", "masked_conv2d", "masked_conv2d_backward", "keep_thresholds", "sampled_weight",
    "sampled_weights", "sampled_grad_scores_", "sampled_grad_scores_of_all_",
):  # fmt: skip
    setattr(TritonBackend, _name, _hand_over(_name))
