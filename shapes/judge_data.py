"""Labelled pictures for the judges: a pool of groups, each one caption and four pictures of it.

Rendered groups hold one faithful picture and three with attributes changed; generated groups hold four
pictures of the base model. The oracle reads every picture once; its facts then score the picture against
any caption.
"""

from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from shapes.oracle import SIZE_LIMIT, Facts, check, claims, fraction, observe
from shapes.render import render, to_uint8
from shapes.world import Scene, perturb

GROUP = 4  # pictures of one caption in a pool


@dataclass
class Pool:
    """g groups of GROUP pictures each."""

    scenes: list[Scene]  # g
    images: Tensor  # uint8 (g * GROUP, 3, 32, 32)
    facts: Facts  # of the g * GROUP pictures


Batch = tuple[list[Scene], Tensor, Facts]  # m captions, m * GROUP pictures in [0, 1], their facts


def rows_of(facts: Facts, index: Tensor) -> Facts:
    """The facts of some pictures."""
    return Facts(*(getattr(facts, name)[index] for name in Facts.__annotations__))


def oracle_matrix(facts: Facts, scenes: list[Scene]) -> Tensor:
    """Every one of n pictures against every one of m captions: (n, m) fractions in [0, 1]."""
    n, m = len(facts.background), len(scenes)
    said = claims(scenes)
    columns = torch.arange(m).repeat(n)
    tiled = type(said)(*(getattr(said, name)[columns] for name in type(said).__annotations__))
    return fraction(*check(rows_of(facts, torch.arange(n).repeat_interleave(m)), tiled)).view(n, m)


def pool_of(scenes: list[Scene], images: Tensor) -> Pool:
    """Reads the facts of pictures (g * GROUP, 3, 32, 32) in [0, 1], rounded to bytes as scorers see them."""
    small = to_uint8(images).permute(0, 3, 1, 2).contiguous()
    return Pool(scenes, small, observe(small.float() / 255))


def stored(pool: Pool) -> dict[str, Tensor]:
    """Pictures and facts as one flat dictionary for `save_tensors`; the captions go to a text file."""
    facts = {f"facts.{name}": getattr(pool.facts, name) for name in Facts.__annotations__}
    return {"images": pool.images, **facts}


def restored(scenes: list[Scene], tensors: dict[str, Tensor]) -> Pool:
    """The inverse of `stored`."""
    return Pool(scenes, tensors["images"], Facts(*(tensors[f"facts.{name}"] for name in Facts.__annotations__)))


def merged(pools: list[Pool]) -> Pool:
    """One pool of all groups."""
    columns = ([getattr(pool.facts, name) for pool in pools] for name in Facts.__annotations__)
    facts = Facts(*map(torch.cat, columns))
    return Pool([s for pool in pools for s in pool.scenes], torch.cat([pool.images for pool in pools]), facts)


def rendered_pool(scenes: list[Scene], random: Random) -> Pool:
    """One faithful picture and three with one, one or two, and two or three attributes changed."""
    shown = []
    for scene in scenes:
        once = [perturb(scene, random) for _ in range(3)]
        twice = perturb(once[1], random) if random.random() < 0.5 else once[1]
        thrice = perturb(perturb(once[2], random), random) if random.random() < 0.5 else perturb(once[2], random)
        shown += [scene, once[0], twice, thrice]
    return pool_of(scenes, render(shown, random))


def draw(pool: Pool, groups: int, generator: torch.Generator) -> Batch:
    """A random batch: scenes (groups), pictures (groups * GROUP, 3, 32, 32) in [0, 1] and their facts."""
    chosen = torch.randint(len(pool.scenes), (groups,), generator=generator)
    index = (chosen[:, None] * GROUP + torch.arange(GROUP)).flatten()
    return (
        [pool.scenes[i] for i in chosen.tolist()],
        pool.images[index].float() / 255,
        rows_of(pool.facts, index),
    )


def attributes(facts: Facts) -> dict[str, Tensor]:
    """What an attribute head must read from an embedding: class indices and, for relations, yes/no.

    shape (n, 6) in 0..4: circle, square, triangle, no shape, absent; size (n, 6): small, large, absent (2);
    background (n,); order (n, 2, 6, 6): colour i is left of / above colour j, -1 where one is absent.
    """
    present = facts.present()
    shape = torch.where(present, facts.shape, 4)
    size = torch.where(present, (facts.radius > SIZE_LIMIT).long(), 2)
    both = (present[:, :, None] & present[:, None, :]) & ~torch.eye(present.shape[1], dtype=torch.bool)
    x, y = facts.centre.unbind(-1)
    order = torch.stack([x[:, :, None] < x[:, None, :] - 0.1, y[:, :, None] < y[:, None, :] - 0.1], 1).float()
    return {
        "shape": shape,
        "size": size,
        "background": facts.background,
        "order": torch.where(both[:, None], order, -1.0),
    }
