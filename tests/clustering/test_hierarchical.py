"""Watanabe's hierarchy: exact heights and correlations, a planted pair of networks, units that do not vary."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from subnets.clustering import signed_correlations, unit_hierarchy, ward
from torch import nn

pytest.importorskip("scipy")


def same_partition(a, b):
    """Whether two labellings are the same up to names (adjusted Rand index 1)."""
    pairs = set(zip(a, b, strict=True))
    return len(pairs) == len(set(a)) == len(set(b))


def planted(units=5, seed=0):
    """Two networks side by side: inputs 0-2, hidden units with even number, output 0; the rest."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 2 * units), nn.Tanh(), nn.Linear(2 * units, 2))
    with torch.no_grad():
        # units of a part do much the same, so that their signed correlations agree
        model[0].weight.uniform_(0.8, 1.2)
        model[2].weight.uniform_(0.8, 1.2)
        model[0].weight[0::2, 3:], model[0].weight[1::2, :3] = 0.0, 0.0
        model[2].weight[0, 1::2], model[2].weight[1, 0::2] = 0.0, 0.0
    return model


def test_ward_heights_of_four_points():
    heights = ward(np.array([[0.0, 0], [1, 0], [5, 0], [6, 0]]))[:, 2]
    assert heights == pytest.approx([1, 1, 50**0.5], abs=1e-12)  # the last: dE = 25


def test_ward_merges_in_the_order_of_the_least_growth_of_squared_error():
    points = np.random.default_rng(0).normal(size=(17, 3))
    clusters, heights = {i: [i] for i in range(17)}, []
    for step, row in enumerate(ward(points)):
        def growth(a, b):
            na, nb = len(clusters[a]), len(clusters[b])
            gap = points[clusters[a]].mean(0) - points[clusters[b]].mean(0)
            return na * nb / (na + nb) * gap @ gap

        a, b = min(((a, b) for a in clusters for b in clusters if a < b), key=lambda pair: growth(*pair))
        assert {a, b} == {int(row[0]), int(row[1])}
        heights.append((2 * growth(a, b)) ** 0.5)
        clusters[17 + step] = clusters.pop(a) + clusters.pop(b)
    assert ward(points)[:, 2] == pytest.approx(heights, rel=1e-9)


def test_correlations_are_corrcoef_and_keep_or_flip_under_scaling():
    rng = np.random.default_rng(1)
    outputs, signals = rng.normal(size=(50, 4)), rng.normal(size=(50, 3)) + 7
    expected = np.corrcoef(outputs.T, signals.T)[:4, 4:]
    assert np.allclose(signed_correlations(outputs, signals), expected, rtol=0, atol=1e-13)
    assert np.allclose(signed_correlations(3 * outputs + 2, signals), expected, rtol=0, atol=1e-13)
    assert np.allclose(signed_correlations(-3 * outputs + 2, signals), -expected, rtol=0, atol=1e-13)
    outputs[:, 1] = 0.1  # its mean is not .1 to the bit
    assert np.isnan(signed_correlations(outputs, signals)).any(1).tolist() == [False, True, False, False]


def test_features_are_the_correlations_of_activations_with_inputs_then_outputs():
    torch.manual_seed(0)
    first, second = (nn.Linear(3, 4), nn.ReLU(), nn.Dropout(0.5)), (nn.Linear(4, 5), nn.Tanh())
    model, x = nn.Sequential(*first, *second, nn.Linear(5, 2)), torch.randn(40, 3)
    found = unit_hierarchy(model, x)
    assert model.training and not model[0]._forward_pre_hooks
    model.eval()
    with torch.no_grad():
        hidden = torch.cat([model[:2](x), model[:5](x)], 1).double().numpy()
        signals = torch.cat([x, model(x)], 1).double().numpy()
    assert np.allclose(found.features, np.corrcoef(hidden.T, signals.T)[:9, 9:], rtol=0, atol=1e-12)
    assert found.units == [("0", i) for i in range(4)] + [("3", i) for i in range(5)] and found.num_inputs == 3


def test_cut_at_two_gives_a_planted_pair_of_networks():
    model = planted()
    hierarchy = unit_hierarchy(model, torch.randn(300, 6))
    clusters = hierarchy.cut(2)
    assert same_partition(clusters.labels["0"], [0, 1] * 5)
    assert (clusters.labels["input"] == -1).all() and (clusters.labels["2"] == -1).all()
    even = int(clusters.labels["0"][0])
    kept = clusters.subnet(even) | clusters.subnet(even, "out")
    assert kept.masks["0.weight"][0::2].all() and kept.masks["2.weight"][:, 0::2].all()
    assert kept.num_kept() == 30 + 10 + 5
    centers = hierarchy.centers(2)[even]
    assert (centers[:3] > 0.4).all() and (abs(centers[3:6]) < 0.2).all() and centers[6] > 0.9 and abs(centers[7]) < 0.2


def test_permuted_units_get_permuted_labels():
    torch.manual_seed(2)
    model, x = nn.Sequential(nn.Linear(5, 13), nn.ReLU(), nn.Linear(13, 3)), torch.randn(200, 5)
    order = torch.randperm(13)
    before = unit_hierarchy(model, x).cut(4).labels["0"]
    with torch.no_grad():
        model[0].weight.copy_(model[0].weight[order])
        model[0].bias.copy_(model[0].bias[order])
        model[2].weight.copy_(model[2].weight[:, order])
    assert same_partition(unit_hierarchy(model, x).cut(4).labels["0"], before[order.numpy()])
    assert len(set(before)) == 4


