"""Generated labelled images: an object of one of 16 shapes and 16 textures, before a cluttered background.

Colours say nothing: every part of every image draws its own. So a class shows in two cues alone, the outline of the
object and the pattern on it, and `independent` pairs of them let either be asked for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from subnets.experiments.vision.cues import (
    PERIODS,
    SHAPE_EXTENT,
    SHAPES,
    TEXTURE_PIXELS,
    TEXTURES,
    shape_pictures,
    texture_tiles,
)
from subnets.experiments.vision.images import ImageSet
from subnets.training.seeds import torch_generator

CLASSES = tuple(f"{shape} / {texture}" for shape, texture in zip(SHAPES, TEXTURES, strict=True))
NUM_CLASSES = len(CLASSES)
CUES = ("natural", "conflict", "independent")
_CHUNK = 64  # images drawn at once (of a size that caches hold); part of what a seed means
_REGIONS = 3  # of the background
_OCCLUDERS = 2
_OBJECT = _REGIONS  # its segment's number; occluders follow


@dataclass(frozen=True)
class Look:
    """How hard the two cues are to see; the defaults are the bundled experiment's.

    Args:
        object_scale: smallest and largest half-width of the object, as a fraction of half the image.
        turn: the object's largest rotation, degrees.
        bend: the largest displacement that bends its outline, in half-widths.
        period: smallest and largest period of the texture, pixels at 64 px.
        contrast: smallest and largest difference between a texture's two colours, of [0, 1].
        occluders: probability of each of the two patches that may hide a part of the object.
        texture_turn: the texture's largest rotation, degrees.
        surroundings: probability that a region of the background carries the texture as well, with half the contrast.
        plain: probability that an object has almost no texture (contrast 0 to 0.1): shape alone says its class.
        close_up: probability that an object is so near that it fills the image: texture alone says its class.
        noise: standard deviation of the pixel noise, of [0, 1].
    """

    object_scale: tuple[float, float] = (0.55, 0.85)
    turn: float = 30.0
    bend: float = 0.06
    period: tuple[float, float] = (8.0, 10.0)
    contrast: tuple[float, float] = (0.5, 0.9)
    occluders: float = 0.3
    texture_turn: float = 10.0
    surroundings: float = 1.0
    plain: float = 0.35
    close_up: float = 0.15
    noise: float = 0.02


BOTH_CUES = {"plain": 0.0, "close_up": 0.0}  # changes to a Look: every object whole and textured


@dataclass(frozen=True)
class Scenes:
    """Images with the segment of every pixel.

    Args:
        images: :class:`ImageSet` of uint8 [N, 3, size, size].
        segments: uint8 [N, size, size]: 0 to 2 the background's regions, 3 the object, 4 and 5 patches before it.
    """

    images: ImageSet
    segments: Tensor


def draw_scenes(num: int, seed: int | str, cues: str = "natural", size: int = 64, look: Look = Look()) -> Scenes:
    """``num`` images of ``size`` x ``size`` pixels, the same for the same arguments.

    Args:
        num: number of images; classes are as equally frequent as ``num`` allows.
        seed: of everything drawn.
        cues: "natural": the texture is that of the shape's class; "conflict": always that of another class;
            "independent": of any class.
        size: pixels.
        look: how hard the cues are to see.

    Raises:
        ValueError: a negative num, size < 16, an unknown ``cues``.
    """
    if num < 0 or size < 16:
        raise ValueError(f"draw_scenes: num must be >= 0 and size >= 16, got {num} and {size}")
    if cues not in CUES:
        raise ValueError(f"draw_scenes: cues must be one of {', '.join(CUES)}, got {cues!r}")
    shape, texture = _classes(num, seed, cues)
    parts = [
        _draw(shape[i : i + _CHUNK], texture[i : i + _CHUNK], size, look, torch_generator("world", seed, cues, i))
        for i in range(0, num, _CHUNK)
    ]
    images = torch.cat([part[0] for part in parts]) if parts else torch.empty(0, 3, size, size, dtype=torch.uint8)
    segments = torch.cat([part[1] for part in parts]) if parts else torch.empty(0, size, size, dtype=torch.uint8)
    return Scenes(ImageSet(images, shape, texture, CLASSES), segments)


def _classes(num: int, seed: int | str, cues: str) -> tuple[Tensor, Tensor]:
    """Shape and texture ids: every shape equally often; under conflict every ordered pair equally often."""
    generator = torch_generator("world", seed, cues, "classes")
    order = torch.randperm(num, generator=generator)
    rank = torch.arange(num)
    shape = rank % NUM_CLASSES
    if cues == "natural":
        texture = shape
    else:
        first = 1 if cues == "conflict" else 0
        offset = first + rank // NUM_CLASSES % (NUM_CLASSES - first)
        texture = (shape + offset) % NUM_CLASSES
    return shape[order], texture[order]


def _draw(shape: Tensor, texture: Tensor, size: int, look: Look, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One chunk: images uint8 [B, 3, size, size] and segments uint8 [B, size, size]."""
    count = len(shape)

    def uniform(low: float, high: float, *dims: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *dims, generator=generator)

    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    xy = torch.stack([axis[None, :].expand(size, size), axis[:, None].expand(size, size)], -1)  # [S, S, 2]

    background, region = _background(xy, uniform, look)
    cover, object_xy = _outline(shape, xy, uniform, look)
    pattern = _pattern(texture, xy, size, uniform, look)
    object_colour = _away_from(background.flatten(2).mean(2), uniform)
    is_plain = uniform(0, 1, 1) < look.plain
    contrast = torch.where(is_plain, uniform(0, 0.1, 1), uniform(*look.contrast, 1)) * _directions(uniform)
    wave = contrast[:, :, None, None] * (pattern[:, None] - 0.5)
    is_around = (uniform(0, 1) < look.surroundings)[:, None, None] & (region == 0)
    background = background + 0.5 * wave * is_around[:, None]
    shade = _along(object_xy, uniform(0, 2 * math.pi))[:, None] * uniform(0, 0.1, 1, 1, 1)
    painted = object_colour[:, :, None, None] + wave + shade
    image = torch.lerp(background, painted, cover[:, None])
    segments = torch.where(cover > 0.5, _OBJECT, region)
    image, segments = _occlude(image, segments, xy, uniform, look)
    image = image + look.noise * torch.randn(image.shape, generator=generator)
    return (image.clamp(0, 1) * 255).round().to(torch.uint8), segments.to(torch.uint8)


