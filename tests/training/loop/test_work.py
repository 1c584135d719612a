"""How much work a training step is, counted: no clock, so it holds on a busy machine too."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.training.work import Work, built, counted, waits
from tests.training.worlds import EMBEDDING, LATENT, make_plan
from training.loop.dataset import positions_of_step
from training.loop.run import Run
from training.model.loading import load_network
from training.model.reference import ModelRef
from training.plan import TrainingPlan

PAIRS, BATCH = 12, 4
EPOCH = PAIRS // BATCH
REFERENCE = 25_139_200
"""Operations (two a multiplication with addition) of a forward pass of the tiny UNet over a pair."""
POLICY = {"lora": 56_518_144, "full": 76_400_640}
"""The same of a forward and a backward pass of the policy."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    make_plan(folder)
    return folder


def plan_in(world: Path, **changes: Any) -> TrainingPlan:
    return make_plan(world, **{"steps": 20, "output": str(world / "out"), **changes})


def work_of(run: Run, step: int) -> Work:
    with counted(run) as work:
        run.step(step)
    return work


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("micro", [1, 4])
def test_a_pair_is_two_rows_through_each_network_and_nothing_else(world: Path, method: str, micro: int) -> None:
    with built() as classes:
        run = Run(plan_in(world, method=method, micro_batch_size=micro))
        work = work_of(run, 0)
    pair = [(2 * micro, False, "reference"), (2 * micro, True, "policy")]  # the reference first: no graph is held
    assert work.passes == pair * (BATCH // micro)
    assert work.operations == BATCH * (REFERENCE + POLICY[method])
    makers = {kind.__module__ for kind in classes}
    assert "diffusers.models.unets.unet_2d_condition" in makers
    assert not [m for m in makers if m.startswith("transformers") or "autoencoder" in m], "a text encoder or a VAE"


def test_the_reference_is_the_plain_network_without_a_backward_pass(world: Path) -> None:
    network = load_network(ModelRef(str(world / "base")))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(2, *LATENT), torch.zeros(2), torch.zeros(2, *EMBEDDING))
    assert counter.get_total_flops() == REFERENCE
    # Backward costs a forward pass through frozen weights, two through trained ones, and attention is recomputed in it.
    assert 2.0 < POLICY["lora"] / REFERENCE < 2.4
    assert 2.9 < POLICY["full"] / REFERENCE < 3.1


@pytest.mark.parametrize("method", ["lora", "full"])
def test_with_kept_errors_the_reference_runs_once_a_draw(world: Path, method: str) -> None:
    """One step is one epoch; the third sees the noise of the first."""
    run = Run(plan_in(world, method=method, noise_draws=2, batch_size=PAIRS, micro_batch_size=PAIRS))
    for step in range(4):
        work, rows = work_of(run, step), 2 * PAIRS
        assert [work.rows("reference"), work.rows("policy")] == [rows if step < 2 else 0, rows]
        assert work.operations == PAIRS * (POLICY[method] + (REFERENCE if step < 2 else 0)), step


def test_kept_errors_survive_an_interruption_and_change_nothing(world: Path, tmp_path: Path) -> None:
    plan = plan_in(world, noise_draws=1, batch_size=PAIRS, micro_batch_size=PAIRS)
    run, again, forgetful = Run(plan), Run(plan), Run(plan)
    run.step(0)
    run.save(tmp_path, 1)
    assert again.resume(tmp_path, 1) == forgetful.resume(tmp_path, 1) == 1
    forgetful.kept.clear()
    losses = [each.step(1)["loss"] for each in (run, again, forgetful)]
    assert losses[0] == losses[1] == losses[2]
    assert work_of(again, 2).rows("reference") == 0


def test_a_refreshed_reference_runs_again(world: Path) -> None:
    run = Run(plan_in(world, noise_draws=1, batch_size=PAIRS, micro_batch_size=PAIRS, refresh_reference=2))
    assert [work_of(run, step).rows("reference") > 0 for step in range(4)] == [True, False, True, False]


def test_only_missing_pairs_go_through_the_reference(world: Path) -> None:
    """Steps of 8 in epochs of 12: the second has pairs of both epochs."""
    run, seen = Run(plan_in(world, batch_size=8, micro_batch_size=8, noise_draws=1)), set[int]()
    for step in range(3):
        indices = [index for _, index in positions_of_step(step, 8, PAIRS, run.plan.seed)]
        new = [index for index in indices if index not in seen]
        assert work_of(run, step).rows("reference") == 2 * len(new)
        seen |= set(indices)
    assert len(new) < 8


def test_a_loss_without_a_reference_runs_none(world: Path) -> None:
    work = work_of(Run(plan_in(world, loss="mapo")), 0)
    assert work.passes == [(2 * BATCH, True, "policy")] and work.operations == BATCH * POLICY["lora"]


@pytest.mark.parametrize("changes", [
    {"method": "full", "error_space": "velocity"}, {"noise_draws": 1, "ema": 0.9, "loss": "sdpo"},
    {"mixed_precision": "bf16", "prompt_dropout": 0.5, "optimizer": "adafactor"},
], ids=str)  # fmt: skip
def test_a_step_waits_for_the_device_once(world: Path, changes: dict[str, object]) -> None:
    """For its metrics, at its end, however many passes it is made of and however long the run has been going."""
    run = Run(plan_in(world, micro_batch_size=2, **changes))
    for step in (0, EPOCH):  # the second begins the second epoch
        with waits() as found:
            run.step(step)
        assert found == ["tolist"], step


def test_nothing_grows_with_the_steps(world: Path) -> None:
    run = Run(plan_in(world))
    works = [work_of(run, step) for step in (0, 1, EPOCH, 1000)]
    assert all(work == works[0] for work in works)


def test_the_order_of_an_epoch_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a permutation of all pairs: a million of them take longer than a small step."""
    draw, drawn = np.random.default_rng, []
    monkeypatch.setattr(np.random, "default_rng", lambda key: (drawn.append(key), draw(key))[1])
    for step in range(5):
        positions_of_step(step, 7, 17, seed=12345)
    assert drawn == [[12345, 0], [12345, 1], [12345, 2]]


def test_adapters_and_their_moments_are_float32_over_a_bfloat16_network(world: Path) -> None:
    run = Run(plan_in(world, mixed_precision="bf16"))
    run.step(0)
    trained = {p.dtype for p in run.policy.parameters()}
    moments = {v.dtype for s in run.optimizer.state.values() for v in s.values()}
    frozen = {p.dtype for p in run.policy.network.parameters() if not p.requires_grad}
    assert (trained, moments, frozen) == ({torch.float32}, {torch.float32}, {torch.bfloat16})
