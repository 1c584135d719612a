"""Turns preferences among the candidates of one prompt into preference pairs.

Pure numpy. Knows nothing of images, scorers or files: a group is the matrix of margins between one prompt's
candidates (`combine` makes it out of scores), and a pair names two of their positions. Scores are comparable only
inside a group, so no function compares two groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
    """How much better the winner is, in the unit of the margins; > 0, also when lower scores are better."""


PairingRule = Callable[[np.ndarray, float], list[Pair]]


def best_vs_worst(margins: np.ndarray, min_margin: float) -> list[Pair]:
    """The pair with the largest margin: of one scorer, its best candidate against its worst one.

    `margins`: shape (k, k), finite, antisymmetric; entry (i, j) > 0 says that candidate i is preferred to j by so
    much. `min_margin`: smallest margin kept (inclusive), >= 0, in the unit of the margins. Of equal margins the
    winner with the lowest position is taken, then the loser with the lowest. Returns no pair when nothing is
    preferred, or not by `min_margin`.
    Raises ValueError for another shape, a NaN or infinite margin, or a negative `min_margin`.
    """
    _check(margins, min_margin)
    winner, loser = (int(i) for i in np.unravel_index(np.argmax(margins), margins.shape))
    pair = Pair(winner, loser, float(margins[winner, loser]))
    return [pair] if pair.margin > 0 and pair.margin >= min_margin else []


def all_pairs(margins: np.ndarray, min_margin: float) -> list[Pair]:
    """Every two candidates with a preference, ordered by the lower position and then by the higher one.

    Arguments and errors as for `best_vs_worst`. At most k (k - 1) / 2 pairs come back.
    """
    _check(margins, min_margin)
    first, second = np.triu_indices(len(margins), 1)
    values = margins[first, second]
    winners, losers = np.where(values < 0, second, first), np.where(values < 0, first, second)
    kept = (values != 0) & (np.abs(values) >= min_margin)
    found = zip(winners[kept], losers[kept], np.abs(values[kept]), strict=True)
    return [Pair(int(winner), int(loser), float(margin)) for winner, loser, margin in found]


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


def pair_groups(margins: Iterable[np.ndarray], spread: float, rule: str, min_margin_sd: float) -> list[list[Pair]]:
    """Applies a rule to every prompt, with one smallest margin for all of them.

    `margins`: one (k, k) a prompt. `spread`: the pooled within-prompt standard deviation behind them, > 0 or, if
    nothing differs, 0. `rule`: a key of `RULES`. `min_margin_sd`: smallest margin in units of `spread`, >= 0; 0
    keeps every pair that is no tie. Returns one list a prompt, empty where nothing qualifies. The choice of pairs
    does not change when a scorer is shifted or rescaled.
    Raises ValueError for an unknown rule and for what the rules refuse.
    """
    if rule not in RULES:
        raise ValueError(f"unknown pairing rule {rule!r}; known rules: {', '.join(sorted(RULES))}")
    if not 0 <= min_margin_sd < np.inf:
        raise ValueError(f"min_margin_sd must be a finite number >= 0, got {min_margin_sd}")
    return [RULES[rule](group, min_margin_sd * spread) for group in margins]


def _check(margins: np.ndarray, min_margin: float) -> None:
    if margins.ndim != 2 or margins.shape[0] != margins.shape[1] or not len(margins):
        raise ValueError(f"margins of a group must have shape (k >= 1, k), got {margins.shape}")
    if not min_margin >= 0:
        raise ValueError(f"min_margin must be >= 0, got {min_margin}")
    _refuse_non_finite(margins)


def _refuse_non_finite(values: np.ndarray) -> None:
    # NaN compares false with everything, so argmax would silently make a preference out of it.
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        where = tuple(int(i) for i in bad[0])
        raise ValueError(f"score at {where} is {values[where]}; a group with such a score cannot be ordered")


RULES: dict[str, PairingRule] = {"best-vs-worst": best_vs_worst, "all-pairs": all_pairs}
