"""What this machine can do, measured in the same run: copy bandwidth and matrix product rates."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .timing import TimingConfig, percentile, time_interleaved


class Ceilings:
    """Measured on first use and kept: bytes/s of a copy (read + written) of about the size asked for, FLOP/s by dtype.

    Each is taken from the 20th percentile of the times, on the run's clock.
    """

    def __init__(self, device: str, config: TimingConfig) -> None:
        self.device, self.config = device, config
        self.copies: dict[int, float] = {}
        self.products: dict[torch.dtype, float] = {}

    def bytes_per_s(self, num_bytes: int) -> float:
        """Bytes/s, read and written, of a copy that moves ``num_bytes`` (rounded to a power of two, 64 kB to 4 GB; to
        512 MB on a CPU). A working set that fits in a cache has that cache's bandwidth as its ceiling."""
        largest = 32 if self.device == "cuda" else 29
        exponent = min(max(num_bytes - 1, 1).bit_length(), largest)
        exponent = max(exponent, 16)
        if exponent not in self.copies:
            source = torch.randn((1 << exponent) // 8, device=self.device)
            target = torch.empty_like(source)
            self.copies[exponent] = (1 << exponent) / self._seconds(lambda: target.copy_(source))
        return self.copies[exponent]

    def flops_per_s(self, dtype: torch.dtype) -> float:
        """FLOP/s of a large square matrix product through torch."""
        if dtype not in self.products:
            n = 8192 if self.device == "cuda" else 1024
            a, b = (torch.randn(n, n, device=self.device, dtype=dtype) for _ in range(2))
            out = torch.empty_like(a)
            self.products[dtype] = 2 * n**3 / self._seconds(lambda: torch.mm(a, b, out=out))
        return self.products[dtype]

    def _seconds(self, function: Callable[[], object]) -> float:
        for _ in range(3):
            function()
        config = TimingConfig(num_rounds=21, min_rounds=5, budget_s=2.0, clock=self.config.clock)
        return percentile(time_interleaved({"f": function}, self.device, config)["f"].samples, 20)

    def floor_s(self, flops: float, num_bytes: int, dtype: torch.dtype) -> float:
        """The larger of flops over the product rate and bytes over the copy bandwidth."""
        compute = flops / self.flops_per_s(dtype) if flops else 0.0
        return max(compute, num_bytes / self.bytes_per_s(num_bytes))

    def known(self) -> dict[str, float]:
        """What was measured so far: GB/s by copied MB, TFLOP/s by dtype."""
        copies = {f"copy_{2.0**e / 2**20:g}mb_gb_s": rate / 1e9 for e, rate in sorted(self.copies.items())}
        return copies | {f"matmul_{str(d)[6:]}_tflop_s": rate / 1e12 for d, rate in self.products.items()}
