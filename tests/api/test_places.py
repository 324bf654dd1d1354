"""Role, depth and heads are read off parameter names of any architecture."""

from __future__ import annotations

import pytest
import torch
from subnets.report.places import heads_by_projection, places_of
from subnets.subnet import Subnet
from torch import Tensor, nn

# one per line: name, role, depth, position
MODELS = {
    "GPT-2": """
        transformer.h.0.attn.c_attn.weight attn.c_attn 0 0
        transformer.h.11.attn.c_attn.weight attn.c_attn 11 11
        transformer.h.11.mlp.c_fc.weight mlp.c_fc 11 11
        transformer.wte.weight transformer.wte None None""",
    "BERT": """
        encoder.layer.3.attention.self.query.weight attention.self.query 3 3
        encoder.layer.3.attention.output.dense.weight attention.output.dense 3 3
        encoder.layer.4.output.dense.weight output.dense 4 4
        classifier.weight classifier None None""",
    "T5: two stacks, and numbers that count kinds of sublayers": """
        encoder.block.0.layer.0.SelfAttention.q.weight encoder.block.*.layer.0.SelfAttention.q 0 0
        encoder.block.0.layer.1.DenseReluDense.wi.weight encoder.block.*.layer.1.DenseReluDense.wi 0 0
        decoder.block.1.layer.0.SelfAttention.q.weight decoder.block.*.layer.0.SelfAttention.q 1 1""",
    "transformers' ResNet: stages of blocks": """
        encoder.stages.0.layers.0.layer.1.convolution.weight layer.1.convolution 0 0
        encoder.stages.0.layers.1.layer.1.convolution.weight layer.1.convolution 0 0.5
        encoder.stages.1.layers.0.layer.1.convolution.weight layer.1.convolution 1 1
        encoder.stages.1.layers.0.shortcut.convolution.weight shortcut.convolution 1 1""",
    "torchvision's ResNet: the stage's number at the end of a word": """
        conv1.weight conv1 None None
        layer1.0.conv1.weight conv1 1 1
        layer1.1.conv1.weight conv1 1 1.5
        layer2.0.downsample.0.weight downsample.0 2 2
        fc.weight fc None None""",
    "experts": """
        model.layers.1.mlp.experts.0.w1.weight mlp.experts.*.w1 1 1
        model.layers.1.mlp.experts.3.w1.weight mlp.experts.*.w1 1 1.5
        model.layers.1.self_attn.q_proj.weight self_attn.q_proj 1 1""",
    "raw parameters, under a name that ends in a number": """
        gpt2.blocks.0.attn.W_Q attn.W_Q 0 0
        gpt2.blocks.1.attn.W_Q attn.W_Q 1 1
        gpt2.blocks.1.mlp.W_in mlp.W_in 1 1""",
    "nn.Sequential": """
        0.weight * 0 0
        2.weight * 2 2""",
    "numbered attributes": """
        fc1.weight fc* 1 1
        fc2.weight fc* 2 2
        head.weight head None None""",
    "one layer": """
        weight weight None None""",
}


@pytest.mark.parametrize("model", MODELS)
def test_places_of_the_architectures_that_people_have(model):
    lines = [line.split() for line in MODELS[model].strip().splitlines()]
    found = places_of([name for name, *_ in lines])
    for name, role, depth, position in lines:
        place = found[name]
        assert (place.role, str(place.depth)) == (role, depth), name
        assert place.position == (None if position == "None" else float(position)), name


def test_hostile_names_are_names():
    names = ["", ".", "²", "9" * 5000, "h.\n0.x", "s.9999999999.w"]
    assert [place.depth for place in places_of(names).values()].count(None) >= 4


def of_heads(densities: list[float], rows: int, columns: int) -> Tensor:
    """[heads * rows, columns]: of each head's block, the first rows kept, as many as its density says."""
    blocks = []
    for density in densities:
        block = torch.zeros(rows, columns, dtype=torch.bool)
        block[: round(density * rows)] = True
        blocks.append(block)
    return torch.cat(blocks)


