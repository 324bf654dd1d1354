"""The sixteen shapes and the sixteen textures of the generated images, drawn once as small pictures to sample from.

A shape is a polygon (even-odd rule, so one with a hole is a polygon with a seam), a texture a function on a torus, so
that it can be moved, turned and scaled freely. Class k of the generated world is shape k with texture k.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from subnets.training.seeds import torch_generator

Points = list[tuple[float, float]]

SHAPE_PIXELS = 96  # side of a shape's picture, which covers [-1.25, 1.25]^2
SHAPE_EXTENT = 1.25
TEXTURE_PIXELS = 192  # side of a texture's tile, which holds PERIODS periods of the pattern
PERIODS = 8

# ------------------------------------------------------------------------------ shapes


def _arc(radius: float, start: float, end: float, count: int = 40, x: float = 0.0, y: float = 0.0) -> Points:
    """Points on a circle's arc; angles in degrees, y upwards."""
    angles = [math.radians(start + (end - start) * i / (count - 1)) for i in range(count)]
    return [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles]


def _regular(count: int, turn: float = 90.0) -> Points:
    return [(math.cos(a), math.sin(a)) for a in (math.radians(turn + 360 * i / count) for i in range(count))]


def _spikes(count: int, inner: float) -> Points:
    radii = [1.0 if i % 2 == 0 else inner for i in range(2 * count)]
    angles = [math.radians(90 + 180 * i / count) for i in range(2 * count)]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]


def _gear(teeth: int = 7) -> Points:
    points: Points = []
    for i in range(teeth):
        for angle, radius in ((-0.28, 0.7), (-0.22, 1.0), (0.22, 1.0), (0.28, 0.7)):
            a = 2 * math.pi * (i + angle) / teeth
            points.append((radius * math.cos(a), radius * math.sin(a)))
    return points


