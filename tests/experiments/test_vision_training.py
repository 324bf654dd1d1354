"""Training and measuring one classifier, style noise, and what each transfer condition starts from."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from subnets.experiments.vision.classifier_training import (
    Recipe,
    class_averaged_accuracy,
    class_weights,
    predict,
    train,
)
from subnets.experiments.vision.conditions import CONDITIONS, MEANING, planted, starting_state
from subnets.experiments.vision.images import ImageSet
from subnets.experiments.vision.models import (
    NetworkShape,
    build,
    embedding_state,
    head_state,
    load_pretrained,
    masked_targets,
    norm_layers,
    norm_state,
)
from subnets.experiments.vision.stages import decisions
from subnets.experiments.vision.style_noise import style_noise
from subnets.experiments.vision.world import draw_scenes
from subnets.masking import mask_model
from subnets.subnet import Subnet

TINY = NetworkShape(width=4, image_size=32)
TINY_VIT = NetworkShape("vit", width=8, image_size=32, patch=8, depth=2, heads=2)
RECIPE = Recipe(3, 16, 1e-2, optimizer="adamw", norms_frozen=False, bf16=False)


def images(num: int = 32, seed: int = 0) -> ImageSet:
    return draw_scenes(num, seed, size=32).images


def test_a_class_that_is_twice_as_frequent_weighs_half():
    shape = torch.tensor([0] * 8 + [1] * 4 + [2] * 2)
    data = ImageSet(torch.zeros(14, 3, 16, 16, dtype=torch.uint8), shape, shape, ("a", "b", "c", "never"))
    weights = class_weights(data)
    assert weights.tolist() == pytest.approx([14 / 24, 14 / 12, 14 / 6, 0.0])
    assert weights[shape].mean().item() == pytest.approx(1.0)


def test_class_averaged_accuracy_counts_classes_and_not_images():
    target = torch.tensor([0, 0, 0, 0, 2, 2])
    assert class_averaged_accuracy(torch.tensor([0, 0, 0, 0, 1, 1]), target) == pytest.approx(0.5)
    assert class_averaged_accuracy(torch.tensor([0, 1, 1, 1, 2, 2]), target) == pytest.approx(0.625)
    with pytest.raises(ValueError, match="at least one class id"):
        class_averaged_accuracy(torch.tensor([]), torch.tensor([], dtype=torch.int64))


def test_decisions_leave_out_images_whose_cues_agree():
    shape, texture = torch.tensor([0, 1, 2, 3, 0]), torch.tensor([1, 2, 3, 3, 2])
    conflict = ImageSet(torch.zeros(5, 3, 16, 16, dtype=torch.uint8), shape, texture, ("a", "b", "c", "d"))
    found = decisions(torch.tensor([0, 2, 0, 3, 0]), conflict)  # shape, texture, neither, (agree), shape
    assert found == pytest.approx({"shape_decisions": 0.5, "texture_decisions": 0.25, "shape_bias": 2 / 3})
    nothing = decisions(torch.tensor([3, 3, 0, 3, 3]), conflict)
    assert nothing["shape_bias"] != nothing["shape_bias"] and nothing["shape_decisions"] == 0.0


def test_a_killed_training_goes_on_in_the_same_numbers(tmp_path):
    data, whole, cut = images(), build(TINY, 1), build(TINY, 1)
    expected = train(whole, data, RECIPE, ("t",), checkpoint=None)
    kept = tmp_path / "part.safetensors"

    def stop(done: list[int] = []) -> None:  # noqa: B006
        done.append(1)
        if len(done) == 5:  # in the middle of the third epoch
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(cut, data, RECIPE, ("t",), checkpoint=kept, report=lambda _: stop())
    again = build(TINY, 7)
    found = train(again, data, RECIPE, ("t",), checkpoint=kept)
    assert found.curve == expected.curve
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_frozen_norms_do_not_move_and_other_weights_do():
    model = build(TINY, 0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, images(), dataclasses.replace(RECIPE, norms_frozen=True, optimizer="sgd"), ("t",))
    after, norms = model.state_dict(), norm_state(model)
    assert len(norms) == 5 * len(norm_layers(model)) == 100  # ResNet-18 has 20 batch norms
    assert all(torch.equal(before[name], after[name]) for name in norms)
    assert not any(torch.equal(before[name], after[name]) for name in set(after) - norms)


def test_a_loss_that_is_not_finite_stops_the_training():
    with pytest.raises(ValueError, match="the loss of epoch 1 must be finite"):
        train(build(TINY, 0), images(), dataclasses.replace(RECIPE, lr=1e30, optimizer="sgd"), ("t",))
    with pytest.raises(ValueError, match="at least one image"):
        train(build(TINY, 0), images(0), RECIPE, ("t",))


def test_predictions_are_those_of_eval_mode_in_order():
    model, data = build(TINY, 0), images(300)
    expected = torch.cat([model(data.images[i : i + 1]).argmax(1) for i in range(300)])
    model.train()
    assert (predict(model, data, bf16=False) == expected).float().mean() > 0.99  # batched sums round otherwise
    assert model.training


def test_style_noise_changes_the_chosen_images_and_keeps_flat_ones_flat():
    x = images(64).images
    assert torch.allclose(style_noise(x, 0.0, torch.Generator().manual_seed(0)), x.float(), atol=1e-4)
    styled = style_noise(x, 0.5, torch.Generator().manual_seed(0))
    changed = (styled - x).abs().amax((1, 2, 3)) > 1e-3
    assert 20 < changed.sum() < 44 and 0 <= styled.min() and styled.max() <= 255
    flat = torch.full((4, 3, 16, 16), 200, dtype=torch.uint8)
    out = style_noise(flat, 1.0, torch.Generator().manual_seed(1))
    assert (out - out[:, :, :1, :1]).abs().max() < 1e-3


@pytest.mark.parametrize("shape", [TINY, TINY_VIT])
def test_masked_weights_are_those_of_the_paper(shape: NetworkShape):
    model = build(shape, 0)
    masked = set(mask_model(model, masked_targets(shape)).subnet().masks)
    head = {name for name in masked if name.startswith("network.classifier")}
    if shape.architecture == "resnet18":
        assert len(masked) == 20 and not head
    else:
        assert len(masked) == 2 * 6 + 2 and head == {"network.classifier.weight"}


def everything_masked(model: torch.nn.Module, names: set[str]) -> Subnet:
    return Subnet({name: torch.rand(model.state_dict()[name].shape) < 0.3 for name in names})


@pytest.mark.parametrize("shape", [TINY, TINY_VIT])
@pytest.mark.parametrize("inherit", ["unmasked", "norms", "none"])
def test_conditions_start_from_what_their_names_say(shape: NetworkShape, inherit: str):
    source, fresh = build(shape, 0), build(shape, 1)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(torch.randn_like(parameter))  # norms and biases of both would be equal
    masked = set(mask_model(build(shape, 0), masked_targets(shape)).subnet().masks)
    head, special = head_state(source), norm_state(source) | embedding_state(source)
    for condition in CONDITIONS:
        state = starting_state(condition, source, fresh, masked, inherit, 0.5)
        for name, value in state.items():
            old, new = source.state_dict()[name], fresh.state_dict()[name]
            if condition == "pretrained":
                expected = new if name in head else old
            elif name in masked:
                expected = old if condition == "full_model" else 0.5 * new
            else:
                is_inherited = inherit == "unmasked" or (inherit == "norms" and name in special)
                expected = old if is_inherited else new
            assert torch.equal(value, expected), (condition, name)


def test_samples_are_as_large_as_the_subnet_and_the_others_plant_nothing():
    model = build(TINY, 0)
    subnet = everything_masked(model, set(mask_model(build(TINY, 0), "all-conv").subnet().masks))
    sample = planted("sampled", subnet, torch.Generator().manual_seed(0))
    assert sample is not None and sample.iou(subnet) < 0.5
    assert all(sample.masks[name].sum() == mask.sum() for name, mask in subnet.masks.items())
    assert planted("subnet", subnet, torch.Generator()) is subnet
    assert [planted(name, subnet, torch.Generator()) for name in CONDITIONS if name not in ("subnet", "sampled")] == [
        None
    ] * 4
    assert set(MEANING) == set(CONDITIONS)


def test_a_transformers_checkpoint_becomes_the_base_but_for_its_head(tmp_path):
    source, target = build(dataclasses.replace(TINY, num_classes=10), 3), build(TINY, 4)
    source.network.save_pretrained(tmp_path)
    head = {name: target.state_dict()[name].clone() for name in head_state(target)}
    load_pretrained(target, tmp_path)
    for name, value in target.state_dict().items():
        expected = head[name] if name in head else source.state_dict()[name]
        assert torch.equal(value, expected), name
    with pytest.raises(ValueError, match="of the config's width and depth"):
        load_pretrained(build(NetworkShape(width=8, image_size=32), 0), tmp_path)
    with pytest.raises(ValueError, match="must be a transformers checkpoint"):
        load_pretrained(target, tmp_path / "missing")
    heads = dataclasses.replace(TINY_VIT, heads=4)  # parameters of the same shapes, another function
    build(heads, 0).network.save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match="must have num_attention_heads=2, as the config says, got 4"):
        load_pretrained(build(TINY_VIT, 0), tmp_path / "vit")