def test_densities_of_heads_of_each_layout():
    query, key, value, out = [0.25, 0.5, 1.0], [0.0, 0.75, 0.25], [1.0, 0.0, 0.5], [0.5, 0.25, 0.0]
    q, k, v, o = (of_heads(densities, 4, 12) for densities in (query, key, value, out))
    conv1d = {"h.0.attn.c_attn.weight": torch.cat([q, k, v]).t(), "h.0.attn.c_proj.weight": o}
    linear = {"h.0.attn.c_attn.weight": torch.cat([q, k, v]), "h.0.attn.c_proj.weight": o.t()}
    for masks in (conv1d, linear):
        assert heads_by_projection(masks, 3) == {
            "h.0.attn.c_attn.weight": {"q": query, "k": key, "v": value},
            "h.0.attn.c_proj.weight": {"": out},
        }
    separate = {"l.0.self_attn.q_proj.weight": q, "l.0.self_attn.o_proj.weight": o.t(), "l.0.mlp.fc1.weight": q}
    assert heads_by_projection(separate, 3) == {
        "l.0.self_attn.q_proj.weight": {"": query}, "l.0.self_attn.o_proj.weight": {"": out},
    }  # fmt: skip
    bert = {"layer.0.attention.self.value.weight": v, "layer.0.attention.output.dense.weight": o.t(),
            "layer.0.output.dense.weight": o}  # fmt: skip
    assert list(heads_by_projection(bert, 3)) == list(bert)[:2]
    t5 = {"layer.0.SelfAttention.q.weight": q, "layer.0.SelfAttention.o.weight": o.t(),
          "layer.1.DenseReluDense.wo.weight": o.t()}  # fmt: skip
    assert list(heads_by_projection(t5, 3)) == list(t5)[:2]


def test_the_layout_of_multihead_attention_is_torchs():
    """What head 1 gives vanishes with the value rows that are called head 1 here, and with nothing less."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(12, 3, bias=False, batch_first=True)
    with torch.no_grad():
        attention.out_proj.weight.copy_(torch.eye(12))
    x = torch.randn(2, 5, 12)
    kept = attention.in_proj_weight.detach().clone() != 0
    kept[24 + 4 : 24 + 8] = False
    found = heads_by_projection({"in_proj_weight": kept}, 3)
    assert found["in_proj_weight"] == {"q": [1.0] * 3, "k": [1.0] * 3, "v": [1.0, 0.0, 1.0]}
    with torch.no_grad():
        attention.in_proj_weight.mul_(kept)
        by_head = attention(x, x, x)[0].unflatten(-1, (3, 4)).abs().sum((0, 1, 3))
    assert (by_head == 0).tolist() == [False, True, False]


def test_key_and_value_may_have_fewer_heads_and_raw_parameters_need_no_number():
    grouped = {"0.q_proj.weight": of_heads([1.0, 0.5, 0.0, 0.5], 2, 8), "0.k_proj.weight": of_heads([0.5, 1.0], 2, 8)}
    assert heads_by_projection(grouped, 4)["0.k_proj.weight"] == {"": [0.5, 1.0]}
    raw = {"blocks.0.attn.W_K": torch.stack([torch.ones(6, 2).bool(), torch.zeros(6, 2).bool()])}
    assert heads_by_projection(raw, None) == {"blocks.0.attn.W_K": {"": [1.0, 0.0]}}
    assert heads_by_projection(grouped, None) == {}


@pytest.mark.parametrize("heads", [0, -1, 3])
def test_a_number_of_heads_that_does_not_fit_is_refused(heads):
    masks = {"0.q_proj.weight": torch.ones(8, 8, dtype=torch.bool)}
    with pytest.raises(ValueError, match=f"heads must .*got {heads}"):
        heads_by_projection(masks, heads)


def test_inspect_and_subnet_count_heads_alike():
    """With the head's size that the number of heads gives, per-head densities are those of Subnet.density_per_head."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"h.0.attn.c_attn.weight": (8, 24), "h.0.attn.c_proj.weight": (8, 8), "h.0.attn.W_V": (4, 8, 2)}
    masks = {name: torch.rand(shape, generator=generator) < 0.4 for name, shape in shapes.items()}
    found = heads_by_projection(masks, 4)
    for name, densities in Subnet(masks).density_per_head(2).items():
        assert [value for part in found[name].values() for value in part] == densities.tolist()