def _along(xy: Tensor, angle: Tensor) -> Tensor:
    """Coordinate of xy [B or 1, S, S, 2] along the directions `angle` [B]."""
    return xy[..., 0] * angle.cos()[:, None, None] + xy[..., 1] * angle.sin()[:, None, None]


def _turned(xy: Tensor, angle: Tensor) -> Tensor:
    """xy [B, S, S, 2] turned by -angle [B]."""
    c, s = angle.cos()[:, None, None], angle.sin()[:, None, None]
    x, y = xy[..., 0], xy[..., 1]
    return torch.stack([c * x + s * y, c * y - s * x], -1)


def _directions(uniform) -> Tensor:
    """Random unit vectors of colour [B, 3]."""
    return F.normalize(uniform(-1, 1, 3) + 1e-3, dim=1)


def _away_from(colour: Tensor, uniform) -> Tensor:
    """A colour for the object, away from the background's mean [B, 3] by 0.35 before it is kept in [0.05, 0.95]."""
    own = uniform(0.15, 0.85, 3)
    gap = own - colour
    far = colour + F.normalize(gap, dim=1) * gap.norm(dim=1, keepdim=True).clamp(min=0.35)
    return far.clamp(0.05, 0.95)


def _background(xy: Tensor, uniform, look: Look) -> tuple[Tensor, Tensor]:
    """Colours [B, 3, S, S] and region numbers [B, S, S] of wavy regions with blotches and a slow gradient."""
    size = xy.shape[0]
    region, highest = torch.zeros(1, dtype=torch.int64), torch.tensor(-torch.inf)
    for number in range(_REGIONS):  # each pixel belongs to the region whose wave is highest there
        angle, phase, speed = uniform(0, 2 * math.pi), uniform(0, 2 * math.pi), uniform(0.7, 1.8)
        wave = torch.sin(_along(xy, angle) * speed[:, None, None] * 2 + phase[:, None, None])
        region, highest = torch.where(wave > highest, number, region), torch.maximum(wave, highest)
    colours = uniform(0.1, 0.9, _REGIONS, 3)
    flat = torch.gather(colours, 1, region.flatten(1)[..., None].expand(-1, -1, 3))
    flat = flat.transpose(1, 2).unflatten(2, (size, size))
    blotches = uniform(-1, 1, 3, 8, 8) * uniform(0, 0.12, 1, 1, 1)
    return flat + F.interpolate(blotches, (size, size), mode="bicubic"), region


