"""What `transfer` plants and what it refuses. How it holds: test_transfer_frozen.py."""

import copy

import pytest
import torch
from subnets.subnet import Subnet
from subnets.transfer import anchor as anchors
from subnets.transfer import release, transfer
from torch import nn


def make_net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))


def make_subnet(seed: int = 7, density: float = 0.4) -> Subnet:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"0.weight": (5, 4), "2.weight": (2, 5)}
    return Subnet({name: torch.rand(shape, generator=generator) < density for name, shape in shapes.items()})


def state(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("how", ["frozen", "free"])
def test_target_gets_the_masked_entries_of_the_source_and_nothing_else(how):
    source, target, subnet = make_net(0), make_net(1), make_subnet()
    before, parameters, source_before = state(target), list(target.parameters()), state(source)
    assert transfer(subnet, source, target, anchor=how) is target
    after = state(target)
    for name, mask in subnet.masks.items():
        assert torch.equal(after[name], torch.where(mask, source.state_dict()[name], before[name]))
    assert torch.equal(after["0.bias"], before["0.bias"]) and torch.equal(after["2.bias"], before["2.bias"])
    assert all(p is q for p, q in zip(parameters, target.parameters(), strict=True))
    assert same(state(source), source_before)


def test_free_entries_train():
    source, target, subnet = make_net(0), make_net(1), make_subnet()
    transfer(subnet, source, target, anchor="free")
    target(torch.randn(9, 4)).square().sum().backward()
    torch.optim.SGD(target.parameters(), lr=0.1).step()
    mask = subnet.masks["2.weight"]
    assert not torch.equal(target[2].weight[mask], source[2].weight[mask])
    assert anchors.anchor_of(target[2].weight) is None


def test_a_file_with_weights_plants_without_its_network(tmp_path):
    source, target, other, subnet = make_net(0), make_net(1), make_net(1), make_subnet()
    subnet.save(tmp_path / "s.safetensors", weights=source)
    transfer(Subnet.load(tmp_path / "s.safetensors"), None, target, anchor="free")
    transfer(subnet, source, other, anchor="free")
    assert same(state(target), state(other))


def test_planting_alone_without_values_is_refused():
    with pytest.raises(ValueError, match="source is None and the subnet carries no values"):
        transfer(make_subnet(), None, make_net(1))


def test_another_source_than_the_file_remembers_is_refused_unless_told(tmp_path):
    source, impostor, target, subnet = make_net(0), make_net(0), make_net(1), make_subnet()
    with torch.no_grad():
        impostor[0].weight[0, 0] += 1e-6
    subnet.save(tmp_path / "s.safetensors", weights=source)
    loaded = Subnet.load(tmp_path / "s.safetensors")
    before = state(target)
    with pytest.raises(ValueError, match="must be the network that the subnet was found in"):
        transfer(loaded, impostor, target)
    assert same(state(target), before)
    transfer(loaded, source, target, anchor="free")
    transfer(loaded, impostor, target, anchor="free", check_hash=False)
    with torch.no_grad():
        impostor[0].bias.add_(1)  # not masked: no part of the hash
        impostor[0].weight.copy_(source[0].weight)
    transfer(loaded, impostor, target)


def test_a_target_that_does_not_fit_lists_names_and_stays_unchanged():
    source, subnet = make_net(0), make_subnet()
    target = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Sequential(nn.Linear(6, 2)))
    before = state(target)
    with pytest.raises(ValueError) as error:
        transfer(subnet, source, target)
    text = str(error.value)
    assert text.startswith("transfer: target: ") and "missing from the model: 2.weight" in text
    assert "differently shaped: 0.weight (subnet [5, 4], model [6, 4])" in text and "besides: 2.0.weight" in text
    assert same(state(target), before)
    with pytest.raises(ValueError, match="transfer: source: "):
        transfer(subnet, target, source)


def test_differing_dtypes_and_non_finite_values_are_refused_before_any_write():
    source, target, subnet = make_net(0), make_net(1), make_subnet()
    target[2].bfloat16()
    before = state(target)
    with pytest.raises(ValueError, match=r"2.weight is torch.float32 in the source and torch.bfloat16 in target"):
        transfer(subnet, source, target)
    target = make_net(1)
    before = state(target)
    with torch.no_grad():
        source[2].weight[subnet.masks["2.weight"]] = float("nan")
    with pytest.raises(ValueError, match=r"must be finite.*: 2.weight"):
        transfer(subnet, source, target)
    assert same(state(target), before)


def test_a_nan_outside_the_subnet_is_no_obstacle():
    source, target, subnet = make_net(0), make_net(1), make_subnet()
    with torch.no_grad():
        source[2].weight[~subnet.masks["2.weight"]] = float("nan")
    transfer(subnet, source, target, anchor="free")
    assert all(p.isfinite().all() for p in target.parameters())


