"""Random numbers that depend on the seed and the epoch alone, and leave the caller's as they were."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch


class RandomState:
    """The random numbers that batches, objective and evaluate may draw: torch's on the CPU and on ``devices``, numpy's,
    random's and those of ``generators``."""

    def __init__(self, devices: Iterable[torch.device], generators: Iterable[torch.Generator] = ()) -> None:
        cuda = {torch.cuda.current_device() if d.index is None else d.index for d in devices if d.type == "cuda"}
        own = {id(generator): generator for generator in generators}
        on_cuda = [torch.cuda.default_generators[index] for index in sorted(cuda)]
        self._generators = [torch.default_generator, *on_cuda, *own.values()]

    def seed(self, seed: int) -> None:
        for generator in self._generators:
            generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)

    def get(self) -> Any:
        """Where all of them are."""
        return [generator.get_state() for generator in self._generators], random.getstate(), np.random.get_state()

    def set(self, state: Any) -> None:
        for generator, its_state in zip(self._generators, state[0], strict=True):
            generator.set_state(its_state)
        random.setstate(state[1])
        np.random.set_state(state[2])

    def is_at(self, state: Any) -> bool:
        """Whether nothing was drawn since that state."""
        tensors, python, numpy = self.get()
        return (
            all(map(torch.equal, tensors, state[0])) and python == state[1] and numpy[2:] == state[2][2:]
            and bool((numpy[1] == state[2][1]).all())
        )  # fmt: skip

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """After the block all of them are where they were before, whatever happened inside."""
        before = self.get()
        try:
            yield
        finally:
            self.set(before)


class Streams:
    """The random numbers of several seeds that take turns with the same generators."""

    def __init__(self, state: RandomState, seeds: Iterable[int]) -> None:
        self.state = state
        self.states = []
        for seed in seeds:
            state.seed(seed)
            self.states.append(state.get())

    @contextlib.contextmanager
    def at(self, number: int, advance: bool = True) -> Iterator[None]:
        """Inside, the generators are where the block before with this number left them, or the last that advanced."""
        self.state.set(self.states[number])
        yield
        if advance:
            self.states[number] = self.state.get()
