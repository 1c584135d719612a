"""What an expression makes of the raw scores of its scorers: for two candidates of a prompt, who is preferred.

Raw scores are never added: a PickScore near 20 and an HPSv2 near 0.27 have no common unit. Each scorer is first
measured in its own pooled within-prompt standard deviations over all prompts at hand (`margin_from_spread`), or
within the group. Pure numpy; knows nothing of images and files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from scoring.labels.expressions import ORDERS, Expression, Leaf
from scoring.labels.pairing import margin_from_spread
from scoring.labels.soft_labels import fit_scale, preference_probability
from scoring.scorers.scorer import ScorerInfo

NOISE = 1e-9
"""Differences of combined scores below this many deviations are float noise of exact ties."""


@dataclass(frozen=True)
class Order:
    """Who is preferred to whom among the candidates of each prompt."""

    parts: np.ndarray
    """float64 (scorers, prompts, k): larger is better. One part: its differences are the margins. Several: parts
    in their own deviations, that `rule` makes one margin of."""
    rule: str
    """"single", "agree" or "pareto"."""
    spread: float
    """The pooled within-prompt standard deviation in which margins are counted; 1 where parts have been divided."""
    unit: str
    """Unit of the margins: the scorer's for one scorer alone, else "sd"."""

    def margins(self, prompt: int) -> np.ndarray:
        """(k, k) margins of one prompt: entry (i, j) > 0 says that i is preferred to j by so much.

        Antisymmetric; 0 = a tie, or no preference.
        """
        values = self.parts[:, prompt]
        differences = values[:, :, None] - values[:, None, :]
        if self.rule == "single":
            margins: np.ndarray = differences[0]
            return margins if self.unit != "sd" else _without_noise(margins)
        return _agreed(differences) if self.rule == "agree" else _dominated(differences)

    def prompts(self) -> int:
        return int(self.parts.shape[1])


def order(expression: Expression, scores: Mapping[str, np.ndarray], infos: Mapping[str, ScorerInfo]) -> Order:
    """Applies an expression to groups of candidates.

    `scores`: by scorer as the expression writes it, shape (prompts >= 1, k >= 2), finite; `infos` likewise. One
    scorer alone keeps its unit. The combinations:

    - mean: weighted mean of scores in pooled within-prompt deviations.
    - z: weighted mean of scores standardised within each group (deviation over k, as GRPO does); with k = 2 a vote.
    - rank: weighted mean of ranks within each group as the share of the others beaten, ties averaged (Borda).
    - agree: i is preferred where all do so; the margin is the smallest one, in deviations.
    - pareto: i is preferred where none objects and one is for it (dominance, as in CaPO, arXiv:2502.02588); the
      margin is the mean one, in deviations.

    Raises ValueError for shapes that differ and what `margin_from_spread` refuses.
    """
    sizes = {name: np.shape(values) for name, values in scores.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"scores of one expression must have one shape, got {sizes}")
    if isinstance(expression, Leaf):
        values = _oriented(expression, scores, infos)
        return Order(values[None], "single", margin_from_spread(values), infos[str(expression)].unit)
    if expression.kind not in ORDERS:
        values = _values(expression, scores, infos)
        return Order(values[None], "single", margin_from_spread(values), "sd")
    parts = [_in_deviations(_values(term, scores, infos)) for term in expression.terms]
    return Order(np.stack(parts), expression.kind, 1.0, "sd")


def _oriented(leaf: Leaf, scores: Mapping[str, np.ndarray], infos: Mapping[str, ScorerInfo]) -> np.ndarray:
    values = np.asarray(scores[str(leaf)], dtype=np.float64)
    return values if infos[str(leaf)].higher_is_better else -values


