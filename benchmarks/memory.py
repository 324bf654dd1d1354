"""Bytes kept between forward and backward, and the peak while both run.

Kept: what ``torch.autograd.graph.saved_tensors_hooks`` sees, each storage once, without those that exist anyway (x, W,
s, bias, beta). Peak: on the CPU, the largest sum of what torch's allocator handed out and got back during the call,
from the profiler's memory events, so that results (gradients) count and what was there before does not; memory that
MKL or oneDNN take elsewhere is not seen. On CUDA, ``max_memory_allocated`` over the level before the call.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from .contenders import Contender


def kept_bytes(contender: Contender) -> int:
    """Bytes that the graph of one forward pass holds beyond the tensors that exist anyway."""
    own = {tensor.untyped_storage().data_ptr() for tensor in contender.own_tensors()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # no address is used twice while this holds them

    def see(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    contender.x.grad = contender.trained.grad = None
    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        results = contender.forward()
    alive.extend(tensor for tensor in results if tensor is not None)
    return sum(kept.values())


def peak_bytes(contender: Contender) -> int:
    """The most bytes that one forward and backward pass holds at a time beyond what exists before it."""
    contender.forward_backward()
    contender.x.grad = contender.trained.grad = None
    return peak_of(contender.forward_backward, contender.x.device.type)


def step_bytes(contender: Contender) -> int:
    """The most bytes that exist during a training step, gradients dropped after each: what lives from step to step
    (weight, what is trained, moments, effective weight) and the peak of what comes and goes."""
    contender.step()
    contender.step()
    contender.x.grad = contender.trained.grad = None
    peak = peak_of(contender.step, contender.x.device.type)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in contender.resident()}
    return peak + sum(storages.values())


def peak_of(function: Callable[[], object], device: str) -> int:
    """The most bytes that a call holds at a time."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _quiet_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        function()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """The profiler's C++ part writes a line per start and stop; what a call raises in Python is not touched."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)
