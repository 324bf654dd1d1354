"""Controls over all parameters together, what ablated weights become, dense values, and density per head."""

import copy

import pytest
import torch
import transformers
from subnets import Subnet
from torch import nn


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def subnet_of(**masks: list) -> Subnet:
    return Subnet({name: torch.tensor(mask, dtype=torch.bool) for name, mask in masks.items()})


UNEVEN = subnet_of(a=[[1, 1, 1, 0]], b=[0] * 8)  # 3 of 4 and 0 of 8


def test_a_global_sample_has_as_many_weights_in_all_wherever_they_fall():
    draws = generator()
    samples = [UNEVEN.sample_like(draws, per_layer=False) for _ in range(3000)]
    assert {sample.num_kept() for sample in samples} == {3}
    frequency = sum(torch.cat([m.flatten() for m in sample.masks.values()]).float() for sample in samples) / 3000
    assert torch.allclose(frequency, torch.full((12,), 3 / 12), atol=0.035)  # more than four standard deviations
    assert samples[0].provenance == {"control": "sample_like", "of": [{}], "per_layer": False}
    assert samples[0].masks["a"].shape == (1, 4)


def test_a_global_sample_follows_the_seed_and_not_the_order_of_the_masks():
    masks = {name: torch.rand(20, 30, generator=generator(i)) < 0.6 for i, name in enumerate("ab")}
    subnet, turned = Subnet(masks), Subnet(dict(reversed(masks.items())))
    first = subnet.sample_like(generator(3), per_layer=False)
    assert first.iou(turned.sample_like(generator(3), per_layer=False)) == 1.0
    assert first.iou(subnet.sample_like(generator(4), per_layer=False)) < 0.6


def test_size_matched_samples_exist_above_half_density():
    dense = Subnet({"a": torch.rand(30, 30, generator=generator(1)) < 0.8})
    for per_layer in (True, False):
        sample = dense.sample_like(generator(2), per_layer=per_layer)
        assert sample.num_kept() == dense.num_kept() and 0.6 < sample.iou(dense) < 0.75  # .67 is chance


def test_a_global_complement_sample_needs_room_in_all_only():
    with pytest.raises(ValueError, match=r"a \(3 inside, 1 outside\); use sample_like, per_layer=False, or a sparser"):
        UNEVEN.complement_sample(generator())
    draws = generator()
    samples = [UNEVEN.complement_sample(draws, per_layer=False) for _ in range(2000)]
    assert all(sample.num_kept() == 3 and (sample & UNEVEN).num_kept() == 0 for sample in samples)
    outside = sum(sample.masks["a"][0, 3].float() for sample in samples) / 2000
    assert abs(outside - 3 / 9) < 0.045
    with pytest.raises(ValueError, match=r"all parameters together \(3 inside, 2 outside\); use sample_like, or"):
        subnet_of(a=[1, 1, 1], b=[0, 0]).complement_sample(generator(), per_layer=False)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last))


def net_subnet() -> Subnet:
    masks = {"0.weight": torch.rand(6, 5, generator=generator(0)) < 0.5}
    return Subnet(masks | {"1.weight": torch.rand(3, 2, 3, 3, generator=generator(1)) < 0.5})


@pytest.mark.parametrize("mode", ["keep", "ablate"])
def test_taken_out_weights_become_the_mean_of_their_whole_parameter(mode):
    model, subnet = net(), net_subnet()
    before = copy.deepcopy(model)
    with subnet.applied(model, mode, fill="mean"):
        for name, mask in subnet.masks.items():
            old, new = before.get_parameter(name), model.get_parameter(name)
            taken = mask if mode == "ablate" else ~mask
            assert torch.equal(new[~taken], old[~taken])
            assert torch.equal(new[taken], old.double().mean().float().expand(int(taken.sum())))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


