"""Intervals and tests against published numbers, independent evaluation and exact enumeration."""

import math
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize
from scipy import stats as scipy_stats

from scoring.verdict.verdict import (
    agreement,
    holm,
    mean_difference_interval,
    sign_test,
    wilson_interval,
    win_rate_interval,
)

COUNTS = st.tuples(*[st.integers(0, 60)] * 3).filter(lambda counts: sum(counts) > 0)
CONFIDENCES = st.sampled_from([0.8, 0.95, 0.99])


def test_tango_published_value() -> None:
    """Complete response before and after therapy (Cavo et al. 2012), table 59, 6, 16, 80.

    The R package contingencytables of Fagerland, Lydersen and Laake prints the Tango interval -0.1240 to
    -0.0054 of the difference of paired proportions, and P = 0.052479 for the exact conditional McNemar test,
    which is the sign test.
    """
    low, high = win_rate_interval(6, 59 + 80, 16)
    assert 2 * low - 1 == pytest.approx(-0.1240, abs=5e-5)
    assert 2 * high - 1 == pytest.approx(-0.0054, abs=5e-5)
    assert sign_test(6, 16) == pytest.approx(0.052479, abs=5e-7)


def _score_z(delta: float, wins: int, ties: int, losses: int) -> float:
    """Tango's statistic with the constrained maximum likelihood found numerically."""
    total = wins + ties + losses

    def negative_log_likelihood(loss: float) -> float:
        parts = [(wins, loss + delta), (ties, 1 - 2 * loss - delta), (losses, loss)]
        return -sum(count * math.log(max(p, 1e-300)) for count, p in parts if count)

    bounds = (max(0.0, -delta), (1 - delta) / 2)
    q = optimize.minimize_scalar(negative_log_likelihood, bounds=bounds, method="bounded", options={"xatol": 1e-13}).x
    return (wins - losses - total * delta) / math.sqrt(total * (2 * q + delta - delta * delta))


@pytest.mark.parametrize("counts", [(6, 139, 16), (30, 5, 10), (12, 0, 3), (1, 40, 1), (3, 97, 0), (5, 2, 200)])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_tango_ends_solve_the_score_equation(counts: tuple[int, int, int], confidence: float) -> None:
    low, high = win_rate_interval(*counts, confidence)
    z = scipy_stats.norm.ppf(0.5 + confidence / 2)
    assert _score_z(2 * low - 1, *counts) == pytest.approx(z, abs=1e-4)
    assert _score_z(2 * high - 1, *counts) == pytest.approx(-z, abs=1e-4)


@pytest.mark.parametrize("n", [1, 2, 10, 500])
def test_edges_in_closed_form(n: int) -> None:
    """All wins: Wilson's lower end n / (n + z^2). Only ties: |delta| up to z^2 / (n + z^2)."""
    z2 = scipy_stats.norm.ppf(0.975) ** 2
    assert win_rate_interval(n, 0, 0) == pytest.approx((n / (n + z2), 1.0), abs=1e-12)
    assert win_rate_interval(0, 0, n) == pytest.approx((0.0, z2 / (n + z2)), abs=1e-12)
    assert win_rate_interval(0, n, 0) == pytest.approx((n / (n + z2) / 2, 1 - n / (n + z2) / 2), abs=1e-12)


@given(st.integers(0, 100), st.integers(0, 100).filter(bool), CONFIDENCES)
def test_without_ties_it_is_wilson(wins: int, losses: int, confidence: float) -> None:
    expected = scipy_stats.binomtest(wins, wins + losses).proportion_ci(confidence, method="wilson")
    assert win_rate_interval(wins, 0, losses, confidence) == pytest.approx(tuple(expected), abs=1e-9)
    assert wilson_interval(wins, wins + losses, confidence) == pytest.approx(tuple(expected), abs=1e-9)


@given(COUNTS, CONFIDENCES)
def test_interval_contains_the_estimate_inside_the_unit_range(counts: tuple[int, int, int], confidence: float) -> None:
    wins, ties, losses = counts
    low, high = win_rate_interval(wins, ties, losses, confidence)
    assert 0 <= low <= (wins + ties / 2) / sum(counts) <= high <= 1
    assert low < high


@given(COUNTS, CONFIDENCES)
def test_interval_mirrors_when_the_sides_swap(counts: tuple[int, int, int], confidence: float) -> None:
    low, high = win_rate_interval(*counts, confidence)
    assert win_rate_interval(*counts[::-1], confidence) == pytest.approx((1 - high, 1 - low), abs=1e-12)


