"""The grammar of the world: scenes, captions and their one-attribute variations.

Knows nothing of pixels (`render`), of judging (`oracle`) or of models.
"""

import re
from dataclasses import dataclass, replace
from random import Random

SHAPES = ("circle", "square", "triangle")
COLOURS = {  # RGB in [0, 1]; pairwise distances above 0.5, so that a label survives a lossy decoder
    "red": (0.90, 0.12, 0.12),
    "green": (0.10, 0.65, 0.15),
    "blue": (0.12, 0.25, 0.90),
    "yellow": (0.95, 0.85, 0.10),
    "purple": (0.62, 0.12, 0.72),
    "cyan": (0.10, 0.82, 0.88),
}
SIZES = ("small", "large")
BACKGROUNDS = {"black": (0.03, 0.03, 0.03), "white": (0.97, 0.97, 0.97), "gray": (0.50, 0.50, 0.50)}
RELATIONS = ("left of", "right of", "above", "below")
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

COLOUR_NAMES = tuple(COLOURS)
BACKGROUND_NAMES = tuple(BACKGROUNDS)


@dataclass(frozen=True)
class Thing:
    """One object of a scene."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """One or two things on a background; `relation` reads "first RELATION second", None = one thing."""

    things: tuple[Thing, ...]
    relation: str | None
    background: str

    def caption(self) -> str:
        """The only sentence that describes this scene in this order; at most 20 tokens."""
        middle = f" {self.relation} ".join(str(thing) for thing in self.things)
        return f"{middle} on a {self.background} background"

    def canonical(self) -> "Scene":
        """The same picture told from the left or from the top: the unit in which prompt sets are disjoint."""
        if self.relation in (None, "left of", "above"):
            return self
        return Scene(self.things[::-1], INVERSE[self.relation], self.background)


_THING = rf"a ({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_SENTENCE = re.compile(rf"{_THING}(?: ({'|'.join(RELATIONS)}) {_THING})? on a ({'|'.join(BACKGROUNDS)}) background")


def parse(caption: str) -> Scene:
    """The scene that `caption` describes; refuses every sentence outside the grammar."""
    match = _SENTENCE.fullmatch(" ".join(caption.lower().split()))
    if match is None:
        raise ValueError(
            f"prompt {caption!r} is not a sentence of the shapes world; expected e.g. "
            "'a small red circle left of a large blue square on a white background'"
        )
    size, colour, shape, relation, size2, colour2, shape2, background = match.groups()
    things: tuple[Thing, ...] = (Thing(size, colour, shape),)
    if relation is not None:
        if colour == colour2:
            raise ValueError(f"prompt {caption!r} gives both things the colour {colour}; they must differ")
        things += (Thing(size2, colour2, shape2),)
    return Scene(things, relation, background)


def all_things() -> list[Thing]:
    """Every thing of the world, in a fixed order (36)."""
    return [Thing(size, colour, shape) for size in SIZES for colour in COLOURS for shape in SHAPES]


def all_scenes() -> list[Scene]:
    """Every caption of the world as a scene, in a fixed order (108 with one thing, 12960 with two)."""
    things = all_things()
    single = [Scene((thing,), None, background) for thing in things for background in BACKGROUNDS]
    double = [
        Scene((first, second), relation, background)
        for first in things
        for second in things
        if first.colour != second.colour
        for relation in RELATIONS
        for background in BACKGROUNDS
    ]
    return single + double


def _other(options: tuple[str, ...], taken: set[str], random: Random) -> str:
    return random.choice([option for option in options if option not in taken])


def _change_thing(scene: Scene, attribute: str, random: Random) -> Scene:
    index = random.randrange(len(scene.things))
    thing = scene.things[index]
    options = {"size": SIZES, "colour": COLOUR_NAMES, "shape": SHAPES}[attribute]
    taken = {getattr(thing, attribute)}
    if attribute == "colour":
        taken = {other.colour for other in scene.things}
    changed = replace(thing, **{attribute: _other(options, taken, random)})
    return replace(scene, things=(*scene.things[:index], changed, *scene.things[index + 1 :]))


def perturb(scene: Scene, random: Random) -> Scene:
    """The scene with exactly one attribute changed: a size, colour, shape, the background or the relation."""
    attributes = ["size", "colour", "shape", "size", "colour", "shape", "background"]
    attribute = random.choice(attributes + ["relation"] * 2 * (scene.relation is not None))
    if attribute == "background":
        return replace(scene, background=_other(BACKGROUND_NAMES, {scene.background}, random))
    if attribute == "relation":
        return replace(scene, relation=_other(RELATIONS, {scene.relation or ""}, random))
    return _change_thing(scene, attribute, random)