def _heart() -> Points:
    angles = [2 * math.pi * i / 60 for i in range(60)]
    return [
        (math.sin(t) ** 3, (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 15)
        for t in angles
    ]


def _plus(w: float = 0.33) -> Points:
    return [(-w, 1), (w, 1), (w, w), (1, w), (1, -w), (w, -w), (w, -1), (-w, -1), (-w, -w), (-1, -w), (-1, w), (-w, w)]


SHAPES: dict[str, Points] = {
    "disc": _arc(0.9, 0, 360),
    "square": [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
    "triangle": _regular(3),
    "star": _spikes(5, 0.42),
    "cross": _plus(),
    "ring": _arc(1.0, 0, 360) + _arc(0.52, 360, 0),
    "crescent": _arc(1.0, 60, 300) + _arc(0.87, 270, 90, x=0.5),
    "heart": _heart(),
    "arrow": [(0, 1), (0.8, 0.1), (0.3, 0.1), (0.3, -1), (-0.3, -1), (-0.3, 0.1), (-0.8, 0.1)],
    "ell": [(-0.7, 1), (-0.1, 1), (-0.1, -0.4), (0.8, -0.4), (0.8, -1), (-0.7, -1)],
    "tee": [(-0.9, 0.9), (0.9, 0.9), (0.9, 0.35), (0.3, 0.35), (0.3, -1), (-0.3, -1), (-0.3, 0.35), (-0.9, 0.35)],
    "horseshoe": [*_arc(1.0, -30, 210), (-0.87, -1), (-0.4, -1), *_arc(0.5, 210, -30), (0.4, -1), (0.87, -1)],
    "gear": _gear(),
    "drop": [(0, 1.1), *_arc(0.7, 150, 390, y=-0.3)],
    "hourglass": [(-0.8, 1), (0.8, 1), (0.15, 0), (0.8, -1), (-0.8, -1), (-0.15, 0)],
    "half-disc": _arc(1.0, 0, 180, y=-0.4),
}


def _filled(polygon: Points) -> Tensor:
    """Coverage [SHAPE_PIXELS, SHAPE_PIXELS] in [0, 1] of a polygon, row 0 on top; 4 x 4 samples a pixel."""
    fine = SHAPE_PIXELS * 4
    axis = ((torch.arange(fine) + 0.5) / fine * 2 - 1) * SHAPE_EXTENT
    x, y = axis[None, :].expand(fine, fine), -axis[:, None].expand(fine, fine)
    inside = torch.zeros(fine, fine, dtype=torch.bool)
    for (x0, y0), (x1, y1) in zip(polygon, polygon[1:] + polygon[:1], strict=True):
        if y0 == y1:
            continue
        crosses = (y >= min(y0, y1)) & (y < max(y0, y1)) & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
        inside ^= crosses
    return torch.nn.functional.avg_pool2d(inside.float()[None], 4)[0]


@functools.cache
def shape_pictures() -> Tensor:
    """fp32 [16, SHAPE_PIXELS, SHAPE_PIXELS]: how much of each pixel each shape covers."""
    return torch.stack([_filled(polygon) for polygon in SHAPES.values()])


# ---------------------------------------------------------------------------- textures


def _smooth_noise(name: str, cycles: float) -> Tensor:
    """Periodic noise in [0, 1] whose features are about TEXTURE_PIXELS / cycles pixels wide."""
    noise = torch.randn(TEXTURE_PIXELS, TEXTURE_PIXELS, generator=torch_generator("vision", "texture", name))
    f = torch.fft.fftfreq(TEXTURE_PIXELS) * TEXTURE_PIXELS
    keep = torch.exp(-(f[:, None] ** 2 + f[None, :] ** 2) / (2 * cycles**2))
    smooth = torch.fft.ifft2(torch.fft.fft2(noise) * keep).real
    return torch.sigmoid(smooth / smooth.std() * 2)


def _cracks(x: Tensor, y: Tensor) -> Tensor:
    """Lines between the cells of random points on the torus (a Voronoi diagram's edges)."""
    points = torch.rand(PERIODS**2, 2, generator=torch_generator("vision", "texture", "cracks")) * PERIODS
    gap = torch.stack([x, y], -1)[:, :, None] - points
    gap = gap - PERIODS * (gap / PERIODS).round()
    near = gap.norm(dim=-1).topk(2, largest=False).values
    return (near[..., 1] - near[..., 0] < 0.14).float()


def _centre_distance(x: Tensor, y: Tensor) -> Tensor:
    return ((x % 1 - 0.5) ** 2 + (y % 1 - 0.5) ** 2).sqrt()


def _square_wave(x: Tensor) -> Tensor:
    return (x % 1 < 0.5).float()


def _triangle_wave(y: Tensor) -> Tensor:
    return (y % 1 - 0.5).abs() * 2


def _scales(x: Tensor, y: Tensor) -> Tensor:
    """Outlines of overlapping half circles, row over row."""
    value = torch.zeros_like(x)
    for row in (1, 0):  # the upper row is drawn last, over the lower one
        height = (2 * y + row) % 2 - 1
        distance = (((x + 0.5 * row) % 1 - 0.5) ** 2 + (height / 2) ** 2).sqrt()
        inside = (distance < 0.5) & (height >= 0)
        value = torch.where(inside, (distance > 0.36).float(), value)
    return value


TEXTURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "stripes": lambda x, y: _square_wave(x),
    "checks": lambda x, y: (_square_wave(x) - _square_wave(y)).abs(),
    "dots": lambda x, y: (_centre_distance(x, y) < 0.32).float(),
    "mesh": lambda x, y: ((x % 1 < 0.24) | (y % 1 < 0.24)).float(),
    "waves": lambda x, y: _square_wave(x + 0.3 * torch.sin(math.pi * y)),
    "zigzag": lambda x, y: _square_wave(x + 0.9 * _triangle_wave(y / 2)),
    "bricks": lambda x, y: ((2 * y % 1 < 0.3) | ((x + 0.5 * (2 * y % 2 < 1)) % 1 < 0.16)).float(),
    "rings": lambda x, y: _square_wave(_centre_distance(x / 2, y / 2) * 4.5),
    "plaid": lambda x, y: (_square_wave(x) + _square_wave(y)) / 2,
    "scales": _scales,
    "speckle": lambda x, y: (_smooth_noise("speckle", 22.0) > 0.72).float(),
    "clouds": lambda x, y: _smooth_noise("clouds", 5.0),
    "wood": lambda x, y: _square_wave(1.5 * x + 2.5 * _smooth_noise("wood", 4.0)),
    "triangles": lambda x, y: ((x % 1 + y % 1 > 1).float() - _square_wave(y / 2)).abs(),
    "diamonds": lambda x, y: _square_wave(((x % 1 - 0.5).abs() + (y % 1 - 0.5).abs()) * 2 + 0.25),
    "cracks": _cracks,
}


@functools.cache
def texture_tiles() -> Tensor:
    """fp32 [16, TEXTURE_PIXELS, TEXTURE_PIXELS] in [0, 1], periodic, softened by about a tenth of a period."""
    axis = (torch.arange(TEXTURE_PIXELS) + 0.5) / TEXTURE_PIXELS * PERIODS
    x, y = axis[None, :].expand(TEXTURE_PIXELS, -1), axis[:, None].expand(-1, TEXTURE_PIXELS)
    tiles = torch.stack([draw(x, y) for draw in TEXTURES.values()])
    f = torch.fft.fftfreq(TEXTURE_PIXELS) * TEXTURE_PIXELS
    keep = torch.exp(-(f[:, None] ** 2 + f[None, :] ** 2) / (2 * (2.5 * PERIODS) ** 2))
    return torch.fft.ifft2(torch.fft.fft2(tiles) * keep).real.clamp(0, 1)


assert len(SHAPES) == len(TEXTURES) == 16
