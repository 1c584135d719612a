"""Scores from a judge that only compares: how often a picture beats the others of its prompt."""

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from data.shards import read_shard
from scoring.scorers.scorer import compare_images
from tasks.pictures import pictures
from tasks.record.plan import PlannedCycle
from tasks.record.workspace import Part


def compared_scores(
    judge: Any,
    cycle: PlannedCycle,
    part: Part,
    index: int,
    images: Sequence[np.ndarray],
    prompts: Sequence[str],
    advance: Callable[[int], None],
) -> np.ndarray:
    """float32 scores in [0, 1] of the pictures of one shard.

    Candidates meet each of their mates once, and score their mean probability of being preferred: a
    Borda count. In the evaluation a picture meets the base's of the same prompt, and the base's score 0.5.
    """
    if part == "candidates":
        return _tournament(judge, images, prompts, cycle.images_per_prompt(part), advance)
    if part == "base":
        advance(len(images))
        return np.full(len(images), 0.5, np.float32)
    shard = cycle.part("base").candidates(index)
    stored = read_shard(shard, ["image"])["image"].to_pylist()
    base = pictures(shard, slice(None), [image["bytes"] for image in stored])
    scores = compare_images(judge, images, base, prompts).astype(np.float32)
    advance(len(images))
    return scores


def _tournament(
    judge: Any, images: Sequence[np.ndarray], prompts: Sequence[str], each: int, advance: Callable[[int], None]
) -> np.ndarray:
    """Every two candidates of each prompt, which stand one after another, `each` a prompt."""
    scores = np.zeros(len(images))
    for start in range(0, len(images), each):
        meetings = list(combinations(range(start, start + each), 2))
        first, second = ([images[meeting[side]] for meeting in meetings] for side in (0, 1))
        won = compare_images(judge, first, second, [prompts[start]] * len(meetings))
        for (a, b), probability in zip(meetings, won, strict=True):
            scores[a] += probability
            scores[b] += 1 - probability
        advance(each)
    return (scores / (each - 1)).astype(np.float32)
