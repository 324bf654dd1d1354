"""The pass of many sets of projections over one frozen network: autograd's losses and gradients for each."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from subnets import mask_model
from subnets.experiments.arithmetic import data
from subnets.training.frozen_gpt2 import FrozenGPT2, stacked_lm_loss
from subnets.training.gpt2 import GPT2Shape, LeanGPT2, lm_loss
from subnets.training.seeds import torch_generator
from torch import nn

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
        assert grad.dtype == weights[name].dtype
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


def test_projections_that_are_not_given_are_the_networks_own() -> None:
    model, sequences = network(torch.float64), data.training_set(data.T1, 20, 0)
    everything = projections(model)
    some = {name: everything[name] for name in ("h.0.mlp.c_fc.weight", "h.1.attn.c_attn.weight")}
    full = {name: model.state_dict()[name].expand(G, -1, -1) for name in everything} | some
    run = FrozenGPT2(SHAPE, model.state_dict())
    losses, grads = run(some, sequences)
    true, true_grads = run(full, sequences)
    assert torch.equal(losses, true) and set(grads) == set(some)
    assert all(torch.equal(grads[name], true_grads[name]) for name in some)


def test_what_lm_loss_offers_for_many_masks_follows_autocast_and_the_model() -> None:
    model, sequences = network(), data.training_set(data.T1, 20, 0)
    masks = mask_model(model, SHAPE.masked_names())
    weights = projections(network())
    run = stacked_lm_loss(model)
    assert run is not None and lm_loss.stacked(model) is not None  # pyright: ignore
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            losses, grads = run(weights, sequences)
        true, true_grads = FrozenGPT2(SHAPE, network().state_dict(), dtype=dtype)(weights, sequences)
        assert torch.equal(losses, true) and all(torch.equal(grads[name], true_grads[name]) for name in grads)
    model.train()
    assert stacked_lm_loss(model) is None
    masks.unmask()
    assert stacked_lm_loss(nn.Linear(2, 2)) is None


def test_what_does_not_fit_is_refused_in_words() -> None:
    run, weights = FrozenGPT2(SHAPE, network().state_dict()), projections(network())
    sequences = data.training_set(data.T1, 20, 0)
    with pytest.raises(ValueError, match=r"must agree in G, got \[2, 3\] and sequences \[2, 20, 4\]"):
        run(weights, sequences.expand(2, -1, -1))
    with pytest.raises(ValueError, match=r"h.0.attn.c_attn.weight and 7 more\), got \['x'\]"):
        run({("x" if name == "h.0.attn.c_attn.weight" else name): w for name, w in weights.items()}, sequences)


def test_a_model_with_hooks_is_left_to_its_own_forward_pass():
    model = LeanGPT2(SHAPE).eval()
    mask_model(model, score_init=0.1)
    assert lm_loss.stacked(model) is not None
    handle = model.h[0].mlp.register_forward_hook(lambda module, args, out: out * 1.5)
    assert lm_loss.stacked(model) is None
    handle.remove()
    assert lm_loss.stacked(model) is not None


def test_a_context_longer_than_the_sequences_is_served():
    model = LeanGPT2(GPT2Shape(layers=1, width=16, heads=2, vocabulary=23, context=8)).eval()
    names = model.shape.masked_names()
    state = {name: value.detach() for name, value in model.state_dict().items()}
    weights = {name: state[name][None].clone().requires_grad_() for name in names}
    sequences = torch.randint(23, (5, 4), generator=torch.Generator().manual_seed(0))
    losses, grads = FrozenGPT2(model.shape, state)({name: w.detach() for name, w in weights.items()}, sequences)
    loss = lm_loss(model, sequences)
    expected = torch.autograd.grad(loss, [model.get_parameter(name) for name in names])
    torch.testing.assert_close(losses[0], loss.detach())
    for name, grad in zip(names, expected, strict=True):
        torch.testing.assert_close(grads[name][0], grad)
