"""How well a network does each of several functions with each of several masks, and with each mask's inverse."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..evaluation import Test, scores_of
from ..nn.hf_conv1d import is_hf_conv1d
from ..report.page import Table
from ..subnet import Subnet
from ..subnet_fill import FILLS
from ..subnet_fit import check_unmasked

ABLATIONS = (*FILLS, "random")
NEITHER = "neither"


@dataclass(frozen=True)
class Accuracies:
    """acc(f, m) and acc(f, not m) of functions f and masks m; `function_accuracies` makes it.

    Attributes:
        whole: function to accuracy of the network as it is.
        subnet: mask to function to accuracy with the subnet alone.
        ablated: mask to function to accuracy of the network without the subnet.
    """

    whole: dict[str, float]
    subnet: dict[str, dict[str, float]]
    ablated: dict[str, dict[str, float]]

    def rows(self) -> list[dict[str, Any]]:
        """Return one dict per mask, part ("whole", "subnet", "ablated") and function: these keys and accuracy."""
        parts = {("", "whole"): self.whole}
        parts |= {(mask, part): its[mask] for mask in self.subnet
                  for part, its in (("subnet", self.subnet), ("ablated", self.ablated))}  # fmt: skip
        return [
            {"mask": mask, "part": part, "function": function, "accuracy": accuracy}
            for (mask, part), its in parts.items()
            for function, accuracy in its.items()
        ]

    def table(self) -> Table:
        """Return one line per mask and part, one column per function."""
        lines = itertools.groupby(self.rows(), lambda row: " ".join(filter(None, (row["mask"], row["part"]))))
        rows = [[name, *(f"{row['accuracy']:.4f}" for row in its)] for name, its in lines]
        return Table("Accuracy", ["mask", *self.whole], rows)


def function_accuracies(
    model: nn.Module, subnets: Mapping[str, Subnet], tests: Mapping[str, Test], *, ablation: str = "zero",
    seed: int = 0, caller: str = "function_accuracies",
) -> Accuracies:  # fmt: skip
    """Return the accuracy of every function with every mask, with its inverse, and of the whole network.

    Args:
        model: unmasked network that the subnets were found in; restored bit for bit. Its train or eval mode is the
            caller's business.
        subnets: name to subnet; a control mask, found on all functions at once, may be among them.
        tests: function's name to its test: ``test(model) -> accuracy``, from 0 to 1.
        ablation: what becomes of the weights that are taken out where a subnet is ablated: "zero"; "random", fresh
            values ``kaiming_uniform(a=sqrt(5))``, uniform within ``+-1 / sqrt(inputs)``; "mean" and "reinit" as in
            `Subnet.apply_`. The subnet alone always has zeros outside.
        seed: decides the values of "random" and "reinit", the same for every subnet.
        caller: begins the error messages.

    Raises:
        TypeError: tests that are no functions or return no number, subnets that are none.
        ValueError: an unknown ablation, no subnet, a subnet that does not fit, an accuracy that is not from 0 to 1, or
            "random" for a parameter of fewer than two dimensions.
    """
    check_functions(tests, "tests", caller)
    if not isinstance(subnets, Mapping) or not subnets:
        raise ValueError(f"{caller}: subnets must map names to subnets, got {subnets!r}")
    for name, subnet in subnets.items():
        if not isinstance(subnet, Subnet):
            raise TypeError(f"{caller}: {name!r} must be a Subnet, got {type(subnet).__name__}")
        subnet.parameters_in(model, caller)
    if ablation not in ABLATIONS:
        raise ValueError(f"{caller}: ablation must be one of {sorted(ABLATIONS)}, got {ablation!r}")
    check_unmasked(model, caller)
    found = Accuracies(accuracies_of(model, tests, caller), {}, {})
    for name, subnet in subnets.items():
        with subnet.applied(model):
            found.subnet[name] = accuracies_of(model, tests, caller)
        with subnet.applied(model, "ablate", **_fill(model, subnet, ablation, seed, caller)):
            found.ablated[name] = accuracies_of(model, tests, caller)
    return found


def confusion_row(predicted: Tensor, answers: Mapping[str, Tensor]) -> dict[str, float]:
    """Return how often a prediction is each function's answer, or none's: function to fraction, and "neither".

    One row of the confusion matrix: ask for one function, with one mask, and see which one is done. Inputs for which
    two functions have the same answer say nothing and are left out (a + b = ab for 40 of the 10,000 pairs mod 100), so
    that the fractions add up to 1.

    Args:
        predicted: what the network says, ``[n]``, or ``[n, digits]`` if an answer has several.
        answers: function's name to its answers to the same inputs, each of predicted's shape.

    Raises:
        ValueError: other shapes, a function called "neither", fewer than two functions, or no input that tells.

    Source: Csordas et al., whose code counts an answer of two functions for both.

    >>> confusion_row(torch.tensor([3, 2, 9, 4]), {"+": torch.tensor([3, 3, 5, 4]), "*": torch.tensor([2, 2, 6, 4])})
    {'+': 0.3333333333333333, '*': 0.3333333333333333, 'neither': 0.3333333333333333}
    """
    if len(answers) < 2 or NEITHER in answers:
        raise ValueError(
            f"confusion_row: answers must be of two or more functions, none called {NEITHER!r}, got {list(answers)}"
        )
    shapes = {name: list(answer.shape) for name, answer in answers.items()}
    if predicted.ndim < 1 or any(shape != list(predicted.shape) for shape in shapes.values()):
        wanted = f"predicted's shape {list(predicted.shape)}, [n] or [n, digits]"
        raise ValueError(f"confusion_row: answers must have {wanted}, got {shapes}")

    def equal(a: Tensor, b: Tensor) -> Tensor:
        return (a == b).reshape(len(a), -1).all(1)

    pairs = itertools.combinations(answers.values(), 2)
    tells = ~torch.stack([equal(a, b) for a, b in pairs]).any(0)
    count = int(tells.sum())
    if not count:
        raise ValueError(f"confusion_row: all answers must differ for some input, they do for none of {len(tells)}")
    matches = {name: int(equal(predicted, answer)[tells].sum()) for name, answer in answers.items()}
    matches[NEITHER] = count - sum(matches.values())
    return {name: number / count for name, number in matches.items()}


def check_functions(tests: Mapping[str, Test], what: str, caller: str) -> None:
    """Raise TypeError unless these are names and functions."""
    if not isinstance(tests, Mapping) or not tests or not all(callable(test) for test in tests.values()):
        raise TypeError(f"{caller}: {what} must map names to functions of the model, got {tests!r}")


def accuracies_of(model: nn.Module, tests: Mapping[str, Test], caller: str) -> dict[str, float]:
    """What each test gives of the model, checked to be an accuracy."""
    found = scores_of(model, tests, caller)
    for name, accuracy in found.items():
        if not 0 <= accuracy <= 1:  # NaN too
            raise ValueError(f"{caller}: an accuracy must be from 0 to 1, test {name!r} returned {accuracy:g}")
    return found


def _fill(model: nn.Module, subnet: Subnet, ablation: str, seed: int, caller: str) -> dict[str, Any]:
    """The arguments of `Subnet.applied` for an ablation."""
    if ablation == "random":
        return {"fill": _random_values(model, subnet.parameters_in(model, caller), seed, caller)}
    return {"fill": ablation, "generator": torch.Generator().manual_seed(seed) if ablation == "reinit" else None}


def _random_values(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], seed: int, caller: str
) -> dict[str, Tensor]:
    generator, fresh = torch.Generator().manual_seed(seed), {}
    for name in sorted(parameters):
        if parameters[name].ndim < 2:
            raise ValueError(
                f"{caller}: ablation 'random' is defined for weights of two or more dimensions, {name} has shape "
                f"{list(parameters[name].shape)}; use 'zero', 'mean' or 'reinit'"
            )
        inputs_first = is_hf_conv1d(model.get_submodule(name.rpartition(".")[0]))
        fresh[name] = nn.init.kaiming_uniform_(
            torch.empty(parameters[name].shape), math.sqrt(5), "fan_out" if inputs_first else "fan_in",
            generator=generator,
        )  # fmt: skip
    return fresh
