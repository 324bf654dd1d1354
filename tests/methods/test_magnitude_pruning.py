"""iterative_magnitude_pruning: exact counts with each rounding, survivors to the bit, zeros that stay, controls."""

from __future__ import annotations

import math

import pytest
import torch
from subnets import mask_model, release, transfer
from subnets.methods import PruningConfig, iterative_magnitude_pruning
from subnets.subnet_file import weights_hash
from subnets.transfer.anchor import _anchors
from torch import nn
from torch.nn import functional as F

PERCENT = [80.038, 64.064, 51.282, 41.053, 32.867, 26.316, 21.072, 16.876, 13.517, 10.828,
           8.676, 6.952, 5.572, 4.467, 3.583, 2.874, 2.306, 1.851, 1.486, 1.194]  # fmt: skip


def lenet() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))


def small(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 17), nn.BatchNorm1d(17), nn.Tanh(), nn.Linear(17, 3))


def add_noise(model: nn.Module) -> None:
    """Stands for training where only counts are asked for: other sizes, no ties."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_((p != 0) * torch.randn(p.shape, generator=generator))


OPTIMIZERS = {
    "sgd momentum decay": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.3),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, weight_decay=0.1),
}


def steps(model: nn.Module, start: int = 0, stop: int | None = None, build=OPTIMIZERS["adamw"]) -> list[int]:
    """Six steps of a schedule, each on data of its own."""
    optimizer, taken = build(model.parameters()), list(range(start, 6 if stop is None else stop))
    for step in taken:
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(20, 6, generator=generator), torch.randint(0, 3, (20,), generator=generator)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return taken


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.fixture(autouse=True)
def nothing_is_held_afterwards():
    yield
    assert _anchors == {}


# --- counts


def counts(tickets) -> list[list[int]]:
    return [[int(mask.sum()) for mask in subnet.masks.values()] for subnet in tickets.subnets]


def test_layerwise_ladder_of_lenet_is_the_closed_form_within_rounding():
    tickets = iterative_magnitude_pruning(lenet(), add_noise, PruningConfig.preset("lottery_ticket", 20))
    sizes, rates = (235_200, 30_000, 1_000), (0.2, 0.2, 0.1)
    for level, kept in enumerate(counts(tickets)):
        exact = [n * (1 - p) ** level for n, p in zip(sizes, rates, strict=True)]
        # roundings of at most 1/2 each, shrunk by 1 - p per round, add up to at most 1 / (2 p)
        assert all(abs(k - e) <= 0.5 / p for k, e, p in zip(kept, exact, rates, strict=True)), (level, kept)
        if level:
            assert round(100 * sum(exact) / 266_200, 3) == PERCENT[level - 1]
            assert tickets.history[level]["density"] == pytest.approx(PERCENT[level - 1] / 100, abs=6e-5 / 2)
    assert counts(tickets)[0] == list(sizes) and counts(tickets)[1] == [188_160, 24_000, 900]


def test_the_authors_code_drops_one_more_per_layer_and_round():
    tickets = iterative_magnitude_pruning(lenet(), add_noise, PruningConfig.preset("lottery_ticket_code", 15))
    kept = counts(tickets)
    assert kept[1] == [188_159, 23_999, 899] and kept[7] == [49_321, 6_288, 472]
    assert round(100 * tickets.subnets[7].density(), 3) == 21.067
    assert round(100 * tickets.subnets[15].density(), 3) == 3.576


def test_open_lth_counts_all_layers_together_and_the_whole_output_layer_too():
    tickets = iterative_magnitude_pruning(lenet(), add_noise, PruningConfig.preset("open_lth", 3))
    left = [266_200]
    for _ in range(3):
        left.append(left[-1] - math.ceil(0.2 * left[-1]) - 1)
    assert [sum(kept) for kept in counts(tickets)] == left and left[1:] == [212_959, 170_366, 136_291]
    tickets = iterative_magnitude_pruning(lenet(), add_noise, PruningConfig.preset("open_lth_lenet", 2))
    assert [kept[2] for kept in counts(tickets)] == [1000, 1000, 1000]
    assert [sum(kept) for kept in counts(tickets)] == left[:3]  # the output layer's 1000 count, and none of them goes


def test_a_half_rounds_to_the_even_number_as_in_numpy():
    model = nn.Linear(5, 5, bias=False)  # 12.5 of 25 go: 12; then 6.5 of 13: 6
    tickets = iterative_magnitude_pruning(model, add_noise, PruningConfig(rounds=2, rate=0.5))
    assert counts(tickets) == [[25], [13], [7]]


# --- which weights


def planted(model: nn.Module) -> None:
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -2.0], [3.0, -4.0]]))
        model[1].weight.copy_(torch.tensor([[-10.0, 20.0], [0.5, -40.0]]))


def test_layerwise_and_global_differ_on_a_planted_example():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    with torch.no_grad():  # at the start the largest are elsewhere: what counts are trained sizes
        model[0].weight.copy_(torch.tensor([[9.0, 9.0], [0.1, 0.1]]))
    kept = {}
    for scope in ("layer", "global"):
        tickets = iterative_magnitude_pruning(model, planted_once(), PruningConfig(rounds=1, rate=0.5, scope=scope))
        kept[scope] = [mask.int().tolist() for mask in tickets.subnets[1].masks.values()]
    assert kept["layer"] == [[[0, 0], [1, 1]], [[0, 1], [0, 1]]]
    assert kept["global"] == [[[0, 0], [0, 1]], [[1, 1], [0, 1]]]


def planted_once():
    """The first training writes the example, the ticket's moves a bit what is left."""
    calls = []

    def train(model: nn.Module) -> None:
        calls.append(None)
        if len(calls) == 1:
            planted(model)
        else:
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1.5)

    return train


