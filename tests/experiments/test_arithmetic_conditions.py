"""What each transfer condition plants: counts, overlaps with the subnet, and agreement with `transfer`."""

from __future__ import annotations

import pytest
import torch
from subnets.experiments.arithmetic.conditions import FROZEN, MEANING, planted_masks, starting_state
from subnets.experiments.arithmetic.config import CONDITIONS
from subnets.subnet import Subnet
from subnets.training.gpt2 import GPT2Shape, LeanGPT2
from subnets.training.seeds import torch_generator
from subnets.transfer import transfer

SHAPE = GPT2Shape(layers=1, width=32, heads=4)


def subnet_of(density: float) -> Subnet:
    generator = torch_generator("conditions", str(density))
    state = LeanGPT2(SHAPE).state_dict()
    return Subnet({name: torch.rand(state[name].shape, generator=generator) < density for name in SHAPE.masked_names()})


def counts(masks: dict[str, torch.Tensor]) -> list[int]:
    return [int(mask.sum()) for mask in masks.values()]


def test_each_condition_plants_as_many_weights_per_matrix_as_its_name_says() -> None:
    subnet = subnet_of(0.2)
    kept = counts(subnet.masks)
    total = [mask.numel() for mask in subnet.masks.values()]
    rest = [n - k for n, k in zip(total, kept, strict=True)]
    expected = {
        "subnet": kept, "subnet_trainable": kept, "full_model": total, "random_init": [0] * len(kept),
        "sampled": kept, "sampled_complement": kept,
        "sampled_as_published": rest, "sampled_complement_as_published": rest,
    }  # fmt: skip
    for condition in CONDITIONS:
        planted = planted_masks(condition, subnet, torch_generator("draw"))
        assert counts(planted) == expected[condition], condition


def test_complement_samples_avoid_the_subnet_and_the_published_complement_contains_it() -> None:
    subnet = subnet_of(0.2)
    ours = planted_masks("sampled_complement", subnet, torch_generator("draw"))
    published = planted_masks("sampled_complement_as_published", subnet, torch_generator("draw"))
    sampled = planted_masks("sampled", subnet, torch_generator("draw"))
    for name, mask in subnet.masks.items():
        assert not (ours[name] & mask).any()
        assert torch.equal(published[name] & mask, mask)
        assert (sampled[name] & mask).sum().item() == pytest.approx(0.2 * mask.sum().item(), rel=0.3)


def test_a_complement_sample_of_a_dense_subnet_is_refused() -> None:
    with pytest.raises(ValueError, match="outside"):
        planted_masks("sampled_complement", subnet_of(0.7), torch_generator("draw"))


@pytest.mark.parametrize("condition", CONDITIONS)
def test_the_starting_state_is_what_transfer_makes_of_a_fresh_network(condition: str) -> None:
    source, fresh = LeanGPT2(SHAPE, torch_generator("source")), LeanGPT2(SHAPE, torch_generator("fresh"))
    planted = planted_masks(condition, subnet_of(0.2), torch_generator("draw"))
    state = starting_state(condition, planted, source.state_dict(), SHAPE, "none", torch_generator("fresh"))
    if condition == "full_model":
        assert all(torch.equal(state[name], value) for name, value in source.state_dict().items())
        return
    expected = transfer(Subnet(planted), source, fresh, anchor="free").state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_inherit_unmasked_takes_embeddings_norms_and_biases_from_t1() -> None:
    source = {name: value + 1.0 for name, value in LeanGPT2(SHAPE, torch_generator("source")).state_dict().items()}
    fresh = LeanGPT2(SHAPE, torch_generator("fresh")).state_dict()
    planted = planted_masks("random_init", subnet_of(0.2), torch_generator("draw"))
    inherited = starting_state("random_init", planted, source, SHAPE, "unmasked", torch_generator("fresh"))
    alone = starting_state("random_init", planted, source, SHAPE, "none", torch_generator("fresh"))
    for name in source:
        from_t1 = name not in SHAPE.masked_names()
        assert torch.equal(inherited[name], source[name] if from_t1 else fresh[name]), name
        assert torch.equal(alone[name], fresh[name]), name


def test_every_condition_is_explained_and_only_planted_controls_are_frozen() -> None:
    assert set(MEANING) == set(CONDITIONS)
    assert set(CONDITIONS) - set(FROZEN) == {"full_model", "random_init", "subnet_trainable"}
