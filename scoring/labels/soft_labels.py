"""From a difference of scores to the probability of a preference, and the scale between the two fitted to labels.

The model is that of Bradley and Terry (1952), Biometrika 39:324-345, with scores as log strengths: image a is
preferred to image b with probability sigmoid(scale * (score_a - score_b)). Pure functions of arrays.
"""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import ArrayLike

log = logging.getLogger(__name__)


def preference_probability(difference: ArrayLike, scale: float) -> np.ndarray:
    """P(a preferred to b) = sigmoid(scale * difference), float64, in [0, 1], of the shape of `difference`.

    `difference`: score of a minus score of b, in units of the scorer. `scale`: `ScorerInfo.preference_scale`, per
    unit of the scorer; negative for a scorer whose lower score is better.
    """
    from scipy.special import expit

    probability: np.ndarray = expit(scale * np.asarray(difference, dtype=np.float64))
    return probability


def log_loss(differences: ArrayLike, labels: ArrayLike, scale: float) -> float:
    """Mean negative log-likelihood (nats a pair) of the labels under sigmoid(scale * difference); chance is log 2.

    Arguments and errors as for `fit_scale`. A label y in (0, 1) costs -y log p - (1 - y) log (1 - p), whose smallest
    value is not 0 but the entropy of y: log 2 for a tie.
    """
    from scipy.special import log_expit

    difference, label = _checked(differences, labels)
    logit = scale * difference
    return float(-(label * log_expit(logit) + (1 - label) * log_expit(-logit)).mean())


def fit_scale(differences: ArrayLike, labels: ArrayLike) -> float:
    """The scale that makes the labels most likely under P(a preferred) = sigmoid(scale * difference).

    `differences`: score of a minus score of b, shape (n,), n >= 1, finite. `labels`: shape (n,), in [0, 1]: 1 when a
    was preferred, 0 when b, 0.5 for a tie. The log-likelihood is concave in the scale, so its maximum is where
    sum(difference * (label - sigmoid(scale * difference))) is 0. The result is negative when the labels go against
    the differences. Two cases have no maximum, are answered all the same, and logged as a warning:

    - Every difference is 0: the labels say nothing about the scale, and 0 is returned.
    - Every pair that differs is decided, and all in the same direction of the score: any larger scale is more likely.
      Returned is +-log(n + 1) / median |difference| over the n pairs that differ, at which the median pair has the
      probability (n + 1) / (n + 2) that Laplace's rule of succession gives to what happened n times out of n.

    Raises ValueError for other shapes, no pair, a NaN or infinite difference, or a label outside [0, 1].
    """
    difference, label = _checked(differences, labels)
    differs = difference != 0
    difference, label = difference[differs], label[differs]
    if not len(difference):
        log.warning("all differences of scores are 0: no scale can be fitted, 0 is used")
        return 0.0
    if _separable(difference, label):
        side = 1.0 if label[0] * 2 - 1 == np.sign(difference[0]) else -1.0
        scale = side * float(np.log(len(difference) + 1) / np.median(np.abs(difference)))
        log.warning("the scorer orders all %d labelled pairs alike: the scale is capped at %g", len(label), scale)
        return scale
    return _maximum(difference, label)


def _separable(difference: np.ndarray, label: np.ndarray) -> bool:
    """Whether a larger scale always explains the labels better; all differences are non-zero."""
    direction = np.sign(difference) * (2 * label - 1)
    return bool((direction == 1).all() or (direction == -1).all())


def _maximum(difference: np.ndarray, label: np.ndarray) -> float:
    """The root of the slope of the log-likelihood, of which there is exactly one."""
    from scipy.optimize import brentq

    unit = float(np.median(np.abs(difference)))
    scaled = difference / unit  # so that the search starts at the right order of magnitude

    def slope(scale: float) -> float:
        return float((scaled * (label - preference_probability(scaled, scale))).mean())

    bound = 1.0
    while slope(bound) > 0 or slope(-bound) < 0:
        bound *= 2
    return float(brentq(slope, -bound, bound, xtol=1e-12, rtol=1e-12)) / unit


def _checked(differences: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    difference, label = np.asarray(differences, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    if difference.ndim != 1 or difference.shape != label.shape or not len(label):
        raise ValueError(f"need one label a difference, at least one, got {difference.shape} and {label.shape}")
    if not np.isfinite(difference).all():
        raise ValueError(f"difference {int(np.flatnonzero(~np.isfinite(difference))[0])} is not finite")
    if not ((label >= 0) & (label <= 1)).all():
        raise ValueError(f"labels must lie in [0, 1], got {label.min()} to {label.max()}")
    return difference, label
