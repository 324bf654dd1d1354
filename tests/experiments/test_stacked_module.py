"""Stacks of any architecture: the numbers of StackedGPT2, and those of separate training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from subnets.experiments.arithmetic import data
from subnets.training.gpt2 import GPT2Shape, LeanGPT2
from subnets.training.member_training import Member, Recipe, train_stack
from subnets.training.seeds import torch_generator
from subnets.training.stacked import StackedGPT2
from subnets.training.stacked_module import StackedModule
from torch import Tensor, nn

SHAPE = GPT2Shape(layers=1, width=32, heads=4, dropout=0.0)


def gpt2_loss(network: Callable[..., Any], sequences: Tensor) -> Tensor:
    logits = network(sequences[:, :-1])
    return F.cross_entropy(logits.transpose(1, 2), sequences[:, 1:], reduction="none").mean(1)


def gpt2_right(network: Callable[..., Any], sequences: Tensor) -> Tensor:
    return network(sequences[:, :-1])[:, -1].argmax(-1) == sequences[:, -1]


def generic(states: list[dict[str, Tensor]], device: torch.device) -> StackedModule:
    return StackedModule(LeanGPT2(SHAPE).eval(), states, gpt2_loss, gpt2_right, device=device)


def gpt2_member(index: int, rows: int, *, frozen: bool = False) -> Member:
    generator = torch_generator("generic", index)
    state = LeanGPT2(SHAPE, generator).state_dict()
    masks = {n: torch.rand(state[n].shape, generator=generator) < 0.3 for n in SHAPE.masked_names()} if frozen else {}
    sets = [data.held_out_set(data.T2, split, index, 60) for split in ("validation", "test")]
    return Member({"index": index}, state, data.training_set(data.T2, rows, index), *sets, ("g", index), masks)


def test_losses_and_gradients_are_those_of_the_hand_written_stack() -> None:
    states = [{n: v.double() for n, v in gpt2_member(i, 5).state.items()} for i in range(3)]
    sequences = torch.stack([data.training_set(data.T1, 20, i) for i in range(3)])
    live = torch.rand(3, 20, generator=torch_generator("live")) < 0.6
    written, made = StackedGPT2(SHAPE, states), generic(states, torch.device("cpu"))
    for counted in (None, live):
        torch.testing.assert_close(made.loss_and_grads(sequences, None, counted), written.loss_and_grads(
            sequences, None, counted
        ), rtol=1e-12, atol=0)  # fmt: skip
        for name, grad in written.grads.items():
            torch.testing.assert_close(made.grads[name], grad, rtol=1e-8, atol=1e-13)
    assert torch.equal(made.right(sequences), written.right(sequences))


def test_training_is_that_of_the_hand_written_stack() -> None:
    members = [gpt2_member(0, 110), gpt2_member(1, 70, frozen=True)]
    recipe = Recipe(epochs=2, batch=50, lr=1e-3)
    for ours, theirs in zip(train_stack(generic, members, recipe), train_stack(SHAPE, members, recipe), strict=True):
        for a, b in zip(ours.curve, theirs.curve, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=2e-6)
            assert a["validation_accuracy"] == pytest.approx(b["validation_accuracy"], abs=0.02)
    for name, mask in members[1].frozen.items():
        trained = train_stack(generic, members, recipe)[1].state[name]
        assert torch.equal(trained[mask], members[1].state[name][mask])


class ConvNet(nn.Sequential):
    """A batch norm in eval mode between two convolutions."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 3, stride=2), nn.Flatten(),
            nn.Linear(4 * 9, 3),
        )  # fmt: skip


def test_a_conv_net_trains_as_each_network_alone() -> None:
    generator = torch_generator("conv")
    torch.manual_seed(0)
    nets = [ConvNet().double() for _ in range(3)]
    for buffer in (nets[0][1].running_mean, nets[0][1].running_var):
        buffer.uniform_(0.5, 1.5)  # shared by all
    for net in nets:
        net.load_state_dict({n: v for n, v in nets[0].state_dict().items() if "running" in n}, strict=False)
        net.eval()
    images = torch.randn(70, 2, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (70,), generator=generator)
    cuts = (70, 50, 70)
    held_out = [(images[:9], labels[:9]), (images[9:20], labels[9:20])]
    members = [
        Member({}, net.state_dict(), (images[:n], labels[:n]), *held_out, (i,))
        for i, (net, n) in enumerate(zip(nets, cuts, strict=True))
    ]

    def loss(network: Callable[..., Any], rows: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(network(rows[0]), rows[1], reduction="none")

    def right(network: Callable[..., Any], rows: tuple[Tensor, Tensor]) -> Tensor:
        return network(rows[0]).argmax(-1) == rows[1]

    recipe = Recipe(epochs=3, batch=32, lr=1e-2, clip=0.5)
    results = train_stack(
        lambda states, device: StackedModule(nets[0], states, loss, right, device=device), members, recipe
    )
    for i, (net, n, result) in enumerate(zip(nets, cuts, results, strict=True)):
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.01)
        best, kept = -1.0, {}
        for epoch in (1, 2, 3):
            for rows in torch.randperm(n, generator=torch_generator(i, "order", epoch)).split(32):
                optimizer.zero_grad()
                F.cross_entropy(net(images[rows]), labels[rows]).backward()
                nn.utils.clip_grad_norm_(net.parameters(), 0.5)
                optimizer.step()
            accuracy = (net(images[:9]).argmax(-1) == labels[:9]).double().mean().item()
            assert result.curve[epoch - 1]["validation_accuracy"] == pytest.approx(accuracy)
            if accuracy > best:
                best, kept = accuracy, {name: value.clone() for name, value in net.state_dict().items()}
        assert set(result.state) >= {name for name, _ in net.named_parameters()}
        for name, value in result.state.items():
            torch.testing.assert_close(value, kept[name], rtol=1e-6, atol=1e-9)
        ConvNet().double().load_state_dict(result.state)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.2)), r"1 \(Dropout\) has dropout 0.2 in training mode"),
        (nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)), r"1 \(BatchNorm2d\) keeps running statistics"),
        (nn.BatchNorm1d(3, track_running_stats=False).eval(), r"BatchNorm1d \(BatchNorm1d\) normalises over the batch"),
        (nn.MultiheadAttention(4, 2, dropout=0.5), r"\(MultiheadAttention\) has dropout 0.5"),
    ],
)
def test_what_members_would_share_is_refused(module: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StackedModule(module, [module.state_dict()], gpt2_loss, gpt2_right)
    with pytest.raises(ValueError, match="at least one state dict, got none"):
        StackedModule(nn.Linear(1, 1), [], gpt2_loss, gpt2_right)
