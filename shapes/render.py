"""Draws scenes: anti-aliased signed distance fields, vectorised over the batch.

Knows nothing of captions beyond the `Scene` it is given. Lengths are fractions of the picture's side.
"""

import math
from dataclasses import dataclass
from random import Random

import torch

from shapes.world import BACKGROUNDS, COLOURS, SHAPES, Scene, Thing

SIDE = 32  # px
CHUNK = 64  # pictures drawn at once; larger batches fall out of the CPU cache and cost five times more each
RADII = {"small": (0.120, 0.145), "large": (0.190, 0.215)}
MARGIN = 0.015  # free space at the border
GAP = 0.04  # least free space between two things

SQUARE_HALF = 0.9  # half side, in radii
TRIANGLE = (1.05, 1.2, 0.6)  # half base, apex above the centroid, base below the centroid, in radii
AREA = {
    "circle": math.pi,
    "square": 4 * SQUARE_HALF**2,
    "triangle": TRIANGLE[0] * (TRIANGLE[1] + TRIANGLE[2]),
}
# left/right, up, down: how far a shape reaches from its centroid, in radii
REACH = {"circle": (1.0, 1.0, 1.0), "square": (0.9, 0.9, 0.9), "triangle": TRIANGLE}


@dataclass(frozen=True)
class Placed:
    """A thing with a place: centroid and radius."""

    thing: Thing
    x: float
    y: float
    radius: float


def _radius(thing: Thing, random: Random) -> float:
    return random.uniform(*RADII[thing.size])


def _range(thing: Thing, radius: float, axis: int) -> tuple[float, float]:
    """The interval that the centroid may lie in along `axis` (0 = x, 1 = y)."""
    side, up, down = (reach * radius for reach in REACH[thing.shape])
    low, high = (side, side) if axis == 0 else (up, down)
    return low + MARGIN, 1 - MARGIN - high


def _clamp(value: float, interval: tuple[float, float]) -> float:
    return min(max(value, interval[0]), interval[1])


def place(scene: Scene, random: Random) -> list[Placed]:
    """A random layout that satisfies the scene's relation with room to spare."""
    scene = scene.canonical()
    radii = [_radius(thing, random) for thing in scene.things]
    if scene.relation is None:
        thing, radius = scene.things[0], radii[0]
        x, y = (random.uniform(*_range(thing, radius, axis)) for axis in (0, 1))
        return [Placed(thing, x, y, radius)]
    axis = 0 if scene.relation == "left of" else 1
    first, second = scene.things
    reach1 = REACH[first.shape][0 if axis == 0 else 2] * radii[0]
    reach2 = REACH[second.shape][0 if axis == 0 else 1] * radii[1]
    low, high = _range(first, radii[0], axis)[0], _range(second, radii[1], axis)[1]
    apart = reach1 + reach2 + GAP
    slack = max(high - low - apart, 0.0)
    cuts = sorted((random.random(), random.random()))
    along = (low + cuts[0] * slack, low + apart + cuts[1] * slack)
    across1 = random.uniform(*_range(first, radii[0], 1 - axis))
    drift = random.uniform(-0.4, 0.4) * (along[1] - along[0])
    across2 = _clamp(across1 + drift, _range(second, radii[1], 1 - axis))
    points = [(along[0], across1), (along[1], across2)]
    xy = points if axis == 0 else [(across, main) for main, across in points]
    return [Placed(t, x, y, r) for t, (x, y), r in zip(scene.things, xy, radii, strict=True)]


def grid(side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixel centres: x (1, side) and y (side, 1) in (0, 1)."""
    line = (torch.arange(side) + 0.5) / side
    return line[None, :], line[:, None]


def distance(shape: str, dx: torch.Tensor, dy: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Signed distance to the outline, negative inside; offsets from the centroid, broadcastable shapes."""
    if shape == "circle":
        return torch.sqrt(dx**2 + dy**2 + 1e-12) - radius
    if shape == "square":
        return torch.maximum(dx.abs(), dy.abs()) - SQUARE_HALF * radius
    base, up, down = TRIANGLE
    slanted = (dx.abs() * (up + down) - (dy + up * radius) * base) / math.hypot(base, up + down)
    # maximum of half planes: exact inside and along edges, which is all that anti-aliasing needs
    return torch.maximum(slanted, dy - down * radius)


def coverage(shape: str, x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor, side: int) -> torch.Tensor:
    """How much of each pixel the shape covers: (n,) centroids and radii -> (n, side, side) in [0, 1]."""
    gx, gy = grid(side)
    dx, dy = gx[None] - x[:, None, None], gy[None] - y[:, None, None]
    return (0.5 - distance(shape, dx, dy, radius[:, None, None]) * side).clamp(0, 1)


def _paint(canvas: torch.Tensor, rows: list[tuple[int, Placed]], shape: str) -> None:
    index = torch.tensor([row for row, _ in rows])
    x, y, radius = torch.tensor([(p.x, p.y, p.radius) for _, p in rows]).T
    colour = torch.tensor([COLOURS[p.thing.colour] for _, p in rows])[:, :, None, None]
    alpha = coverage(shape, x, y, radius, canvas.shape[-1])[:, None]
    canvas[index] = canvas[index] * (1 - alpha) + colour * alpha


def _draw_chunk(scenes: list[Scene], layouts: list[list[Placed]]) -> torch.Tensor:
    ground = torch.tensor([BACKGROUNDS[scene.background] for scene in scenes])
    canvas = ground[:, :, None, None].repeat(1, 1, SIDE, SIDE)
    for position in (0, 1):
        for shape in SHAPES:
            rows = [
                (row, layout[position])
                for row, layout in enumerate(layouts)
                if position < len(layout) and layout[position].thing.shape == shape
            ]
            if rows:
                _paint(canvas, rows, shape)
    return canvas


def render(scenes: list[Scene], random: Random) -> torch.Tensor:
    """Draws each scene with a random layout: float32 (n, 3, 32, 32) in [0, 1]."""
    layouts = [place(scene, random) for scene in scenes]
    chunks = [slice(start, start + CHUNK) for start in range(0, len(scenes), CHUNK)]
    return torch.cat([_draw_chunk(scenes[chunk], layouts[chunk]) for chunk in chunks])


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """(n, 3, H, W) in [0, 1] -> uint8 (n, H, W, 3), the form in which pictures are judged."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
