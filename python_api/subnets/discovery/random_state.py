"""Random numbers that depend on the seed and the epoch alone, and leave the caller's as they were."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator

import numpy as np
import torch


@contextlib.contextmanager
def seeded(seed: int, devices: Iterable[torch.device], generators: Iterable[torch.Generator] = ()) -> Iterator[None]:
    """Inside: torch on the CPU and on ``devices``, numpy, random and ``generators`` start from ``seed``. After it, all
    of them are where they were before, whatever happened inside."""
    cuda = sorted({torch.cuda.current_device() if d.index is None else d.index for d in devices if d.type == "cuda"})
    own = {id(generator): generator for generator in generators}.values()
    states = [(generator, generator.get_state()) for generator in own]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=cuda):
        try:
            torch.default_generator.manual_seed(seed)
            for index in cuda:
                torch.cuda.default_generators[index].manual_seed(seed)
            for generator in own:
                generator.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
            for generator, state in states:
                generator.set_state(state)
