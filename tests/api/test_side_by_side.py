"""Many subnets of one network in one forward pass."""

import pytest
import torch
from subnets import Subnet, mask_model, outputs_of
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4)
        self.hidden, self.head = nn.Linear(4 * 36, 10), nn.Linear(10, 2, bias=False)

    def forward(self, x, scale):
        hidden = torch.relu(self.hidden(self.norm(self.conv(x)).flatten(1)))
        return {"logits": self.head(hidden) * scale, "hidden": (hidden,)}


def subnets_of(net, names, num):
    generator = torch.Generator().manual_seed(1)
    shapes = {name: p.shape for name, p in net.named_parameters() if name in names}
    return [Subnet({n: torch.rand(s, generator=generator) < 0.5 for n, s in shapes.items()}) for _ in range(num)]


def test_each_part_is_what_its_subnet_says_alone():
    torch.manual_seed(0)
    net, x, scale = Net().train(), torch.randn(5, 3, 6, 6), torch.rand(5, 1)
    subnets = [*subnets_of(net, ["conv.weight", "hidden.weight"], 2), *subnets_of(net, ["head.weight"], 1)]
    state = {name: value.clone() for name, value in net.state_dict().items()}
    together = outputs_of(net, subnets, x, scale=scale)
    assert together["logits"].shape == (3, 5, 2) and net.training and "forward" not in vars(net.conv)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    net.eval()
    for part, hidden, subnet in zip(together["logits"], together["hidden"][0], subnets, strict=True):
        with subnet.applied(net), torch.no_grad():
            alone = net(x, scale)
        torch.testing.assert_close(part, alone["logits"])
        torch.testing.assert_close(hidden, alone["hidden"][0])


def test_a_transformer_of_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=11, n_positions=8)
    net = transformers.GPT2LMHeadModel(config).eval()
    subnets = subnets_of(net, ["transformer.h.0.mlp.c_fc.weight", "transformer.h.0.attn.c_attn.weight"], 3)
    tokens = torch.randint(0, 11, (2, 5))
    together = outputs_of(net, subnets, input_ids=tokens, use_cache=False).logits
    for part, subnet in zip(together, subnets, strict=True):
        with subnet.applied(net), torch.no_grad():
            torch.testing.assert_close(part, net(input_ids=tokens).logits)


def test_layers_whose_weight_torch_reads_itself():
    torch.manual_seed(0)
    net, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), torch.randn(3, 4, 8)
    subnets = subnets_of(net, ["linear1.weight"], 2)
    for part, subnet in zip(outputs_of(net, subnets, x), subnets, strict=True):
        with subnet.applied(net), torch.no_grad():
            torch.testing.assert_close(part, net(x))
    assert torch.backends.mha.get_fastpath_enabled()


def test_tied_weights_have_one_mask_and_autocast_casts():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)), torch.randn(3, 6)
    net[2].weight = net[0].weight
    subnets = subnets_of(net, ["0.weight"], 2)
    for context, allowed in ((torch.autocast("cpu", enabled=False), 1e-6), (torch.autocast("cpu"), 0.02)):
        with context:
            together = outputs_of(net, subnets, x)
        for part, subnet in zip(together, subnets, strict=True):
            with subnet.applied(net), torch.no_grad(), context:
                alone = net(x)
            assert part.dtype == alone.dtype and (part - alone).abs().max() <= allowed


def test_what_it_refuses():
    class SequenceFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.a(x.transpose(0, 1)).transpose(0, 1)

    rows = torch.randn(5, 2, 4)
    with pytest.raises(ValueError, match=r"a\.weight must see the batch \(10 rows side by side\) in its first"):
        outputs_of(SequenceFirst(), subnets_of(SequenceFirst(), ["a.weight"], 2), rows)
    plain = SequenceFirst()
    plain.forward = lambda x: plain.a(x)
    with pytest.raises(ValueError, match=r"unused\.weight was never called in this pass"):
        outputs_of(plain, subnets_of(plain, ["a.weight", "unused.weight"], 2), rows)
    with pytest.raises(TypeError, match="subnets must be Subnets, got str"):
        outputs_of(plain, ["a"], rows)

    net, x, scale = Net(), torch.randn(5, 3, 6, 6), torch.rand(5, 1)
    with pytest.raises(ValueError, match="at least one subnet"):
        outputs_of(net, [], x, scale)
    with pytest.raises(ValueError, match=r"norm\.weight is not the weight of an nn\.Linear"):
        outputs_of(net, [Subnet({"norm.weight": torch.ones(4).bool()})], x, scale)
    with pytest.raises(ValueError, match=r"head\.weight must have shape \[2, 10\], got \[2, 9\]"):
        outputs_of(net, [Subnet({"head.weight": torch.ones(2, 9).bool()})], x, scale)
    with pytest.raises(ValueError, match=r"one batch as first dimension, got \[4, 5\]"):
        outputs_of(net, subnets_of(net, ["head.weight"], 1), x, scale[:4])
    mask_model(net)
    with pytest.raises(ValueError, match="the model is masked"):
        outputs_of(net, subnets_of(net, ["head.weight"], 1), x, scale)
