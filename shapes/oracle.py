"""The exact judge of the world: reads a picture back into facts and checks a caption against them.

Every pixel is explained as a mix of the background and one of the six colours; shapes are compared with
ideal templates of equal area and place. Knows nothing of models. Usable as a scorer plug-in under
`shapes.oracle:Oracle`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shapes.render import AREA, CHUNK, SHAPES, coverage
from shapes.world import BACKGROUND_NAMES, BACKGROUNDS, COLOUR_NAMES, COLOURS, Scene, parse

VIEW = 64  # px; pictures are read at this size
RESIDUAL = 0.30  # RGB distance beyond which a pixel is no mix of background and colour
LEAST_AREA = 0.012  # of the picture; the smallest true shape (a triangle) covers 0.027
LEAST_IOU = 0.72  # overlap with the ideal template below which a blob has no shape
TOLERANCE = 0.06  # a shape is met unless another template overlaps better by more; in true pictures .07 to .2
SIZE_LIMIT = 0.167  # radius that separates small (<= 0.145) from large (>= 0.19)
LEAST_RING = 0.80  # of the border pixels must show the background
DIRT = 0.004  # of the picture may be unexplained or of a colour not named, after erosion
SPECKS = 0.05  # of the picture may be so without erosion; a true picture has no such pixel at all
SLANT = 1.15  # the named direction's offset must exceed the other one by this factor

NO_SHAPE = len(SHAPES)  # shape index of a blob that matches no template


@dataclass(frozen=True)
class OracleInfo:
    """What a report needs to know about this scorer."""

    name: str
    version: str
    unit: str
    higher_is_better: bool
    source: str
    fingerprint: str


@dataclass
class Facts:
    """What n pictures show; c runs over the six colours."""

    background: Tensor  # (n,) int64, index into BACKGROUND_NAMES
    ring: Tensor  # (n,) share of the border that shows the background
    area: Tensor  # (n, c) share of the picture
    shape: Tensor  # (n, c) int64, index into SHAPES or NO_SHAPE
    overlap: Tensor  # (n, c, 3) intersection over union with each shape's template
    radius: Tensor  # (n, c) radius of the best template, fraction of the side
    centre: Tensor  # (n, c, 2) centroid x, y
    foreign: Tensor  # (n, c) share of the picture firmly covered by that colour, thin edges eroded
    unknown: Tensor  # (n, 2) share of the picture that no mix explains: thin edges eroded, and as it is

    def present(self) -> Tensor:
        """(n, c) bool: the colour covers enough to be a thing."""
        return self.area >= LEAST_AREA


def _erode(mask: Tensor) -> Tensor:
    """3 x 3 erosion of a float mask (n, c, h, w); outside counts as inside."""
    return -F.max_pool2d(-mask, 3, stride=1, padding=1)


def _explain(view: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(n, 3, h, w) -> background (n,), ring share (n,), colour masks (n, 6, h, w), unknown (n, h, w)."""
    grounds = torch.tensor(list(BACKGROUNDS.values()))
    colours = torch.tensor(list(COLOURS.values()))
    sides = (view[..., :3, :], view[..., -3:, :], view[..., :3], view[..., -3:])
    border = torch.cat([side.flatten(2) for side in sides], 2)
    near = (border[:, None] - grounds[None, :, :, None]).square().sum(2).sqrt() < RESIDUAL  # (n, 3, m)
    ring, background = near.float().mean(2).max(1)
    ground = grounds[background][:, None, :, None, None]  # (n, 1, 3, 1, 1)
    ray = colours[None, :, :, None, None] - ground  # (n, 6, 3, 1, 1)
    offset = view[:, None] - ground  # (n, 1, 3, h, w)
    alpha = ((offset * ray).sum(2) / ray.square().sum(2)).clamp(0, 1)  # (n, 6, h, w)
    residual = (offset - alpha[:, :, None] * ray).square().sum(2).sqrt()
    least, owner = residual.min(1)
    owned = F.one_hot(owner, len(colours)).movedim(-1, 1).bool() & (least < RESIDUAL)[:, None]
    return background, ring, (owned & (alpha > 0.5)).float(), (least >= RESIDUAL).float()


