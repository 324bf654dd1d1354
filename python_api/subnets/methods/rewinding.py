"""A model's state remembered and put back, and calls of somebody's ``train`` that are checked to have trained it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..subnet_file import listed
from ..subnet_fit import check_unmasked
from ..transfer import release
from ..transfer.anchor import anchor_of

State = dict[str, Tensor]  # parameters and buffers by name, tied ones once
Train = Callable[..., Any]


def state_of(model: nn.Module) -> State:
    """Return a copy of all parameters and buffers, on their devices."""
    return {name: tensor.detach().clone() for name, tensor in _tensors(model)}


@torch.no_grad()
def rewind(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Write ``state`` into the model's own parameters and buffers, bit for bit."""
    for name, tensor in _tensors(model):
        tensor.copy_(state[name])


@contextlib.contextmanager
def borrowed(model: nn.Module, caller: str) -> Iterator[State]:
    """Context that yields the model's state and gives the model back as it was: values, gradients, modes; nothing held.

    Raises:
        TypeError: it is no module.
        ValueError: it is masked, or a transfer holds some of its weights.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model must be a torch.nn.Module, got {type(model).__name__}")
    check_unmasked(model, caller)
    held = [name for name, parameter in model.named_parameters() if anchor_of(parameter) is not None]
    if held:
        raise ValueError(f"{caller}: a transfer holds weights of {listed(held)}; call release(model) first")
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    state = state_of(model)
    try:
        yield state
    finally:
        release(model)
        rewind(model, state)
        for module, mode in modes:
            module.training = mode
        for parameter, gradient in gradients:
            parameter.grad = gradient


def run(train: Train, model: nn.Module, caller: str, *args: Any, **kwargs: Any) -> Any:
    """Return ``train(model, *args, **kwargs)``, called without gradients left from before.

    Modes (training or evaluation) are afterwards what they were.

    Raises:
        ValueError: parameters are afterwards other objects, or not finite, or all as before.
    """
    before = dict(model.named_parameters())
    values = {name: parameter.detach().clone() for name, parameter in before.items()}
    modes = [(module, module.training) for module in model.modules()]
    for parameter in model.parameters():
        parameter.grad = None
    result = train(model, *args, **kwargs)
    for module, mode in modes:
        module.training = mode
    replaced = [name for name, parameter in before.items() if model.get_parameter(name) is not parameter]
    if replaced:
        what = f"train must train the model's own parameters, but it replaced {listed(replaced)}"
        raise ValueError(f"{caller}: {what}; change them in place (load_state_dict without assign=True)")
    infinite = [name for name, parameter in before.items() if not bool(parameter.isfinite().all())]
    if infinite:
        raise ValueError(f"{caller}: train left NaN or infinity in {listed(infinite)}; lower its rate")
    if all(torch.equal(parameter, values[name]) for name, parameter in before.items()):
        raise ValueError(
            f"{caller}: train changed nothing in {listed(before)}; it must train the model that it is given, in place"
        )
    return result


def check_train(train: Train, caller: str, call: str, *args: Any, **kwargs: Any) -> None:
    """Raise TypeError unless ``train`` can be called as ``call`` says."""
    if not callable(train):
        raise TypeError(f"{caller}: train must be a function that trains the model, got {type(train).__name__}")
    try:
        signature = inspect.signature(train)
    except (TypeError, ValueError):  # a callable that tells no signature
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{caller}: train is called as {call}, which its signature refuses: {error}") from None


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
