"""Turns the scores of the candidates of one prompt into preference pairs.

Pure numpy. Knows nothing of images, scorers or files: a group is the array of scores of one prompt's
candidates, and a pair names two of its positions. Scores are comparable only inside a group, so no function
compares two groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Pair:
    """One preference inside a group of candidates."""

    winner: int
    """Position of the preferred candidate in its group."""
    loser: int
    """Position of the other candidate in its group."""
    margin: float
    """How much better the winner is, in units of the scorer; > 0, also when lower scores are better."""


PairingRule = Callable[[np.ndarray, bool, float], list[Pair]]


def best_vs_worst(scores: np.ndarray, higher_is_better: bool, min_margin: float) -> Pair | None:
    """The best candidate against the worst one; of equal candidates the lowest position is taken.

    `scores`: shape (k,), k >= 1, finite. `min_margin`: smallest margin kept (inclusive), in units of the
    scorer, >= 0. Returns None when all candidates tie (so for k = 1) or when the margin is below
    `min_margin`.
    Raises ValueError for an empty group, another shape, a NaN or infinite score, or a negative `min_margin`.
    """
    goodness = _goodness(scores, higher_is_better, min_margin)
    pair = _pair(goodness, int(goodness.argmax()), int(goodness.argmin()))
    return pair if pair.margin > 0 and pair.margin >= min_margin else None


def all_pairs(scores: np.ndarray, higher_is_better: bool, min_margin: float) -> list[Pair]:
    """Every two candidates that differ, ordered by the lower position and then by the higher one.

    Arguments and errors as for `best_vs_worst`. Tied candidates make no pair; at most k (k - 1) / 2 pairs
    come back.
    """
    goodness = _goodness(scores, higher_is_better, min_margin)
    first, second = np.triu_indices(len(goodness), 1)
    swap = goodness[first] < goodness[second]
    winners, losers = np.where(swap, second, first), np.where(swap, first, second)
    pairs = (_pair(goodness, int(w), int(b)) for w, b in zip(winners, losers, strict=True))
    return [pair for pair in pairs if pair.margin > 0 and pair.margin >= min_margin]


def margin_from_spread(groups: np.ndarray) -> float:
    """The pooled within-prompt standard deviation: a unit in which margins of all scorers mean the same.

    `groups`: shape (prompts, k), k >= 2, finite. Returns sqrt(sum_ij (x_ij - mean_i)^2 / (prompts (k - 1))),
    the root of the within-group mean square of a one-way analysis of variance; differences between prompts do
    not enter.
    Raises ValueError for another shape, fewer than two candidates a prompt, or a NaN or infinite score.
    """
    values = np.asarray(groups, dtype=np.float64)
    if values.ndim != 2 or values.shape[0] < 1 or values.shape[1] < 2:
        raise ValueError(f"groups must have shape (prompts >= 1, candidates >= 2), got {values.shape}")
    _refuse_non_finite(values)
    return float(np.sqrt(values.var(axis=1, ddof=1).mean()))


def pair_groups(scores: np.ndarray, rule: str, higher_is_better: bool, min_margin_sd: float) -> list[list[Pair]]:
    """Applies a rule to every prompt, with one smallest margin for all of them.

    `scores`: shape (prompts, k). `rule`: a key of `RULES`. `min_margin_sd`: smallest margin in units of the
    pooled within-prompt standard deviation of `scores`, >= 0; 0 keeps every pair that is no tie. Returns one
    list a prompt, empty where nothing qualifies. The choice of pairs does not change when a scorer is shifted
    or rescaled.
    Raises ValueError for an unknown rule and for what `margin_from_spread` and the rules refuse.
    """
    if rule not in RULES:
        raise ValueError(f"unknown pairing rule {rule!r}; known rules: {', '.join(sorted(RULES))}")
    if not 0 <= min_margin_sd < np.inf:
        raise ValueError(f"min_margin_sd must be a finite number >= 0, got {min_margin_sd}")
    min_margin = min_margin_sd * margin_from_spread(scores)
    return [RULES[rule](group, higher_is_better, min_margin) for group in np.asarray(scores)]


def _best_vs_worst_list(scores: np.ndarray, higher_is_better: bool, min_margin: float) -> list[Pair]:
    """`best_vs_worst` in the signature that all rules share: zero pairs or one."""
    pair = best_vs_worst(scores, higher_is_better, min_margin)
    return [] if pair is None else [pair]


def _goodness(scores: np.ndarray, higher_is_better: bool, min_margin: float) -> np.ndarray:
    """The scores as float64, oriented so that larger is better; refuses what no rule can order."""
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"scores of a group must have shape (candidates >= 1,), got {values.shape}")
    if not min_margin >= 0:
        raise ValueError(f"min_margin must be >= 0, got {min_margin}")
    _refuse_non_finite(values)
    return values if higher_is_better else -values


def _pair(goodness: np.ndarray, winner: int, loser: int) -> Pair:
    return Pair(winner, loser, float(goodness[winner] - goodness[loser]))


def _refuse_non_finite(values: np.ndarray) -> None:
    # NaN compares false with everything, so argmax and argmin would silently make a preference out of it.
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        where = tuple(int(i) for i in bad[0])
        raise ValueError(f"score at {where} is {values[where]}; a group with such a score cannot be ordered")


RULES: dict[str, PairingRule] = {"best-vs-worst": _best_vs_worst_list, "all-pairs": all_pairs}
