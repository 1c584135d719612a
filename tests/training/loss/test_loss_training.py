"""Every loss in the training loop: where it starts, which way it goes, what it computes, and the labels it reads."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.shards import ShardError, read_shard
from tests.rounding import of_errors, of_margins
from tests.training.worlds import make_plan, save_pairs
from training.loop.checkpoint import CheckpointRecord
from training.loop.dataset import PreferencePairs, positions_of_step
from training.loop.run import Run
from training.loop.trainer import train
from training.loss.errors import LossOutput, PairErrors
from training.loss.table import LOSSES, preference_loss
from training.plan import TrainingPlan

pytestmark = pytest.mark.numerical

NEEDED = {"rdpo": {"label_smoothing": 0.1}}
"""Options without which a loss is refused."""
ALL = positions_of_step(0, 12, 12, 0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("losses")
    make_plan(folder)
    return folder


def plan_in(world: Path, output: Path, loss: str, **changes: Any) -> TrainingPlan:
    return make_plan(world, output=str(output), loss=loss, **{**NEEDED.get(loss, {}), **changes})


def errors_in(run: Run, monkeypatch: pytest.MonkeyPatch) -> PairErrors:
    """The errors of all pairs that the loss is given."""
    captured: list[PairErrors] = []

    def spy(name: str, errors: PairErrors, *rest: Any) -> LossOutput:
        captured.append(errors)
        return preference_loss(name, errors, *rest)

    with monkeypatch.context() as patch:
        patch.setattr("training.loop.pair_loss.preference_loss", spy)
        run.loss(run.pairs.read(ALL))
    return captured[0]


@pytest.mark.parametrize("name", LOSSES)
def test_it_starts_at_zero_margin_and_a_step_goes_the_right_way(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    run = Run(plan_in(world, tmp_path, name, batch_size=12, micro_batch_size=12, beta=100.0))
    before, first = errors_in(run, monkeypatch), run.step(0)
    if LOSSES[name].reference:
        assert first["margin"] == 0.0 and first["implicit_accuracy"] == 0.5
        assert first["loss"] == pytest.approx(LOSSES[name].at_zero, abs=1e-6)
    after = errors_in(run, monkeypatch)
    winner = after.policy_winner.mean() - before.policy_winner.mean()
    if before.policy_loser is None or after.policy_loser is None:
        assert winner < 0
    else:
        assert winner < after.policy_loser.mean() - before.policy_loser.mean()


@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_change_neither_loss_nor_gradient(world: Path, tmp_path: Path, name: str) -> None:
    """Margins far beyond what rounding does to them: large steps, and a small kappa, which multiplies the rounding."""
    changes: dict[str, Any] = {"max_grad_norm": 1e9, "beta": 200.0, "learning_rate": 1e-2}
    runs = [Run(plan_in(world, tmp_path, name, micro_batch_size=size, **changes)) for size in (2, 4)]
    for step in range(2):
        two, four = (run.step(step) for run in runs)
        allowed = rounding_of(name, four)
        for metric in sorted(set(two) - {"pairs_per_second"}):
            found = pytest.approx(four[metric], rel=0, abs=allowed.get(metric.partition("_q")[0], 0))
            assert two[metric] == found, (step, metric)


def rounding_of(name: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """By how much two computations may differ, by metric; not at all where it is not named.

    A gradient is a loss's slope times kappa times what does not depend on the margin: it changes by |slope' / slope|
    times as much as the margin, relative to itself. That is 1 / |h - 1/2| < 2.5 for ipo, and at most 1 for the others.
    """
    margin, error = of_margins(100.0, 1.5, 256), of_errors(1.5, 256)
    slope = {"sft": 0.0, "mapo": 0.1, "kto": 0.25, "rdpo": 1.25, "ipo": 2.0}.get(name, 1.0)  # of the loss, at most
    errors = {f"{kind}{side}_error": error for kind in ("", "reference_") for side in ("winner", "loser")}
    deltas = {f"{side}_error_delta": 2 * error for side in ("winner", "loser")}
    scale = {"loser_scale": 2 * error, "margin": margin, "grad_norm": metrics["grad_norm"] * (2.5 * margin + error)}
    return {**errors, **deltas, **scale, "loss": slope * margin + (error if name in ("sft", "mapo") else 0)}


@pytest.mark.parametrize("name", LOSSES)
def test_only_what_the_loss_needs_is_computed(world: Path, tmp_path: Path, name: str) -> None:
    """Pictures through the network a pair, without and with gradients; winner and loser under the same conditions."""
    run, seen = Run(plan_in(world, tmp_path, name)), []

    def watch(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        noisy, times, embedding = inputs
        seen.append((len(noisy) / 4, torch.is_grad_enabled()))
        for each in (times, embedding):
            assert all(torch.equal(each[:4], part) for part in each.split(4)), "both images: same timestep and prompt"

    run.policy.network.register_forward_pre_hook(watch)
    run.loss(run.pairs.read(ALL[:4]))
    sides = 2 if LOSSES[name].loser else 1
    assert seen == ([(sides, False)] if LOSSES[name].reference else []) + [(sides, True)]


@pytest.mark.parametrize("name", ["sft", "dco", "sdpo"])
def test_a_whole_run_records_its_loss_beta_and_kappa(world: Path, tmp_path: Path, name: str) -> None:
    record = train(plan_in(world, tmp_path, name, steps=2))
    assert (record.loss, record.beta, record.kappa) == (name, 2000.0, 1000.0)
    assert CheckpointRecord.read(tmp_path) == record
    assert ("winner_error" in record.metrics) != ("winner_error_delta" in record.metrics)
    assert ("loser_scale" in record.metrics) == (name == "sdpo")


def test_soft_labels_are_the_labelled_winners(world: Path) -> None:
    pairs, table = PreferencePairs(world / "pairs"), read_shard(world / "pairs" / "00000-of-00002.arrow")
    batch = pairs.read([(0, row) for row in range(table.num_rows)])
    sides = [0 if label == 1.0 else 1 for label in table["label_0"].to_pylist()]
    assert len(set(sides)) == 2
    expected = [table[f"soft_label_{side}"][row].as_py() for row, side in enumerate(sides)]
    assert batch.soft_label.tolist() == expected and min(expected) >= 0.6


def test_margins_are_in_units_of_their_mean(world: Path) -> None:
    margin = PreferencePairs(world / "pairs").read(ALL).margin
    assert margin.mean().item() == pytest.approx(1.0)
    assert (margin.max() / margin.min()).item() == pytest.approx(7.0)


def test_soft_labels_reach_the_loss(world: Path, tmp_path: Path) -> None:
    """The first step's loss is ln 2 whatever the labels; from the second on they matter. Weights count at once."""
    losses = {}
    for name, options in {"hard": {}, "soft": {"soft_labels": True}, "weighted": {"margin_weights": True}}.items():
        run = Run(plan_in(world, tmp_path / name, "dpo", **options))
        losses[name] = [run.step(step)["loss"] for step in range(2)]
    assert losses["hard"][0] == losses["soft"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses["hard"][1] != losses["soft"][1]
    drawn = PreferencePairs(world / "pairs").read(positions_of_step(0, 4, 12, 0)).margin.mean().item()
    assert losses["weighted"][0] == pytest.approx(drawn * math.log(2), rel=1e-5)


def test_shards_without_soft_labels_are_refused(world: Path, tmp_path: Path) -> None:
    pairs = save_pairs(tmp_path / "hard", soft=False)
    assert np.isnan(PreferencePairs(pairs).read(ALL).soft_label.numpy()).all()
    with pytest.raises(ShardError, match=r"12 of 12 pairs have no soft label.*training\.soft_labels"):
        Run(plan_in(world, tmp_path, "dpo", pairs=str(pairs), soft_labels=True))
    Run(plan_in(world, tmp_path, "dpo", pairs=str(pairs)))


def test_an_option_that_the_loss_ignores_is_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"training\.label_smoothing=0\.1.*'hinge'"):
        train(plan_in(world, tmp_path, "hinge", label_smoothing=0.1))
