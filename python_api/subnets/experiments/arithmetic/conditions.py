"""The transfer conditions: what each one plants of the T1 network, and whether it stays fixed.

Every condition is one function subnet -> planted masks. Published names keep the published meaning: the authors'
sampling routine returns a mask with |S| *zeros*, so their "sampled" network is given N - |S| random weights of T1, and
their "complement" network still contains S. `sampled` and `sampled_complement` plant what the names say.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from subnets.experiments.arithmetic.config import CONDITIONS
from subnets.subnet import Subnet
from subnets.training.gpt2 import GPT2Shape, LeanGPT2

Masks = dict[str, Tensor]
FROZEN = ("subnet", "sampled", "sampled_complement", "sampled_as_published", "sampled_complement_as_published")


def _everything(subnet: Subnet) -> Masks:
    return {name: torch.ones_like(mask) for name, mask in subnet.masks.items()}


def _nothing(subnet: Subnet) -> Masks:
    return {name: torch.zeros_like(mask) for name, mask in subnet.masks.items()}


_PLANTED: dict[str, Callable[[Subnet, torch.Generator], Masks]] = {
    "subnet": lambda subnet, generator: subnet.masks,
    "subnet_trainable": lambda subnet, generator: subnet.masks,
    "full_model": lambda subnet, generator: _everything(subnet),
    "random_init": lambda subnet, generator: _nothing(subnet),
    "sampled": lambda subnet, generator: subnet.sample_like(generator).masks,
    "sampled_complement": lambda subnet, generator: subnet.complement_sample(generator).masks,
    "sampled_as_published": lambda subnet, generator: (~subnet.sample_like(generator)).masks,
    "sampled_complement_as_published": lambda subnet, generator: (~subnet.complement_sample(generator)).masks,
}
assert set(_PLANTED) == set(CONDITIONS)

MEANING = {
    "subnet": "S planted and frozen, the other masked weights fresh and trained",
    "subnet_trainable": "S planted, then trained with the rest",
    "full_model": "the whole T1 network loaded, everything trained",
    "random_init": "all masked weights fresh",
    "sampled": "|S| random weights of T1 planted and frozen (per matrix)",
    "sampled_complement": "|S| random weights of T1 from outside S planted and frozen",
    "sampled_as_published": "N - |S| random weights of T1 planted and frozen, |S| fresh (as in the published curve)",
    "sampled_complement_as_published": "S and N - 2|S| others planted and frozen (as in the published curve)",
}


def planted_masks(condition: str, subnet: Subnet, generator: torch.Generator) -> Masks:
    """The weights of T1 that `condition` plants; ValueError where the subnet is too dense for a complement sample."""
    return _PLANTED[condition](subnet, generator)


def starting_state(
    condition: str,
    planted: Masks,
    source: dict[str, Tensor],
    shape: GPT2Shape,
    inherit: str,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """The state dict that training on T2 starts from.

    Fresh weights are N(0, 0.02^2), biases 0, norms 1. `inherit="unmasked"` (as published) takes everything that
    discovery does not mask (embeddings, norms, biases) from T1; "none" draws it afresh. `full_model` takes all of T1.
    """
    if condition == "full_model":
        return {name: value.clone() for name, value in source.items()}
    state = {name: value.detach().clone() for name, value in LeanGPT2(shape, generator).state_dict().items()}
    for name, value in source.items():
        if name in planted:
            state[name] = torch.where(planted[name], value, state[name])
        elif inherit == "unmasked":
            state[name] = value.clone()
    return state