def _outline(shape: Tensor, xy: Tensor, uniform, look: Look) -> tuple[Tensor, Tensor]:
    """How much of each pixel the object covers [B, S, S], and its own coordinates [B, S, S, 2]."""
    scale = torch.where(uniform(0, 1) < look.close_up, uniform(1.3, 2.0), uniform(*look.object_scale))
    slack = (1 - scale).abs()[:, None] * 0.8
    centre = uniform(-1, 1, 2) * slack
    own = _turned(xy - centre[:, None, None], uniform(-1, 1) * math.radians(look.turn))
    stretch = torch.exp(uniform(-0.2, 0.2))
    own = own / (scale[:, None, None, None] * torch.stack([stretch, 1 / stretch], -1)[:, None, None])
    bend, phase = uniform(0, look.bend, 2), uniform(0, 2 * math.pi, 2)
    own = own + bend[:, None, None] * torch.sin(3 * own.flip(-1) + phase[:, None, None])
    pictures = shape_pictures()[shape][:, None]
    return F.grid_sample(pictures, own / SHAPE_EXTENT, align_corners=False)[:, 0].clamp(0, 1), own


def _pattern(texture: Tensor, xy: Tensor, size: int, uniform, look: Look) -> Tensor:
    """The texture's value in [0, 1] at every pixel [B, S, S], turned, scaled and moved at random."""
    period = uniform(*look.period) * size / 64  # pixels
    where = _turned(xy.expand(len(texture), -1, -1, -1), uniform(-1, 1) * math.radians(look.texture_turn))
    tile = where * (size / 2 / period / PERIODS)[:, None, None, None] + uniform(0, 1, 1, 1, 2)  # in tiles
    wrapped = F.pad(texture_tiles(), (1, 1, 1, 1), mode="circular")[texture][:, None]
    grid = ((tile % 1) * TEXTURE_PIXELS + 1) / (TEXTURE_PIXELS + 2) * 2 - 1
    return F.grid_sample(wrapped, grid, align_corners=False)[:, 0]


def _occlude(image: Tensor, segments: Tensor, xy: Tensor, uniform, look: Look) -> tuple[Tensor, Tensor]:
    """Plain elliptic patches, some of them over the object."""
    for i in range(_OCCLUDERS):
        centre, axes = uniform(-0.8, 0.8, 2), uniform(0.1, 0.28, 2)
        own = _turned(xy - centre[:, None, None], uniform(0, math.pi)) / axes[:, None, None]
        inside = (own[..., 0].square() + own[..., 1].square() < 1) & (uniform(0, 1) < look.occluders)[:, None, None]
        image = torch.where(inside[:, None], uniform(0.1, 0.9, 3)[:, :, None, None], image)
        segments = torch.where(inside, _OBJECT + 1 + i, segments)
    return image, segments
