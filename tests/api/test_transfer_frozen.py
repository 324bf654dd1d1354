"""anchor="frozen": planted entries stay bit-identical under every torch optimizer, however the module travels."""

import copy
import gc
import io

import pytest
import torch
from subnets.subnet import Subnet
from subnets.transfer import anchor as anchors
from subnets.transfer import release, transfer
from torch import nn
from torch.optim import optimizer as torch_optimizer


def make_net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 13), nn.Tanh(), nn.Linear(13, 3))


def make_subnet(net: nn.Module, density: float = 0.4) -> Subnet:
    generator = torch.Generator().manual_seed(7)
    weights = {name: p for name, p in net.named_parameters() if p.ndim > 1}
    return Subnet({name: torch.rand(p.shape, generator=generator) < density for name, p in weights.items()})


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.detach().contiguous().view(torch.uint8)


def is_planted(subnet: Subnet, source: nn.Module, target: nn.Module) -> bool:
    there = dict(target.named_parameters())
    return all(
        torch.equal(bits(there[name][subnet.masks[name]]), bits(p[subnet.masks[name]]))
        for name, p in source.named_parameters()
        if name in subnet.masks
    )


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4, step=None) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(11, 6, generator=generator)
    y = torch.randn(11, 3, generator=generator)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        dtype = next(net.parameters()).dtype
        loss = (net(x.to(dtype)) - y.to(dtype)).square().mean()
        loss.backward()
        return loss

    for _ in range(steps):
        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(closure)
        else:
            closure()
            (step or optimizer.step)()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd momentum decay": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "sgd nesterov foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, fused=True),
    "adam decay": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adam fused": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.3, foreach=False),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.3, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.3, fused=True),
    "adamw amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.3, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, weight_decay=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01, weight_decay=0.1),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=4, line_search_fn="strong_wolfe"),
}


@pytest.fixture(params=[False, True], ids=["packed", "positions"])
def keep_positions(request) -> bool:
    return request.param


@pytest.fixture(autouse=True)
def no_anchor_is_left_behind():
    yield
    if anchors._anchors:
        gc.collect()
    assert anchors._anchors == {}
    anchors._remove_step_hook()  # idle after targets that died without release


@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_planted_entries_stay_bit_identical_and_the_rest_trains(build, keep_positions):
    source, target = make_net(0), make_net(1)
    subnet = make_subnet(source)
    before = {name: p.detach().clone() for name, p in target.named_parameters()}
    transfer(subnet, source, target, keep_positions=keep_positions)
    train(target, build(target.parameters()))
    assert is_planted(subnet, source, target)
    for name, parameter in target.named_parameters():
        free = ~subnet.masks[name] if name in subnet.masks else torch.ones_like(parameter, dtype=torch.bool)
        assert (parameter[free] != before[name][free]).float().mean() > 0.95


@pytest.mark.parametrize("build", [OPTIMIZERS["sgd momentum decay"], OPTIMIZERS["adamw"]], ids=["sgd", "adamw"])
def test_an_optimizer_built_and_moving_before_the_transfer_holds_too(build, keep_positions):
    source, target = make_net(0), make_net(1)
    subnet = make_subnet(source)
    optimizer = build(target.parameters())
    train(target, optimizer)  # momentum is under way
    transfer(subnet, source, target, keep_positions=keep_positions)
    train(target, optimizer)
    assert is_planted(subnet, source, target)


def test_without_the_step_hook_weight_decay_would_move_planted_entries():
    source, target = make_net(0), make_net(1)
    subnet = make_subnet(source)
    transfer(subnet, source, target)
    anchors._remove_step_hook()
    train(target, OPTIMIZERS["adamw"](target.parameters()), steps=1)
    assert not is_planted(subnet, source, target)


