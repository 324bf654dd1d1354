"""ticket_search: weights and scores together as by hand, rounds, the ticket's values, and what it leaves behind."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from subnets import DiscoveryConfig, release
from subnets.methods import ContinuousSparsification, Lepori, ticket_search
from subnets.subnet_file import weights_hash
from subnets.transfer.anchor import _anchors
from torch import Tensor, nn
from torch.nn import functional as F

X = torch.randn(24, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
Y = X[:, :3].argmax(1)
BATCHES = [(X[8 * i : 8 * i + 8], Y[8 * i : 8 * i + 8]) for i in range(3)]
EPOCHS, ROUNDS = 4, 3


@pytest.fixture(autouse=True)
def nothing_is_held_afterwards():
    yield
    assert _anchors == {}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()


def classify(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def by_hand(s0: float, reset: str, scale: float, lam: float, rewind_to: int) -> tuple[list[Tensor], ...]:
    """(scores, weights and biases, those at the start of epoch rewind_to) of the authors' loop."""
    values = [p.detach().clone().requires_grad_(True) for p in network().parameters()]
    w1, b1, w2, b2 = values
    scores = [torch.full_like(w, s0).requires_grad_(True) for w in (w1, w2)]
    both = [
        torch.optim.SGD(scores, 0.02, momentum=0.9, nesterov=True),
        torch.optim.SGD(values, 0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    ]
    rewound: list[Tensor] = []
    for epoch in range(ROUNDS * EPOCHS):
        e = epoch % EPOCHS
        if epoch == rewind_to:
            rewound = [p.detach().clone() for p in values]
        if epoch and e == 0:
            with torch.no_grad():
                for s in scores:
                    s.copy_((s * (200 if reset == "paper" else 1)).clamp(max=s0))
        beta = torch.tensor(200 ** (e / (EPOCHS - 1))).item()
        for optimizer, rate in zip(both, (0.02, 0.05), strict=True):
            optimizer.param_groups[0]["lr"] = rate * (0.1 if e >= 2 else 1)
        for x, y in BATCHES:
            m1, m2 = (scale * torch.sigmoid(beta * s) for s in scores)
            loss = F.cross_entropy(F.linear(F.linear(x, w1 * m1, b1).relu(), w2 * m2, b2), y)
            (loss + lam * (m1.sum() + m2.sum())).backward()
            for optimizer in both:
                optimizer.step()
                optimizer.zero_grad()
    return scores, values, rewound


@pytest.mark.parametrize("reset", ["paper", "code"])
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("rewind_to", [0, 2])
def test_weights_and_ticket_are_those_of_the_authors_loop_written_by_hand(reset, rescale, rewind_to):
    s0, lam = 0.01, 2e-3
    scale = 1 + math.exp(-s0) if rescale else 1.0
    method = ContinuousSparsification(
        reset=reset, rescale=rescale, score_init=s0, lam=lam, lr=0.02, lr_schedule=(0.5,), rounds=ROUNDS
    )
    model = network()
    ticket = ticket_search(
        model, BATCHES, classify, DiscoveryConfig(epochs=EPOCHS), method=method, weight_lr=0.05, weight_decay=0.01,
        rewind_to=rewind_to,
    )  # fmt: skip
    scores, values, rewound = by_hand(s0, reset, scale, lam, rewind_to)
    for name, expected in zip(("0.weight", "0.bias", "2.weight", "2.bias"), values, strict=True):
        torch.testing.assert_close(ticket.trained[name], expected.detach(), rtol=1e-9, atol=1e-11)
    for name, expected in zip(("0.weight", "0.bias", "2.weight", "2.bias"), rewound, strict=True):
        factor = scale if name.endswith("weight") else 1
        torch.testing.assert_close(ticket.rewound[name], expected * factor, rtol=1e-9, atol=1e-11)
    for name, its in (("0.weight", scores[0]), ("2.weight", scores[1])):
        assert torch.equal(ticket.subnet.masks[name], its > 0)
    assert 0 < ticket.subnet.density() < 1
    assert [row["round"] for row in ticket.history] == [r for r in range(ROUNDS) for _ in range(EPOCHS)]


def test_the_ticket_starts_from_its_rewound_values_to_the_bit_and_others_stay_zero():
    ticket = ticket_search(
        network(), BATCHES, classify, DiscoveryConfig(epochs=EPOCHS), method=ContinuousSparsification(rounds=2)
    )
    model = ticket.plant(network())
    for name, mask in ticket.subnet.masks.items():
        weight = model.get_parameter(name).detach()
        assert torch.equal(weight[mask], ticket.rewound[name][mask]) and not weight[~mask].any()
        assert torch.equal(ticket.subnet.weights[name], ticket.rewound[name][mask])
    assert torch.equal(model[0].bias, ticket.rewound["0.bias"])
    assert ticket.subnet.base_hash == weights_hash({name: ticket.rewound[name] for name in ticket.subnet.masks})
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    for batch in BATCHES:
        classify(model, batch).backward()
        optimizer.step()
    assert all(not model.get_parameter(name)[~mask].any() for name, mask in ticket.subnet.masks.items())
    release(model)


def test_the_model_comes_back_as_it_was_also_after_an_error_and_frozen_parameters_stay():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.2), nn.Linear(6, 3)).double()
    model[4].bias.requires_grad_(False)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    modules = [(type(module), module.training, sorted(vars(module))) for module in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    modes = []

    def objective(model: nn.Module, batch: Any) -> Tensor:
        modes.append(model.training)
        if len(modes) > 40:
            raise KeyboardInterrupt
        return classify(model, batch)

    config, method = DiscoveryConfig(epochs=3), ContinuousSparsification(rounds=2)
    ticket = ticket_search(model, BATCHES, objective, config, method=method, evaluate=lambda m: float(not m.training))
    assert torch.equal(ticket.trained["4.bias"], state["4.bias"])
    assert not torch.equal(ticket.trained["0.bias"], state["0.bias"])
    assert not torch.equal(ticket.rewound["1.running_mean"], state["1.running_mean"])
    assert all(modes) and all(row["score"] == 1.0 for row in ticket.history)
    with pytest.raises(KeyboardInterrupt):
        for _ in range(3):
            ticket_search(model, BATCHES, objective, config, method=method)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [(type(module), module.training, sorted(vars(module))) for module in model.modules()] == modules
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(torch.get_rng_state(), random_state)


def test_equal_seeds_give_equal_tickets():
    def shuffled(epoch: int) -> list[tuple[Tensor, Tensor]]:
        return [(X[part], Y[part]) for part in torch.randperm(24).split(8)]

    tickets = [
        ticket_search(network(), shuffled, classify, DiscoveryConfig(epochs=3, seed=seed))
        for seed in (1, 1, 2)
    ]
    assert tickets[0].history == tickets[1].history != tickets[2].history
    assert all(torch.equal(value, tickets[1].trained[name]) for name, value in tickets[0].trained.items())


@pytest.mark.parametrize("change, error, message", [
    (dict(rewind_to=4), ValueError, "rewind_to must be an epoch of the first round, 0 to 3, got 4"),
    (dict(rewind_to=-1), ValueError, "rewind_to must be an epoch of the first round"),
    (dict(method="continuous_sparsification"), TypeError, "method must be a ContinuousSparsification, got 'cont"),
    (dict(config=DiscoveryConfig(epochs=4, checkpoint="x.ckpt")), ValueError, "checkpoint is discover's"),
    (dict(config=DiscoveryConfig(epochs=4, seeds=(0, 1)), method=Lepori()), ValueError, "seeds is discover's"),
    (dict(config=DiscoveryConfig(epochs=4, lr=3.0)), ValueError, "lr of the config are the method's to set"),
    (dict(weight_lr=0.0), ValueError, "weight_lr must be a finite number > 0, got 0.0"),
    (dict(weight_decay=-1.0), ValueError, "weight_decay must be a finite number >= 0, got -1.0"),
])  # fmt: skip
def test_bad_input_is_refused_and_the_model_stays(change, error, message):
    model = network()
    arguments = {"config": DiscoveryConfig(epochs=EPOCHS), "method": ContinuousSparsification(rounds=1), **change}
    with pytest.raises(error, match=message):
        ticket_search(model, BATCHES, classify, **arguments)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), network().parameters(), strict=True))
    assert type(model[0]) is nn.Linear
