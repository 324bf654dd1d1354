"""Lesions on a network whose parts are known: what each takes away, and the p values by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from subnets.clustering import UnitChain, UnitClusters, combined_p, lesion_test, mean_p
from subnets.clustering.lesions import Lesion
from torch import nn

pytest.importorskip("scipy")
CLASSES, COPIES = 4, 3


def one_unit_group_per_class():
    """12 hidden units, three for each of four classes; the last 4 of 16 are pruned. Inputs are one-hot classes."""
    model = nn.Sequential(nn.Linear(CLASSES, 16), nn.ReLU(), nn.Linear(16, CLASSES))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for unit in range(CLASSES * COPIES):
            model[0].weight[unit, unit % CLASSES] = 1.0
            model[2].weight[unit % CLASSES, unit] = 1.0
        model[2].bias.copy_(torch.tensor([0.3, 0.2, 0.1, 0.0]))
    return model


def accuracies(model):
    with torch.no_grad():
        predicted = model(torch.eye(CLASSES)).argmax(1)
    return (predicted == torch.arange(CLASSES)).double()


def clusters_of(model, hidden, count):
    chain = UnitChain(model)
    labels = {name: np.full(size, -1) for name, size in chain.sizes.items()} | {"0": np.array(hidden)}
    return UnitClusters(chain, labels, count, "by hand")


def test_the_units_of_one_class_are_coherent_and_important():
    model = one_unit_group_per_class()
    before = [parameter.clone() for parameter in model.parameters()]
    clusters = clusters_of(model, [u % CLASSES for u in range(12)] + [-1] * 4, CLASSES)
    test = lesion_test(model, clusters, accuracies, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert [(one.layer, one.cluster, one.num_units) for one in test.lesions] == [("0", c, COPIES) for c in range(4)]
    # without its units class 0 still wins by its bias; each other class falls to another one, alone
    assert [one.change for one in test.lesions] == [0.0, -0.25, -0.25, -0.25]
    assert [one.spread for one in test.lesions] == [0.0, 4.0, 4.0, 4.0]
    for one in test.lesions:
        assert one.control_changes.size == 19 and set(one.control_changes) <= {0.0, -0.25}
        assert one.importance_p == ((one.control_changes <= one.change).sum() + 1) / 20
        assert one.coherence_p == ((one.control_spreads >= one.spread).sum() + 1) / 20
    # 3 of 220 choices of three units take a class: few random lesions do
    assert test.lesions[0].importance_p == 1.0 and max(one.importance_p for one in test.lesions[1:]) <= 3 / 20
    shifted = [one.importance_p - 0.5 / 20 for one in test.lesions]
    statistic = -2 * sum(map(math.log, shifted))
    chi2_tail = math.exp(-statistic / 2) * sum((statistic / 2) ** k / math.factorial(k) for k in range(4))
    assert test.importance_p == pytest.approx(chi2_tail, rel=1e-9)


def test_a_lesion_of_pruned_units_changes_nothing_and_is_not_important():
    model = one_unit_group_per_class()
    clusters = clusters_of(model, [0] * 12 + [1] * 4, 2)
    lesions = {one.cluster: one for one in lesion_test(model, clusters, accuracies).lesions}
    assert lesions[1].change == 0.0 and lesions[1].spread == 0.0
    assert lesions[1].importance_p == 1.0 and lesions[1].coherence_p == 1.0
    assert lesions[0].change == -0.75  # only the class of the largest bias is left


def test_random_lesions_take_units_of_the_same_layer_that_are_in_a_cluster():
    model, seen = one_unit_group_per_class(), []

    def recording(model):
        seen.append((model[0].weight == 0).all(1)[:12].nonzero().flatten().tolist())
        return accuracies(model)

    lesion_test(model, clusters_of(model, [0, 0, 0, 1, 1, 1, 1, 1] + [-1] * 8, 2), recording, controls=4)
    assert seen[0] == [] and seen[1] == [0, 1, 2] and seen[6] == [3, 4, 5, 6, 7]
    assert all(len(units) == 3 and max(units) < 8 for units in seen[2:6])
    assert all(len(units) == 5 and max(units) < 8 for units in seen[7:]) and len(seen) == 11


def test_subclusters_too_small_or_as_large_as_their_layer_are_left_out():
    model = one_unit_group_per_class()
    lesions = lesion_test(model, clusters_of(model, [0] + [1] * 15, 2), accuracies, controls=1).lesions
    assert [one.cluster for one in lesions] == [1]
    with pytest.raises(ValueError, match=r"no cluster has from 2 to 99% of the units of a hidden layer"):
        lesion_test(model, clusters_of(model, [0] * 16, 1), accuracies)


def test_spread_and_mean_of_changes_by_hand():
    changes = np.array([-0.1, -0.3, 0.0, -0.2])
    base = np.array([0.9, 0.8, 1.0, 0.7])
    model, calls = one_unit_group_per_class(), []

    def scripted(model):
        calls.append(0)
        return base if len(calls) == 1 else base + changes

    one = lesion_test(model, clusters_of(model, [0, 0] + [1] * 2 + [-1] * 12, 2), scripted, controls=1).lesions[0]
    assert one.change == pytest.approx(-0.15) and one.spread == pytest.approx(0.3 / 0.15)
    assert one.importance_p == 1.0 and one.coherence_p == 1.0  # the control does as much
    mixed = Lesion("0", 0, 2, 0.0, np.zeros(3), math.inf, np.array([1.0, math.inf, 2.0]))
    assert mixed.coherence_p == 2 / 4


def test_p_values_are_combined_by_fisher_and_by_bates():
    assert combined_p([1 / 20], 19) == pytest.approx(0.025, rel=1e-9)  # one alone, less half a rank
    product = 0.475 * 0.025
    assert combined_p([0.5, 0.05], 19) == pytest.approx(product * (1 - math.log(product)), rel=1e-9)
    assert mean_p([0.3]) == 0.3 and mean_p([0.2, 0.4]) == pytest.approx(0.18)  # .6^2 / 2
    assert mean_p([0.9, 0.7]) == pytest.approx(1 - 0.4**2 / 2) and mean_p([0.5] * 40) == pytest.approx(0.5)
    assert mean_p([0.5, 0.9, 0.1]) == pytest.approx((1.5**3 - 3 * 0.5**3) / 6)
    with pytest.raises(ValueError, match=r"numbers from 0 to 1"):
        mean_p([1.2])


def test_bad_accuracies_are_named():
    model = one_unit_group_per_class()
    clusters = clusters_of(model, [0] * 8 + [1] * 8, 2)
    with pytest.raises(ValueError, match=r"accuracy of classes \[2\] is not a number; does each have a sample"):
        lesion_test(model, clusters, lambda model: [1.0, 0.5, math.nan, 1.0])
    with pytest.raises(ValueError, match=r"one number for each of two or more classes, got shape \(\)"):
        lesion_test(model, clusters, lambda model: 0.5)
    with pytest.raises(ValueError, match=r"controls must be an integer >= 1"):
        lesion_test(model, clusters, accuracies, controls=0)
