"""Rounding to bf16 by a hash: the definition, and the CPU kernels that keep moments so."""

from __future__ import annotations

import math

import pytest
import torch

from subnet_kernels.rounding import round_to_bf16, rounding_bits


def test_the_bits_are_these():
    """Python's own integers; index 0 in step 0 is 0, which every stage leaves."""

    def by_hand(index: int, step: int) -> int:
        x = (index + step * 0x9E3779B9) % 2**32
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        return x ^ x >> 16

    assert rounding_bits(4, 0)[0] == 0
    for step in (1, 7, 123_456):
        expected = [by_hand(index, step) for index in range(100)]
        assert rounding_bits(100, step).tolist() == expected
        assert rounding_bits(100, torch.tensor(float(step))).tolist() == expected


def test_both_halves_are_even_and_unrelated_over_elements_and_steps():
    num = 200_000
    halves = [(bits & 0xFFFF, bits >> 16) for bits in (rounding_bits(num, 5), rounding_bits(num, 6))]
    columns = torch.stack([half.double() / 2**16 for pair in halves for half in pair])
    assert (columns.mean(1) - 0.5).abs().max() < 5 * (1 / 12 / num) ** 0.5
    off_diagonal = torch.corrcoef(columns) - torch.eye(4)
    assert off_diagonal.abs().max() < 5 / num**0.5
    counts = torch.bincount(halves[0][0] >> 8, minlength=256).double()  # chi squared, 255 degrees of freedom
    assert ((counts - num / 256) ** 2 / (num / 256)).sum() < 255 + 6 * (2 * 255) ** 0.5


@pytest.mark.parametrize("value", [0.12345, -3.3e-20, 7.1e37, 1.0])
def test_rounding_is_right_on_average_and_to_a_neighbour(value):
    num = 400_000
    exact = torch.full((num,), value)
    rounded = round_to_bf16(exact, rounding_bits(num, 3) & 0xFFFF).double()
    below = exact[:1].view(torch.int32).bitwise_and(-65536).view(torch.float32).double()
    gap = 2.0 ** math.floor(math.log2(abs(value))) * 2**-7  # bf16 keeps 8 bits
    assert set((rounded - below).abs().unique().tolist()) <= {0.0, gap}
    assert (rounded.mean() - exact[0].double()).abs() <= 5 * gap / 2 / num**0.5


def test_special_values_stay():
    inf, nan = float("inf"), float("nan")
    odd_nan = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    for random in (0, 1, 0xFFFF):
        bits = torch.full((5,), random)
        got = round_to_bf16(torch.tensor([inf, -inf, nan, 0.0, 2.0]), bits)
        assert got[:2].tolist() == [inf, -inf] and got[2].isnan() and got[3:].tolist() == [0.0, 2.0]
        assert round_to_bf16(odd_nan, bits[:2]).isnan().all()


def test_a_second_moment_decays_though_each_step_changes_it_by_less_than_a_unit_in_the_last_place():
    moment, num = torch.full((4096,), 1.0).bfloat16(), 4096
    for step in range(1, 1001):
        moment = round_to_bf16(moment.float() * 0.999, rounding_bits(num, step) >> 16)
    assert moment.double().mean().item() == pytest.approx(0.999**1000, rel=5e-3)
    nearest = torch.tensor(1.0, dtype=torch.bfloat16)
    assert (nearest.float() * 0.999).bfloat16() == nearest  # what rounding to the nearest would do, for ever
