"""Interleaved timing: every round times each contender once, in turning order, so that a busy moment hits all alike."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from subnet_kernels.capturing import capture_scope

Function = Callable[[], object]


@dataclass(frozen=True)
class TimingConfig:
    """num_rounds: samples per contender, fewer once budget_s is spent but never under min_rounds. sample_s: a sample
    repeats the call until it lasts about so long. clock: "wall", or "cpu" (this process's time on all its threads)."""

    num_rounds: int = 101
    min_rounds: int = 11
    budget_s: float = 20.0
    sample_s: float = 1e-3
    clock: str = "wall"


@dataclass(frozen=True)
class Timing:
    """Seconds per call, one entry per round; entry i of all contenders was taken in the same round."""

    samples: tuple[float, ...]

    def percentile_us(self, percent: float) -> float:
        return percentile(self.samples, percent) * 1e6

    def ratio(self, other: Timing) -> float:
        """Median over the rounds of other's time / this one's: above 1, this one is faster."""
        return percentile([b / a for a, b in zip(self.samples, other.samples, strict=True)], 50)

    def over_us(self, other: Timing) -> float:
        """Median over the rounds of this one's time minus other's, microseconds."""
        return percentile([a - b for a, b in zip(self.samples, other.samples, strict=True)], 50) * 1e6


def percentile(values: list[float] | tuple[float, ...], percent: float) -> float:
    """Linear interpolation between the ordered values."""
    ordered = sorted(values)
    at = (len(ordered) - 1) * percent / 100
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def _sample(function: Function, num_calls: int, device: str, clock: Callable[[], float]) -> float:
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for _ in range(num_calls):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / num_calls
    before = clock()
    for _ in range(num_calls):
        function()
    return (clock() - before) / num_calls


def time_interleaved(functions: dict[str, Function], device: str, config: TimingConfig) -> dict[str, Timing]:
    """Seconds per call of every function. Warm up what must not be timed (compilation) before."""
    if not functions:
        return {}
    clock = time.process_time if config.clock == "cpu" else time.perf_counter
    num_calls = {}
    for name, function in functions.items():
        function()
        estimate = min(_sample(function, 1, device, time.perf_counter) for _ in range(3))
        num_calls[name] = max(1, math.ceil(config.sample_s / max(estimate, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    start = time.perf_counter()
    try:
        for i in range(config.num_rounds):
            if i >= config.min_rounds and time.perf_counter() - start > config.budget_s:
                break
            shift = i % len(names)
            for name in names[shift:] + names[:shift]:
                samples[name].append(_sample(functions[name], num_calls[name], device, clock))
    finally:
        if was_enabled:
            gc.enable()
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def as_cuda_graph(function: Function, leaves: Iterable[Tensor] = (), num_warmups: int = 3) -> Function:
    """Capture ``function`` once and return its replay: what it costs without Python and launch gaps. ``leaves`` lose
    their gradients before, so that the captured backward pass allocates them where every replay writes."""
    with capture_scope() as kept:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(num_warmups):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        for leaf in leaves:
            leaf.grad = None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()

    def replay() -> list[Tensor]:
        graph.replay()
        return kept  # lives with this function

    return replay
