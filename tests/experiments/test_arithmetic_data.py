"""The arithmetic tasks: exact class shares, what blind rules score, and what each random set promises."""

from __future__ import annotations

import math

import pytest
import torch
from subnets.experiments.arithmetic import data


def all_pairs() -> torch.Tensor:
    """Every pair (a, b) of 0 .. 999, int64 [1000000, 2]."""
    return torch.cartesian_prod(torch.arange(1000), torch.arange(1000))


@pytest.mark.parametrize("task", data.TASKS.values(), ids=lambda task: task.name)
def test_answer_zero_has_share_0_265_and_the_other_answers_about_0_1224(task: data.Task) -> None:
    shares = torch.bincount(task.answer(all_pairs()), minlength=7).double() / 1_000_000
    assert shares[0].item() == pytest.approx(0.265, abs=6e-4)
    for share in shares[1:].tolist():
        assert share == pytest.approx(0.1224, abs=1.2e-3)


def test_blind_rules_score_0_265_on_t2_and_t1s_function_scores_0_286() -> None:
    pairs = all_pairs()
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    a, b, right = pairs[:, 0], pairs[:, 1], data.T2.answer(pairs)

    def score(answer: torch.Tensor) -> float:
        return (answer % 7 == right).double().mean().item()

    assert score(torch.zeros_like(a)) == pytest.approx(0.265, abs=1e-3)
    assert score(2 * a * a) == pytest.approx(0.265, abs=1e-3)
    assert score(2 * b * b) == pytest.approx(0.265, abs=1e-3)
    assert score(data.T1.answer(pairs)) == pytest.approx(0.286, abs=1e-3)


def test_on_equal_pairs_the_rule_of_t2_is_twice_the_square() -> None:
    pairs = data.ambiguous_pairs(500, torch.Generator().manual_seed(0))
    assert torch.equal(pairs[:, 0], pairs[:, 1])
    assert torch.equal(data.T2.answer(pairs), 2 * pairs[:, 0] ** 2 % 7)


def test_sequences_are_a_b_separator_answer() -> None:
    pairs = torch.tensor([[3, 5], [999, 0]])
    expected = [[3, 5, 1000, (3 + 15) % 7], [999, 0, 1000, 999 % 7]]
    assert data.sequences(pairs, data.T1).tolist() == expected


def test_the_first_thousand_rows_contain_every_integer_and_later_rows_are_drawn_with_replacement() -> None:
    for make in (data.random_pairs, data.unambiguous_pairs):
        pairs = make(3000, torch.Generator().manual_seed(1))
        assert pairs[:1000, 0].unique().numel() == 1000
        assert pairs[1000:2000, 0].unique().numel() < 700
        assert pairs.min().item() >= 0 and pairs.max().item() <= 999


def test_unambiguous_pairs_never_have_a_equal_to_b_and_reach_all_other_values() -> None:
    pairs = data.unambiguous_pairs(200_000, torch.Generator().manual_seed(2))
    assert not (pairs[:, 0] == pairs[:, 1]).any()
    assert ((pairs[:, 1] - pairs[:, 0]) % 1000).unique().tolist() == list(range(1, 1000))


def test_transfer_sets_of_one_seed_are_nested_and_of_the_right_size() -> None:
    small, large = data.transfer_set(40, seed=7), data.transfer_set(640, seed=7)
    assert (len(small), len(large)) == (1040, 1640)
    assert torch.equal(large[:1040], small)
    assert torch.equal(small[:1000, 0], small[:1000, 1])
    assert not torch.equal(data.transfer_set(40, seed=8), small)


def test_held_out_splits_differ_and_repeat() -> None:
    validation, test = (data.held_out_set(data.T2, split, 3) for split in ("validation", "test"))
    assert validation.shape == test.shape == (1000, 4)
    assert not torch.equal(validation, test)
    assert torch.equal(test, data.held_out_set(data.T2, "test", 3))


def test_disambiguation_sizes_are_the_published_ones() -> None:
    assert len(data.DISAMBIGUATION_SIZES) == 17
    assert data.DISAMBIGUATION_SIZES[0] == 0 and data.DISAMBIGUATION_SIZES[-1] == 10000


def test_a_perfect_model_of_t1_has_the_loss_ln_1000_over_3() -> None:
    assert data.LOSS_FLOOR == pytest.approx(math.log(1000) / 3) == pytest.approx(2.3026, abs=1e-4)
    shares = torch.bincount(data.T1.answer(all_pairs()), minlength=7).double() / 1_000_000
    entropy = -(shares * shares.log()).sum().item()
    assert (math.log(1000) + entropy) / 3 == pytest.approx(2.934, abs=1e-3)  # the plateau: only the shares are known
