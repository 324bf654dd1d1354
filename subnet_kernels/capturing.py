"""Which capture of a CUDA graph is under way. Slots ask, because a replay changes scores and beta without a trace in
any version counter, and because memory made in a capture belongs to its graph.

The number is 0 outside of captures, > 0 inside a :func:`capture_scope` (each has its own), and FOREIGN in a capture
that somebody else makes, of which nothing is known: neither where it began nor whether the next one is the same.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

FOREIGN = -1

_scope = 0  # of the process, not of a thread: backward passes run in threads of their own
_numbers = itertools.count(1)
_kept_in_scope: list[Tensor] = []
_kept_forever: list[Tensor] = []  # what graphs of others use: nobody can say when their last replay was


def is_capturing(tensor: Tensor) -> bool:
    """Whether work on this tensor goes into a graph now; tests put their own answer here."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def capture_number(tensor: Tensor) -> int:
    """The capture in which work on this tensor takes part; see the module."""
    return (_scope or FOREIGN) if is_capturing(tensor) else 0


def memory_number(tensor: Tensor) -> int:
    """The graph to which memory made now for work on this tensor is to belong: as capture_number, but the warm-up of a
    capture_scope counts too, so that the capture finds the addresses that the warm-up used."""
    return capture_number(tensor) or _scope


def keep_in_scope(*tensors: Tensor) -> None:
    """Keep tensors that a warm-up or capture made as long as its graph lives."""
    if _scope:
        _kept_in_scope.extend(tensors)


def keep_if_captured(used: Tensor, *others: Tensor | None) -> None:
    """Keep tensors from outside, which a graph will read or write, as long as the graph lives."""
    if number := capture_number(used):
        kept = _kept_forever if number == FOREIGN else _kept_in_scope
        kept += [tensor for tensor in (used, *others) if tensor is not None]


@contextlib.contextmanager
def capture_scope() -> Iterator[list[Tensor]]:
    """One graph's warm-up and capture. Gives the list of tensors that must live as long as the graph.

    Raises:
        RuntimeError: entered inside another.
    """
    global _scope, _kept_in_scope
    if _scope:
        raise RuntimeError("capture_scope: entered twice; one graph is captured at a time")
    _scope, _kept_in_scope = next(_numbers), []
    try:
        yield _kept_in_scope
    finally:
        _scope, _kept_in_scope = 0, []