@pytest.mark.parametrize("as_state", [False, True])
def test_taken_out_weights_come_from_another_network(as_state):
    model, subnet, other = net(), net_subnet(), net().double()
    before = copy.deepcopy(model)
    with torch.no_grad():
        [parameter.add_(1) for parameter in other.parameters()]
    subnet.apply_(model, "ablate", fill=other.state_dict() if as_state else other)
    for name, mask in subnet.masks.items():
        expected = torch.where(mask, other.get_parameter(name).float(), before.get_parameter(name))
        assert torch.equal(model.get_parameter(name), expected)
    assert model[1].weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(model[0].bias, before[0].bias)


def test_reinitialised_weights_are_those_of_the_modules_own_initialisation():
    model, subnet = net(), net_subnet()
    with torch.no_grad():
        [parameter.fill_(7) for parameter in model.parameters()]
    state, draws = torch.get_rng_state(), generator(5)
    twin = copy.deepcopy(model)
    subnet.apply_(model, "ablate", fill="reinit", generator=draws)
    assert torch.equal(torch.get_rng_state(), state) and not torch.equal(draws.get_state(), generator(5).get_state())
    for name, mask in subnet.masks.items():
        weight, bound = model.get_parameter(name), (5 if name[0] == "0" else 18) ** -0.5  # kaiming_uniform(sqrt(5))
        fresh = weight[mask]
        assert (weight[~mask] == 7).all() and fresh.abs().max() <= bound and fresh.std() > 0.4 * bound
        assert len(set(fresh.tolist())) == len(fresh)
    assert (model[0].bias == 7).all()
    subnet.apply_(twin, "ablate", fill="reinit", generator=generator(5))
    assert torch.equal(twin[0].weight, model[0].weight)
    part = Subnet({"0.weight": subnet.masks["0.weight"]})
    part.apply_(twin, "ablate", fill="reinit", generator=generator(5))
    assert torch.equal(twin[0].weight, model[0].weight)
    part.apply_(twin, "ablate", fill="reinit", generator=generator(6))
    assert not torch.equal(twin[0].weight, model[0].weight)


def test_a_transformers_model_is_reinitialised_as_it_initialises_itself():
    shape = dict(n_layer=1, n_head=2, n_embd=32, n_positions=8, vocab_size=11, initializer_range=0.5)
    model = nn.ModuleDict({"inner": transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape))})
    name = "inner.transformer.h.0.attn.c_attn.weight"
    weight = model.get_parameter(name)
    with torch.no_grad():
        weight.fill_(9)
    everything = Subnet({name: torch.ones(weight.shape, dtype=torch.bool)})
    everything.apply_(model, "ablate", fill="reinit", generator=generator())
    assert abs(weight.std().item() - 0.5) < 0.02 and abs(weight.mean().item()) < 0.04


class Raw(nn.Module):
    """A raw parameter, and an initialisation that forgets it."""

    def __init__(self, forgets: bool) -> None:
        super().__init__()
        self.W_Q = nn.Parameter(torch.ones(2, 3, 4))
        if forgets:
            self.reset_parameters = lambda: None


def test_bad_fills_change_nothing():
    model, subnet = net(), net_subnet()
    before = [p.detach().clone() for p in model.parameters()]
    cases = [
        (dict(fill="noise"), ValueError, r"fill must be one of \['zero', 'mean', 'reinit'\], a model or a state dict"),
        (dict(fill=3), TypeError, "got int"),
        (dict(fill="reinit"), TypeError, "fill='reinit' needs generator="),
        (dict(fill="mean", generator=generator()), ValueError, "generator is for fill='reinit', got fill='mean'"),
        (dict(fill={"0.weight": torch.ones(6, 5)}), ValueError, "missing: 1.weight"),
        (dict(fill=model.state_dict() | {"0.weight": torch.ones(5, 6)}), ValueError, r"0.weight \(\[5, 6\], here"),
        (dict(fill=nn.Sequential(nn.Linear(5, 6))), ValueError, "missing: 1.weight"),
    ]
    for arguments, error, words in cases:
        with pytest.raises(error, match=words):
            subnet.apply_(model, "keep", **arguments)
        with pytest.raises(error, match=words), subnet.applied(model, "keep", **arguments):
            pass
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    for forgets, words in ((False, "no way to initialise W_Q"), (True, "initialising W_Q left it as it was")):
        raw = Raw(forgets)
        with pytest.raises(ValueError, match=words):
            Subnet({"W_Q": torch.ones(2, 3, 4).bool()}).apply_(raw, fill="reinit", generator=generator())
        assert (raw.W_Q == 1).all()


