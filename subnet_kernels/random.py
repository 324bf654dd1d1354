"""Random numbers for mask elements that depend on the element's place, a seed and an offset alone.

The draw of an element is the same on every backend, whatever its tiles and threads, so that a backward pass can make a
mask again without keeping it. This file is the definition, in plain PyTorch; csrc/philox.h, csrc/cpu/random.cpp and
csrc/cuda/random.cu are its translations, equal to the bit.

One call of Philox4x32-10 gives four 32-bit words for the eight columns of a group:

- counter: (row, column // 8, sample, offset mod 2^32); key: (low, high) half of the seed, mod 2^64
- with one seed for each sample the counter's sample is 0: a sample's draws depend on its own seed, not on its place
- column c takes word (c % 8) // 2, its low half if c is even, its high half if c is odd

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .backends import native

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # the golden ratio, sqrt(3) - 1
NUM_ROUNDS = 10
_WORD = 0xFFFFFFFF
Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox4x32(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """The four words of Philox4x32-10; counters and keys broadcast and are int64 tensors of values in [0, 2^32)."""
    a, b, c, d = counter
    low, high = key
    for _ in range(NUM_ROUNDS):
        of_a, of_c = a * MULTIPLIERS[0], c * MULTIPLIERS[1]  # mod 2^64: int64 keeps all bits
        a, b = (of_c >> 32 & _WORD) ^ b ^ low, of_c & _WORD
        c, d = (of_a >> 32 & _WORD) ^ d ^ high, of_a & _WORD
        low, high = low + KEY_STEPS[0] & _WORD, high + KEY_STEPS[1] & _WORD
    return a, b, c, d


def rows_and_columns(shape: Sequence[int]) -> tuple[int, int]:
    """A mask of this shape as a matrix: the first dimension is the row, all others together are the column."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def check_samples(first_sample: int, num_samples: int) -> None:
    """The numbers of all samples fit into the counter's 32 bits.

    Raises:
        ValueError: they do not.
    """
    if not 0 <= first_sample <= _WORD - num_samples:
        raise ValueError(f"random_bits: first_sample must be in [0, 2^32 - num_samples), got {first_sample}")


def random_bits(
    seed: int | Tensor, offset: int | Tensor, shape: Sequence[int], num_samples: int = 1,
    device: torch.device | str | None = None, first_sample: int = 0,
) -> Tensor:
    """16 random bits for every element of ``num_samples`` masks of ``shape``; the module says which.

    ``bits < round(p * 2**16)`` is true with probability p, to 1 in 65,536.

    Args:
        seed: an int, or an int64 tensor whose values are read on their device (so that a captured CUDA graph can draw
            anew at each replay); 0-d for all samples, or ``[num_samples]``, one for each: sample i is then what
            ``seed[i]`` alone gives; taken mod 2^64.
        offset: an int or a 0-d int64 tensor, likewise; what tells calls with one seed apart, such as a count of steps;
            taken mod 2^32.
        shape: of one mask: the first dimension is the row, all others together, in C order, are the column. A shape
            with one dimension or none is one row.
        num_samples: masks that are drawn; sample i does not depend on how many they are.
        device: where seed and offset are ints (the CPU if not given).
        first_sample: the number of the first sample, in [0, 2^32); with one seed for all of them.

    Returns:
        uint16 ``[num_samples, *shape]``, uniform in [0, 2^16). (PyTorch compares uint16 on few devices:
        ``.to(torch.int32)``.)

    Raises:
        TypeError: seed or offset are neither ints nor int64 tensors.
        ValueError: a tensor has another shape, the devices differ, or a size is negative.

    >>> random_bits(1, 0, (2, 3)).tolist() == random_bits(1, 0, (2, 3), num_samples=2)[:1].tolist()
    True
    >>> each = random_bits(torch.tensor([7, 1]), 0, (2, 3), num_samples=2)
    >>> each[1].tolist() == random_bits(1, 0, (2, 3))[0].tolist()
    True
    """
    sizes = [int(size) for size in shape]
    if num_samples < 0 or any(size < 0 for size in sizes):
        raise ValueError(f"random_bits: sizes must not be negative, got {num_samples} samples of shape {sizes}")
    rows, columns = rows_and_columns(sizes)
    check_samples(first_sample, num_samples)
    seed, offset = _tensors(seed, offset, num_samples, device)
    if native.serves(seed):
        out = torch.empty(num_samples, rows, columns, dtype=torch.uint16, device=seed.device)
        torch.ops.subnet_native.random_bits(seed, offset, first_sample, out)
    else:
        out = plain_random_bits(seed, offset, num_samples, rows, columns, first_sample)
    return out.view(num_samples, *sizes)


def plain_random_bits(
    seed: Tensor, offset: Tensor, num_samples: int, rows: int, columns: int, first_sample: int = 0
) -> Tensor:
    """uint16 [num_samples, rows, columns] by plain PyTorch; seed 0-d or [num_samples]."""
    samples = 1 if seed.dim() else num_samples  # that one seed has
    groups = (columns + 7) // 8

    def indices(num: int, *shape: int) -> Tensor:
        return torch.arange(num, device=seed.device).view(shape)

    numbers = indices(samples, -1, 1, 1) + (0 if seed.dim() else first_sample)
    counter = indices(rows, 1, -1, 1), indices(groups, 1, 1, -1), numbers, offset & _WORD
    seed = seed.view(-1, 1, 1)
    words = torch.broadcast_tensors(*philox4x32(counter, (seed & _WORD, seed >> 32 & _WORD)))
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, -1).flatten(2)[..., :columns].to(torch.uint16).contiguous()


def _tensors(
    seed: int | Tensor, offset: int | Tensor, num_samples: int, device: torch.device | str | None
) -> tuple[Tensor, Tensor]:
    given = [value.device for value in (seed, offset) if isinstance(value, Tensor)]
    if device is not None:
        given.append(torch.device(device))
    made = []
    for name, value in (("seed", seed), ("offset", offset)):
        if isinstance(value, Tensor):
            if value.dtype != torch.int64:
                raise TypeError(f"random_bits: {name} must be an int or an int64 tensor, got {value.dtype}")
            if value.dim() != 0 and not (name == "seed" and value.shape == (num_samples,)):
                expected = f"0-d or [{num_samples}], one for each sample" if name == "seed" else "0-d"
                raise ValueError(f"random_bits: {name} must be {expected}, got shape {list(value.shape)}")
            value = value.contiguous()
        elif isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"random_bits: {name} must be an int or an int64 tensor, got {type(value).__name__}")
        else:
            wrapped = (value + 2**63) % 2**64 - 2**63  # as int64 keeps it
            value = torch.full((), wrapped, dtype=torch.int64, device=given[0] if given else "cpu")
        made.append(value)
    if len({value.device.type for value in made} | {device.type for device in given}) > 1:
        raise ValueError(f"random_bits: seed, offset and device must be on one device, got {given}")
    return made[0], made[1]
