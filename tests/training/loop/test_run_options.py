"""What may change about a run: its reference, its draws, its average, its held-out pairs, its processes."""

import copy
import importlib.util
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from data.shards import ShardError
from tests.rounding import of_errors, of_margins
from tests.training.worlds import make_plan
from training.loop import launch as launching
from training.loop.dataset import PreferencePairs, positions_of_step, share_of
from training.loop.diagnostics import TrainingDiverged
from training.loop.launch import launch, process_count
from training.loop.lora_policy import LoraPolicy
from training.loop.policy import Policy
from training.loop.run import Run
from training.loop.trainer import train
from training.model.loading import embed_negative
from training.plan import TrainingPlan


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("options")
    make_plan(folder)
    return folder


def plan_in(world: Path, output: Path, **changes: Any) -> TrainingPlan:
    return make_plan(world, **changes).changed(output=str(output))


def all_tensors(output: Path) -> dict[str, torch.Tensor]:
    """Everything in the last checkpoint and in the trained model."""
    files = [*output.glob("checkpoint-000006/*.safetensors"), *output.glob("adapter/*"), *output.glob("unet/*.safe*")]
    return {f"{file.stem}:{name}": tensor for file in files for name, tensor in load_file(file).items()}


OPTIONS: dict[str, dict[str, object]] = {
    "kept reference": {"noise_draws": 2, "steps": 6, "batch_size": 8},  # 12 pairs: the second epoch begins in step 2
    "moving reference": {"refresh_reference": 2, "checkpoint_every": 1},
    "moving kept reference of all weights": {"refresh_reference": 3, "noise_draws": 1, "method": "full"},
    "average": {"ema": 0.9, "schedule": "cosine"},
    "adafactor": {"optimizer": "adafactor", "learning_rate": 1e-4},
    "held-out pairs": {"heldout_share": 0.3, "heldout_every": 2, "prompt_dropout": 0.5},
}


class Cut(RuntimeError):
    """What ends a training early."""


def cut_at(last: int) -> Callable[[int, dict[str, float]], None]:
    """Ends it after so many steps."""

    def stop(step: int, metrics: dict[str, float]) -> None:
        if step == last:
            raise Cut

    return stop


NEEDS_PACKAGE = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.mark.parametrize("name", [*OPTIONS, pytest.param("8-bit states of all weights", marks=NEEDS_PACKAGE)])
def test_a_resumed_run_is_bit_equal_whatever_it_keeps(world: Path, tmp_path: Path, name: str) -> None:
    changes = {"beta": 200.0, **OPTIONS.get(name, {"optimizer": "adamw-8bit", "method": "full"})}
    train(plan_in(world, tmp_path / "whole", **changes))
    plan = plan_in(world, tmp_path / "cut", **changes)

    for last in (1, 5):  # before the first checkpoint, and between two
        with pytest.raises(Cut):
            train(plan, cut_at(last))
    train(plan)
    whole, cut = all_tensors(tmp_path / "whole"), all_tensors(tmp_path / "cut")
    assert whole.keys() == cut.keys() and len(whole) > 10
    for key, tensor in whole.items():
        assert torch.equal(tensor.nan_to_num(-1), cut[key].nan_to_num(-1)), key
    lines = [(tmp_path / side / "metrics.jsonl").read_text().splitlines() for side in ("whole", "cut")]
    rows = [[json.loads(line) for line in side] for side in lines]
    for row in (*rows[0], *rows[1]):
        del row["pairs_per_second"]
    assert rows[0] == rows[1]


def count_reference_rows(run: Run) -> list[int]:
    """Rows that each call of the reference network sees, from now on."""
    rows: list[int] = []
    own = run.policy.reference

    @contextmanager
    def counted() -> Iterator[torch.nn.Module]:
        with own() as network:
            hook = network.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
            yield network
            hook.remove()

    run.policy.reference = counted  # type: ignore[method-assign]
    return rows


@pytest.mark.numerical
def test_kept_errors_replace_the_reference_and_change_nothing(world: Path, tmp_path: Path) -> None:
    """With one draw, epochs after the first see the same noise: no reference row, and the errors of a fresh pass."""
    kept = Run(plan_in(world, tmp_path, noise_draws=1, beta=200.0, learning_rate=1e-2))
    rows = count_reference_rows(kept)
    for step in range(3):  # 12 pairs, 4 a step: one epoch
        kept.step(step)
    assert sum(rows) == 24 and kept.kept is not None and not kept.kept.values.isnan().any()
    batch = kept.pairs.read(positions_of_step(3, 4, 12, 0))
    found = kept.loss(batch)
    assert sum(rows) == 24
    kept.loss.kept = None
    fresh = kept.loss(batch)
    assert sum(rows) == 32
    allowed = of_margins(100.0, 1.5, 256)
    torch.testing.assert_close(found.loss, fresh.loss, rtol=0, atol=allowed)
    torch.testing.assert_close(found.metrics["margin"], fresh.metrics["margin"], rtol=0, atol=allowed)
    assert fresh.metrics["margin"].abs().max() > 100 * allowed