def test_to_dense_puts_the_kept_values_in_their_places():
    model, subnet = net().to(torch.bfloat16), net_subnet()
    with pytest.raises(ValueError, match="Subnet.to_dense: the subnet carries no values"):
        subnet.to_dense()
    for dense in (subnet.to_dense(model), subnet.with_weights(model).to_dense()):
        assert list(dense) == list(subnet.masks)
        for name, values in dense.items():
            assert values.dtype == torch.bfloat16 and torch.equal(
                values, torch.where(subnet.masks[name], model.get_parameter(name), 0)
            )
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight.add_(1)
    with pytest.raises(ValueError, match="must be the network that the subnet was found in"):
        subnet.with_weights(model).to_dense(other)


def test_density_per_head_counts_each_heads_own_weights():
    qkv = torch.zeros(4, 12, dtype=torch.bool)  # Conv1D: [in, 3 * 2 heads * 2]
    qkv[:, 0:2] = True  # all of the queries' first head
    qkv[0, 10] = True  # one of the 8 weights of the values' second head
    out = torch.zeros(4, 4, dtype=torch.bool)
    out[2:, 1] = True  # Conv1D: [2 heads * 2, out]
    raw = torch.zeros(3, 4, 2, dtype=torch.bool)
    raw[1] = True
    masks = {"h.0.attn.c_attn.weight": qkv, "h.0.attn.c_proj.weight": out, "attn.W_Q": raw, "h.0.mlp.c_fc.weight": out}
    found = {name: values.tolist() for name, values in Subnet(masks).density_per_head(2).items()}
    assert found == {
        "h.0.attn.c_attn.weight": [1, 0, 0, 0, 0, 1 / 8], "h.0.attn.c_proj.weight": [0, 2 / 8], "attn.W_Q": [0, 1, 0]
    }  # fmt: skip
    linear = {"self_attn.o_proj.weight": out, "mix.weight": out.T.contiguous()}
    assert Subnet(linear).density_per_head(2)["self_attn.o_proj.weight"].tolist() == [2 / 8, 0]
    assert Subnet(linear).density_per_head(2, {r"mix\.weight": 1})["mix.weight"].tolist() == [0, 2 / 8]


def test_density_per_head_is_that_of_the_names_of_transformers_models():
    llama = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=5,
    )  # fmt: skip
    bert = transformers.BertConfig(
        hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4, vocab_size=5
    )
    for model, heads in (
        (transformers.LlamaForCausalLM(llama), {"q_proj": 4, "k_proj": 2, "v_proj": 2, "o_proj": 4}),
        (transformers.BertModel(bert), {"query": 4, "key": 4, "value": 4, "attention.output.dense": 4}),
        (nn.TransformerEncoderLayer(16, 4, 8), {"in_proj": 12, "out_proj": 4}),
    ):
        masks = {n: torch.ones(p.shape).bool() for n, p in model.named_parameters() if p.ndim == 2}
        found = Subnet(masks).density_per_head(4)
        ending = lambda name: name.removesuffix(".weight").removesuffix("_weight")  # noqa: E731
        assert sorted(len(v) for v in found.values()) == sorted(heads.values())
        for end, count in heads.items():
            assert [len(v) for n, v in found.items() if ending(n).endswith(end)] == [count]


def test_density_per_head_refuses_what_holds_no_heads():
    subnet = subnet_of(**{"q_proj.weight": [[1, 0]] * 4})
    for size in (0, True, 2.0):
        with pytest.raises(ValueError, match="head_size must be an integer >= 1"):
            subnet.density_per_head(size)
    with pytest.raises(ValueError, match=r"q_proj.weight has shape \[4, 2\], and its dimension 0 must divide .* 3"):
        subnet.density_per_head(3)
    with pytest.raises(ValueError, match="no parameter is known to hold heads, of \\['a', 'b'\\]"):
        UNEVEN.density_per_head(2)
