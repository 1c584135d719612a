"""The preference scale is the maximum of the likelihood, and its degenerate cases are finite and said."""

import logging

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import expit

from scoring.labels.soft_labels import fit_scale, log_loss, preference_probability


def labelled(n: int, scale: float, spread: float, seed: int = 0, ties: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    difference = rng.normal(0, spread, n)
    label = (rng.random(n) < expit(scale * difference)).astype(float)
    return difference, np.where(rng.random(n) < ties, 0.5, label)


def test_probability_is_the_sigmoid() -> None:
    np.testing.assert_allclose(preference_probability([0.0, 1.0, -1.0], 2.0), [0.5, 0.880797, 0.119203], atol=1e-6)
    assert preference_probability(1.0, -1e9) == 0 and preference_probability(1.0, 1e9) == 1


@pytest.mark.parametrize(("scale", "spread"), [(1.0, 2.0), (100.0, 0.01), (0.02, 30.0), (-3.0, 0.5)])
@pytest.mark.parametrize("ties", [0.0, 0.3])
def test_fit_is_where_the_likelihood_is_largest(scale: float, spread: float, ties: float) -> None:
    """Against a search over the log loss that knows nothing of its slope."""
    difference, label = labelled(2000, scale, spread, ties=ties)
    found = fit_scale(difference, label)
    best = minimize_scalar(
        lambda s: log_loss(difference, label, s), bounds=(-5 * abs(scale), 5 * abs(scale)), method="bounded",
        options={"xatol": 1e-9 * abs(scale)},
    )  # fmt: skip
    assert found == pytest.approx(best.x, rel=1e-4)
    for nearby in (0.99, 1.01):
        assert log_loss(difference, label, found) < log_loss(difference, label, nearby * found)


def test_fit_recovers_the_scale_without_bias() -> None:
    """200 sets of 400 pairs: the mean is off by less than three standard errors and the small-sample bias."""
    found = np.array([fit_scale(*labelled(400, 150.0, 0.01, seed)) for seed in range(200)])
    assert abs(found.mean() - 150) < 3 * found.std() / np.sqrt(200) + 1.5
    assert 5 < found.std() < 25


def test_ties_pull_the_scale_to_zero() -> None:
    difference, label = labelled(2000, 2.0, 1.0)
    softened = np.where(np.arange(2000) % 2, label, 0.5)
    assert 0 < fit_scale(difference, softened) < 0.7 * fit_scale(difference, label)
    assert fit_scale([1.0, -2.0, 3.0], [0.5, 0.5, 0.5]) == 0


def test_fit_is_in_units_of_the_score() -> None:
    difference, label = labelled(500, 1.0, 1.0)
    assert fit_scale(1e-6 * difference, label) == pytest.approx(1e6 * fit_scale(difference, label))
    assert fit_scale(-difference, label) == pytest.approx(-fit_scale(difference, label))
    assert fit_scale(difference, 1 - label) == pytest.approx(-fit_scale(difference, label))


def test_separable_labels_give_a_finite_scale_and_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """Median difference 2 and 3 pairs that differ: P = (3 + 1) / (3 + 2) at the median."""
    with caplog.at_level(logging.WARNING):
        scale = fit_scale([1.0, -2.0, 9.0, 0.0], [1.0, 0.0, 1.0, 0.0])
    assert float(preference_probability(2.0, scale)) == pytest.approx(4 / 5)
    assert "the scorer orders all 3 labelled pairs alike: the scale is capped at 0.69" in caplog.text
    assert fit_scale([1.0, -2.0, 9.0], [0.0, 1.0, 0.0]) == pytest.approx(-scale)


def test_one_contradicting_pair_makes_it_a_maximum() -> None:
    assert fit_scale([1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0]) == pytest.approx(np.log(3))


def test_no_difference_at_all_gives_zero_and_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert fit_scale([0.0, 0.0], [1.0, 0.0]) == 0
    assert "all differences of scores are 0" in caplog.text


def test_log_loss() -> None:
    assert log_loss([3.0, -1.0], [1.0, 0.5], 0.0) == pytest.approx(np.log(2))
    assert log_loss([1.0], [1.0], 1.0) == pytest.approx(-np.log(expit(1.0)))
    assert log_loss([1e6], [0.0], 1.0) == pytest.approx(1e6)  # and neither infinite nor NaN


@pytest.mark.parametrize(
    ("differences", "labels", "message"),
    [
        ([1.0], [1.0, 0.0], r"one label a difference, at least one, got \(1,\) and \(2,\)"),
        ([], [], "at least one"),
        ([1.0, np.nan], [1.0, 0.0], "difference 1 is not finite"),
        ([1.0], [2.0], r"labels must lie in \[0, 1\], got 2.0"),
        ([1.0], [np.nan], r"labels must lie in \[0, 1\]"),
    ],
)
def test_what_cannot_be_fitted_is_refused(differences: list, labels: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_scale(differences, labels)
