"""Score gradients of convolutions put off to the end of a backward pass, to be made for all layers in one call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.base import Backend
from ..masks import MaskKind


class Entry(NamedTuple):
    """What one layer's backward pass leaves behind."""

    grad_w_eff: Tensor
    grad_penalty: Tensor | None
    weight: Tensor
    scores: Tensor  # a leaf: its .grad is written


class PendingScoreGradients:
    """While open, backward passes of masked convolutions add what their score gradient needs instead of making it."""

    def __init__(self) -> None:
        self.is_open = False
        self._entries: dict[tuple[Backend, MaskKind, int], tuple[Tensor, list[Entry]]] = {}

    def add(self, backend: Backend, kind: MaskKind, beta: Tensor, entry: Entry) -> None:
        self._entries.setdefault((backend, kind, id(beta)), (beta, []))[1].append(entry)

    def clear(self) -> None:
        self._entries.clear()

    @torch.no_grad()
    def finish(self) -> None:
        """Make the gradients and add each to its scores' ``.grad``."""
        for (backend, kind, _), (beta, entries) in self._entries.items():
            grads, penalties, weights, all_scores = (list(part) for part in zip(*entries, strict=True))
            made = backend.grad_scores_of_many(grads, penalties, weights, all_scores, beta, kind)  # pyright: ignore
            for entry, grad_scores in zip(entries, made, strict=True):
                scores = entry.scores
                scores.grad = grad_scores if scores.grad is None else scores.grad.add_(grad_scores)
        self.clear()
