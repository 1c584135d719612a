"""The watch over a run: silent over healthy ones, in time for those that fail, and the same after a restart.

Most runs here are made of numbers with the spread that training shows; the last tests train for real.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.training.worlds import make_plan
from training.loop.diagnostics import (
    DRIFT_LIMIT,
    REPEAT,
    WINDOW,
    Metrics,
    TrainingDiverged,
    Watch,
    by_quartile,
    reference_errors,
    relative_drift,
)
from training.loop.run import Run
from training.loss.errors import PairErrors

Shape = Callable[[int], float]
KNOWN = {"learning_rate": 0.001, "beta": 500.0, "loss": "dpo", "max_grad_norm": 1.0, "steps": 200}


def flat(value: float) -> Shape:
    return lambda step: value


def run_of(
    steps: int, drift: Shape = lambda step: 0.2, accuracy: Shape = lambda step: 0.75, batch: int = 16, seed: int = 0,
    loss: Shape = lambda step: 0.5, norm: Shape = lambda step: 2.0, reference: bool = True,
) -> list[dict[str, float]]:  # fmt: skip
    """Metrics as training gives them: errors over timesteps vary by their own size, gradient norms by a factor of 2."""
    rng, history = np.random.default_rng(seed), []
    for step in range(1, steps + 1):
        errors = 0.03 * rng.exponential(size=batch)  # of the reference on each pair of the batch
        moved = errors * drift(step) * rng.lognormal(-0.32, 0.8, batch)  # mean: drift
        metrics = {
            "step": step,
            "loss": loss(step) * rng.lognormal(0, 0.2),
            "grad_norm": norm(step) * rng.lognormal(0, 0.7),
        }
        if reference:
            metrics |= {
                "winner_error_delta": float(moved.mean()), "reference_winner_error": float(errors.mean()),
                "implicit_accuracy": rng.binomial(batch, accuracy(step)) / batch,
            }  # fmt: skip
        else:
            metrics |= {"winner_error": float((errors + moved).mean())}
        history.append(metrics)
    return history


def watched(history: Sequence[Metrics], context: dict[str, Any] | None = None, held: bool = True) -> list[str]:
    watch = Watch(KNOWN if context is None else context, held)
    return [warning for metrics in history for warning in watch.observe(metrics)]


def step_of(warning: str) -> int:
    return int(warning.split()[1].rstrip(":"))


def stopped_at(history: Sequence[Metrics]) -> tuple[int, str]:
    watch = Watch(KNOWN)
    for metrics in history:
        try:
            watch.observe(metrics)
        except TrainingDiverged as stop:
            return int(metrics["step"]), str(stop)
    raise AssertionError("it was not stopped")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("reference", [True, False])
def test_a_healthy_run_is_left_alone(seed: int, batch: int, reference: bool) -> None:
    """300 steps at a drift of up to 0.3, also with batches of one pair, whose errors vary as much as they are large."""
    drift = (lambda step: min(0.3, step / 300)) if reference else flat(0.0)
    history = run_of(300, drift, batch=batch, seed=seed, reference=reference)
    assert watched(history) == []


@pytest.mark.parametrize("reference", [True, False])
def test_a_collapse_is_warned_of_and_then_stopped(reference: bool) -> None:
    """The drift grows by 0.1 a step from step 15 on: it passes 0.5 at step 20 and 2 at step 35."""
    history = run_of(200, lambda step: max(0, step - 15) / 10, flat(0.8), batch=64, reference=reference)
    warnings = watched(history[:35])
    assert len(warnings) == 1 and step_of(warnings[0]) > 20
    step, text = stopped_at(history)
    assert 35 < step < 65
    for words in (f"step {step}: the winners' error", "checkpoint is kept", "training.learning_rate (now 0.001)"):
        assert words in text
    assert ("implicit accuracy, 0.8" in text and "does not show it" in text) == reference


def test_perfect_accuracy_warns_earlier() -> None:
    """Winner errors that rise by a third are usual; together with an accuracy above 0.9 they are a collapse."""
    assert watched(run_of(100, flat(0.35), accuracy=flat(0.8))) == []
    warnings = watched(run_of(100, flat(0.35), accuracy=flat(0.97)))
    assert len(warnings) == 1 and "above the reference's" in warnings[0] and "implicit accuracy, 0.9" in warnings[0]
    assert watched(run_of(100, flat(0.1), accuracy=flat(1.0))) == [], "accuracy alone is no failure"


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stops_the_run(name: str, value: float) -> None:
    history = run_of(3)
    history[2][name] = value
    step, text = stopped_at(history)
    assert step == 3 and str(value) in text and "training.beta (now 500.0)" in text


def test_a_gradient_that_explodes_is_warned_of() -> None:
    """Fine for 150 steps, then 30 times as large; single steps of 30 times are not the same."""
    exploding = watched(run_of(160, norm=lambda step: 2.0 if step <= 150 else 60.0))
    assert len(exploding) == 1 and "training.learning_rate (now 0.001) or max_grad_norm (now 1.0)" in exploding[0]
    assert 150 < step_of(exploding[0]) <= 155
    assert watched(run_of(160, norm=lambda step: 60.0 if step % 10 == 0 else 2.0)) == []


def test_a_gradient_that_returns_after_vanishing_is_no_explosion() -> None:
    """hinge: no pair pulls any more, and then some do again."""
    assert watched(run_of(200, norm=lambda step: 2.0 if step < 20 or step > 150 else 0.0)) == []


def test_skipped_steps_have_no_gradient() -> None:
    history = run_of(100)
    for metrics in history[20:80]:
        metrics |= {"skipped": 1.0, "grad_norm": 0.0}
    assert watched(history) == []


def test_a_loss_far_above_its_start_is_warned_of() -> None:
    warnings = watched(run_of(60, loss=lambda step: 0.7 if step < 30 else 3.0))
    assert len(warnings) == 1 and "at the start" in warnings[0]
    assert watched(run_of(60, loss=lambda step: 0.7 if step < 30 else 1.2)) == []
    assert watched(run_of(60, loss=lambda step: 0.1 - 0.02 * step)) == [], "rdpo has no lower bound"


def test_the_advice_is_what_the_loss_has() -> None:
    drifting = run_of(40, flat(1.0), reference=True)
    assert "raise training.beta (now 500.0)" in watched(drifting)[0]
    rising = run_of(60, lambda step: 0.0 if step < 20 else 1.8, batch=64, reference=False)
    assert "training.learning_rate (now 0.001) or training.steps (now 200)" in watched(rising, held=False)[0]
    assert "(now" not in watched(drifting, {})[0]


def test_the_same_is_said_once_in_a_while() -> None:
    """Also beyond: a drift that stays is repeated after REPEAT steps, not at each."""
    steps = [step_of(text) for text in watched(run_of(2 * REPEAT + 50, flat(1.0)))]
    assert len(steps) == 3 and all(later - earlier >= REPEAT for earlier, later in pairwise(steps))


@pytest.mark.parametrize("cut", [3, 12, 60, 149])
def test_a_resumed_run_says_what_the_whole_one_would_have(cut: int) -> None:
    """From the history as it was written: nothing twice, nothing lost, stopped at the same step."""
    history = run_of(300, lambda step: 0.012 * step, norm=lambda step: 2.0 if step < 70 else 80.0)
    whole = until_stop(Watch(KNOWN), history)
    cut_short, resumed = Watch(KNOWN), Watch(KNOWN)
    first = [said for metrics in history[:cut] for said in cut_short.observe(metrics)]
    resumed.replay(history[:cut])
    assert first + until_stop(resumed, history[cut:]) == whole
    assert len(whole) >= 4 and "stopped" in whole[-1]


def until_stop(watch: Watch, history: Sequence[Metrics]) -> list[str]:
    """All that is said, and the reason of the stop."""
    said: list[str] = []
    with pytest.raises(TrainingDiverged) as stop:
        for metrics in history:
            said += watch.observe(metrics)
    return [*said, str(stop.value)]


def test_quartiles_of_noise() -> None:
    level = torch.tensor([0.0, 0.24, 0.25, 0.5, 0.74, 0.75, 1.0])
    metrics = {"margin": torch.arange(7.0), "loss": torch.ones(7)}
    parts = by_quartile(level, metrics, ["margin", "winner_error_delta"])
    assert sorted(parts) == [f"margin_q{index}" for index in (1, 2, 3, 4)], "metrics that are not there are left out"
    kept = [parts[f"margin_q{index}"] for index in (1, 2, 3, 4)]
    assert [part[~part.isnan()].tolist() for part in kept] == [[0, 1], [2], [3, 4], [5, 6]]
    assert torch.equal(torch.stack(kept).nansum(0), metrics["margin"]), "each pair is in one quartile"


def test_drift_is_the_distance_moved_over_the_error_left() -> None:
    """p = r + d with a residual r - y that d knows nothing of: |p - y|^2 / |r - y|^2 - 1 = |d|^2 / |r - y|^2."""
    rng = torch.Generator().manual_seed(0)
    residual, moved = (torch.randn(64, 10_000, generator=rng) * size for size in (0.2, 0.3))
    reference, policy = residual.square().mean(1), (residual + moved).square().mean(1)
    errors = PairErrors(policy_winner=policy, reference_winner=reference)
    logged = {"winner_error_delta": errors.winner_delta(), **reference_errors(errors)}
    history = [{name: float(value[i]) for name, value in logged.items()} for i in range(64)]
    assert relative_drift(history) == pytest.approx(0.3**2 / 0.2**2, rel=0.01)
    assert relative_drift([{"winner_error": 1.0}]) is None and reference_errors(PairErrors(policy)) == {}
    assert DRIFT_LIMIT == 2 and WINDOW == 10, "figures in the messages and the documentation"


@pytest.mark.slow
def test_real_runs(tmp_path: Path) -> None:
    """The trainer on a tiny network: a usual learning rate is left alone, one that destroys it is stopped."""
    runs = [Run(make_plan(tmp_path, method="full", learning_rate=rate, beta=20.0)) for rate in (1e-5, 0.1)]
    healthy, destroyed = ([run.step(step) for step in range(2 * WINDOW)] for run in runs)
    assert watched(healthy) == []
    assert stopped_at(destroyed)[0] <= 2 * WINDOW
