"""Generated scenes: what they show, what they do not show, and that a seed means the same images."""

from __future__ import annotations

import pytest
import torch
from subnets.experiments.vision.cues import SHAPES, TEXTURES, shape_pictures, texture_tiles
from subnets.experiments.vision.pooling import mean_pool
from subnets.experiments.vision.world import CLASSES, Look, draw_scenes


def test_the_same_seed_gives_the_same_images_and_another_seed_others():
    first, again, other = draw_scenes(70, 3), draw_scenes(70, 3), draw_scenes(70, 4)
    assert torch.equal(first.images.images, again.images.images) and torch.equal(first.segments, again.segments)
    assert torch.equal(first.images.shape, again.images.shape)
    assert not torch.equal(first.images.images, other.images.images)
    assert draw_scenes(0, 0).images.images.shape == (0, 3, 64, 64)


def test_natural_cues_agree_and_every_class_is_equally_frequent():
    images = draw_scenes(64, 0).images
    assert torch.equal(images.shape, images.texture)
    assert torch.bincount(images.shape, minlength=16).tolist() == [4] * 16
    assert images.classes == CLASSES and len(set(CLASSES)) == 16


def test_conflicting_cues_never_agree_and_every_pair_is_equally_frequent():
    images = draw_scenes(480, 0, "conflict", size=16).images
    pairs = torch.bincount(images.shape * 16 + images.texture, minlength=256).view(16, 16)
    assert pairs.diagonal().sum() == 0 and set(pairs[~torch.eye(16, dtype=torch.bool)].tolist()) == {2}
    independent = draw_scenes(256, 0, "independent", size=16).images
    assert torch.bincount(independent.shape * 16 + independent.texture).tolist() == [1] * 256


def test_shapes_and_textures_can_be_told_apart():
    shapes, textures = shape_pictures() > 0.5, texture_tiles()
    for i in range(16):
        for j in range(i):
            iou = (shapes[i] & shapes[j]).sum() / (shapes[i] | shapes[j]).sum()
            assert iou < 0.85, (list(SHAPES)[i], list(SHAPES)[j])
            alike = torch.corrcoef(torch.stack([textures[i].flatten(), textures[j].flatten()]))[0, 1]
            assert alike < 0.8, (list(TEXTURES)[i], list(TEXTURES)[j])
    assert (textures.flatten(1).std(1) > 0.15).all()
    assert shapes[list(SHAPES).index("ring")][48, 48].item() is False  # the hole is a hole
    area = shapes[list(SHAPES).index("disc")].float().mean() * 2.5**2
    assert area == pytest.approx(torch.pi * 0.9**2, rel=0.01)


def test_texture_tiles_have_no_seam():
    tiles = texture_tiles()
    inside = (tiles[:, 1:] - tiles[:, :-1]).abs().amax((1, 2))
    assert ((tiles[:, 0] - tiles[:, -1]).abs().amax(1) <= inside + 1e-6).all()


def test_colours_say_nothing_of_the_class():
    scenes = draw_scenes(1024, 0)
    pooled = mean_pool(scenes.images.images, scenes.segments).float()
    is_object = (scenes.segments == 3)[:, None]
    colour = (pooled * is_object).sum((2, 3)) / is_object.sum((2, 3)).clamp(min=1)
    half = 512
    means = torch.stack([colour[:half][scenes.images.shape[:half] == k].mean(0) for k in range(16)])
    guessed = torch.cdist(colour[half:], means).argmin(1)
    assert (guessed == scenes.images.shape[half:]).float().mean() < 0.11  # chance .0625, its std .011


def test_mean_pooling_leaves_one_colour_for_the_object():
    scenes = draw_scenes(32, 1)
    pooled = mean_pool(scenes.images.images, scenes.segments)
    for image, segments in zip(pooled, scenes.segments, strict=True):
        assert len(image[:, segments == 3].unique(dim=1).T) == 1
    assert set(scenes.segments.unique().tolist()) == {0, 1, 2, 3, 4, 5}


def test_plain_objects_have_no_texture_and_close_ups_fill_the_image():
    quiet = {"noise": 0.0, "occluders": 0.0, "surroundings": 0.0}

    def spread_and_size(**look: float) -> tuple[float, float]:
        scenes = draw_scenes(64, 5, look=Look(**{"plain": 0.0, "close_up": 0.0, **quiet, **look}))
        inside = scenes.segments == 3
        stds = [image[:, here].float().std(1).mean() for image, here in zip(scenes.images.images, inside, strict=True)]
        return torch.stack(stds).mean().item(), inside.float().mean().item()

    usual, plain, near = spread_and_size(), spread_and_size(plain=1.0), spread_and_size(close_up=1.0)
    assert plain[0] < usual[0] / 2 and near[1] > 2 * usual[1]
    assert 0.1 < usual[1] < 0.3


@pytest.mark.parametrize(("arguments", "message"), [
    ((-1, 0), "num must be >= 0"), ((4, 0, "odd"), "cues must be one of natural"), ((4, 0, "natural", 8), "size >= 16"),
])  # fmt: skip
def test_what_can_not_be_drawn_is_refused(arguments: tuple, message: str):
    with pytest.raises(ValueError, match=message):
        draw_scenes(*arguments)