def test_masks_are_nested_and_each_round_drops_the_smallest_of_those_left():
    seen = []

    def train(model: nn.Module) -> None:
        steps(model)
        seen.append(values(model))

    tickets = iterative_magnitude_pruning(small(), train, PruningConfig(rounds=3, rate=0.3))
    for level in range(3):
        for name, mask in tickets.subnets[level].masks.items():
            after, size = tickets.subnets[level + 1].masks[name], seen[level][name].abs()
            gone = mask & ~after
            assert not (after & ~mask).any() and int(gone.sum()) == round(0.3 * int(mask.sum()))
            assert size[gone].max() < size[after].min()


def test_of_equal_weights_the_first_go_so_that_counts_are_exact():
    model = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Linear(1, 4, bias=False))

    def train(model: nn.Module) -> None:
        with torch.no_grad():
            model[0].weight.copy_(torch.tensor([[2.0, -1.0, 2.0, 3.0]]) * (model[0].weight != 0))
            model[1].weight.copy_(torch.tensor([[-2.0], [2.0], [4.0], [5.0]]) * (model[1].weight != 0))

    tickets = iterative_magnitude_pruning(model, train, PruningConfig(rounds=1, rate=0.5, scope="global"))
    assert [mask.flatten().int().tolist() for mask in tickets.subnet.masks.values()] == [[0, 0, 0, 1], [0, 1, 1, 1]]


def test_targets_and_exclude_choose_as_mask_model_does():
    tickets = iterative_magnitude_pruning(small(), steps, PruningConfig(rounds=1, exclude="3"))
    assert list(tickets.subnet.masks) == ["0.weight"]
    tickets = iterative_magnitude_pruning(small(), steps, PruningConfig(rounds=1, targets=["3", "0.bias"]))
    masks = mask_model(small(), targets=["3", "0.bias"]).subnet().masks
    assert list(tickets.subnet.masks) == list(masks) == ["0.bias", "3.weight"]


# --- rewinding, zeros


@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_survivors_start_from_theta_0_to_the_bit_and_pruned_weights_stay_zero(build):
    model = small()
    before, level = values(model), []

    def train(model: nn.Module) -> None:
        level.append(values(model))
        steps(model, build=build)
        level.append(values(model))

    tickets = iterative_magnitude_pruning(model, train, PruningConfig(rounds=2, rate=0.4))
    assert_equal(values(model), before)
    for number, subnet in enumerate(tickets.subnets):
        start, end = level[2 * number : 2 * number + 2]
        assert_equal(start, {n: t * subnet.masks[n] if n in subnet.masks else t for n, t in before.items()})
        for name, mask in subnet.masks.items():
            assert not end[name][~mask].any() and (end[name][mask] != start[name][mask]).all()


def test_late_rewinding_goes_back_to_step_k_and_on_from_there():
    calls, starts = [], []

    def train(model: nn.Module, start: int, stop: int | None) -> None:
        calls.append((start, stop))
        starts.append(values(model))
        steps(model, start, stop)

    model, reference = small(), small()
    tickets = iterative_magnitude_pruning(model, train, PruningConfig(rounds=2, rate=0.4, rewind_to=2))
    assert calls == [(0, 2), (2, None), (2, None), (2, None)]
    steps(reference, 0, 2)
    at_k = values(reference)  # batch norm's buffers too
    assert_equal(starts[1], at_k)
    last = tickets.subnet
    assert_equal(starts[3], {n: t * last.masks[n] if n in last.masks else t for n, t in at_k.items()})
    assert all(torch.equal(kept, at_k[n][last.masks[n]]) for n, kept in last.weights.items())
    assert last.base_hash == weights_hash({n: at_k[n] for n in last.masks})
    assert_equal(values(model), values(small()))


def test_the_model_comes_back_with_its_gradients_and_modes_even_if_train_fails():
    model = small().eval()
    model[0].train()
    model(torch.randn(4, 6)).sum().backward()
    before, gradients = values(model), [p.grad for p in model.parameters()]

    def train(model: nn.Module) -> None:
        assert all(p.grad is None for p in model.parameters())
        assert [m.training for m in model] == [True, False, False, False]
        steps(model.train())
        if fails:
            raise RuntimeError("stop")

    for fails in (False, True):
        if fails:
            with pytest.raises(RuntimeError, match="stop"):
                iterative_magnitude_pruning(model, train, PruningConfig(rounds=1))
        else:
            iterative_magnitude_pruning(model, train, PruningConfig(rounds=1))
        assert_equal(values(model), before)
        assert [p.grad for p in model.parameters()] == gradients
        assert [m.training for m in model] == [True, False, False, False]


def test_history_holds_density_score_and_what_train_returned():
    tickets = iterative_magnitude_pruning(
        small(), steps, PruningConfig(rounds=1, rate=0.5), evaluate=lambda model: float((model[0].weight == 0).sum())
    )
    assert tickets.history[0] == {"level": 0, "kept": 153, "density": 1.0, "score": 0.0, "trained": [0, 1, 2, 3, 4, 5]}
    # round(.5 * 102) = 51 and round(.5 * 51) = 26 (25.5 to the even number)
    assert tickets.history[1]["score"] == 51 and tickets.history[1]["kept"] == 51 + 25


# --- planting, controls


@pytest.fixture(scope="module")
def late():
    return iterative_magnitude_pruning(small(), steps, PruningConfig(rounds=2, rate=0.4, rewind_to=2))


def test_a_planted_ticket_trains_to_the_same_weights_as_within(late):
    seen = []

    def train(model: nn.Module, start: int, stop: int | None) -> None:
        steps(model, start, stop)
        seen.append(values(model))

    iterative_magnitude_pruning(small(), train, late.config)
    model = late.plant(small(5))
    steps(model, 2)
    assert_equal(values(model), seen[-1])
    assert_equal(values(release(late.plant(model, level=0))), late.rewound)


def test_reinit_keeps_the_mask_and_nothing_else(late):
    model = late.plant(small(5), control="reinit", generator=torch.Generator().manual_seed(1))
    for name, mask in late.subnet.masks.items():
        weight = model.get_parameter(name)
        bound = 1 / math.sqrt(weight.shape[1])  # nn.Linear's own initialisation
        assert not weight[~mask].any() and weight.abs().max() <= bound
        assert not torch.isin(weight[mask], late.initial[name]).any()
    assert not torch.isin(model[0].bias, late.initial["0.bias"]).any()
    assert torch.equal(model[1].running_mean, torch.zeros(17))  # that of the start, not of step k
    steps(model)
    assert all(not model.get_parameter(name)[~mask].any() for name, mask in late.subnet.masks.items())
    release(model)


def test_a_fresh_model_as_control_gives_its_own_values(late):
    fresh, model = small(7), late.plant(small(5))
    late.plant(model, control=fresh)
    masks = late.subnet.masks
    assert_equal(values(model), {n: t * masks[n] if n in masks else t for n, t in values(fresh).items()})
    release(model)
    for wrong in ({"control": nn.Linear(2, 2)}, {"control": "rewind"}):
        with pytest.raises(ValueError, match=r"Tickets.plant: (a model must have|control must be 'reinit')"):
            late.plant(model, **wrong)
    with pytest.raises(TypeError, match=r"Tickets.plant: 'random' needs generator"):
        late.plant(model, control="random")


def test_random_control_has_the_layers_densities_and_the_rewound_values(late):
    model = late.plant(small(5), control="random", generator=torch.Generator().manual_seed(1))
    for name, mask in late.subnet.masks.items():
        weight = model.get_parameter(name)
        assert int((weight != 0).sum()) == int(mask.sum()) and not torch.equal(weight != 0, mask)
        assert torch.equal(weight, late.rewound[name] * (weight != 0))
    release(model)


def test_the_subnet_plants_itself_with_transfer(late):
    target = small(9)
    transfer(late.subnet, None, target)
    mask = late.subnet.masks["0.weight"]
    assert torch.equal(target[0].weight[mask], late.rewound["0.weight"][mask])
    release(target)


# --- bad input


def frozen(model: nn.Module) -> None:
    model(torch.randn(3, 6))


def writes(model: nn.Module) -> None:
    with torch.no_grad():
        model[0].weight.add_(1.0)


def replaces(model: nn.Module) -> None:
    model.load_state_dict(small(3).state_dict(), assign=True)


def diverges(model: nn.Module) -> None:
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (frozen, "train changed nothing in 0.weight"),
        (writes, "pruned weights of 0.weight are no longer zero after train"),
        (replaces, "train must train the model's own parameters, but it replaced 0.weight"),
        (diverges, "train left NaN or infinity in 0.weight"),
    ],
)
def test_a_train_that_does_not_train_is_refused_and_the_model_is_left_alone(train, message):
    model = small()
    with pytest.raises(ValueError, match=f"iterative_magnitude_pruning: {message}"):
        iterative_magnitude_pruning(model, train, PruningConfig(rounds=1))
    assert_equal(values(model), values(small()))


def test_arguments_are_checked_in_words():
    with pytest.raises(TypeError, match=r"train is called as train\(model, start=\.\.\., stop=\.\.\.\)"):
        iterative_magnitude_pruning(small(), add_noise, PruningConfig(rounds=1, rewind_to=3))
    with pytest.raises(ValueError, match="round 2 would drop 4 of the 3 weights left in weight"):
        config = PruningConfig(rounds=3, rate=0.9, rounding="nearest+1")
        iterative_magnitude_pruning(nn.Linear(6, 7, bias=False), add_noise, config)
    model = small()
    mask_model(model)
    with pytest.raises(ValueError, match="iterative_magnitude_pruning: the model is masked"):
        iterative_magnitude_pruning(model, steps, PruningConfig(rounds=1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rounds": 0}, "rounds must be an integer >= 1, got 0"),
        ({"rate": 1.0}, r"rate must be in \(0, 1\).*got 1.0"),
        ({"rate": 0.0}, r"rate must be in \(0, 1\).*got 0.0"),
        ({"output_rate": -0.1}, r"output_rate must be in \[0, 1\) or None, got -0.1"),
        ({"scope": "net"}, "scope must be one of"),
        ({"scope": "global", "output_rate": 0.1}, "scope 'global' ranks all layers together.*got output_rate=0.1"),
        ({"rewind_to": -1}, "rewind_to must be an integer >= 0, got -1"),
    ],
)
def test_settings_are_refused_with_the_value(settings, message):
    with pytest.raises(ValueError, match=f"PruningConfig: {message}"):
        PruningConfig(**{"rounds": 1, **settings})
