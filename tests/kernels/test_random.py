"""Draws for mask elements: Philox's published vectors, which half of which word an element takes, and equal bits from
Python, every CPU capability and the CUDA C++ kernel (as a host function)."""

import pytest
import torch

import subnet_kernels as sk
from subnet_kernels.random import philox4x32, plain_random_bits
from tests.kernels import cuda_on_host

SHAPES = [(5,), (), (8, 8), (67, 129), (4, 3, 3, 3), (1, 2051), (300, 7), (0, 3), (3, 0)]
SEED, OFFSET = 0x1234_5678_9ABC_DEF0, 0xFFFF_FFFF_0000_0007  # the offset counts mod 2^32


def words(*values):
    return tuple(torch.tensor(value) for value in values)


# counter, key, result; source: the known-answer tests of Random123, the authors' own implementation
PUBLISHED = [
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]  # fmt: skip


@pytest.mark.parametrize("counter, key, result", PUBLISHED)
def test_philox_gives_the_published_words(counter, key, result):
    assert tuple(int(word) for word in philox4x32(words(*counter), words(*key))) == result


def sizes_of(shape):
    return (shape[0], int(torch.tensor(shape[1:]).prod())) if len(shape) > 1 else (1, int(torch.tensor(shape).prod()))


def test_an_element_takes_its_half_word_by_row_column_sample_and_offset():
    """Sample 2, row 3, column 13: counter (3, 1, 2, offset), word (13 % 8) // 2, high half; key: the seed's halves."""
    bits = sk.random_bits(SEED, OFFSET, (5, 4, 5), num_samples=3).to(torch.int64).view(3, 5, 20)
    drawn = philox4x32(words(3, 1, 2, 7), words(0x9ABCDEF0, 0x12345678))
    assert bits[2, 3, 13] == int(drawn[2]) >> 16
    assert bits[2, 3, 12] == int(drawn[2]) & 0xFFFF and bits[2, 3, 8] == int(drawn[0]) & 0xFFFF
    assert bits[2, 3, 15] == int(drawn[3]) >> 16


def test_draws_of_seed_zero_have_these_values():
    assert sk.random_bits(0, 0, (8,)).tolist() == [[0xE8D5, 0x6627, 0xC58D, 0xE169, 0xAC4C, 0xBC57, 0xDBD8, 0x9B00]]


def natives():
    pytest.importorskip("subnet_kernels._C", reason="the extension is not built")
    from tests.kernels.native_inputs import CAPABILITIES, capability

    return CAPABILITIES, capability


def on_host(seed, given, first_sample=0):
    cuda_on_host.OnHost().ops.random_bits(seed, torch.tensor(OFFSET - 2**64), first_sample, given)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_seed_for_each_sample_draws_what_that_seed_draws_alone_everywhere(shape):
    capabilities, capability = natives()
    seeds = torch.tensor([SEED, 5, -(2**63) + 9, 5, SEED])[::2]  # strided, too
    alone = [sk.random_bits(int(seed), OFFSET, shape).to(torch.int32) for seed in seeds]
    wanted = torch.cat(alone)
    plain = plain_random_bits(seeds, torch.tensor(OFFSET - 2**64), 3, *sizes_of(shape))
    assert torch.equal(plain.to(torch.int32).flatten(), wanted.flatten())
    for name in capabilities:
        with capability(name):
            assert torch.equal(sk.random_bits(seeds, OFFSET, shape, num_samples=3).to(torch.int32), wanted)
    if cuda_on_host.compiler() is not None:
        given = torch.zeros(3, *sizes_of(shape), dtype=torch.uint16)
        on_host(seeds.contiguous(), given)
        assert torch.equal(given.to(torch.int32).flatten(), wanted.flatten())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_python_every_cpu_capability_and_the_cuda_kernel_draw_the_same_bits(shape):
    capabilities, capability = natives()
    wanted = plain_random_bits(torch.tensor(SEED), torch.tensor(OFFSET - 2**64), 3, *sizes_of(shape)).to(torch.int32)
    for name in capabilities:
        with capability(name):
            made = sk.random_bits(SEED, OFFSET, shape, num_samples=3)
        assert made.dtype == torch.uint16 and made.shape == (3, *shape)
        assert torch.equal(made.to(torch.int32).flatten(), wanted.flatten())
    if cuda_on_host.compiler() is None:
        return
    out = torch.zeros(wanted.numel() + 1, dtype=torch.uint16)
    for begin in (0, 1):  # aligned, and not
        given = out[begin : begin + wanted.numel()].view(wanted.shape)
        on_host(torch.tensor(SEED), given)
        assert torch.equal(given.to(torch.int32), wanted)