def test_a_compiled_optimizer_step_holds_whether_compiled_before_or_after():
    source, target = make_net(0), make_net(1)
    subnet = make_subnet(source)
    optimizer = torch.optim.AdamW(target.parameters(), lr=0.01, weight_decay=0.3)
    step = torch.compile(optimizer.step, backend="aot_eager")
    train(target, optimizer, steps=2, step=step)
    transfer(subnet, source, target)
    train(target, optimizer, steps=2, step=step)
    assert is_planted(subnet, source, target)
    other = torch.optim.SGD(target.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    train(target, other, steps=2, step=torch.compile(other.step, backend="aot_eager"))
    assert is_planted(subnet, source, target)
    release(target)
    train(target, optimizer, steps=1, step=step)
    assert not is_planted(subnet, source, target)


def test_a_compiled_model_gets_zero_gradients_at_planted_entries():
    source, target = make_net(0), make_net(1)
    subnet = make_subnet(source)
    compiled = torch.compile(target, backend="aot_eager")
    compiled(torch.randn(2, 6)).sum().backward()  # compiled before the transfer
    target.zero_grad()
    transfer(subnet, source, target)
    compiled(torch.randn(2, 6)).square().sum().backward()
    for name, mask in subnet.masks.items():
        gradient = target.get_parameter(name).grad
        assert (gradient[mask] == 0).all() and (gradient[~mask] != 0).all()


def test_the_gradient_is_zero_at_planted_entries_and_unchanged_elsewhere(keep_positions):
    source, target = make_net(0), make_net(1)
    subnet = make_subnet(source)
    transfer(subnet, source, target, anchor="free")
    x = torch.randn(5, 6)
    free = torch.autograd.grad(target(x).square().sum(), [target[0].weight])[0]
    transfer(subnet, source, target, keep_positions=keep_positions)
    frozen = torch.autograd.grad(target(x).square().sum(), [target[0].weight])[0]
    target(x).square().sum().backward()
    mask = subnet.masks["0.weight"]
    assert torch.equal(frozen, free * ~mask) and torch.equal(target[0].weight.grad, free * ~mask)
    norm = nn.utils.clip_grad_norm_([target[0].weight], 1e9)
    assert norm == pytest.approx(float(free[~mask].norm()), rel=1e-6)


def test_a_nan_gradient_at_a_planted_entry_does_not_reach_it():
    target = nn.Linear(3, 1, bias=False)
    transfer(Subnet({"weight": torch.tensor([[True, False, False]])}), target, target)
    target(torch.tensor([[float("nan"), 1.0, 1.0]])).sum().backward()
    assert target.weight.grad.tolist() == [[0.0, 1.0, 1.0]]


def test_a_sparse_gradient_is_zeroed_at_planted_entries():
    target = nn.Embedding(5, 2, sparse=True)
    mask = torch.zeros(5, 2, dtype=torch.bool)
    mask[1, 0] = mask[4] = True
    source = nn.Embedding(5, 2)
    transfer(Subnet({"weight": mask}), source, target)
    optimizer = torch.optim.SGD(target.parameters(), lr=0.5)
    before = target.weight.detach().clone()
    target(torch.tensor([1, 1, 4, 2])).sum().backward()
    assert target.weight.grad.is_sparse
    assert target.weight.grad.to_dense().tolist() == [[0, 0], [0, 2], [1, 1], [0, 0], [0, 0]]
    optimizer.step()
    expected = before.clone()
    expected[1, 1] -= 1.0
    expected[2] -= 0.5
    assert torch.equal(target.weight.detach(), expected)


def test_negative_zero_and_half_precision_keep_their_bits():
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        source, target = make_net(0).to(dtype), make_net(1).to(dtype)
        subnet = make_subnet(source)
        with torch.no_grad():
            source[0].weight[subnet.masks["0.weight"]] = -0.0
        transfer(subnet, source, target)
        train(target, torch.optim.SGD(target.parameters(), lr=0.1, momentum=0.5))
        assert is_planted(subnet, source, target)


def test_weights_in_any_memory_order_are_planted_and_held(keep_positions):
    source, target = nn.Conv2d(3, 5, 2), nn.Conv2d(3, 5, 2).to(memory_format=torch.channels_last)
    subnet = make_subnet(source)
    transfer(subnet, source, target, keep_positions=keep_positions)
    assert target.weight.is_contiguous(memory_format=torch.channels_last) and is_planted(subnet, source, target)
    optimizer = torch.optim.AdamW(target.parameters(), lr=0.1, weight_decay=0.3)
    target(torch.randn(2, 3, 4, 4)).sum().backward()
    optimizer.step()
    assert is_planted(subnet, source, target)


def test_deepcopy_holds_on_its_own(keep_positions):
    source, target = make_net(0), make_net(1)
    subnet = make_subnet(source)
    transfer(subnet, source, target, keep_positions=keep_positions)
    twin = copy.deepcopy(target)
    release(target)
    train(target, OPTIMIZERS["adamw"](target.parameters()))
    train(twin, OPTIMIZERS["adamw"](twin.parameters()))
    assert is_planted(subnet, source, twin) and not is_planted(subnet, source, target)
    mask = subnet.masks["0.weight"]
    assert (twin[0].weight.grad[mask] == 0).all() and (target[0].weight.grad[mask] != 0).any()


def test_a_deepcopy_of_an_inner_module_holds_too():
    source, target = make_net(0), make_net(1)
    subnet = make_subnet(source)
    transfer(subnet, source, target)
    layer = copy.deepcopy(target[0])
    layer(torch.randn(3, 6)).sum().backward()
    torch.optim.AdamW(layer.parameters(), weight_decay=0.5).step()
    mask = subnet.masks["0.weight"]
    assert torch.equal(layer.weight[mask], source[0].weight[mask])


def test_a_saved_and_loaded_module_holds():
    source, target = make_net(0), make_net(1)
    subnet = make_subnet(source)
    transfer(subnet, source, target)
    file = io.BytesIO()
    torch.save(target, file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    train(loaded, OPTIMIZERS["adam decay"](loaded.parameters()))
    assert is_planted(subnet, source, loaded)
    assert (loaded[0].weight.grad[subnet.masks["0.weight"]] == 0).all()
    release(loaded)
    train(loaded, OPTIMIZERS["adam decay"](loaded.parameters()))
    assert not is_planted(subnet, source, loaded)


def test_a_change_of_dtype_rounds_the_planted_values_as_the_parameter(keep_positions):
    source, target = make_net(0), make_net(1)
    subnet = make_subnet(source)
    transfer(subnet, source, target, keep_positions=keep_positions).to(torch.bfloat16)
    train(target, OPTIMIZERS["adamw"](target.parameters()))
    assert is_planted(subnet, copy.deepcopy(source).to(torch.bfloat16), target)


def test_frozen_parameters_are_planted_stay_frozen_and_hold_once_unfrozen():
    source, target = make_net(0), make_net(1).requires_grad_(False)
    subnet = make_subnet(source)
    transfer(subnet, source, target)
    assert not any(p.requires_grad for p in target.parameters()) and is_planted(subnet, source, target)
    target.requires_grad_(True)
    train(target, OPTIMIZERS["adamw"](target.parameters()))
    assert is_planted(subnet, source, target)
    assert (target[0].weight.grad[subnet.masks["0.weight"]] == 0).all()


def test_gradient_accumulation_and_two_optimizers_hold():
    source, target = make_net(0), make_net(1)
    subnet = make_subnet(source)
    transfer(subnet, source, target)
    first = torch.optim.AdamW(target[0].parameters(), weight_decay=0.3)
    second = torch.optim.SGD(target[2].parameters(), lr=0.1, weight_decay=0.3)
    for _ in range(3):
        target(torch.randn(4, 6)).square().sum().backward()
    first.step()
    second.step()
    assert is_planted(subnet, source, target)
    assert (target[0].weight.grad[subnet.masks["0.weight"]] == 0).all()


def test_loaded_weights_give_way_to_the_planted_ones_at_the_next_step():
    source, target = make_net(0), make_net(1)
    subnet = make_subnet(source)
    transfer(subnet, source, target)
    target.load_state_dict(make_net(2).state_dict())
    assert not is_planted(subnet, source, target)
    train(target, OPTIMIZERS["sgd"](target.parameters()), steps=1)
    assert is_planted(subnet, source, target)


def test_a_second_transfer_after_foreign_weights_were_loaded_holds_what_was_planted_first():
    source, target = make_net(0), make_net(1)
    subnet = make_subnet(source)
    transfer(subnet, source, target)
    target.load_state_dict(make_net(2).state_dict())
    extra = Subnet({"0.weight": ~subnet.masks["0.weight"]})
    transfer(extra, source, target)
    assert torch.equal(target[0].weight, source[0].weight)
    train(target, OPTIMIZERS["adamw"](target.parameters()))
    assert is_planted(subnet, source, target) and torch.equal(target[0].weight, source[0].weight)


def test_a_replaced_parameter_is_free_and_its_module_still_copies():
    source, target = make_net(0), make_net(1)
    subnet = make_subnet(source)
    transfer(subnet, source, target)
    target.load_state_dict(make_net(2).state_dict(), assign=True)
    gc.collect()
    twin = copy.deepcopy(copy.deepcopy(target))
    assert anchors._anchors == {}
    train(twin, OPTIMIZERS["adamw"](twin.parameters()))
    assert twin[0].weight.grad.all()
    transfer(subnet, source, release(twin))
    assert is_planted(subnet, source, twin)


def test_release_removes_every_trace_and_all_entries_train():
    source, target = make_net(0), make_net(1)
    subnet = make_subnet(source)
    keys = list(target.state_dict())
    attributes = {name: set(module.__dict__) for name, module in target.named_modules()}
    hooks = dict(torch_optimizer._global_optimizer_post_hooks)
    assert anchors._step_hook is None
    transfer(subnet, source, target)
    assert list(target.state_dict()) == keys
    assert len(torch_optimizer._global_optimizer_post_hooks) == len(hooks) + 1
    assert release(target) is target
    assert dict(torch_optimizer._global_optimizer_post_hooks) == hooks
    assert {name: set(module.__dict__) for name, module in target.named_modules()} == attributes
    assert not any(p._backward_hooks for p in target.parameters())
    before = target[0].weight.detach().clone()
    train(target, OPTIMIZERS["sgd"](target.parameters()), steps=1)
    mask = subnet.masks["0.weight"]
    assert (target[0].weight[mask] != before[mask]).all()
    assert release(target) is target


def test_one_step_hook_serves_all_targets_and_a_dead_target_leaves_no_anchor():
    source, first, second = make_net(0), make_net(1), make_net(2)
    subnet = make_subnet(source)
    count = len(torch_optimizer._global_optimizer_post_hooks)
    transfer(subnet, source, first)
    transfer(subnet, source, second)
    assert len(torch_optimizer._global_optimizer_post_hooks) == count + 1 and len(anchors._anchors) == 4
    del first
    gc.collect()
    assert len(anchors._anchors) == 2
    train(second, OPTIMIZERS["adamw"](second.parameters()))
    assert is_planted(subnet, source, second)
    release(second)
    assert len(torch_optimizer._global_optimizer_post_hooks) == count


def test_an_anchor_keeps_one_bit_per_weight_and_one_value_per_planted_weight():
    source, target = nn.Linear(40, 50), nn.Linear(40, 50)
    mask = torch.zeros(50, 40, dtype=torch.bool)
    mask[:5] = True
    transfer(Subnet({"weight": mask}), source, target)
    held = anchors.anchor_of(target.weight)
    target(torch.randn(2, 40)).sum().backward()
    torch.optim.SGD(target.parameters(), lr=0.1).step()
    tensors = [value for value in vars(held).values() if isinstance(value, torch.Tensor)]
    assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) == 50 * 40 // 8 + 200 * 4
