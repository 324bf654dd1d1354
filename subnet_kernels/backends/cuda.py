"""The backend ``cuda``: CUDA C++ kernels of the extension, compiled ahead of time, and the vendor's products."""

from __future__ import annotations

import torch

from .base import Call
from .native import ExtensionBackend, has_cuda_kernels


class CudaBackend(ExtensionBackend):
    """Elementwise ops of many tensors in one launch; scores of weight's shape."""

    has_mask_adamw = False

    def __init__(self) -> None:
        super().__init__("cuda")

    def refuse(self, call: Call) -> str | None:
        if (reason := super().refuse(call)) is not None:
            return reason
        if not torch.cuda.is_available():
            return "torch can use no GPU here"
        if not has_cuda_kernels():
            return "the extension was built without CUDA kernels (no nvcc then) or torch has no CUDA"
        if call.op not in ("effective_weight", "effective_weights"):
            return f"{call.op} is not built in CUDA C++ yet"
        if not call.is_same_shape:
            return "scores coarser than weight are not built in CUDA C++ yet"
        return None
