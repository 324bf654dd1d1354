"""The transfer conditions: what each one plants of the base network, how it starts and how it is trained."""

from __future__ import annotations

import torch
from torch import Tensor

from subnets.experiments.vision.models import Classifier, embedding_state, head_state, norm_state
from subnets.subnet import Subnet

CONDITIONS = ("subnet", "full_model", "sampled", "random_init", "pretrained", "augmentation")
INHERIT = ("unmasked", "norms", "none")

MEANING = {
    "subnet": "the shape subnet planted and frozen, the other masked weights fresh and trained",
    "full_model": "all masked weights of the base loaded; everything trained with the recipe of the others",
    "sampled": "as many random weights of the base as the subnet has, per layer, planted and frozen",
    "random_init": "all masked weights fresh",
    "pretrained": "the whole base with a fresh head, fine-tuned: norm layers are trained as well",
    "augmentation": "random_init trained with style noise (random convolutions) on a part of the images",
}


def planted(condition: str, subnet: Subnet, generator: torch.Generator) -> Subnet | None:
    """What is planted and frozen; None where nothing is."""
    if condition == "subnet":
        return subnet
    return subnet.sample_like(generator) if condition == "sampled" else None


def starting_state(
    condition: str, source: Classifier, fresh: Classifier, masked: set[str], inherit: str, fresh_scale: float
) -> dict[str, Tensor]:
    """The state dict that training starts from, before anything is planted.

    Args:
        condition: one of CONDITIONS.
        source: the base network.
        fresh: a network of the same shape, newly initialised.
        masked: names of the weights that discovery masks.
        inherit: what is taken from ``source`` beside planted weights: "unmasked", "norms" or "none".
        fresh_scale: fresh masked weights are multiplied by it.
    """
    old, state = source.state_dict(), {name: value.clone() for name, value in fresh.state_dict().items()}
    if condition == "pretrained":
        return {name: state[name] if name in head_state(source) else value.clone() for name, value in old.items()}
    inherited = set(old) - masked if inherit == "unmasked" else norm_state(source) | embedding_state(source)
    for name in state:
        if name in masked:
            state[name] = old[name].clone() if condition == "full_model" else state[name] * fresh_scale
        elif inherit != "none" and name in inherited:
            state[name] = old[name].clone()
    return state


def norms_are_frozen(condition: str, norms: str) -> bool:
    """Whether norm layers stay as they are in training: never in the ordinary fine-tuning of `pretrained`."""
    return norms == "frozen" and condition != "pretrained"
