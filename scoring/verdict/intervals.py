"""Intervals and tests that a verdict is made of: win rate, proportion, mean difference, sign test, Holm.

Pure functions of counts and numbers. Knows nothing of judges, prompts or models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def win_rate_interval(wins: int, ties: int, losses: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval (low, high) of the win rate (W + T/2) / N, inside [0, 1] and containing the point estimate.

    The win rate is (1 + delta) / 2 with delta = (W - L) / N, a difference of two paired proportions; its
    interval is the score interval of Tango (1998), Statistics in Medicine 17:891-908: all delta that the
    score test does not reject. Without ties it equals Wilson's interval, with ties only it is 1/2 (1 -+ z^2 /
    (N + z^2)).
    Raises ValueError for negative counts, no prompt at all, or a confidence outside (0, 1).
    """
    if min(wins, ties, losses) < 0 or wins + ties + losses < 1:
        raise ValueError(f"need counts >= 0 of at least one prompt, got {wins=}, {ties=}, {losses=}")
    total, z = wins + ties + losses, _normal_quantile(confidence)
    low = -_upper_difference(losses, wins, total, z)
    high = _upper_difference(wins, losses, total, z)
    return (1 + low) / 2, (1 + high) / 2


def tango_statistic(delta: float, wins: int, losses: int, total: int) -> tuple[float, float]:
    """Numerator and variance of the score statistic of "the true difference is delta", delta in [-1, 1].

    Tango (1998): with q the maximum-likelihood probability of a loss under that hypothesis, the larger root
    of A q^2 + B q + C = 0 with A = 2N, B = -W - L + (2N - W + L) delta, C = -L delta (1 - delta), the
    statistic (W - L - N delta) / sqrt(N (2q + delta (1 - delta))) is about standard normal. The variance is 0
    at the edges of the parameter space, so the two parts come back separately.
    """
    b = -wins - losses + (2 * total - wins + losses) * delta
    c = -losses * delta * (1 - delta)
    q = (math.sqrt(max(b * b - 8 * total * c, 0.0)) - b) / (4 * total)
    return wins - losses - total * delta, max(total * (2 * q + delta * (1 - delta)), 0.0)


def _upper_difference(wins: int, losses: int, total: int, z: float) -> float:
    """The largest delta in [-1, 1] that the score test with normal quantile z does not reject."""

    def accepted(delta: float) -> bool:
        numerator, variance = tango_statistic(delta, wins, losses, total)
        return numerator >= -z * math.sqrt(variance)

    # The statistic falls with delta, so what is accepted is one interval that begins at the estimate or below
    # it.
    low, high = (wins - losses) / total, 1.0
    if accepted(high):
        return high
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if accepted(middle) else (low, middle)
    return low


def wilson_interval(successes: float, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927, J. Am. Stat. Assoc. 22:209-212), inside [0, 1].

    `successes` may be fractional (half a success for a tie). Returns (0, 1) when `total` is 0: nothing is
    known.
    """
    if total == 0:
        return 0.0, 1.0
    z, rate = _normal_quantile(confidence), successes / total
    shrink = 1 + z * z / total
    centre = (rate + z * z / (2 * total)) / shrink
    half = z / shrink * math.sqrt(rate * (1 - rate) / total + z * z / (4 * total * total))
    return max(0.0, min(rate, centre - half)), min(1.0, max(rate, centre + half))


def sign_test(wins: int, losses: int) -> float:
    """Exact two-sided p-value of the sign test: if neither is better, wins are Binomial(wins + losses, 1/2).

    Ties carry no information about the direction and are dropped; without any win or loss the p-value is 1.
    Twice the smaller tail, at most 1 (Conover, Practical Nonparametric Statistics, section 3.4).
    Raises ValueError for negative counts.
    """
    from scipy.special import bdtr

    if min(wins, losses) < 0:
        raise ValueError(f"counts must be >= 0, got {wins=}, {losses=}")
    return min(1.0, 2 * float(bdtr(min(wins, losses), wins + losses, 0.5)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Step-down adjusted p-values of Holm (1979), Scand. J. Statist. 6:65-70, in the order given.

    The i-th smallest (i = 0 first) of m becomes the maximum over j <= i of (m - j) p_(j), at most 1.
    Rejecting what is at most alpha keeps the chance of any false rejection below alpha, whatever the
    dependence between the judges.
    Raises ValueError for a value outside [0, 1].
    """
    p = np.asarray(p_values, dtype=np.float64)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p-values must lie in [0, 1], got {list(p_values)}")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return [float(value) for value in adjusted]


def mean_difference_interval(differences: Sequence[float] | np.ndarray, confidence: float) -> tuple[float, float]:
    """Student's t interval (low, high) of a mean of paired differences: mean -+ t_(n-1) s / sqrt(n).

    `differences`: shape (n,), n >= 2, one a prompt. Equal differences give an interval of width 0.
    Raises ValueError for fewer than two differences or a confidence outside (0, 1).
    """
    from scipy.special import stdtrit

    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"an interval needs at least two differences, got shape {values.shape}")
    t = float(stdtrit(len(values) - 1, 0.5 + _checked(confidence) / 2))
    half = t * float(values.std(ddof=1)) / math.sqrt(len(values))
    mean = float(values.mean())
    return mean - half, mean + half


def _checked(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}")
    return confidence


def _normal_quantile(confidence: float) -> float:
    """z with P(|Z| <= z) = confidence for a standard normal Z."""
    from scipy.special import ndtri

    return float(ndtri(0.5 + _checked(confidence) / 2))