def test_equal_units_merge_at_height_zero():
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = model[0].weight[0], model[0].bias[0]
    linkage = unit_hierarchy(model, torch.randn(50, 4)).linkage
    assert linkage[0, :3] == pytest.approx([0, 1, 0], abs=1e-7) and linkage[1, 2] > 0.1


def test_a_cut_is_scipys_at_every_number_of_clusters():
    from scipy.cluster.hierarchy import fcluster

    torch.manual_seed(3)
    hierarchy = unit_hierarchy(nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 3)), torch.randn(100, 5))
    for count in range(1, 13):
        assert same_partition(hierarchy.cut(count).labels["0"], fcluster(hierarchy.linkage, count, "maxclust"))


def test_filters_are_correlated_by_their_mean_over_the_image():
    torch.manual_seed(4)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    x = torch.randn(30, 1, 4, 4)
    found = unit_hierarchy(model, x)
    with torch.no_grad():
        hidden = torch.cat([model[:2](x).mean((2, 3)), model[:4](x).mean((2, 3))], 1).double().numpy()
        signals = torch.cat([x.flatten(1), model(x)], 1).double().numpy()
    assert np.allclose(found.features, np.corrcoef(hidden.T, signals.T)[:5, 5:], rtol=0, atol=1e-6)
    assert found.num_inputs == 16


def test_tokens_are_examples_for_a_transformers_block():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.GPT2Model(
        transformers.GPT2Config(n_layer=1, n_embd=4, n_head=2, vocab_size=11, n_positions=6)
    ).eval()
    ids = torch.randint(0, 11, (5, 6))
    found = unit_hierarchy(model, {"input_ids": ids}, ["h.0.mlp.c_fc", "h.0.mlp.c_proj"])
    assert found.features.shape == (16, 8) and len(found.units) == 16
    read = []
    model.h[0].mlp.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    with torch.no_grad():
        model(input_ids=ids)
        x = read[0].reshape(30, 4)
        hidden = model.h[0].mlp.act(model.h[0].mlp.c_fc(x))
        signals = torch.cat([x, model.h[0].mlp.c_proj(hidden)], 1)
    expected = np.corrcoef(hidden.double().numpy().T, signals.double().numpy().T)[:16, 16:]
    assert np.allclose(found.features, expected, rtol=0, atol=1e-5)


def test_constant_units_are_refused_or_left_out_and_constant_inputs_count_nothing():
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    x = torch.randn(60, 4)
    x[:, 2] = 0.1
    with torch.no_grad():
        model[0].bias[3] = -100.0
    with pytest.raises(ValueError, match=r"1 of 5 units give the same output on all 60 examples.*0:3.*constant='drop'"):
        unit_hierarchy(model, x)
    found = unit_hierarchy(model, x, constant="drop")
    assert found.constant_units == [("0", 3)] and found.constant_signals == [2]
    assert not found.features[:, 2].any() and np.isfinite(found.features).all()
    assert found.cut(4).labels["0"][3] == -1 and found.cut(4).labels["0"].max() == 3
    with pytest.raises(ValueError, match=r"num_clusters must be from 1 to the 4 units there are, got 5"):
        found.cut(5)
    with pytest.raises(ValueError, match=r"num_clusters must be from 1 to the 4 units there are, got 0"):
        found.centers(0)


class Transposed(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


def test_other_bad_input_is_named():
    with pytest.raises(ValueError, match=r"at least two layers"):
        unit_hierarchy(nn.Sequential(nn.Linear(2, 2)), torch.randn(5, 2))
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"two examples or more and finite values, got 1"):
        unit_hierarchy(model, torch.randn(1, 2))
    with pytest.raises(ValueError, match=r"'raise' or 'drop', got 'zero'"):
        unit_hierarchy(model, torch.randn(5, 2), constant="zero")
    patches = nn.Sequential(nn.Conv2d(1, 3, 2, 2), nn.Flatten(2), Transposed(), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"convolution '0', '3' must read \[images, features\], got \[5, 4, 3\]"):
        unit_hierarchy(patches, torch.randn(5, 1, 4, 4))
    shared = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"each layer must run once in a pass"):
        unit_hierarchy(nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh(), nn.Linear(2, 2)), torch.randn(5, 2))


def test_the_dendrogram_has_one_link_per_merge_and_the_line_of_the_cut():
    hierarchy = unit_hierarchy(planted(), torch.randn(300, 6))
    (axes,) = hierarchy.figure(2).axes
    tops = sorted(path.vertices[:, 1].max() for c in axes.collections for path in c.get_paths())
    assert tops == pytest.approx(sorted(hierarchy.linkage[:, 2]))
    (line,) = axes.lines
    assert hierarchy.linkage[-2, 2] < line.get_ydata()[0] < hierarchy.linkage[-1, 2]
    assert sorted(label.get_text() for label in axes.get_xticklabels()) == sorted(f"0:{i}" for i in range(10))
