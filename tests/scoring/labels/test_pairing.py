"""Pairing rules against direct evaluation of their definition."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scoring.labels.pairing import RULES, Pair, all_pairs, best_vs_worst, margin_from_spread, pair_groups

# Few distinct values, so that ties are common; multiples of 1/4, so that differences are exact.
VALUES = st.integers(-6, 6).map(lambda n: n / 4)
GROUPS = st.lists(VALUES, min_size=1, max_size=6).map(np.array)
MARGINS = st.integers(0, 8).map(lambda n: n / 4)


def between(scores: np.ndarray) -> np.ndarray:
    """The margins of one scorer: entry (i, j) is score i minus score j."""
    return np.subtract.outer(scores, scores)


def test_best_vs_worst_takes_the_lowest_position_among_equals() -> None:
    """Best 3 at positions 1 and 3, worst 0 at positions 2 and 4: the pair is (1, 2) with margin 3 - 0."""
    scores = np.array([1.0, 3.0, 0.0, 3.0, 0.0])
    assert best_vs_worst(between(scores), 0.0) == [Pair(1, 2, 3.0)]
    assert best_vs_worst(between(-scores), 0.0) == [Pair(2, 1, 3.0)]


@pytest.mark.parametrize("scores", [[2.0], [2.0, 2.0, 2.0]])
@pytest.mark.parametrize("rule", RULES)
def test_nothing_to_choose_makes_no_pair(scores: list[float], rule: str) -> None:
    assert RULES[rule](between(np.array(scores)), 0.0) == []


def test_min_margin_is_inclusive() -> None:
    margins = between(np.array([0.0, 0.5]))
    assert best_vs_worst(margins, 0.5) == [Pair(1, 0, 0.5)]
    assert best_vs_worst(margins, np.nextafter(0.5, 1)) == []
    assert all_pairs(margins, np.nextafter(0.5, 1)) == []


@given(GROUPS, MARGINS)
def test_all_pairs_is_every_ordered_pair_that_qualifies(scores: np.ndarray, margin: float) -> None:
    k = len(scores)
    expected = {
        (w, b, scores[w] - scores[b])
        for w in range(k)
        for b in range(k)
        if scores[w] > scores[b] and scores[w] - scores[b] >= margin
    }
    pairs = all_pairs(between(scores), margin)
    assert {(p.winner, p.loser, p.margin) for p in pairs} == expected
    assert len(pairs) == len(expected)


@given(GROUPS, MARGINS)
def test_best_vs_worst_has_the_largest_margin_of_all_pairs(scores: np.ndarray, margin: float) -> None:
    best, every = best_vs_worst(between(scores), margin), all_pairs(between(scores), margin)
    assert bool(best) == bool(every)
    if best:
        assert best[0] in every
        assert best[0].margin == max(pair.margin for pair in every) == np.ptp(scores)


def test_a_preference_that_no_single_score_could_give() -> None:
    """0 over 1 over 2, and none between 0 and 2, as `agree` may say: the strongest of the two is taken."""
    margins = np.array([[0.0, 1.0, 0.0], [-1.0, 0.0, 2.0], [0.0, -2.0, 0.0]])
    assert best_vs_worst(margins, 0.0) == [Pair(1, 2, 2.0)]
    assert all_pairs(margins, 0.0) == [Pair(0, 1, 1.0), Pair(1, 2, 2.0)]


def test_spread_by_hand() -> None:
    """Groups (0, 2) and (10, 16): squares 1 + 1 and 9 + 9, pooled sqrt(20 / (2 * 1)) = sqrt(10)."""
    assert margin_from_spread(np.array([[0.0, 2.0], [10.0, 16.0]])) == pytest.approx(np.sqrt(10))


def test_spread_ignores_differences_between_prompts() -> None:
    scores = np.random.default_rng(0).normal(size=(50, 4))
    shifted = scores + 1000 * np.arange(50)[:, None]
    assert margin_from_spread(shifted) == pytest.approx(margin_from_spread(scores), rel=1e-9)
    assert np.std(shifted) > 1000 * margin_from_spread(shifted)


def test_pair_groups_measures_the_margin_in_the_given_spread() -> None:
    groups = [between(np.array([0.0, 2.0])), between(np.array([0.0, 6.0]))]
    assert pair_groups(groups, 3.0, "best-vs-worst", 1.0) == [[], [Pair(1, 0, 6.0)]]
    assert pair_groups(groups, 3.0, "best-vs-worst", 0.0) == [[Pair(1, 0, 2.0)], [Pair(1, 0, 6.0)]]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_cannot_be_ordered_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match=r"score at \(0, 1\) is"):
        best_vs_worst(np.array([[0.0, bad], [-bad, 0.0]]), 0.0)
    with pytest.raises(ValueError, match=r"score at \(0, 1\) is"):
        margin_from_spread(np.array([[0.0, bad]]))


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="known rules: all-pairs, best-vs-worst"):
        pair_groups([np.zeros((2, 2))], 1.0, "worst-vs-best", 0.0)
    with pytest.raises(ValueError, match="min_margin must be >= 0, got -1"):
        best_vs_worst(np.zeros((2, 2)), -1)
    with pytest.raises(ValueError, match="min_margin_sd must be a finite number >= 0, got nan"):
        pair_groups([np.zeros((2, 2))], 1.0, "all-pairs", float("nan"))
    with pytest.raises(ValueError, match=r"got \(2, 1\)"):
        margin_from_spread(np.zeros((2, 1)))
    with pytest.raises(ValueError, match=r"got \(2, 3\)"):
        all_pairs(np.zeros((2, 3)), 0.0)
