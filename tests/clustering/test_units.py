"""Chains of units: which weights belong to a unit, in every kind of layer, and clusters as subnets."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from subnets import Subnet, mask_model, transfer
from subnets.clustering import UnitChain, UnitClusters, mlp_blocks
from torch import nn


def mlp(*sizes):
    layers = [part for i, o in pairwise(sizes) for part in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def clusters_of(model, labels, **where):
    """Clusters with the given labels of hidden layers, everything else in none."""
    chain = UnitChain(model, **where)
    full = {name: np.array(labels.get(name, [-1] * size)) for name, size in chain.sizes.items()}
    return UnitClusters(chain, full, max(int(its.max()) for its in full.values()) + 1, "by hand")


def small_cnn():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(4 * 16, 5), nn.ReLU(), nn.Linear(5, 2),
    ).eval()  # fmt: skip


def test_edges_of_a_cluster_are_rows_columns_or_both():
    clusters = clusters_of(mlp(2, 3, 3, 2), {"0": [0, 1, 0], "2": [1, 0, -1]})
    into, out, within = (clusters.subnet(0, edges).masks for edges in ("into", "out", "within"))
    row, column = torch.tensor([True, False, True]), torch.tensor([False, True, False])
    assert torch.equal(into["0.weight"], row[:, None].expand(3, 2)) and torch.equal(into["0.bias"], row)
    assert torch.equal(into["2.weight"], column[:, None].expand(3, 3)) and torch.equal(into["2.bias"], column)
    assert not into["4.weight"].any() and not into["4.bias"].any()
    assert torch.equal(out["2.weight"], row[None].expand(3, 3)) and not out["0.weight"].any()
    assert torch.equal(out["4.weight"], column[None].expand(2, 3)) and not out["2.bias"].any()
    assert torch.equal(within["2.weight"], column[:, None] & row) and not within["0.weight"].any()


def test_ablating_what_leads_into_filters_silences_them_and_nothing_else():
    model = small_cnn()
    with torch.no_grad():
        model[1].running_mean.normal_()
        model[1].bias.normal_()
    clusters = clusters_of(model, {"0": [0, 1, 0], "3": [1, 0, 1, 1], "6": [0, 1, 1, 1, 1]})
    image, seen = torch.randn(6, 1, 4, 4), {}
    for index in (3, 5, 8):  # what the next layers read of the layers 0, 3 and 6
        model[index].register_forward_pre_hook(lambda _, args, index=index: seen.update({index: args[0]}))
    model(image)
    before = dict(seen)
    with clusters.subnet(0).applied(model, mode="ablate"):
        model(image)
    assert not seen[3][:, [0, 2]].any() and torch.equal(seen[3][:, 1], before[3][:, 1])
    assert not seen[5][:, 1].any() and not seen[8][:, 0].any()
    assert before[3][:, 0].any() and before[5][:, 1].any() and seen[5][:, 0].any() and seen[8][:, 1:].any()


def test_a_linear_layer_behind_a_convolution_has_one_block_of_inputs_per_filter():
    subnet = clusters_of(small_cnn(), {"3": [1, 0, 1, 1]}).subnet(0, "out")
    expected = torch.zeros(5, 64, dtype=torch.bool)
    expected[:, 16:32] = True
    assert torch.equal(subnet.masks["6.weight"], expected)
    assert sum(int(mask.sum()) for mask in subnet.masks.values()) == 5 * 16


def test_a_cluster_kept_alone_and_planted_computes_its_part():
    torch.manual_seed(1)
    model = mlp(4, 6, 2)
    with torch.no_grad():  # two networks that share nothing: inputs 0, 1 and output 0; inputs 2, 3 and output 1
        model[0].weight[:3, 2:], model[0].weight[3:, :2] = 0.0, 0.0
        model[2].weight[0, 3:], model[2].weight[1, :3] = 0.0, 0.0
    clusters = clusters_of(model, {"input": [0, 0, 1, 1], "0": [0] * 3 + [1] * 3, "2": [0, 1]})
    first, x = clusters.subnet(0, "within"), torch.randn(20, 4)
    expected = model(x)
    with first.applied(model):
        assert torch.equal(model(x)[:, 0], expected[:, 0]) and not model(x)[:, 1].any()
    fresh = mlp(4, 6, 2)
    transfer(first, model, fresh)
    assert torch.equal(fresh[0].weight[:3, :2], model[0].weight[:3, :2])
    assert torch.equal(fresh[2].weight[0, :3], model[2].weight[0, :3])
    assert torch.equal(fresh[0].bias[:3], model[0].bias[:3]) and not torch.equal(fresh[0].bias[3:], model[0].bias[3:])


def test_clusters_and_learned_masks_are_compared_over_the_same_weights():
    model = mlp(2, 4, 2)
    clusters = clusters_of(model, {"0": [0, 0, 1, 1]})
    masks = mask_model(model)
    with torch.no_grad():
        for name, scores in masks.scores().items():
            scores.fill_(-1.0)
            if name.startswith("0"):
                scores[:3] = 1.0
    learned = masks.subnet()
    masks.unmask()
    assert clusters.subnet(0, biases=False).iou(learned) == 4 / 6
    assert (clusters.subnet(0, biases=False) | clusters.subnet(1, biases=False)).density(per_layer=True) == {
        "0.weight": 1.0, "2.weight": 0.0,
    }  # fmt: skip


def test_a_cluster_says_where_it_comes_from_and_survives_its_file(tmp_path):
    model = mlp(2, 4, 2)
    subnet = clusters_of(model, {"0": [0, 0, 1, 1]}).subnet(1)
    subnet.save(tmp_path / "cluster.safetensors", weights=model)
    loaded = Subnet.load(tmp_path / "cluster.safetensors")
    assert loaded.provenance["method"] == "by hand" and loaded.provenance["cluster"] == 1
    assert loaded.provenance["edges"] == "into" and loaded.iou(subnet) == 1.0


def test_clusters_of_some_layers_only():
    clusters = clusters_of(mlp(2, 3, 3, 2), {"0": [0, 1, 0], "2": [1, 0, -1], "4": [0, 0]})
    assert clusters.only(["2"]).subnet(0).num_kept() == 3 + 1
    assert clusters.only(clusters.chain.hidden).subnet(0).num_kept() == (4 + 2) + (3 + 1)
    with pytest.raises(ValueError, match=r"must be a list of \['input', '0', '2', '4'\], got '2'"):
        clusters.only("2")
    with pytest.raises(ValueError, match=r"got \['1'\]"):
        clusters.only(["1"])


def test_clusters_are_counted_by_layer():
    table = clusters_of(mlp(2, 3, 3, 2), {"0": [0, 1, 0], "2": [1, 0, -1]}).table()
    assert list(table.head) == ["layer", "0", "1", "none"]
    assert table.rows == [["input", "0", "0", "2"], ["0", "2", "1", "0"], ["2", "1", "1", "1"], ["4", "0", "0", "2"]]


def test_mlp_blocks_of_transformers_are_found_with_gates_side_by_side():
    transformers = pytest.importorskip("transformers")
    gpt2 = transformers.GPT2Model(transformers.GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=11, n_positions=4))
    assert mlp_blocks(gpt2) == [[f"h.{i}.mlp.c_fc", f"h.{i}.mlp.c_proj"] for i in range(2)]
    llama = transformers.LlamaModel(transformers.LlamaConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, vocab_size=11))  # fmt: skip
    mlp_name = "layers.0.mlp"
    gate_up_down = [(f"{mlp_name}.gate_proj", f"{mlp_name}.up_proj"), f"{mlp_name}.down_proj"]
    assert mlp_blocks(llama) == [gate_up_down]
    bert = transformers.BertModel(transformers.BertConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, vocab_size=11))  # fmt: skip
    assert mlp_blocks(bert) == [["encoder.layer.0.intermediate.dense", "encoder.layer.0.output.dense"]]

    silent = clusters_of(gpt2, {"h.0.mlp.c_fc": [0] * 5 + [1] * 27}, layers=mlp_blocks(gpt2)[0])
    seen = []
    gpt2.h[0].mlp.c_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with silent.subnet(0).applied(gpt2, mode="ablate"):
        gpt2(torch.arange(4)[None])
    assert not seen[0][..., :5].any() and seen[0][..., 5:].all()
    silent = clusters_of(llama, {gate_up_down[0][0]: [1] * 5 + [0] * 7}, layers=gate_up_down)
    assert {name: int(mask.sum()) for name, mask in silent.subnet(0).masks.items()} == {
        f"{mlp_name}.gate_proj.weight": 7 * 8, f"{mlp_name}.up_proj.weight": 7 * 8, f"{mlp_name}.down_proj.weight": 0,
    }  # fmt: skip


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.second, self.first = nn.Linear(3, 2), nn.Linear(4, 3)


def test_wrong_models_and_layers_are_named():
    with pytest.raises(ValueError, match=r"order in which a Net runs its layers can't be told.*second, first"):
        UnitChain(Net())
    with pytest.raises(ValueError, match=r"'first' takes 4 inputs, and 'second' before it has 2 units"):
        UnitChain(Net(), ["second", "first"])
    assert UnitChain(Net(), ["first", "second"]).sizes == {"input": 4, "first": 3, "second": 2}
    with pytest.raises(ValueError, match=r"no layer 'third'; it has second, first"):
        UnitChain(Net(), ["third"])
    with pytest.raises(ValueError, match=r"each layer can be named once, and none 'input'"):
        UnitChain(mlp(2, 2, 2), ["0", "0"])
    with pytest.raises(ValueError, match=r"must have the same widths.*\(3, 2\), \(4, 3\)"):
        UnitChain(Net(), [("second", "first")])
    with pytest.raises(ValueError, match=r"norms\['0'\] must name a batch norm over 2 units, got '1'"):
        UnitChain(mlp(2, 2, 2), ["0", "2"], {"0": "1"})
    with pytest.raises(ValueError, match=r"units are those of linear layers.*'1' is a LSTM"):
        UnitChain(nn.Sequential(nn.Linear(2, 2), nn.LSTM(2, 2)))
    with pytest.raises(ValueError, match=r"'0' is a Conv2d with groups=2"):
        UnitChain(nn.Sequential(nn.Conv2d(2, 2, 1, groups=2), nn.Conv2d(2, 2, 1)))
    with pytest.raises(ValueError, match=r"'0' is a LayerNorm"):
        UnitChain(nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"Sequential has no MLP block with names that are known"):
        mlp_blocks(mlp(2, 3, 2))
    with pytest.raises(ValueError, match=r"cluster must be from 0 to 1, got 2"):
        clusters_of(mlp(2, 2, 2), {"0": [0, 1]}).subnet(2)
    with pytest.raises(ValueError, match=r"edges must be 'into', 'out' or 'within', got 'all'"):
        clusters_of(mlp(2, 2, 2), {"0": [0, 1]}).subnet(0, "all")
