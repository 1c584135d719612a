"""What one judge says of base and tuned model, over paired pictures of held-out prompts.

Pure numpy and scipy. Knows nothing of images, models or files. A prompt is the unit of observation: several
images of one prompt are averaged first, because images of one prompt are not independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from scoring.verdict.intervals import holm, mean_difference_interval, sign_test, win_rate_interval


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What one judge says about the tuned model against the base model, over independent prompts."""

    judge: str
    """Name of the scorer that judged."""
    held_out: bool
    """True when this scorer labelled none of the training data."""
    prompts: int
    """Number of prompts, each one outcome; wins + ties + losses."""
    wins: int
    """Prompts on which the tuned model is better."""
    ties: int
    """Prompts on which the two differ by no more than the tie tolerance."""
    losses: int
    """Prompts on which the base model is better."""
    win_rate: float
    """(wins + ties / 2) / prompts, in [0, 1]; 0.5 says no difference."""
    low: float
    """Lower end of the interval of the win rate, in [0, 1]."""
    high: float
    """Upper end of the interval of the win rate, in [0, 1]."""
    confidence: float
    """Coverage the intervals aim at, in (0, 1), for example 0.95."""
    p_value: float
    """Exact two-sided sign test of "neither is better", in [0, 1]."""
    p_holm: float
    """`p_value` adjusted for the number of judges (`with_holm`); equal to it before that."""
    mean_difference: float
    """Mean over prompts of tuned minus base, in units of the judge; not oriented by `higher_is_better`."""
    mean_difference_low: float
    """Lower end of the interval of the mean difference."""
    mean_difference_high: float
    """Upper end of the interval of the mean difference."""
    mean_base: float
    """Mean score of the base model over prompts, in units of the judge."""
    mean_tuned: float
    """Mean score of the tuned model over prompts, in units of the judge."""


def judge_pairs(
    judge: str,
    base: np.ndarray,
    tuned: np.ndarray,
    prompt_ids: Sequence[str],
    higher_is_better: bool,
    held_out: bool,
    confidence: float = 0.95,
    tie_tolerance: float = 0.0,
) -> Verdict:
    """The verdict of one judge over paired images: position i of both sides is one prompt and one seed.

    `base`, `tuned`: scores, shape (n,), finite. `prompt_ids`: n ids; images with equal id are averaged on
    each side, so that each prompt counts once. `tie_tolerance`: largest |tuned - base| of a prompt that is
    still a tie, in units of the judge, >= 0. `p_holm` equals `p_value` here; `with_holm` adjusts it.
    Raises ValueError for lengths that differ, a NaN or infinite score, or fewer than two different prompts.
    """
    sides = _prompt_means(np.asarray(base), np.asarray(tuned), prompt_ids, judge)
    difference = sides[1] - sides[0]
    wins, ties, losses = _count(difference if higher_is_better else -difference, tie_tolerance)
    low, high = win_rate_interval(wins, ties, losses, confidence)
    mean_low, mean_high = mean_difference_interval(difference, confidence)
    p_value = sign_test(wins, losses)
    return Verdict(
        judge=judge, held_out=held_out, prompts=len(difference), wins=wins, ties=ties, losses=losses,
        win_rate=(wins + ties / 2) / len(difference), low=low, high=high, confidence=confidence, p_value=p_value,
        p_holm=p_value, mean_difference=float(difference.mean()), mean_difference_low=mean_low,
        mean_difference_high=mean_high, mean_base=float(sides[0].mean()), mean_tuned=float(sides[1].mean()),
    )  # fmt: skip


def with_holm(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """The same verdicts with `p_holm` adjusted over all of them by Holm's method."""
    adjusted = holm([verdict.p_value for verdict in verdicts])
    return [replace(verdict, p_holm=p) for verdict, p in zip(verdicts, adjusted, strict=True)]


def _count(goodness: np.ndarray, tie_tolerance: float) -> tuple[int, int, int]:
    if not tie_tolerance >= 0:
        raise ValueError(f"tie_tolerance must be >= 0, got {tie_tolerance}")
    wins, losses = int((goodness > tie_tolerance).sum()), int((goodness < -tie_tolerance).sum())
    return wins, len(goodness) - wins - losses, losses


def _prompt_means(base: np.ndarray, tuned: np.ndarray, prompt_ids: Sequence[str], judge: str) -> np.ndarray:
    """Mean score of each prompt on both sides, float64 (2, prompts); prompts in sorted order of their ids."""
    codes = _group_codes(base, tuned, prompt_ids, judge)
    counts = np.bincount(codes)
    if len(counts) < 2:
        raise ValueError(f"judge {judge!r}: needs at least two different prompts, got {len(counts)}")
    return np.stack([np.bincount(codes, side.astype(np.float64)) / counts for side in (base, tuned)])


def _group_codes(a: np.ndarray, b: np.ndarray, groups: Sequence[str], what: str) -> np.ndarray:
    """The group of each position as an integer 0, 1, ...; checks lengths and that every score is finite."""
    if a.ndim != 1 or a.shape != b.shape or len(groups) != len(a):
        raise ValueError(f"{what}: lengths differ: scores {a.shape} and {b.shape}, {len(groups)} ids")
    bad = np.flatnonzero(~(np.isfinite(a) & np.isfinite(b)))
    if len(bad):
        raise ValueError(f"{what}: scores at {bad[0]} ({groups[bad[0]]!r}) are {a[bad[0]]} and {b[bad[0]]}")
    return np.unique(np.asarray(groups), return_inverse=True)[1]
