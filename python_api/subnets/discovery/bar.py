"""The progress bar of a discovery: loss, beta, density and undecided fraction, refreshed a few times per second."""

from __future__ import annotations

import time
from typing import Protocol

from torch import Tensor
from tqdm import tqdm

_SECONDS_BETWEEN = 0.3
_SHARE_OF_TIME = 0.02  # counting density and undecided reads every score; it may take this share of the time


class Counts(Protocol):
    """What is counted now and then: a MaskSet, or the scores of many members."""

    def density(self) -> float: ...
    def undecided(self) -> float: ...


class Bar:
    """One bar over all steps; ``progress`` None shows it on a terminal only. Reading the loss from a GPU waits for it,
    hence not at every step."""

    def __init__(self, total: int | None, done: int, progress: bool | None) -> None:
        disable = None if progress is None else not progress
        self._bar = tqdm(total=total, initial=done, desc="discover", unit="step", disable=disable, mininterval=0.2)
        self._next_text = self._next_count = 0.0
        self._counts = ""

    def step(self, loss: Tensor, beta: float, masks: Counts) -> None:
        self._bar.update()
        if self._bar.disable:
            return
        now = time.monotonic()
        if now < self._next_text:
            return
        if now >= self._next_count:
            self._counts = f"density={masks.density():.3f}, undecided={masks.undecided():.3f}"
            self._next_count = time.monotonic() + (time.monotonic() - now) / _SHARE_OF_TIME
        self._bar.set_postfix_str(f"loss={float(loss):.4g}, beta={beta:.3g}, {self._counts}", refresh=False)
        self._next_text = time.monotonic() + _SECONDS_BETWEEN

    def close(self) -> None:
        self._bar.close()
