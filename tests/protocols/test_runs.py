"""Break It Down over runs: the exact sign-flip test by hand and against scipy, and what a table of runs says."""

from __future__ import annotations

import math

import pytest
from subnets.protocols import BreakItDown, Subroutine, over_runs, runs_table, sign_flip_p


def test_all_sign_assignments_are_counted():
    assert sign_flip_p([0.5, 0.3, 0.2]) == 1 / 8  # no other assignment reaches the sum 1
    assert sign_flip_p([-0.5, -0.3, -0.2]) == 1
    # sums of +-3 +-2 +-1: 6, 4, 2, 0 (3 - 2 - 1), 0, -2, -4, -6; the observed one is 0 with five at or above it
    assert sign_flip_p([3, -2, -1]) == 5 / 8 and sign_flip_p([-3, 2, 1]) == 5 / 8
    assert sign_flip_p([0.1] * 9) == 1 / 512  # rounding: ties count as ties
    assert sign_flip_p([0.1, 0.2, -0.3]) == 5 / 8  # as 3 - 2 - 1, though .1 + .2 - .3 > 0 in floating point
    assert sign_flip_p([0.0, 0.0]) == 1


def test_seeds_of_one_base_network_count_once():
    nine, bases = [0.4, 0.5, 0.6, 0.1, 0.2, 0.3, 0.7, 0.8, 0.9], ["a"] * 3 + ["b"] * 3 + ["c"] * 3
    assert sign_flip_p(nine) == 1 / 512 and sign_flip_p(nine, bases) == 1 / 8
    assert sign_flip_p([5, -9, 1], ["a", "a", "b"]) == sign_flip_p([-2, 1]) == 3 / 4  # the mean, not the first


def test_sign_flips_agree_with_scipy():
    stats, np = pytest.importorskip("scipy.stats"), pytest.importorskip("numpy")
    for seed in range(4):
        values = np.random.default_rng(seed).normal(0.3, 1, 11)
        expected = stats.permutation_test(
            (values,), np.mean, permutation_type="samples", alternative="greater", n_resamples=4000
        ).pvalue
        assert sign_flip_p(values.tolist()) == pytest.approx(float(expected), abs=1e-12)


def run_of(sub, abl, control=None):
    """delta_sub = sub, delta_abl = -abl."""
    one = Subroutine("i", 0.1, 1.0, {"i": 0.25 + sub, "j": 0.25}, {"i": 0.25, "j": 0.25 + abl}, 0.25)
    return BreakItDown({"i": one}, {}, "zero", control=control)


def test_means_spreads_and_p_values_over_runs():
    runs = [run_of(s, a, run_of(0.5, b)) for s, a, b in ((0.5, 0.25, 0.0), (0.25, 0.5, 0.25), (0.75, 0.0, 0.125))]
    trained, random = over_runs(runs)
    assert (trained["base"], random["base"], trained["runs"]) == ("trained", "random", 3)
    assert trained["delta_sub"] == 0.5 and trained["delta_sub_std"] == pytest.approx(math.sqrt(1 / 24))
    assert trained["delta_abl"] == -0.25 == -trained["quality"] and random["delta_abl"] == -0.125
    assert trained["p_sub"] == 1 / 8 and trained["p_abl"] == 2 / 8  # the sign of a difference of 0 does not matter
    # against the control: delta_sub 0, -.25, +.25; delta_abl lower by .25, .25, -.125
    assert trained["p_sub_control"] == 6 / 8 and trained["p_abl_control"] == 2 / 8
    assert over_runs(runs, groups=["a", "a", "a"])[0]["p_sub"] == 1 / 2
    assert over_runs([run_of(0.5, 0.25)])[0]["p_abl_control"] is None
    text = runs_table([trained, random]).text()
    assert "+0.500 ± 0.204" in text and "i, random" in text and "0.7500" in text


def test_what_can_not_be_tested_is_refused():
    for bad in ([], [math.nan], [0.1] * 21):
        with pytest.raises(ValueError, match="of 1 to 20 independent runs or groups"):
            sign_flip_p(bad)
    assert sign_flip_p([0.1] * 21, list("aaaaaaaaaabbbbbbbbbbb")) == 1 / 4
    with pytest.raises(ValueError, match="one label per run, got 1 for 2"):
        sign_flip_p([1, 2], ["a"])
    with pytest.raises(ValueError, match="one or more"):
        over_runs([])
