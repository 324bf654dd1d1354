"""Which backend runs a call: the first, in the device's order of preference, that does not refuse. On a GPU the order
is what was measured there (tables/<gpu>.json, as data); before any measurement it is the one given here.

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
from .backends.triton import TritonBackend, rules

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
# First on a GPU that nobody measured. Where a call is one pass over memory: cuda, because its kernels are compiled
# ahead of time (no compiler at the first call) and take their table of addresses as an argument (a captured step stays
# one launch). Where it has a product: triton, because its rules choose by shape between what is done inside a product
# and the vendor's, and it serves more of the cases.
_WITH_PRODUCT = ("masked_linear", "masked_conv2d", "linear_step")
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
    """Run every op inside the block on the backend ``name``.

    Args:
        name: "reference", "cpu", "triton" or "cuda".

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


def _first_on_gpu(call: Call) -> str:
    """The backend that is asked first. Plans that keep no effective weight are not measured apart: a backward pass that
    is given none finds the same backend as the forward pass."""
    if call.plan in (None, "cached") and torch.cuda.is_available():
        dtype = str(call.compute_dtype).removeprefix("torch.")
        measured = rules.preferred_backends(torch.cuda.get_device_name())
        if (name := measured.get((call.op, dtype, call.num_weights))) in BACKENDS:
            return name
    return "triton" if call.op in _WITH_PRODUCT else "cuda"


def order_of(call: Call) -> tuple[Backend, ...]:
    """The backends that are asked, in their order."""
    order = _ORDER.get(call.device, _OTHER_DEVICES)
    if call.device != "cuda":
        return order
    first = BACKENDS[_first_on_gpu(call)]
    return (first, *(backend for backend in order if backend is not first))


def forget_choices() -> None:
    """Choose anew: after a table was written."""
    _choose.cache_clear()
    _choose_by_facts.cache_clear()


@functools.lru_cache(maxsize=4096)
def _choose(call: Call, name: str | None) -> Backend:
    if name is not None:
        backend = BACKENDS[_check_name(name)]
        reason = backend.refuse(call)
        if reason is not None:
            raise BackendRefused(f"backend {name!r} refused {call.op}: {reason}")
        return backend
    for backend in order_of(call):
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
    num_dims: int, is_same_shape: bool, num_weights: int, name: str | None,
) -> Backend:
    call = Call(op, device, weight_dtype, compute_dtype, kind, plan, num_dims, is_same_shape, num_weights)
    return _choose(call, name)


def choose_for(
    op: str, weight: Tensor, scores: Tensor, kind: str, compute_dtype: torch.dtype, plan: str | None = None,
    name: str | None = None,
) -> Backend:
    """:func:`choose` for a call with these (checked) tensors; the cheap way, for every forward pass."""
    num = weight.numel()
    return _choose_by_facts(
        op, weight.device.type, weight.dtype, compute_dtype, kind, plan, weight.dim(), num == scores.numel(),
        rules.bucket(num) if weight.is_cuda else 0, name or _forced.get(),
    )  # fmt: skip


def describe(call: Call, name: str | None = None, plan_of: Callable[[Backend], str] | None = None) -> str:
    """The decision for ``call`` in words, one line per backend. plan_of: the plan that a backend would choose."""
    name = name or _forced.get()
    order = list(order_of(call))
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