def test_what_is_not_built_yet_is_refused_in_words():
    arguments = make_subnet(), make_net(0), make_net(1)
    with pytest.raises(NotImplementedError, match="elastic anchor .* not available yet, got 0.5"):
        transfer(*arguments, anchor=0.5)
    with pytest.raises(ValueError, match=r"transfer: the subnet has no ranks, so its highest-scored part is not known"):
        transfer(*arguments, fraction=0.5)
    with pytest.raises(ValueError, match="'frozen' or 'free', got 'elastic'"):
        transfer(*arguments, anchor="elastic")
    for fraction in (0, -1, 1.5, float("nan"), True, "all"):
        with pytest.raises(ValueError, match=r"fraction must be a number in \(0, 1\]"):
            transfer(*arguments, fraction=fraction)
    with pytest.raises(TypeError, match="subnet must be a Subnet, got dict"):
        transfer({}, *arguments[1:])
    with pytest.raises(TypeError, match="transfer: source: a model must be a torch.nn.Module, got OrderedDict"):
        transfer(arguments[0], arguments[1].state_dict(), arguments[2])
    with pytest.raises(TypeError, match="release: target must be"):
        release(None)


def test_a_second_transfer_adds_to_the_first():
    source, target = make_net(0), make_net(1)
    first, second = make_subnet(1), make_subnet(2)
    assert (first & second).num_kept() > 0 and (second - first).num_kept() > 0
    transfer(first, source, target)
    transfer(second, source, target)  # the common entries get the same bits
    target(torch.randn(9, 4)).square().sum().backward()
    torch.optim.AdamW(target.parameters(), weight_decay=0.5).step()
    for name, mask in (first | second).masks.items():
        assert torch.equal(target.get_parameter(name)[mask], source.get_parameter(name)[mask])
        gradient = target.get_parameter(name).grad
        assert (gradient[mask] == 0).all()
    release(target)
    assert not any(p._backward_hooks for p in target.parameters())


@pytest.mark.parametrize("how", ["frozen", "free"])
def test_an_entry_held_with_another_value_is_not_overwritten(how):
    source, other, target = make_net(0), make_net(2), make_net(1)
    first, second = make_subnet(1), make_subnet(2)
    transfer(first, source, target)
    before = state(target)
    with pytest.raises(ValueError, match=r"already holds .* in 0.weight, 2.weight; call release"):
        transfer(second, other, target, anchor=how)
    assert same(state(target), before)
    transfer(second - first, other, target, anchor=how)
    release(target)
    transfer(second, other, target)
    mask = second.masks["0.weight"]
    assert torch.equal(target[0].weight[mask], other[0].weight[mask])


def test_source_and_target_may_be_the_same_network():
    net, subnet = make_net(0), make_subnet()
    before = copy.deepcopy(net)
    transfer(subnet, net, net)
    net(torch.randn(9, 4)).square().sum().backward()
    torch.optim.AdamW(net.parameters(), weight_decay=0.5).step()
    for name, mask in subnet.masks.items():
        assert torch.equal(net.get_parameter(name)[mask], before.get_parameter(name)[mask])
        assert (net.get_parameter(name)[~mask] != before.get_parameter(name)[~mask]).any()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight


def test_a_tied_parameter_is_planted_by_either_name_but_not_by_both():
    mask = torch.rand(5, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    source = Tied()
    for name in ("embedding.weight", "head.weight"):
        target = Tied()
        transfer(Subnet({name: mask}), source, target)
        assert torch.equal(target.head.weight[mask], source.embedding.weight[mask])
        assert target.head.weight is target.embedding.weight
        release(target)
    with pytest.raises(ValueError, match=r"embedding.weight and head.weight are the same tied parameter"):
        transfer(Subnet({"embedding.weight": mask, "head.weight": mask}), source, Tied())


def test_integer_and_meta_parameters_are_refused():
    target = nn.Module()
    target.weight = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    subnet = Subnet({"weight": torch.tensor([True, False])})
    with pytest.raises(ValueError, match="weight must be a plain floating-point parameter with values, got Tensor"):
        transfer(subnet, target, target)
    with pytest.raises(ValueError, match="on meta"):
        transfer(make_subnet(), make_net(0), make_net(1).to("meta"))


def test_an_empty_mask_plants_nothing():
    source, target = make_net(0), make_net(1)
    before = state(target)
    transfer(Subnet({"0.weight": torch.zeros(5, 4, dtype=torch.bool)}), source, target)
    assert same(state(target), before)
    target(torch.randn(9, 4)).square().sum().backward()
    torch.optim.SGD(target.parameters(), lr=0.1).step()
    assert (target[0].weight != before["0.weight"]).any()
