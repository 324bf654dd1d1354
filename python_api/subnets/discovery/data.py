"""Batches of one epoch, from whatever form the user has them in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch

from .config import DiscoveryConfig

Batches = Iterable[Any] | Callable[[int], Iterable[Any]]


class EpochData:
    """``batches`` as epochs: epoch -> iterator over at most ``steps_per_epoch`` batches.

    Raises:
        TypeError: neither something to iterate over nor a function of the epoch.
        ValueError: an iterator that ends after one epoch where several are wanted; too few batches for steps_per_epoch;
            no length known where annealing by step needs one.
    """

    def __init__(self, batches: Batches, config: DiscoveryConfig) -> None:
        can_iterate = hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")
        if not can_iterate and not callable(batches):
            raise TypeError(
                "discover: batches must be something to iterate over once per epoch, or a function epoch -> iterable, "
                f"got {type(batches).__name__}"
            )
        if can_iterate and config.epochs > 1 and hasattr(batches, "__next__"):
            raise ValueError(
                f"discover: batches is a {type(batches).__name__} that is used up after one epoch, and epochs is "
                f"{config.epochs}; pass a list, a DataLoader, or a function epoch -> iterable"
            )
        self._batches, self._can_iterate, self._config = batches, can_iterate, config
        length = _length(batches) if can_iterate else None
        wanted = config.steps_per_epoch
        if length is not None and wanted is not None and length < wanted:
            raise ValueError(
                f"discover: batches has {length} batches per epoch, fewer than steps_per_epoch={wanted}; lower "
                "steps_per_epoch, or pass more batches"
            )
        self.num_steps = length if wanted is None else wanted  # per epoch; None where only running shows it
        if config.anneal == "step" and self.num_steps is None:
            raise ValueError(
                "discover: anneal='step' must know how many steps an epoch has, and batches has no length; set "
                "steps_per_epoch"
            )

    def generators(self) -> list[torch.Generator]:
        """Generators that a DataLoader and its sampler bring along: seeded per epoch like everything else."""
        samplers = [getattr(self._batches, name, None) for name in ("sampler", "batch_sampler")]
        found = [getattr(holder, "generator", None) for holder in (self._batches, *samplers)]
        return [generator for generator in found if isinstance(generator, torch.Generator)]

    def epoch(self, epoch: int) -> Iterator[Any]:
        """The batches of this epoch."""
        if self._can_iterate:
            set_epoch = getattr(getattr(self._batches, "sampler", None), "set_epoch", None)
            if callable(set_epoch):
                set_epoch(epoch)
            source = self._batches
        else:
            source = self._batches(epoch)  # type: ignore[operator]
        try:
            iterator = iter(source)  # type: ignore[arg-type]
        except TypeError:
            raise TypeError(
                f"discover: batches(epoch) must return something to iterate over, got {type(source).__name__}"
            ) from None
        return islice(iterator, self._config.steps_per_epoch)

    def check_count(self, epoch: int, steps: int) -> None:
        """The epoch gave what was promised.

        Raises:
            ValueError: no batch, or another number than annealing by step or steps_per_epoch counted on.
        """
        if steps == 0:
            raise ValueError(
                f"discover: batches gave no batch in epoch {epoch}; pass a list, a DataLoader, or a function epoch -> "
                "iterable that starts anew each time"
            )
        is_counted_on = self._config.steps_per_epoch is not None or self._config.anneal == "step"
        if is_counted_on and steps != self.num_steps:
            raise ValueError(
                f"discover: batches gave {steps} batches in epoch {epoch}, not the {self.num_steps} of steps_per_epoch "
                "or of its length; set steps_per_epoch to what every epoch has"
            )


def _length(batches: Any) -> int | None:
    try:
        return len(batches)
    except (TypeError, NotImplementedError):
        return None