def test_only_what_is_missing_is_asked_of_the_reference(world: Path, tmp_path: Path) -> None:
    run = Run(plan_in(world, tmp_path, noise_draws=1))
    rows = count_reference_rows(run)
    alone = run.loss(run.pairs.read([(0, 3)]))
    together = run.loss(run.pairs.read([(0, 2), (0, 3), (0, 5)]))
    assert rows == [2, 4]  # winner and loser of one pair, then of two
    torch.testing.assert_close(together.metrics["margin"][1], alone.metrics["margin"][0])


def test_draws_repeat_after_as_many_as_asked_for(world: Path, tmp_path: Path) -> None:
    run = Run(plan_in(world, tmp_path, noise_draws=2, loss="sft"))
    errors = [run.loss(run.pairs.read([(epoch, 0)])).metrics["winner_error"].item() for epoch in range(5)]
    assert errors[0] == errors[2] == errors[4] != errors[1] == errors[3]


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.numerical
def test_a_refreshed_reference_is_what_the_policy_was(world: Path, tmp_path: Path, method: str) -> None:
    run = Run(plan_in(world, tmp_path, method=method, refresh_reference=2, learning_rate=1e-2, beta=20.0))
    inputs = (torch.ones(1, 4, 8, 8), torch.tensor([5]), torch.ones(1, 77, 16))

    def predict(policy: Policy, reference: bool) -> torch.Tensor:
        if reference:
            with policy.reference() as network:
                return network(*inputs).sample
        with torch.no_grad():
            return policy.network(*inputs).sample

    start = predict(run.policy, reference=True)
    run.step(0)
    run.step(1)
    torch.testing.assert_close(predict(run.policy, reference=True), start, rtol=0, atol=0)
    after_two = predict(run.policy, reference=False)
    assert (after_two - start).abs().max() > 1e-4
    metrics = run.step(2)  # refreshed before it: winner and loser are where the reference is again
    torch.testing.assert_close(predict(run.policy, reference=True), after_two, rtol=0, atol=1e-6)
    assert metrics["loss"] == pytest.approx(np.log(2), abs=1e-4)


