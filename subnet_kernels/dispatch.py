"""Which backend runs a call: the first, in the device's order of preference, that does not refuse.

Nothing is probed at import; no environment variable steers anything. :func:`use_backend` forces one for a block of
code, :func:`explain` says in words what would run and why the others would not.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .backends.base import Backend, Call
from .backends.cuda import CudaBackend
from .backends.native import NativeBackend
from .backends.reference import ReferenceBackend
from .backends.triton import TritonBackend

BACKENDS: dict[str, Backend] = {
    "reference": ReferenceBackend(),
    "cpu": NativeBackend("cpu"),
    "triton": TritonBackend(),
    "cuda": CudaBackend(),
}
_ORDER: dict[str, tuple[Backend, ...]] = {
    "cpu": (BACKENDS["cpu"], BACKENDS["reference"]),
    "cuda": (BACKENDS["cuda"], BACKENDS["triton"], BACKENDS["reference"]),
}
_OTHER_DEVICES: tuple[Backend, ...] = (BACKENDS["reference"],)

_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("subnet_kernels_backend", default=None)


class BackendRefused(RuntimeError):
    """A backend that was asked for by name can't run the call; the message says why."""


def _check_name(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {list(BACKENDS)}, got {name!r}")
    return name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the block on the backend ``name``: "reference", "cpu", "triton" or "cuda".

    A call that this backend can't run raises :class:`BackendRefused` with the reason; it never falls back. The backward
    pass of a call runs on the backend of its forward pass, wherever it happens.

    Raises:
        ValueError: no backend has that name.
    """
    token = _forced.set(_check_name(name))
    try:
        yield
    finally:
        _forced.reset(token)


def forced_backend() -> str | None:
    """The name given to the enclosing use_backend, if any."""
    return _forced.get()


@functools.lru_cache(maxsize=4096)
def _choose(call: Call, name: str | None) -> Backend:
    if name is not None:
        backend = BACKENDS[_check_name(name)]
        reason = backend.refuse(call)
        if reason is not None:
            raise BackendRefused(f"backend {name!r} refused {call.op}: {reason}")
        return backend
    for backend in _ORDER.get(call.device, _OTHER_DEVICES):
        if backend.refuse(call) is None:
            return backend
    raise AssertionError("the reference backend refuses nothing")


def choose(call: Call, name: str | None = None) -> Backend:
    """The backend that runs ``call``: the one named, else the one of the enclosing use_backend, else the best.

    Raises:
        BackendRefused: the named backend can't run it.
        ValueError: no backend has that name.
    """
    return _choose(call, name or _forced.get())


@functools.lru_cache(maxsize=4096)
def _choose_by_facts(
    op: str, device: str, weight_dtype: torch.dtype, compute_dtype: torch.dtype, kind: str, plan: str | None,
    num_dims: int, is_same_shape: bool, name: str | None,
) -> Backend:
    return _choose(Call(op, device, weight_dtype, compute_dtype, kind, plan, num_dims, is_same_shape), name)


def choose_for(
    op: str, weight: Tensor, scores: Tensor, kind: str, compute_dtype: torch.dtype, plan: str | None = None,
    name: str | None = None,
) -> Backend:
    """:func:`choose` for a call with these (checked) tensors; the cheap way, for every forward pass."""
    return _choose_by_facts(
        op, weight.device.type, weight.dtype, compute_dtype, kind, plan, weight.dim(),
        weight.numel() == scores.numel(), name or _forced.get(),
    )  # fmt: skip


def describe(call: Call, name: str | None = None, plan_of: Callable[[Backend], str] | None = None) -> str:
    """The decision for ``call`` in words, one line per backend. plan_of: the plan that a backend would choose."""
    name = name or _forced.get()
    order = list(_ORDER.get(call.device, _OTHER_DEVICES))
    candidates = order if name is None else [BACKENDS[_check_name(name)]]
    others = [b for b in BACKENDS.values() if b not in candidates]
    chosen: Backend | None = None
    lines = []
    for backend in candidates:
        reason = backend.refuse(call)
        if reason is not None:
            lines.append(f"  {backend.name}: refused: {reason}")
        elif chosen is None:
            chosen = backend
            lines.append(f"  {backend.name}: runs")
        else:
            lines.append(f"  {backend.name}: could run, {chosen.name} comes first on {call.device}")
    for backend in others:
        why = f"does not serve {call.device}" if name is None else f"{name!r} was asked for by name"
        lines.append(f"  {backend.name}: not tried: {why}")
    plan = plan_of(chosen) if chosen and plan_of else call.plan or "cached"
    head = f"{call.op} on {call.device}: " + (
        f"backend {chosen.name}, plan {plan}" if chosen else "no backend runs it (the call would raise)"
    )
    return "\n".join([head, *lines])
