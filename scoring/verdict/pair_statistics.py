"""How well orders agree over labelled pairs: three published conventions, and an interval that knows of prompts.

Pure functions of arrays. Orders are signed numbers: positive when image 0 is better, 0 for a tie.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from scoring.verdict.intervals import wilson_interval


def match(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """1 where two orders are alike (both a tie included), 0.5 where one of them is a tie, 0 where they are opposite.

    `first`, `second`: shape (n,), only their signs count. This is the scoring rule of PickScore's evaluation
    (calc_score in trainer/scripts/eval_preference_predictor.py of yuvalkirstain/PickScore).
    """
    alike: np.ndarray = 1 - np.abs(np.sign(first) - np.sign(second)) / 2
    return alike


def pickscore_accuracy(probability_0: np.ndarray, label_0: np.ndarray, threshold: float) -> float:
    """PickScore's accuracy over all pairs, ties included (Kirstain et al. 2023, arXiv:2305.01569, section 4).

    `probability_0`: P(image 0 preferred), in [0, 1]. `label_0`: 1, 0.5 or 0. A prediction with |p1 - p0| <=
    `threshold` is a tie; then see `match`. The paper chooses the threshold on a validation split; choosing it on the
    pairs that are judged flatters the scorer.
    """
    margin = 2 * np.asarray(probability_0) - 1
    predicted = np.where(np.abs(margin) <= threshold, 0.0, margin)
    return float(match(predicted, np.asarray(label_0) - 0.5).mean())


def hpdv2_accuracy(order: np.ndarray, label_0: np.ndarray, groups: Sequence[str]) -> float:
    """HPDv2's accuracy: 1 - inversions / pairs of a prompt, averaged over prompts (Wu et al. 2023, arXiv:2306.09341).

    An inversion is a decided pair that the scorer orders the other way; a tie among the labels is none, as in
    inversion_score (training/train.py of tgxs002/HPSv2). A tie of the scorer on a decided pair counts as an
    inversion here; the original breaks it by position, which may fall either way.
    """
    wrong = np.sign(order) * np.sign(np.asarray(label_0) - 0.5) <= 0
    inverted = (wrong & (np.asarray(label_0) != 0.5)).astype(np.float64)
    codes, counts = _codes(groups)
    return float(1 - (np.bincount(codes, inverted) / counts).mean())


def imagereward_accuracy(order: np.ndarray, label_0: np.ndarray) -> float:
    """ImageReward's accuracy: the share of decided pairs in the right order, a tie of the scorer counting as wrong.

    All pairs weigh the same (acc in test.py of THUDM/ImageReward). NaN without a decided pair.
    """
    truth = np.sign(np.asarray(label_0) - 0.5)
    right = np.sign(order) == truth
    return float(right[truth != 0].mean()) if (truth != 0).any() else math.nan


def clustered_interval(
    outcomes: np.ndarray, groups: Sequence[str], confidence: float = 0.95
) -> tuple[float, float, float]:
    """Mean of outcomes in [0, 1] and an interval (mean, low, high) for pairs that share prompts.

    Pairs of a prompt share images, often an annotator, and the same difficulty, so n pairs say less than n
    independent ones. The sandwich variance of a ratio over prompts, G / (G - 1) sum_g (sum of the residuals of g)^2 /
    n^2, is compared with the binomial one; their quotient is the number of independent pairs that these are worth
    (Kish's effective sample size, at most n), reduced by (z / t_(G-1))^2 for the G prompts the variance was estimated
    from (Korn and Graubard 1998, Survey Methodology 24:193-201). That number goes into Wilson's score interval, which
    stays inside [0, 1] and is not empty at 0 or 1, where a bootstrap over prompts would be; there a prompt counts as
    one pair. Deterministic. `groups`: n ids. Without any pair (nan, 0, 1), with one prompt (mean, 0, 1).
    """
    from scipy.special import ndtri, stdtrit

    values = np.asarray(outcomes, dtype=np.float64)
    if not len(values):
        return math.nan, 0.0, 1.0
    codes, counts = _codes(groups)
    mean = float(values.mean())
    if len(counts) == 1:
        return mean, 0.0, 1.0
    tail = 0.5 + confidence / 2
    worth = _worth(values, codes, counts) * (float(ndtri(tail)) / float(stdtrit(len(counts) - 1, tail))) ** 2
    total = max(1, int(worth))  # rounded down: a little too wide rather than too narrow
    return mean, *wilson_interval(mean * total, total, confidence)


def _worth(values: np.ndarray, codes: np.ndarray, counts: np.ndarray) -> float:
    """How many independent pairs give the variance that prompts of pairs have."""
    mean, prompts = values.mean(), len(counts)
    residuals = np.bincount(codes, values) - mean * counts
    variance = prompts / (prompts - 1) * float((residuals**2).sum()) / len(values) ** 2
    binomial = float(mean * (1 - mean))
    if binomial <= 0:
        return float(prompts)
    return min(float(len(values)), binomial / variance) if variance > 0 else float(len(values))


def _codes(groups: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """For each item the number of its group, and how many items each group has."""
    _, codes, counts = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    return codes, counts
