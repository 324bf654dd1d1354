"""Every message that docs/troubleshooting.md quotes is raised, word for word, by doing what the page says."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from subnets import DiscoveryConfig, MaskSet, Subnet, discover, mask_model, transfer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import subnet_kernels as sk

PAGE = Path(__file__).resolve().parents[2] / "docs" / "troubleshooting.md"
QUOTES = re.findall(r"```text\n(.*?)\n```", PAGE.read_text(), flags=re.DOTALL)
X, Y = torch.randn(16, 4, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 2


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def masked() -> tuple[nn.Sequential, MaskSet]:
    model = network()
    return model, mask_model(model)


def loss(model: nn.Module, x: Tensor = X) -> Tensor:
    return F.cross_entropy(model(x), Y)


def mean(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).mean()


def half() -> Subnet:
    return Subnet({"0.weight": torch.arange(32).reshape(8, 4) < 16})


# --- what people do, one function per quoted message


def targets_match_nothing(folder: Path) -> None:
    mask_model(network(), "attn")


def mask_twice(folder: Path) -> None:
    mask_model(masked()[0])


def mask_a_diverged_network(folder: Path) -> None:
    model = network()
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    mask_model(model)


def audit_a_reader_of_the_weight(folder: Path) -> None:
    def product(x: Tensor, layer: nn.Linear) -> Tensor:
        return F.linear(x, layer.weight)

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return product(x, self.fc)

    mask_model(Reader()).audit(X)


def audit_what_else_trains(folder: Path) -> None:
    model, masks = masked()
    model[0].bias.requires_grad_(True)
    masks.audit(X)


def heads_that_do_not_divide(folder: Path) -> None:
    mask_model(network(), unit="head:3")


def backward_inside_disabled(folder: Path) -> None:
    model, masks = masked()
    with masks.disabled():
        loss(model).backward()


def change_beta_before_backward(folder: Path) -> None:
    model, masks = masked()
    value = loss(model)
    masks.beta = 5.0
    value.backward()


def collect_over_reentrant_checkpointing(folder: Path) -> None:
    model, masks = masked()
    with masks.collect_penalty() as penalty:
        checkpoint(model, X.clone().requires_grad_(), use_reentrant=True)
    penalty()


def penalty_twice(folder: Path) -> None:
    model, masks = masked()
    with masks.collect_penalty() as penalty:
        model(X)
    penalty(), penalty()


def clip_what_was_stepped_in_backward(folder: Path) -> None:
    model, masks = masked()
    optimizer = masks.adamw(in_backward=True)
    loss(model).backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)


def accumulate_what_is_stepped_in_backward(folder: Path) -> None:
    model, masks = masked()
    optimizer = masks.adamw(in_backward=True)
    loss(model).backward()
    loss(model).backward()
    optimizer.step()


def write_through_data(folder: Path) -> None:
    model, masks = masked()
    model(X)
    masks.layers["0.weight"].scores.data.add_(1.0)
    masks.check_fresh()


def an_objective_that_is_nan(folder: Path) -> None:
    discover(network(), [X], lambda model, x: mean(model, x) * float("nan"), DiscoveryConfig(epochs=2))


def an_iterator_for_two_epochs(folder: Path) -> None:
    discover(network(), iter([X]), mean, DiscoveryConfig(epochs=2))


def a_checkpoint_of_something_else(folder: Path) -> None:
    for config in (DiscoveryConfig(epochs=1), DiscoveryConfig(epochs=2)):
        config = DiscoveryConfig(epochs=config.epochs, checkpoint=str(folder / "checkpoint"))
        discover(network(), [X], mean, config)


def apply_to_another_model(folder: Path) -> None:
    half().apply_(nn.Sequential(network()))


def apply_to_a_masked_model(folder: Path) -> None:
    half().apply_(masked()[0])


def load_what_is_no_subnet(folder: Path) -> None:
    (folder / "s.safetensors").write_text("version 1\nsize 12345\n")
    Subnet.load(folder / "s.safetensors")


def sample_beside_a_dense_subnet(folder: Path) -> None:
    Subnet({"0.weight": torch.ones(8, 4, dtype=torch.bool)}).complement_sample(torch.Generator())


def plant_from_another_network(folder: Path) -> None:
    transfer(half().with_weights(network()), network(), network())


def plant_from_nothing(folder: Path) -> None:
    transfer(half(), None, network())


def plant_from_half_precision(folder: Path) -> None:
    transfer(half(), network().half(), network())


def plant_twice(folder: Path) -> None:
    target = network()
    for source in (network(), network()):
        transfer(half(), source, target)


def a_backend_that_can_not(folder: Path) -> None:
    with sk.use_backend("triton"):
        sk.masked_linear(X, torch.ones(8, 4), torch.ones(8, 4), 1.0)


DOINGS: list[Callable[[Path], None]] = [
    targets_match_nothing, mask_twice, mask_a_diverged_network, audit_a_reader_of_the_weight, audit_what_else_trains,
    heads_that_do_not_divide, backward_inside_disabled, change_beta_before_backward,
    collect_over_reentrant_checkpointing, penalty_twice, clip_what_was_stepped_in_backward,
    accumulate_what_is_stepped_in_backward, write_through_data, an_objective_that_is_nan, an_iterator_for_two_epochs,
    a_checkpoint_of_something_else, apply_to_another_model, apply_to_a_masked_model, load_what_is_no_subnet,
    sample_beside_a_dense_subnet, plant_from_another_network, plant_from_nothing, plant_from_half_precision,
    plant_twice, a_backend_that_can_not,
]  # fmt: skip


def test_every_quote_has_a_doing():
    assert len(QUOTES) == len(DOINGS) > 20


@pytest.mark.parametrize("quote, doing", [*zip(QUOTES, DOINGS)], ids=[doing.__name__ for doing in DOINGS])
def test_a_quoted_message_is_raised_word_for_word(quote, doing, tmp_path):
    with pytest.raises((ValueError, RuntimeError)) as raised:
        doing(tmp_path)
    pattern = ".*".join(re.escape(piece) for piece in quote.split("…"))
    assert re.fullmatch(pattern, str(raised.value), flags=re.DOTALL), str(raised.value)
