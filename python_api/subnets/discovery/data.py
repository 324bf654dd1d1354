"""Batches of one epoch, from whatever form the user has them in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from .config import DiscoveryConfig
from .random_state import Streams

PLAIN = (bool, int, float, str, bytes, type(None))
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
        self.steps_per_epoch = config.steps_per_epoch
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

    def check_seeds(self, number: int) -> None:
        """Several seeds iterate over the same batches at the same time.

        Raises:
            ValueError: they can't.
        """
        if number > 1 and getattr(self._batches, "persistent_workers", False):
            raise ValueError(
                "discover: a DataLoader with persistent_workers has one set of workers, which several seeds can't "
                "share; set persistent_workers=False, or pass one seed"
            )
        if number > 1 and self._can_iterate and hasattr(self._batches, "__next__"):
            raise ValueError(
                f"discover: batches is a {type(self._batches).__name__} that can be used once, and there are {number} "
                "seeds; pass a list, a DataLoader, or a function epoch -> iterable"
            )

    def epoch(self, epoch: int) -> Iterator[Any]:
        """The batches of this epoch."""
        return islice(self.iterator(epoch), self.steps_per_epoch)

    def iterator(self, epoch: int) -> Iterator[Any]:
        """All batches that the source has for this epoch."""
        if self._can_iterate:
            set_epoch = getattr(getattr(self._batches, "sampler", None), "set_epoch", None)
            if callable(set_epoch):
                set_epoch(epoch)
            source = self._batches
        else:
            source = self._batches(epoch)  # type: ignore[operator]
        try:
            return iter(source)  # type: ignore[arg-type]
        except TypeError:
            raise TypeError(
                f"discover: batches(epoch) must return something to iterate over, got {type(source).__name__}"
            ) from None

    def beta(self, epoch: int, index: int) -> float:
        """beta of this step where annealing is by step."""
        assert self.num_steps is not None
        return self._config.beta(epoch * self.num_steps + index, self._config.epochs * self.num_steps)

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


class EpochOfSeeds:
    """One epoch of the same batches for several seeds, step by step, each seed with its own random numbers.

    Raises:
        ValueError: seeds would share an iterator, a loader's workers or a batch's memory; an epoch has more
            batches for one than another.
    """

    def __init__(self, data: EpochData, epoch: int, seeds: tuple[int, ...], streams: Streams) -> None:
        self._seeds, self._streams, self._epoch = seeds, streams, epoch
        data.check_seeds(len(seeds))
        sources = []
        for number in range(len(seeds)):
            with streams.at(number):
                sources.append(data.iterator(epoch))
        if len({id(source) for source in sources}) < len(seeds):
            raise ValueError(
                f"discover: batches gave the same iterator for {len(seeds)} seeds in epoch {epoch}; it must make a new "
                "one at each call"
            )
        self._iterators = [islice(source, data.steps_per_epoch) for source in sources]

    def __iter__(self) -> Iterator[list[Any]]:
        """Each step's batches, one per seed."""
        ended = object()
        step = 0
        while True:
            batches, drawn = [], []
            for number, iterator in enumerate(self._iterators):
                with self._streams.at(number):
                    batches.append(next(iterator, ended))
                drawn.append(versions(batches[-1]))
            if drawn != [versions(batch) for batch in batches]:
                raise ValueError(
                    f"discover: in epoch {self._epoch} one seed's batch was written into the tensors of another's; "
                    "give each its own (batch.clone()), or pass one seed"
                )
            over = [seed for seed, batch in zip(self._seeds, batches, strict=True) if batch is ended]
            if over and len(over) < len(self._seeds):
                raise ValueError(
                    f"discover: epoch {self._epoch} has {step} batches for seed {over[0]} and more for others; members "
                    "are stepped together, so set steps_per_epoch, or run these seeds apart"
                )
            if over:
                return
            step += 1
            yield batches


def versions(batch: Any) -> list[int]:
    """A number for each of its tensors that grows when the tensor is written into."""
    tensors = [leaf for leaf in tree_flatten(batch)[0] if isinstance(leaf, torch.Tensor)]
    return [tensor._version for tensor in tensors if not tensor.is_inference()]  # those can't be written into


def unique_batches(batches: list[Any]) -> tuple[list[Any], list[int]]:
    """(the different ones, the number of each batch's own among them): batches of the same content objects are one."""
    unique: list[Any] = []
    numbers = []
    for batch in batches:
        found = next((i for i, other in enumerate(unique) if other is batch or _is_same(other, batch)), len(unique))
        numbers.append(found)
        if found == len(unique):
            unique.append(batch)
    return unique, numbers


def can_stack(batches: list[Any]) -> bool:
    """Whether the different ones among these have one structure, shapes and dtypes, and all else equal."""
    unique, _ = unique_batches(batches)
    leaves, specs = zip(*map(tree_flatten, unique), strict=True)
    return all(spec == specs[0] for spec in specs) and all(map(_is_alike, zip(*leaves, strict=True)))


def _is_alike(column: tuple[Any, ...]) -> bool:
    first = column[0]
    if isinstance(first, torch.Tensor):
        return all(isinstance(x, torch.Tensor) and x.shape == first.shape and x.dtype == first.dtype for x in column)
    return all(x is first or (isinstance(x, PLAIN) and type(x) is type(first) and x == first) for x in column)


def _is_same(one: Any, other: Any) -> bool:
    """Whether all tensors of these are the same objects, and all else equal."""
    (ours, spec), (theirs, other_spec) = tree_flatten(one), tree_flatten(other)
    return spec == other_spec and all(
        a is b or (isinstance(a, PLAIN) and type(a) is type(b) and a == b) for a, b in zip(ours, theirs, strict=True)
    )


def _length(batches: Any) -> int | None:
    try:
        return len(batches)
    except (TypeError, NotImplementedError):
        return None