@pytest.mark.numerical
def test_the_average_is_what_is_exported(world: Path, tmp_path: Path) -> None:
    run = Run(plan_in(world, tmp_path, ema=0.999))
    name, weight = next((name, weight) for name, weight in run.policy.weights().items() if "lora_B" in name)
    average = weight.double().clone()
    history = []
    for step in range(3):
        history.append(run.step(step))
        average += (1 - (1 + step) / (10 + step)) * (weight.double() - average)
    run.finish(tmp_path, history)
    exported = load_file(next((tmp_path / "adapter").glob("*")))[f"unet.{name.replace('.policy', '')}"]
    torch.testing.assert_close(exported.double(), average, rtol=1e-5, atol=1e-8)
    assert (exported - weight).abs().max() > 1e-5  # and the policy holds its own again


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_gradients_are_clipped_under_every_optimizer(
    world: Path, tmp_path: Path, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by Adafactor, whose own threshold is on the update."""
    run = Run(plan_in(world, tmp_path, optimizer=optimizer, max_grad_norm=1e-3))
    taken: list[float] = []
    inner = run.optimizer.optimizer
    step = inner.step

    def look(*args: Any, **options: Any) -> Any:
        taken.append(torch.nn.utils.get_total_norm([p.grad for p in run.policy.parameters()]).item())
        return step(*args, **options)

    monkeypatch.setattr(inner, "step", look)
    assert run.step(0)["grad_norm"] > 1e-3  # what is told is the norm before
    assert taken == [pytest.approx(1e-3, rel=1e-3)]


def test_held_out_pairs_are_looked_at_and_never_trained_on(world: Path, tmp_path: Path) -> None:
    run = Run(plan_in(world, tmp_path, heldout_share=0.3, heldout_every=2))
    held, count = run.pairs.heldout, len(run.pairs)
    assert held > 0 and held + count == 12
    everyone = PreferencePairs(world / "pairs")
    ids = {everyone.read([(0, index)]).draws[0][0] for index in range(12)}
    kept_back = {run.pairs.read([(0, count + index)]).draws[0][0] for index in range(held)}
    trained_on = {
        run.pairs.read([place]).draws[0][0] for step in range(20) for place in positions_of_step(step, 4, count, 0)
    }
    assert trained_on == ids - kept_back
    history = [run.step(step) for step in range(3)]
    assert ["heldout_implicit_accuracy" in metrics for metrics in history] == [False, True, False]
    assert run.look_at_heldout() == run.look_at_heldout()  # always the same draws
    assert all(parameter.grad is None for parameter in run.policy.parameters())


def test_a_share_may_hold_back_nothing_but_not_everything(world: Path, tmp_path: Path) -> None:
    run = Run(plan_in(world, tmp_path, heldout_share=1e-9))
    assert run.pairs.heldout == 0 and "heldout_loss" not in run.step(49)
    with pytest.raises(ShardError, match=r"heldout_share=0.99999: holds back 12 of the 12 pairs"):
        PreferencePairs(Path(run.plan.pairs), 0.99999)


def test_dropped_prompts_are_dropped_for_both_sides_at_the_rate_asked_for(world: Path, tmp_path: Path) -> None:
    run = Run(plan_in(world, tmp_path, prompt_dropout=0.25))
    seen: list[torch.Tensor] = []
    run.policy.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2]))
    for epoch in range(16):
        run.loss(run.pairs.read([(epoch, index) for index in range(12)]))
    winners, losers = torch.cat([prompts.chunk(2)[0] for prompts in seen]), torch.cat([p.chunk(2)[1] for p in seen])
    assert torch.equal(winners, losers)
    empty = embed_negative(run.plan.model).tokens[0]
    share = (winners == empty).flatten(1).all(1).float().mean().item()
    assert share == pytest.approx(0.25, abs=0.13)  # 192 draws, each seen by both networks: 4 standard errors


@pytest.mark.numerical
def test_accumulation_over_uneven_passes_is_one_batch(world: Path, tmp_path: Path) -> None:
    runs = [Run(plan_in(world, tmp_path, batch_size=5, micro_batch_size=size, max_grad_norm=1e9)) for size in (5, 2)]
    assert [len(batch.draws) for batch in runs[1]._batches(0)] == [2, 2, 1]
    metrics = [run.step(0) for run in runs]
    assert metrics[0]["grad_norm"] == pytest.approx(metrics[1]["grad_norm"], rel=1e-4)


@given(count=st.integers(1, 40), processes=st.integers(1, 9))
def test_processes_read_equally_many_and_count_each_place_once(count: int, processes: int) -> None:
    """Or those with fewer forward passes would leave the others waiting, and a mean would depend on their number."""
    places = [(-1, index) for index in range(count)]
    shares = [share_of(places, process, processes) for process in range(processes)]
    assert len({len(read) for read, _ in shares}) == 1
    assert sorted(place for read, counting in shares for place in read[:counting]) == sorted(places)


def test_two_processes_train_what_one_does(world: Path, tmp_path: Path) -> None:
    """gloo on two CPU processes; with kept reference errors and held-out pairs, whose sums cross the processes."""
    changes: dict[str, Any] = {"steps": 4, "noise_draws": 1, "heldout_share": 0.3, "heldout_every": 2, "beta": 200.0}
    changes["max_grad_norm"] = 1e-2  # Adam's epsilon then hides what rounding does where a gradient is next to nothing
    seen: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    for processes in (1, 2):
        plan = plan_in(world, tmp_path / str(processes), micro_batch_size=2 // processes, **changes)
        launch(plan, processes, lambda step, metrics, own=seen[processes]: own.append(metrics))  # type: ignore[misc]
    one, two = (load_file(next((tmp_path / name / "adapter").glob("*"))) for name in ("1", "2"))
    assert max((one[key] - two[key]).abs().max().item() for key in one) < 1e-5
    assert [metrics["step"] for metrics in seen[2]] == [1, 2, 3, 4]
    kept = [load_file(tmp_path / name / "checkpoint-000004" / "reference_errors.safetensors") for name in ("1", "2")]
    torch.testing.assert_close(*(each["values"] for each in kept), rtol=1e-4, atol=1e-5, equal_nan=True)
    for name in ("loss", "grad_norm", "winner_error_delta", "heldout_implicit_accuracy"):
        told = [[metrics.get(name) for metrics in seen[processes]] for processes in (1, 2)]
        allowed = of_errors(1.5, 256) if name.endswith("delta") else of_margins(100.0, 1.5, 256)
        assert told[1] == [value if value is None else pytest.approx(value, rel=0, abs=allowed) for value in told[0]]


def test_a_process_that_fails_says_why(world: Path, tmp_path: Path) -> None:
    plan = plan_in(world, tmp_path, pairs=str(tmp_path / "nowhere"))
    with pytest.raises(launching.TrainingFailed, match="nowhere"):
        launch(plan, 2, lambda step, metrics: None)


def test_divergence_in_a_process_is_told_as_such(tmp_path: Path) -> None:
    raised = "[rank0]:     raise TrainingDiverged(self._stopped())"
    (tmp_path / "log").write_text(
        f"x\n{raised}\n[rank0]: training.loop.diagnostics.TrainingDiverged: step 3: loss nan.\n"
    )
    error = launching._failure(tmp_path / "log")
    assert isinstance(error, TrainingDiverged) and str(error) == "step 3: loss nan."


@pytest.mark.parametrize(
    ("asked", "device", "batch", "message"),
    [(3, "auto", 8, "multiple of execution.processes=3"), (2, "cuda:1", 8, "is a single one; use 'cuda'")],
)
def test_processes_that_cannot_be_are_refused(asked: int, device: str, batch: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        process_count(asked, device, batch)


def test_a_plan_survives_its_file(world: Path, tmp_path: Path) -> None:
    plan = plan_in(world, tmp_path, noise_draws=3, trackers=["tensorboard"])
    plan.write(tmp_path / "plan.json")
    assert TrainingPlan.read(tmp_path / "plan.json") == plan


def test_an_offloaded_reference_is_the_same(world: Path, tmp_path: Path) -> None:
    metrics = [Run(plan_in(world, tmp_path, method="full", offload_reference=off)).step(0) for off in (False, True)]
    assert metrics[0]["grad_norm"] == metrics[1]["grad_norm"]


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.numerical
def test_gradient_checkpointing_changes_no_gradient(world: Path, tmp_path: Path, method: str) -> None:
    runs = [Run(plan_in(world, tmp_path, method=method, gradient_checkpointing=on)) for on in (False, True)]
    metrics = [run.step(0) for run in runs]
    assert metrics[0]["grad_norm"] == pytest.approx(metrics[1]["grad_norm"], rel=1e-5)
    assert any(getattr(module, "gradient_checkpointing", False) for module in runs[1].policy.network.modules())


def test_the_policy_moves_and_the_first_reference_does_not(world: Path, tmp_path: Path) -> None:
    """With an adapter as reference from the start: it is the one with the policy's first weights."""
    plan = plan_in(world, tmp_path, refresh_reference=100)
    run = Run(plan)
    assert isinstance(run.policy, LoraPolicy)
    before = copy.deepcopy(run.policy.reference_weights())
    run.step(0)
    assert all(torch.equal(before[name], tensor) for name, tensor in run.policy.reference_weights().items())
    assert run.loss(run.pairs.read([(0, 0)])).metrics["margin"].item() != 0


@pytest.mark.parametrize(
    ("loss", "refresh", "copied"), [("dpo", 0, True), ("sft", 0, False), ("mapo", 0, False), ("sft", 3, True)]
)
def test_a_full_training_copies_the_network_only_where_a_reference_is_asked_for(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str, refresh: int, copied: bool
) -> None:
    made: list[object] = []
    monkeypatch.setattr(
        "training.loop.full_policy.deepcopy", lambda network: made.append(network) or copy.deepcopy(network)
    )
    run = Run(plan_in(world, tmp_path, method="full", loss=loss, refresh_reference=refresh))
    assert len(made) == copied
    assert run.step(0)["grad_norm"] > 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_compiled_blocks_train_as_eager_ones_and_resume(world: Path, tmp_path: Path, method: str) -> None:
    """With every variant compiled: none falls back after the compiler's limit of them."""
    options: dict[str, object] = {"method": method, "beta": 200.0, "compile": True}
    eager, compiled = (Run(plan_in(world, tmp_path, **{**options, "compile": on})) for on in (False, True))
    assert any(module._compiled_call_impl is not None for module in compiled.policy.network.modules())
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for run in (eager, compiled):
            run.loss(run.pairs.read(positions_of_step(0, 4, 12, 0))).loss.mean().backward()
        for wanted, found in zip(eager.policy.parameters(), compiled.policy.parameters(), strict=True):
            torch.testing.assert_close(known_grad(found), known_grad(wanted), rtol=1e-3, atol=1e-5)
        steps = [[run.step(step) for step in range(2)] for run in (eager, compiled)]
        for name in ("loss", "grad_norm", "winner_error_delta", "loser_error_delta"):
            values = [[metrics[name] for metrics in each] for each in steps]
            assert values[1] == pytest.approx(values[0], rel=1e-3, abs=1e-5), name
        train(plan_in(world, tmp_path / "whole", **options))
        plan = plan_in(world, tmp_path / "cut", **options)
        with pytest.raises(Cut):
            train(plan, cut_at(5))
        train(plan)
    whole, cut = all_tensors(tmp_path / "whole"), all_tensors(tmp_path / "cut")
    assert all(torch.equal(whole[key], cut[key]) for key in whole) and len(whole) > 10


def known_grad(parameter: torch.nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad
