"""The pass of many sets of projections over one frozen network: autograd's losses and gradients for each."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from subnets.experiments.arithmetic import data
from subnets.training.frozen_gpt2 import FrozenGPT2
from subnets.training.gpt2 import GPT2Shape, LeanGPT2
from subnets.training.seeds import torch_generator

SHAPE = GPT2Shape(layers=2, width=32, heads=4, dropout=0.1)
G = 3


def network(dtype: torch.dtype = torch.float32) -> LeanGPT2:
    generator = torch_generator("frozen")
    model = LeanGPT2(SHAPE, generator).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


def projections(model: LeanGPT2, count: int = G) -> dict[str, torch.Tensor]:
    """Each network's own: masked at random."""
    generator = torch_generator("masks")
    state = model.state_dict()
    return {
        name: torch.stack([state[name] * torch.rand(state[name].shape, generator=generator) for _ in range(count)])
        for name in SHAPE.masked_names()
    }


def by_autograd(
    weights: dict[str, torch.Tensor], sequences: torch.Tensor, dtype: torch.dtype, autocast: bool = False
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model, losses, grads = network(dtype), [], {name: [] for name in weights}
    for i in range(len(next(iter(weights.values())))):
        model.load_state_dict({name: value[i] for name, value in weights.items()}, strict=False)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            rows = sequences if sequences.dim() == 2 else sequences[i]
            loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1).to(dtype), rows[:, 1:].flatten())
        loss.backward()
        losses.append(loss.detach())
        for name in weights:
            grads[name].append(model.get_parameter(name).grad)
    return torch.stack(losses), {name: torch.stack(value) for name, value in grads.items()}


@pytest.mark.parametrize("shared", [False, True], ids=["own batch", "one batch"])
@pytest.mark.parametrize("at_once", [None, 2, 3])
def test_losses_and_gradients_equal_autograd_for_each_network(shared: bool, at_once: int | None) -> None:
    sequences = torch.stack([data.training_set(data.T1, 40, i) for i in range(G)])
    sequences = sequences[0] if shared else sequences
    weights = projections(network(torch.float64))
    losses, grads = FrozenGPT2(SHAPE, network(torch.float64).state_dict(), at_once=at_once)(weights, sequences)
    true, true_grads = by_autograd(weights, sequences, torch.float64)
    torch.testing.assert_close(losses, true, rtol=1e-12, atol=0)
    assert list(grads) == SHAPE.masked_names()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, true_grads[name], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_are_at_most_twice_those_of_pytorch_in_the_same_dtype(dtype: torch.dtype) -> None:
    sequences = data.training_set(data.T1, 100, 0)
    weights = projections(network())
    exact, exact_grads = by_autograd({n: w.double() for n, w in weights.items()}, sequences, torch.float64)
    theirs, their_grads = by_autograd(weights, sequences, torch.float32, autocast=dtype == torch.bfloat16)
    ours, our_grads = FrozenGPT2(SHAPE, network().state_dict(), dtype=dtype)(weights, sequences)
    assert ours.dtype == torch.float32
    unit = torch.finfo(dtype).eps / 2
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 4 * unit * exact.max()
    for name, grad in our_grads.items():
        assert grad.dtype == dtype
        true = exact_grads[name]
        error, their_error = ((g.double() - true).norm() / true.norm() for g in (grad, their_grads[name]))
        assert error <= 2 * their_error + unit


def test_frozen_parts_lie_in_memory_once_and_nothing_else_gets_a_gradient() -> None:
    state = network().state_dict()
    run = FrozenGPT2(SHAPE, state)
    for name, value in run.shared.items():
        assert value.data_ptr() == state[name].data_ptr()
    before = {name: value.clone() for name, value in state.items()}
    run(projections(network()), data.training_set(data.T1, 20, 0))
    assert all(torch.equal(state[name], value) for name, value in before.items())


def test_what_does_not_fit_is_refused_in_words() -> None:
    run, weights = FrozenGPT2(SHAPE, network().state_dict()), projections(network())
    sequences = data.training_set(data.T1, 20, 0)
    with pytest.raises(ValueError, match=r"must agree in G, got \[2, 3\] and sequences \[2, 20, 4\]"):
        run(weights, sequences.expand(2, -1, -1))
    with pytest.raises(ValueError, match=r"got none for \['h.0.attn.c_attn.weight'\] and unknown \['x'\]"):
        run({("x" if name == "h.0.attn.c_attn.weight" else name): w for name, w in weights.items()}, sequences)
