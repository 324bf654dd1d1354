"""The numbers of docs/survey_errors.md, each computed from its formula or from the library, and found on the page."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from subnets.discovery import ContinuousSparsification, Csordas

from subnet_kernels.masks import Gumbel, keep_thresholds

PAGE = (Path(__file__).parents[2] / "docs" / "survey_errors.md").read_text(encoding="utf-8")


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


@pytest.mark.parametrize(
    ("shown", "value"),
    [
        ("| .7109 | .7109 | .7109 |", [sigmoid(0.9)] * 3),  # for every temperature
        ("| .7109 | .5225 | .5022 |", [sigmoid(0.9 * tau) for tau in (1, 0.1, 0.01)]),
        ("π²/3 = 3.2899", [math.pi**2 / 3]),
        ("σ(2) = .8808", [sigmoid(2)]),
        ("needs the logit 2.197", [math.log(0.9 / 0.1)]),
        ("1e-4/128 = 7.8e-7", [1e-4 / 128]),
        ("1.0651 in\nepoch 1", [200 ** (1 / 84)]),
        ("14.142 in epoch 42", [200 ** (42 / 84)]),
        ("187.775 in epoch 83", [200 ** (83 / 84)]),
        ("200 · .05 = 10", [200 * 0.05]),
        ("σ = .99995", [sigmoid(200 * 0.05)]),
        ("−.05 has 4.5e-5", [sigmoid(-200 * 0.05)]),
    ],
)
def test_numbers_on_the_page_are_their_formulas_rounded(shown: str, value: list[float]) -> None:
    assert shown in PAGE
    printed = [word.strip("|,") for word in shown.replace("=", " ").split()]
    for number in value:
        assert any(_rounds_to(number, text) for text in printed), (shown, number)


def _rounds_to(number: float, text: str) -> bool:
    """Is `text` the number, rounded to as many digits as it has?"""
    digits = text.partition("e")[0]
    try:
        given = float(text)
    except ValueError:
        return False
    unit = 10.0 ** -len(digits.partition(".")[2]) * (10.0 ** float(text.partition("e")[2] or 0))
    return abs(given - number) <= unit / 2 + 1e-12


def test_the_two_readings_of_the_bracket_have_the_probabilities_of_the_table() -> None:
    """A million draws of the noise as the survey writes it; its mean and variance too."""
    uniform = torch.rand(2, 10**6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = -(uniform[0].log() / uniform[1].log()).log()
    assert noise.mean().item() == pytest.approx(0, abs=6e-3)  # std of the mean .0018
    assert noise.var().item() == pytest.approx(math.pi**2 / 3, abs=0.02)
    for tau in (1.0, 0.1, 0.01):
        right, literal = (0.9 + noise) / tau, 0.9 + noise / tau
        assert (right.sigmoid() > 0.5).double().mean().item() == pytest.approx(0.7109, abs=2e-3)
        assert (literal.sigmoid() > 0.5).double().mean().item() == pytest.approx(sigmoid(0.9 * tau), abs=2e-3)


def test_the_library_has_the_right_reading() -> None:
    """P(m = 1) is the threshold over 2^16, which no temperature enters; the slope is s (1 - s) / tau."""
    logit = torch.tensor([0.9], dtype=torch.float64)
    assert keep_thresholds(logit, 1.0).item() / 2**16 == pytest.approx(sigmoid(0.9), abs=2**-16)
    key = torch.tensor([5, 0])
    for tau in (1.0, 0.1):
        kind = Gumbel(tau=tau).at(key)
        s = torch.sigmoid((logit + kind.noise(logit)) / tau)
        assert kind.value(logit, 1.0).item() == float(s > 0.5)
        assert kind.slope(logit, 1.0).item() == pytest.approx((s * (1 - s) / tau).item())


def test_an_unused_logit_crosses_zero_at_step_203() -> None:
    settings = Csordas().settings()
    assert (settings["score_init"], settings["lr"], settings["lam"]) == (2.0, 0.01, 1e-4 / 128)
    logit = torch.full((1,), settings["score_init"], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logit], settings["lr"])
    steps = 0
    while logit.item() > 0:
        logit.grad = torch.full_like(logit, settings["lam"])
        optimizer.step()
        steps += 1
    assert steps == 203 and "crosses 0 at step\n203" in PAGE


def test_beta_and_the_first_score_are_the_librarys_too() -> None:
    method = ContinuousSparsification()
    config = method.config()
    betas = {epoch: config.beta(epoch, config.epochs) for epoch in (0, 1, 42, 83, 84)}
    expected = {0: 1.0, 1: 1.0651, 42: 14.142, 83: 187.775, 84: 200.0}
    assert betas == pytest.approx(expected, rel=1e-4) and config.epochs == 85 and config.score_init == 0.0