@given(COUNTS, st.integers(2, 20))
def test_interval_narrows_with_more_prompts_and_widens_with_confidence(
    counts: tuple[int, int, int], factor: int
) -> None:
    low, high = win_rate_interval(*counts)
    more_low, more_high = win_rate_interval(*(factor * count for count in counts))
    sure_low, sure_high = win_rate_interval(*counts, 0.99)
    assert more_high - more_low < high - low
    assert sure_low <= low and high <= sure_high


@cache
def _interval(wins: int, ties: int, losses: int) -> tuple[float, float]:
    return win_rate_interval(wins, ties, losses)


@pytest.mark.parametrize(("p_win", "p_tie"), [(0.5, 0.0), (0.3, 0.4), (0.6, 0.2), (0.15, 0.7), (0.8, 0.1), (0.2, 0.3)])
def test_coverage_is_nominal(p_win: float, p_tie: float) -> None:
    """Exact coverage at 40 prompts: the probabilities of all outcomes whose 95 % interval covers, summed."""
    n, truth = 40, p_win + p_tie / 2
    outcomes = [(w, n - w - b, b) for w in range(n + 1) for b in range(n + 1 - w)]
    weights = scipy_stats.multinomial.pmf(outcomes, n, [p_win, p_tie, 1 - p_win - p_tie])
    assert weights.sum() == pytest.approx(1)
    covers = [low <= truth <= high for low, high in (_interval(*outcome) for outcome in outcomes)]
    assert 0.93 <= float(weights @ np.array(covers)) <= 0.97


@given(st.integers(0, 200), st.integers(0, 200))
def test_sign_test_is_the_exact_binomial(wins: int, losses: int) -> None:
    expected = scipy_stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert sign_test(wins, losses) == pytest.approx(expected, rel=1e-9)
    assert sign_test(wins, losses) == sign_test(losses, wins)


@given(st.lists(st.floats(0, 1), max_size=6))
def test_holm_against_its_definition(p_values: list[float]) -> None:
    """Rejected at level alpha: the hypotheses before the first i (from 0) with p_(i) > alpha / (m - i)."""
    adjusted, m = holm(p_values), len(p_values)
    for alpha in (0.01, 0.05, 0.2, 0.5):
        rejected = set()
        for i, index in enumerate(sorted(range(m), key=lambda j: p_values[j])):
            if (m - i) * p_values[index] > alpha:
                break
            rejected.add(index)
        assert {i for i in range(m) if adjusted[i] <= alpha} == rejected


def test_holm_by_hand() -> None:
    """Sorted .01 .02 .03: 3 x .01 = .03, 2 x .02 = .04, 1 x .03 = .03 raised to .04."""
    assert holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@settings(max_examples=50)
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=20), CONFIDENCES)
def test_mean_difference_is_the_paired_t_interval(differences: list[float], confidence: float) -> None:
    low, high = mean_difference_interval(differences, confidence)
    assert low <= high
    if np.std(differences) > 1e-6:
        expected = scipy_stats.ttest_1samp(differences, 0).confidence_interval(confidence)
        assert (low, high) == pytest.approx(tuple(expected), abs=1e-9)


def test_equal_differences_give_a_degenerate_interval() -> None:
    assert mean_difference_interval([0.5, 0.5, 0.5], 0.95) == (0.5, 0.5)


def _agreement_by_definition(a: list[int], b: list[int], groups: list[str]) -> tuple[float, int]:
    outcomes = [
        0.5 if a[i] == a[j] else float((a[i] > a[j]) == (b[i] > b[j]))
        for i in range(len(a))
        for j in range(i)
        if groups[i] == groups[j] and b[i] != b[j]
    ]
    return sum(outcomes), len(outcomes)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.sampled_from("xyz")), max_size=12))
def test_agreement_against_its_definition(rows: list[tuple[int, int, str]]) -> None:
    a, b, groups = [row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows]
    agreed, pairs = _agreement_by_definition(a, b, groups)
    accuracy, low, high, n = agreement(np.array(a), np.array(b), groups)
    assert n == pairs
    assert (low, high) == wilson_interval(agreed, pairs)
    assert accuracy == agreed / pairs if pairs else math.isnan(accuracy) and (low, high) == (0, 1)


def test_wrong_counts_and_levels_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one prompt"):
        win_rate_interval(0, 0, 0)
    with pytest.raises(ValueError, match="wins=-1"):
        win_rate_interval(-1, 5, 5)
    with pytest.raises(ValueError, match="confidence must lie in"):
        win_rate_interval(1, 1, 1, 95)
    with pytest.raises(ValueError, match="p-values must lie in"):
        holm([0.5, float("nan")])
    with pytest.raises(ValueError, match="at least two differences"):
        mean_difference_interval([1.0], 0.95)
    with pytest.raises(ValueError, match="losses=-1"):
        sign_test(1, -1)