def test_samples_may_be_numbered_from_any_number():
    natives()
    first, seed, offset = 2**32 - 3, torch.tensor(SEED), torch.tensor(OFFSET - 2**64)
    wanted = plain_random_bits(seed, offset, 2, 5, 19, first).to(torch.int32)
    for sample in range(2):
        (drawn,) = philox4x32(words(4, 2, first + sample, 7), words(0x9ABCDEF0, 0x12345678))[:1]
        assert wanted[sample, 4, 17] == int(drawn) >> 16
    assert torch.equal(sk.random_bits(SEED, OFFSET, (5, 19), 2, first_sample=first).to(torch.int32), wanted)
    if cuda_on_host.compiler() is not None:
        given = torch.zeros(2, 5, 19, dtype=torch.uint16)
        on_host(seed, given, first)
        assert torch.equal(given.to(torch.int32), wanted)
    with pytest.raises(ValueError, match="first_sample must be in"):
        sk.random_bits(SEED, OFFSET, (5, 19), 3, first_sample=first)


def test_draws_do_not_depend_on_threads_or_on_what_else_is_drawn():
    whole = sk.random_bits(5, 6, (700, 331), num_samples=2).to(torch.int32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(sk.random_bits(5, 6, (700, 331), num_samples=2).to(torch.int32), whole)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(sk.random_bits(5, 6, (9, 40)).to(torch.int32), whole[:1, :9, :40])
    seed, offset = torch.tensor(5), torch.tensor(6)
    assert torch.equal(sk.random_bits(seed, offset, (9, 40)).to(torch.int32), whole[:1, :9, :40])
    for other in (sk.random_bits(6, 6, (700, 331), 2), sk.random_bits(5, 7, (700, 331), 2)):
        assert (other.to(torch.int32) == whole).float().mean() < 1e-3
    assert (whole[0] == whole[1]).float().mean() < 1e-3


def test_draws_are_uniform_and_neighbours_are_not_correlated():
    bits = sk.random_bits(11, 0, (1024, 1024)).to(torch.float64)[0]
    assert (bits.mean() - 32767.5).abs() < 5 * 18918 / 1024  # five standard deviations of the mean
    counts = torch.histc(bits, bins=256, min=0, max=65536)
    chi_square = ((counts - 4096) ** 2 / 4096).sum()
    assert 255 - 5 * 22.6 < chi_square < 255 + 5 * 22.6
    centred = (bits - 32767.5) / 18918
    for other in (centred.roll(1, 0), centred.roll(1, 1), centred.roll(8, 1)):
        assert (centred * other).mean().abs() < 5 / 1024


def test_what_fits_nothing_is_refused_in_words():
    with pytest.raises(TypeError, match=r"seed must be an int or an int64 tensor, got torch\.float32"):
        sk.random_bits(torch.tensor(1.0), 0, (3,))
    with pytest.raises(TypeError, match="offset must be an int or an int64 tensor, got float"):
        sk.random_bits(1, 0.5, (3,))
    with pytest.raises(ValueError, match=r"seed must be 0-d or \[1\], one for each sample, got shape \[2\]"):
        sk.random_bits(torch.tensor([1, 2]), 0, (3,))
    with pytest.raises(ValueError, match=r"offset must be 0-d, got shape \[1\]"):
        sk.random_bits(1, torch.tensor([1]), (3,))
    with pytest.raises(ValueError, match=r"sizes must not be negative, got -1 samples of shape \[3\]"):
        sk.random_bits(1, 0, (3,), num_samples=-1)