def _best_template(mask: Tensor, area: Tensor, centre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shape index (m,), overlaps (m, 3), best template's radius (m,) of masks (m, h, w), none empty."""
    overlaps, radii = [], []
    for shape in SHAPES:
        radius = (area / AREA[shape]).sqrt()
        ideal = coverage(shape, centre[:, 0], centre[:, 1], radius, VIEW)
        overlaps.append(torch.minimum(ideal, mask).sum((1, 2)) / torch.maximum(ideal, mask).sum((1, 2)))
        radii.append(radius)
    overlap = torch.stack(overlaps, 1)
    best, index = overlap.max(1)
    radius = torch.stack(radii, 1).gather(1, index[:, None])[:, 0]
    return torch.where(best >= LEAST_IOU, index, NO_SHAPE), overlap, radius


def _observe_chunk(images: Tensor) -> Facts:
    view = F.interpolate(images, size=(VIEW, VIEW), mode="bilinear", align_corners=False)
    background, ring, masks, unknown = _explain(view)
    area = masks.mean((2, 3))
    line = (torch.arange(VIEW) + 0.5) / VIEW
    weight = area.clamp(min=1e-6) * VIEW * VIEW
    centre = torch.stack([(masks.sum(2) * line).sum(2) / weight, (masks.sum(3) * line).sum(2) / weight], 2)
    shape = torch.full(area.shape, NO_SHAPE)
    radius, overlap = torch.zeros_like(area), torch.zeros(*area.shape, len(SHAPES))
    seen = area >= LEAST_AREA
    if seen.any():
        shape[seen], overlap[seen], radius[seen] = _best_template(masks[seen], area[seen], centre[seen])
    foreign = _erode(masks).mean((2, 3))
    unexplained = torch.stack([_erode(unknown[:, None]).mean((1, 2, 3)), unknown.mean((1, 2))], 1)
    return Facts(background, ring, area, shape, overlap, radius, centre, foreign, unexplained)


def observe(images: Tensor) -> Facts:
    """Reads pictures, float (n, 3, h, w) in [0, 1], in chunks that fit the cache."""
    parts = [_observe_chunk(chunk) for chunk in images.float().split(CHUNK)]
    return Facts(*(torch.cat([getattr(part, name) for part in parts]) for name in Facts.__annotations__))


@dataclass
class Claims:
    """m captions as numbers; second things are -1 where there is none."""

    background: Tensor  # (m,)
    colour: Tensor  # (m, 2)
    shape: Tensor  # (m, 2)
    large: Tensor  # (m, 2)
    axis: Tensor  # (m,) 0 = x, 1 = y
    sign: Tensor  # (m,) +1: the first thing has the smaller coordinate; 0 = no relation


def claims(scenes: Sequence[Scene]) -> Claims:
    """What the scenes say, as tensors."""
    rows = []
    for scene in scenes:
        row = [BACKGROUND_NAMES.index(scene.background)]
        for thing in scene.things + scene.things[:1] * (2 - len(scene.things)):
            row += [COLOUR_NAMES.index(thing.colour), SHAPES.index(thing.shape), int(thing.size == "large")]
        axis = int(scene.relation in ("above", "below"))
        sign = {None: 0, "left of": 1, "above": 1}.get(scene.relation, -1)
        rows.append([*row, axis, sign])
    table = torch.tensor(rows)
    return Claims(table[:, 0], table[:, 1:5:3], table[:, 2:6:3], table[:, 3:7:3], table[:, 7], table[:, 8])


def check(facts: Facts, said: Claims) -> tuple[Tensor, Tensor]:
    """Row-wise checks of n pictures against n captions: passed (n, 9) and applicable (n, 9), both bool.

    Order: background, colour 1, shape 1, size 1, colour 2, shape 2, size 2, relation, clean.
    """
    pick = said.colour
    present = facts.present().gather(1, pick)  # (n, 2)
    overlap = facts.overlap.gather(1, pick[:, :, None].expand(-1, -1, len(SHAPES)))  # (n, 2, 3)
    claimed = overlap.gather(2, said.shape[:, :, None])[:, :, 0]
    shape = present & (claimed >= LEAST_IOU) & (claimed >= overlap.amax(2) - TOLERANCE)
    size = present & ((facts.radius.gather(1, pick) > SIZE_LIMIT) == said.large.bool())
    centre = facts.centre.gather(1, pick[:, :, None].expand(-1, -1, 2))  # (n, 2, 2)
    offset = centre[:, 1] - centre[:, 0]
    along = offset.gather(1, said.axis[:, None])[:, 0] * said.sign
    across = offset.gather(1, 1 - said.axis[:, None])[:, 0].abs()
    relation = present.all(1) & (along > SLANT * across) & (along > 0.1)
    unnamed = 1 - torch.zeros_like(facts.area).scatter_(1, pick, 1.0)
    clean = ((facts.foreign * unnamed).sum(1) + facts.unknown[:, 0] <= DIRT) & (
        (facts.area * unnamed).sum(1) + facts.unknown[:, 1] <= SPECKS
    )
    background = (facts.background == said.background) & (facts.ring >= LEAST_RING)
    passed = [background]
    for position in (0, 1):
        passed += [present[:, position], shape[:, position], size[:, position]]
    two = said.sign != 0
    yes = torch.ones_like(two)
    return torch.stack([*passed, relation, clean], 1), torch.stack([yes] * 4 + [two] * 4 + [yes], 1)


def fraction(passed: Tensor, applicable: Tensor) -> Tensor:
    """Share of the applicable checks that passed, float32 (n,)."""
    return (passed & applicable).sum(1) / applicable.sum(1)


def to_float(images: np.ndarray | Sequence[np.ndarray]) -> Tensor:
    """uint8 pictures (n, H, W, 3), all of one size -> float (n, 3, H, W) in [0, 1]."""
    stacked = np.stack([np.asarray(image) for image in images])
    if stacked.dtype != np.uint8 or stacked.ndim != 4 or stacked.shape[-1] != 3:
        raise ValueError(f"expected uint8 pictures (n, H, W, 3), found {stacked.dtype} {stacked.shape}")
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 255


def _fingerprint() -> str:
    """Changes with every line that can change a score."""
    folder = Path(__file__).parent
    sources = [(folder / name).read_bytes() for name in ("oracle.py", "render.py", "world.py")]
    return hashlib.sha256(b"\0".join(sources)).hexdigest()[:16]


class Oracle:
    """Scores pictures by the fraction of checks that they pass: 1.0 = exactly what the prompt asks for."""

    def __init__(self, source: str | None = None, device: str = "cpu") -> None:
        """`source` is reported, never read; the oracle has no weights and always runs on the CPU."""
        self.info = OracleInfo("oracle", "1", "fraction of checks passed", True, source or "shapes", _fingerprint())

    def score(self, images: np.ndarray | Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
        """uint8 pictures (n, H, W, 3) and n prompts of the world -> float32 (n,) in [0, 1]."""
        if len(images) != len(prompts):
            raise ValueError(f"found {len(images)} images for {len(prompts)} prompts; expected as many")
        scenes = [parse(prompt) for prompt in prompts]
        if not scenes:
            return np.zeros(0, np.float32)
        passed = fraction(*check(observe(to_float(images)), claims(scenes)))
        return np.asarray(passed, dtype=np.float32)

    def close(self) -> None:
        """Nothing to free."""
