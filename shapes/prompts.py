"""Writes the three prompt sets; disjoint as scenes, so that a mirrored caption cannot leak.

`python -m shapes.prompts` writes `shapes/prompts/{train,tuning,heldout}.jsonl`. Recipes may be chosen on
`tuning`; nothing at all is chosen on `heldout`. No model of this folder reads a caption of either set in
training, in neither telling (the autoencoder, which reads no captions, may have seen such pictures).
"""

import argparse
import json
from pathlib import Path
from random import Random

from shapes.stage import PROMPTS
from shapes.world import Scene, all_scenes, parse

COUNTS = {"heldout": (16, 496), "tuning": (12, 388), "train": (80, 2920)}  # prompts with one thing, with two
SEED = 20


def draw_sets() -> dict[str, list[Scene]]:
    """The prompt sets by name; each scene as told from the left or from the top."""
    random = Random(SEED)
    scenes = list(dict.fromkeys(scene.canonical() for scene in all_scenes()))
    pools = [[s for s in scenes if s.relation is None], [s for s in scenes if s.relation is not None]]
    orders = [random.sample(pool, len(pool)) for pool in pools]
    sets: dict[str, list[Scene]] = {}
    for name, counts in COUNTS.items():
        chosen = []
        for order, count in zip(orders, counts, strict=True):
            chosen += [order.pop() for _ in range(count)]
        random.shuffle(chosen)
        sets[name] = chosen
    return sets


def write_sets(folder: Path = PROMPTS) -> None:
    """One JSON object {"prompt": ...} a line."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, scenes in draw_sets().items():
        lines = [json.dumps({"prompt": scene.caption()}) + "\n" for scene in scenes]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def read_set(name: str) -> list[str]:
    """The captions of a shipped set: "train", "tuning" or "heldout"."""
    lines = (PROMPTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines]


def training_scenes() -> tuple[list[Scene], list[Scene]]:
    """Every telling of every scene that models may learn from: with one thing, with two things."""
    reserved = {parse(text).canonical() for name in ("tuning", "heldout") for text in read_set(name)}
    free = [scene for scene in all_scenes() if scene.canonical() not in reserved]
    return [s for s in free if s.relation is None], [s for s in free if s.relation is not None]


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    write_sets()


if __name__ == "__main__":
    main()