def _values(expression: Expression, scores: Mapping[str, np.ndarray], infos: Mapping[str, ScorerInfo]) -> np.ndarray:
    """(prompts, k) numbers of an expression that gives such, larger is better."""
    if isinstance(expression, Leaf):
        return _oriented(expression, scores, infos)
    common = {"mean": _in_deviations, "z": _standardised, "rank": _ranked}[expression.kind]
    terms = [common(_values(term, scores, infos)) for term in expression.terms]
    weighted: np.ndarray = np.average(terms, axis=0, weights=expression.weights)
    return weighted


def _in_deviations(values: np.ndarray) -> np.ndarray:
    """Divided by the pooled within-prompt deviation; a scorer that ties everywhere has no say."""
    spread = margin_from_spread(values)
    return values / spread if spread > 0 else np.zeros_like(values)


def _standardised(values: np.ndarray) -> np.ndarray:
    centred = values - values.mean(axis=1, keepdims=True)
    deviation = centred.std(axis=1, keepdims=True)
    standard: np.ndarray = np.divide(centred, deviation, out=np.zeros_like(centred), where=deviation > 0)
    return standard


def _ranked(values: np.ndarray) -> np.ndarray:
    """The share of the other candidates that each one beats, in [0, 1]."""
    from scipy.stats import rankdata  # seconds to import, and only orders by rank need it

    beaten: np.ndarray = (rankdata(values, axis=1) - 1) / (values.shape[1] - 1)
    return beaten


def _without_noise(margins: np.ndarray) -> np.ndarray:
    return np.where(np.abs(margins) < NOISE, 0.0, margins)


def _agreed(differences: np.ndarray) -> np.ndarray:
    """(scorers, k, k) -> the smallest margin where all point one way, else 0."""
    signs = np.sign(_without_noise(differences))
    same = np.abs(signs.sum(axis=0)) == len(signs)
    margins: np.ndarray = np.where(same, signs[0] * np.abs(differences).min(axis=0), 0.0)
    return margins


def _dominated(differences: np.ndarray) -> np.ndarray:
    """(scorers, k, k) -> the mean margin where no two point against each other, else 0."""
    signs = np.sign(_without_noise(differences))
    contested = (signs.max(axis=0) > 0) & (signs.min(axis=0) < 0)
    margins: np.ndarray = np.where(contested, 0.0, _without_noise(differences.mean(axis=0)))
    return margins


def winner_probabilities(
    expression: Expression,
    winners: np.ndarray,
    losers: np.ndarray,
    scores: Mapping[str, np.ndarray],
    infos: Mapping[str, ScorerInfo],
    margins: np.ndarray,
) -> np.ndarray | None:
    """P(winner is preferred) of each pair, float64 (pairs,); None when a scorer's `preference_scale` is not known.

    `winners`, `losers`: (pairs, 2) of prompt and position. `margins`: (pairs,), those of the pairs. One scorer
    alone: sigmoid(preference_scale * difference), PickScore's softmax over two images among them. A combination has
    no scale of its own: one is fitted so that sigmoid(scale * margin) comes closest, in cross-entropy, to the
    weighted mean of what its scorers say, so that a larger margin is always a surer preference.
    """
    shares = _shares(expression)
    scales = {name: infos[name].preference_scale for name in shares}
    if not len(winners) or any(scale is None for scale in scales.values()):
        return None
    said = np.zeros(len(winners))
    for name, share in shares.items():
        values = np.asarray(scores[name], dtype=np.float64)
        difference = values[tuple(winners.T)] - values[tuple(losers.T)]
        said += share * preference_probability(difference, scales[name] or 0.0)
    return said if isinstance(expression, Leaf) else preference_probability(margins, fit_scale(margins, said))


def _shares(expression: Expression) -> dict[str, float]:
    """The weight of each scorer in an expression; they add up to 1."""
    if isinstance(expression, Leaf):
        return {str(expression): 1.0}
    shares: dict[str, float] = {}
    for weight, term in zip(expression.weights, expression.terms, strict=True):
        for name, share in _shares(term).items():
            shares[name] = shares.get(name, 0.0) + weight / sum(expression.weights) * share
    return shares
