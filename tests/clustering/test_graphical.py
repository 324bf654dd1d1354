"""The weight graph and its n-cut against the published code's values, by hand, and on planted clusters."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from subnets.clustering import (
    Clusterability,
    clusterability,
    clusterability_table,
    n_cut,
    spectral_clusters,
    weight_graph,
)
from subnets.clustering.graphical import p_value
from torch import nn

# weights of two layers, [in, out], with labels: the unit tests of the authors' repository
FIRST = ([[[12, -1.3], [0, 7.4]], [[-8.9, 0.15], [0.23, -5.7]]], [0, 1] * 3, 0.098897)
SECOND = (
    [
        [[5.4, 0.03, 0, 0], [0, 0, -0.4, 5.5], [-12, 0, 4.8, -0.07], [0, 6.3, 0.001, 7]],
        [[-13.3, -0.4, 6, 0.1], [0.7, -8, 0, -5.8], [7.4, 0.3, -15, 0], [0, 0, 0, -12.3]],
    ],
    [1, 0] * 6,
    0.037213,
)


def of_weights(*matrices):
    """A network of linear layers with the given weights ``[in, out]``."""
    layers = []
    for matrix in matrices:
        weight = torch.tensor(matrix, dtype=torch.float64).t()
        layers += [nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64), nn.ReLU()]
        layers[-2].weight = nn.Parameter(weight.contiguous())
    return nn.Sequential(*layers[:-1])


def blocks(sizes=(6, 8, 8, 4), parts=2, noise=0.0):
    """A network that falls apart into as many equal networks, their units taking turns; noise joins them."""
    rng = np.random.default_rng(0)
    matrices = []
    for a, b in pairwise(sizes):
        same = np.arange(a)[:, None] % parts == np.arange(b) % parts
        matrices.append(rng.uniform(0.5, 1.5, (a, b)) * rng.choice([-1, 1], (a, b)) * np.where(same, 1, noise))
    return of_weights(*(matrix.tolist() for matrix in matrices)), np.concatenate([np.arange(s) % parts for s in sizes])


def same_partition(a, b):
    return len(set(zip(a, b, strict=True))) == len(set(a)) == len(set(b))


@pytest.mark.parametrize("weights, labels, expected", [FIRST, SECOND])
def test_n_cut_is_that_of_the_authors_unit_tests(weights, labels, expected):
    graph = weight_graph(of_weights(*weights))
    assert n_cut(graph.adjacency, np.array(labels)) == pytest.approx(expected, abs=5e-7)


def test_n_cut_by_its_definition_over_pairs():
    rng = np.random.default_rng(0)
    adjacency = np.triu(rng.uniform(size=(9, 9)), 1)
    adjacency, labels = adjacency + adjacency.T, np.array([0, 0, 1, 2, 2, 2, 1, 0, 1])
    expected = 0.0
    for c in range(3):
        cut = sum(adjacency[i, j] for i in range(9) for j in range(9) if labels[i] == c != labels[j])
        expected += cut / (sum(adjacency[i, j] for i in range(9) for j in range(9) if labels[i] == c) + 1e-8)
    assert n_cut(adjacency, labels) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match=r"one label per node, got \(9, 9\) and \(8,\)"):
        n_cut(adjacency, labels[:8])


def test_random_labels_cut_about_one_less_than_their_number():
    rng = np.random.default_rng(1)
    graph = weight_graph(of_weights(rng.normal(size=(40, 60)).tolist(), rng.normal(size=(60, 40)).tolist()))
    cuts = [n_cut(graph.adjacency, rng.integers(0, 4, graph.num_nodes)) for _ in range(30)]
    assert np.mean(cuts) == pytest.approx(3, abs=0.03)


def test_scale_sign_and_order_of_units_do_not_change_the_n_cut():
    model, labels = blocks(noise=0.3)
    expected = n_cut(weight_graph(model).adjacency, labels)
    assert 0.1 < expected < 1
    order = torch.tensor([3, 1, 0, 2, 7, 6, 4, 5])
    with torch.no_grad():
        model[0].weight.copy_(-7 * model[0].weight[order])
        model[2].weight.copy_(7 * model[2].weight[:, order])
        model[4].weight.mul_(7)
    moved = np.concatenate([labels[:6], labels[6:14][order.numpy()], labels[14:]])
    assert n_cut(weight_graph(model).adjacency, moved) == pytest.approx(expected, rel=1e-9)


def test_edges_of_filters_are_norms_of_kernels_with_batch_norm_folded():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
        nn.Linear(4 * 5, 2),
    ).double()  # fmt: skip
    with torch.no_grad():
        model[3].weight.copy_(torch.tensor([1.0, -2, 3, 0.5]))
        model[3].running_var.copy_(torch.tensor([0.5, 1, 2, 4]))
    for norm in (1, 2):
        graph = weight_graph(model, norm=norm)
        assert list(graph.nodes) == ["0", "2", "6"] and graph.num_nodes == 9  # input channels are no nodes
        kernels = model[2].weight.detach().flatten(2).norm(norm, dim=2)
        kernels *= (model[3].weight.detach().abs() / (model[3].running_var + model[3].eps).sqrt())[:, None]
        flat = model[6].weight.detach().reshape(2, 4, 5).norm(norm, dim=2)
        expected = np.zeros((9, 9))
        expected[3:7, :3], expected[7:, 3:7] = kernels, flat
        assert np.allclose(graph.adjacency, expected + expected.T, rtol=1e-12, atol=0)
    same = weight_graph(model, ["0", "2", "6"], norms={"2": "3"})
    assert np.array_equal(same.adjacency, weight_graph(model).adjacency)
    assert not np.array_equal(weight_graph(model, ["0", "2", "6"]).adjacency, same.adjacency)


def test_edges_of_transformers_blocks_take_gate_and_input_together():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=6, intermediate_size=10, num_hidden_layers=1, num_attention_heads=2, vocab_size=11
    )
    model = transformers.LlamaModel(config).double()
    mlp = model.layers[0].mlp
    name = "layers.0.mlp"
    graph = weight_graph(model, [(f"{name}.gate_proj", f"{name}.up_proj"), f"{name}.down_proj"])
    into = (mlp.gate_proj.weight.abs() + mlp.up_proj.weight.abs()).detach().numpy()
    assert np.allclose(graph.adjacency[6:16, :6], into) and graph.num_nodes == 22
    assert np.allclose(graph.adjacency[16:, 6:16], mlp.down_proj.weight.detach().abs().numpy())
    gpt2 = transformers.GPT2Model(transformers.GPT2Config(n_layer=1, n_embd=4, n_head=2, vocab_size=11, n_positions=6))
    graph = weight_graph(gpt2, ["h.0.mlp.c_fc", "h.0.mlp.c_proj"])
    assert np.allclose(graph.adjacency[4:20, :4], gpt2.h[0].mlp.c_fc.weight.detach().abs().t().numpy())


def test_shuffling_keeps_each_layers_weights_and_on_wish_its_zeros():
    model, _ = blocks()
    graph = weight_graph(model)
    free, fixed = (graph.shuffled(np.random.default_rng(0), keep) for keep in (False, True))
    for old, moved, same_zeros in zip(graph.weights, free.weights, fixed.weights, strict=True):
        for other in (moved, same_zeros):
            assert np.array_equal(np.sort(other[0], axis=None), np.sort(old[0], axis=None))
            assert not np.array_equal(other[0], old[0])
        assert np.array_equal(same_zeros[0] == 0, old[0] == 0) and not np.array_equal(moved[0] == 0, old[0] == 0)


def test_p_value_counts_smaller_controls_and_itself():
    assert p_value(1.0, np.full(50, 2.0)) == 1 / 51
    assert p_value(3.0, np.full(50, 2.0)) == 1
    assert p_value(2.0, np.full(50, 2.0)) == 1 / 51 and p_value(2.0, np.full(50, 2.0), ties_count=True) == 1
    assert p_value(2.5, np.array([1.0, 2, 3, 4])) == 3 / 5


def test_z_is_the_distance_in_standard_deviations_and_the_table_shows_it():
    found = Clusterability(None, 9.0, np.array([10.0, 12.0]))  # type: ignore[arg-type]
    assert found.z == -2.0 and found.p_value == 1 / 3
    assert clusterability_table({"mlp": found}).rows == [["mlp", "9.000", "11.000", "1.000", "-2.0", "0.3333"]]
    assert np.isnan(Clusterability(None, 9.0, np.array([10.0, 10.0])).z)  # type: ignore[arg-type]


class TestSpectral:
    """What needs scikit-learn."""

    @pytest.fixture(autouse=True)
    def _sklearn(self):
        pytest.importorskip("sklearn")

    @pytest.mark.parametrize("parts", [2, 3])
    def test_separate_networks_are_recovered_without_a_cut(self, parts):
        model, labels = blocks((6, 9, 12, 6), parts)
        graph = weight_graph(model)
        clusters = spectral_clusters(graph, parts)
        assert same_partition(graph.labels(clusters), labels)
        assert n_cut(graph.adjacency, graph.labels(clusters)) == 0.0
        within = [clusters.subnet(c, "within", biases=False) for c in range(parts)]
        assert sum(subnet.num_kept() for subnet in within) == sum(int((p != 0).sum()) for p in model.parameters()
                                                                   if p.ndim == 2)  # fmt: skip

    def test_joined_networks_cluster_beyond_shuffling_and_dense_random_ones_do_not(self):
        model, labels = blocks((10, 16, 16, 10), noise=0.1)
        graph = weight_graph(model)
        found = clusterability(graph, 2, shuffles=19, n_init=5)
        assert same_partition(graph.labels(found.clusters), labels)
        assert found.n_cut == n_cut(graph.adjacency, labels) and found.p_value == 1 / 20 and found.z < -10
        p_values = []
        for seed in range(10):  # the p value of a random network is itself random, with mean .525
            torch.manual_seed(seed)
            random = weight_graph(nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 10)))
            p_values.append(clusterability(random, 2, shuffles=19, n_init=5).p_value)
        assert 0.3 < np.mean(p_values) < 0.75 and max(p_values) > 0.8

    def test_the_first_shuffles_stay_when_more_are_asked_for(self):
        graph = weight_graph(blocks(noise=0.3)[0])
        few, more = (clusterability(graph, 2, shuffles=n, n_init=3) for n in (2, 4))
        assert np.array_equal(few.shuffled, more.shuffled[:2]) and len(set(more.shuffled)) == 4

    def test_isolated_units_are_refused_or_left_out(self):
        model, _ = blocks()
        with torch.no_grad():
            model[0].weight[3] = 0.0
            model[2].weight[:, 3] = 0.0
        with pytest.raises(ValueError, match=r"1 of 26 units are isolated \(all their weights are 0\): 0:3; pass isol"):
            weight_graph(model)
        graph = weight_graph(model, isolated="drop")
        assert graph.num_nodes == 25 and graph.adjacency.sum(0).min() > 0
        labels = spectral_clusters(graph, 2).labels["0"]
        assert labels[3] == -1 and same_partition(np.delete(labels, 3), np.delete(np.arange(8) % 2, 3))

    def test_as_many_clusters_as_units_and_more(self):
        graph = weight_graph(blocks((2, 3, 2), 1)[0])
        assert sorted(graph.labels(spectral_clusters(graph, 7))) == list(range(7))
        assert len(set(graph.labels(spectral_clusters(graph, 6)))) == 6
        for wrong in (8, 0, 2.0, True):
            with pytest.raises(ValueError, match=r"num_clusters must be from 1 to the 7 units there are"):
                spectral_clusters(graph, wrong)


def test_other_bad_input_is_named():
    model, _ = blocks()
    with pytest.raises(ValueError, match=r"norm must be 1 or 2"):
        weight_graph(model, norm=3)
    with pytest.raises(ValueError, match=r"shuffles must be an integer >= 1, got 0"):
        clusterability(weight_graph(model), 2, shuffles=0)
    with pytest.raises(ValueError, match=r"one convolution alone makes no graph"):
        weight_graph(nn.Sequential(nn.Conv2d(1, 2, 3)))
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"weights must be finite, '2' has NaN"):
        weight_graph(model)
    for layer in (0, 2, 4):
        nn.init.zeros_(model[layer].weight)
    with pytest.raises(ValueError, match=r"26 of 26 units are isolated.*nothing to cluster"):
        weight_graph(model, isolated="drop")
