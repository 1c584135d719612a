"""Pairing rules against direct evaluation of their definition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scoring.pairing import RULES, Pair, all_pairs, best_vs_worst, margin_from_spread, pair_groups

# Few distinct values, so that ties are common; multiples of 1/4, so that differences are exact.
VALUES = st.integers(-6, 6).map(lambda n: n / 4)
GROUPS = st.lists(VALUES, min_size=1, max_size=6).map(np.array)
MARGINS = st.integers(0, 8).map(lambda n: n / 4)


def test_best_vs_worst_takes_the_lowest_position_among_equals() -> None:
    """Best 3 at positions 1 and 3, worst 0 at positions 2 and 4: the pair is (1, 2) with margin 3 - 0."""
    scores = np.array([1.0, 3.0, 0.0, 3.0, 0.0])
    assert best_vs_worst(scores, True, 0.0) == Pair(1, 2, 3.0)
    assert best_vs_worst(scores, False, 0.0) == Pair(2, 1, 3.0)


@pytest.mark.parametrize("scores", [[2.0], [2.0, 2.0, 2.0]])
@pytest.mark.parametrize("rule", RULES)
def test_nothing_to_choose_makes_no_pair(scores: list[float], rule: str) -> None:
    assert RULES[rule](np.array(scores), True, 0.0) == []
    assert best_vs_worst(np.array(scores), True, 0.0) is None


def test_min_margin_is_inclusive() -> None:
    scores = np.array([0.0, 0.5])
    assert best_vs_worst(scores, True, 0.5) == Pair(1, 0, 0.5)
    assert best_vs_worst(scores, True, np.nextafter(0.5, 1)) is None
    assert all_pairs(scores, True, np.nextafter(0.5, 1)) == []


@given(GROUPS, st.booleans(), MARGINS)
def test_all_pairs_is_every_ordered_pair_that_qualifies(scores: np.ndarray, higher: bool, margin: float) -> None:
    k, sign = len(scores), 1 if higher else -1
    expected = {
        (w, b, sign * (scores[w] - scores[b]))
        for w in range(k)
        for b in range(k)
        if sign * (scores[w] - scores[b]) > 0 and sign * (scores[w] - scores[b]) >= margin
    }
    pairs = all_pairs(scores, higher, margin)
    assert {(p.winner, p.loser, p.margin) for p in pairs} == expected
    assert len(pairs) == len(expected)


@given(GROUPS, st.booleans(), MARGINS)
def test_best_vs_worst_has_the_largest_margin_of_all_pairs(scores: np.ndarray, higher: bool, margin: float) -> None:
    best, every = best_vs_worst(scores, higher, margin), all_pairs(scores, higher, margin)
    assert (best is None) == (not every)
    if best is not None:
        assert best in every
        assert best.margin == max(pair.margin for pair in every) == np.ptp(scores)


@given(GROUPS, MARGINS, st.sampled_from(sorted(RULES)))
def test_lower_is_better_equals_negated_scores(scores: np.ndarray, margin: float, rule: str) -> None:
    assert RULES[rule](scores, False, margin) == RULES[rule](-scores, True, margin)


def test_spread_by_hand() -> None:
    """Groups (0, 2) and (10, 16): squares 1 + 1 and 9 + 9, pooled sqrt(20 / (2 * 1)) = sqrt(10)."""
    assert margin_from_spread(np.array([[0.0, 2.0], [10.0, 16.0]])) == pytest.approx(np.sqrt(10))


def test_spread_ignores_differences_between_prompts() -> None:
    scores = np.random.default_rng(0).normal(size=(50, 4))
    shifted = scores + 1000 * np.arange(50)[:, None]
    assert margin_from_spread(shifted) == pytest.approx(margin_from_spread(scores), rel=1e-9)
    assert np.std(shifted) > 1000 * margin_from_spread(shifted)


@settings(max_examples=50)
@given(
    st.lists(st.lists(VALUES, min_size=3, max_size=3), min_size=1, max_size=5).map(np.array),
    st.sampled_from(sorted(RULES)), st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.sampled_from([0.25, 4.0, 64.0]),
)  # fmt: skip
def test_pairs_do_not_depend_on_the_unit_of_the_scorer(
    scores: np.ndarray, rule: str, margin_sd: float, scale: float
) -> None:
    """Powers of two scale floats exactly, so even the inclusive threshold must fall on the same side."""
    before = pair_groups(scores, rule, True, margin_sd)
    after = pair_groups(scores * scale, rule, True, margin_sd)
    assert [[Pair(p.winner, p.loser, p.margin * scale) for p in group] for group in before] == after


def test_pair_groups_measures_the_margin_in_pooled_deviations() -> None:
    """Spread of (0, 2) and (0, 6) is sqrt((2 + 18) / 2) = 3.16: at 1 sd only the second is clear."""
    scores = np.array([[0.0, 2.0], [0.0, 6.0]])
    assert pair_groups(scores, "best-vs-worst", True, 1.0) == [[], [Pair(1, 0, 6.0)]]
    assert pair_groups(scores, "best-vs-worst", True, 0.0) == [[Pair(1, 0, 2.0)], [Pair(1, 0, 6.0)]]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_cannot_be_ordered_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match=r"score at \(1,\) is"):
        best_vs_worst(np.array([0.0, bad]), True, 0.0)
    with pytest.raises(ValueError, match=r"score at \(0, 1\) is"):
        pair_groups(np.array([[0.0, bad]]), "all-pairs", True, 0.0)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="known rules: all-pairs, best-vs-worst"):
        pair_groups(np.zeros((1, 2)), "worst-vs-best", True, 0.0)
    with pytest.raises(ValueError, match="min_margin must be >= 0, got -1"):
        best_vs_worst(np.zeros(2), True, -1)
    with pytest.raises(ValueError, match="min_margin_sd must be a finite number >= 0, got nan"):
        pair_groups(np.zeros((1, 2)), "all-pairs", True, float("nan"))
    with pytest.raises(ValueError, match=r"got \(2, 1\)"):
        margin_from_spread(np.zeros((2, 1)))
    with pytest.raises(ValueError, match=r"got \(0,\)"):
        all_pairs(np.zeros(0), True, 0.0)
