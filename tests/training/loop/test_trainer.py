"""The training loop: start, direction, invariance, resume, and what it hands over."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import load_file, save_file

from data.shards import ShardError
from tests.rounding import of_margins
from tests.training.worlds import make_plan
from training.adapter.lora import ATTENTION, Lora
from training.loop.checkpoint import CheckpointRecord, checkpoints
from training.loop.dataset import PreferencePairs, positions_of_step
from training.loop.diagnostics import TrainingDiverged
from training.loop.full_policy import FullPolicy
from training.loop.lora_policy import LoraPolicy
from training.loop.run import Run
from training.loop.trainer import train
from training.loss.errors import LossOutput, PairErrors
from training.loss.table import preference_loss
from training.model.loading import fuse_adapter, load_network, load_pipeline
from training.model.reference import ADAPTER_FILE, ModelError, ModelRef
from training.plan import TrainingPlan

pytestmark = pytest.mark.numerical


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    make_plan(folder)
    return folder


def plan_in(world: Path, output: Path, **changes: Any) -> TrainingPlan:
    return make_plan(world, output=str(output), **changes)


def weights_of(output: Path) -> dict[str, torch.Tensor]:
    return load_file(next((output / "adapter").glob("*.safetensors")))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_first_step_has_zero_margin_and_loss_ln_2(world: Path, tmp_path: Path, method: str) -> None:
    seen: list[dict[str, float]] = []
    train(plan_in(world, tmp_path, method=method, steps=1), lambda step, metrics: seen.append(metrics))
    assert seen[0]["margin"] == 0.0
    assert seen[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert seen[0]["implicit_accuracy"] == 0.5


@pytest.mark.parametrize("method", ["lora", "full"])
def test_one_step_lowers_the_winners_error_relative_to_the_losers(world: Path, tmp_path: Path, method: str) -> None:
    run = Run(plan_in(world, tmp_path, method=method, learning_rate=1e-3, batch_size=12, micro_batch_size=12))
    positions = positions_of_step(0, 12, 12, 0)
    run.step(0)
    metrics = run.loss(run.pairs.read(positions)).metrics  # the same pairs, noise and timesteps again
    assert metrics["winner_error_delta"].mean() < metrics["loser_error_delta"].mean()


def test_micro_batches_change_neither_loss_nor_gradient(world: Path, tmp_path: Path) -> None:
    """The gradient's norm is compared, since AdamW would hide a wrong scale."""
    changes: dict[str, Any] = {"beta": 200.0, "learning_rate": 1e-2}
    runs = [Run(plan_in(world, tmp_path, micro_batch_size=size, **changes)) for size in (1, 3, 4)]
    allowed = of_margins(100.0, 1.5, 256)
    for step in range(2):
        first, *others = (run.step(step) for run in runs)
        for metrics in others:
            assert metrics["loss"] == pytest.approx(first["loss"], rel=0, abs=allowed), step
            assert metrics["grad_norm"] == pytest.approx(first["grad_norm"], rel=2 * allowed), step
            assert metrics["implicit_accuracy"] == first["implicit_accuracy"], step


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_resumed_run_is_bit_equal_to_an_undisturbed_one(world: Path, tmp_path: Path, method: str) -> None:
    kind = "adapter" if method == "lora" else "unet"
    whole = train(plan_in(world, tmp_path / "whole", method=method))
    plan = plan_in(world, tmp_path / "cut", method=method)

    class Cut(RuntimeError):
        pass

    def stop(step: int, metrics: dict[str, float]) -> None:
        if step == 5:  # one step after the checkpoint of step 4: that step is done again
            raise Cut

    with pytest.raises(Cut):
        train(plan, stop)
    assert not (tmp_path / "cut" / kind).exists()
    steps: list[int] = []
    resumed = train(plan, lambda step, metrics: steps.append(step))
    assert steps == [5, 6]
    assert resumed.sha256 == whole.sha256
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "cut")]
    losses = [[json.loads(line)["loss"] for line in side] for side in lines]
    assert losses[0] == losses[1]


def test_a_finished_training_is_not_done_again(world: Path, tmp_path: Path) -> None:
    plan = plan_in(world, tmp_path)
    first = train(plan)
    assert train(plan, lambda *_: pytest.fail("trained again")) == first == CheckpointRecord.read(tmp_path)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-000004", "checkpoint-000006"]


def test_the_adapter_loads_in_plain_diffusers_and_changes_the_picture(world: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    train(plan_in(world, tmp_path, learning_rate=3e-2, lora=Lora(4, 8.0)))
    pipeline = StableDiffusionPipeline.from_pretrained(world / "base", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)

    def picture() -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        return np.asarray(pipeline("a thing", num_inference_steps=2, generator=generator, output_type="np").images[0])

    before = picture()
    pipeline.load_lora_weights(tmp_path / "adapter", weight_name=ADAPTER_FILE)
    after = picture()
    assert np.abs(after - before).max() > 1e-3
    ours = load_pipeline(ModelRef(str(world / "base"), adapter=str(tmp_path / "adapter")))
    generator = torch.Generator().manual_seed(0)
    fused = np.asarray(ours("a thing", num_inference_steps=2, generator=generator, output_type="np").images[0])
    np.testing.assert_allclose(fused, after, atol=2e-5)  # alpha 8 at rank 4: the scale of 2 came along


def test_the_adapter_comes_back_whole_whatever_it_was_trained_on(world: Path, tmp_path: Path) -> None:
    """Attention and other layers together: diffusers must find every one of them in the file again."""
    targets = ["to_q", "to_out.0", "proj_in", "ff.net.2", "conv1", "conv2"]
    policy = LoraPolicy(ModelRef(str(world / "base")), Lora(4, 8.0, targets), "cpu", "auto", 0)
    torch.manual_seed(1)
    for tensor in policy.weights().values():
        tensor.copy_(torch.randn_like(tensor) * 0.1)
    policy.export(tmp_path, policy.weights())
    loaded = load_network(ModelRef(str(world / "base")))
    fuse_adapter(loaded, str(tmp_path), "unet")
    inputs = (torch.ones(1, 4, 8, 8), 5, torch.ones(1, 77, 16))
    with torch.no_grad():
        wanted, found = (unet.eval()(*inputs).sample for unet in (policy.network, loaded))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_training_from_a_champion_starts_at_it_and_keeps_it_as_reference(world: Path, tmp_path: Path) -> None:
    train(plan_in(world, tmp_path / "first", learning_rate=1e-2))
    champion = ModelRef(str(world / "base"), adapter=str(tmp_path / "first" / "adapter"))
    plan = plan_in(world, tmp_path / "second", model=champion, learning_rate=1e-2)
    run = Run(plan)
    batch = run.pairs.read(positions_of_step(0, 4, 12, 0))
    assert run.loss(batch).metrics["margin"].tolist() == [0.0] * 4
    with run.policy.reference() as unet:
        before = unet(torch.ones(1, 4, 8, 8), 5, torch.ones(1, 77, 16)).sample
    for step in range(3):
        run.step(step)
    with run.policy.reference() as unet:
        after = unet(torch.ones(1, 4, 8, 8), 5, torch.ones(1, 77, 16)).sample
    torch.testing.assert_close(before, after, rtol=0, atol=0)  # the reference never moves
    assert run.loss(batch).metrics["margin"].abs().max() > 0
    base_only = LoraPolicy(ModelRef(str(world / "base")), Lora(4, 4.0), "cpu", "auto", 0)
    with base_only.reference() as unet:
        base = unet(torch.ones(1, 4, 8, 8), 5, torch.ones(1, 77, 16)).sample
    assert (base - before).abs().max() > 1e-4  # and it is the champion, not the base


def test_full_training_from_an_adapter_starts_at_the_fused_champion(world: Path, tmp_path: Path) -> None:
    train(plan_in(world, tmp_path, learning_rate=1e-2))
    champion = ModelRef(str(world / "base"), adapter=str(tmp_path / "adapter"))
    full = FullPolicy(champion, "cpu").network
    lora = LoraPolicy(champion, Lora(4, 4.0), "cpu", "auto", 0).network
    inputs = (torch.ones(1, 4, 8, 8), 5, torch.ones(1, 77, 16))
    torch.testing.assert_close(full(*inputs).sample, lora(*inputs).sample, rtol=1e-4, atol=1e-5)
    assert not any("lora" in name for name, _ in full.named_parameters())


def test_another_shape_than_the_champions_is_refused(world: Path, tmp_path: Path) -> None:
    train(plan_in(world, tmp_path, steps=1))
    champion = ModelRef(str(world / "base"), adapter=str(tmp_path / "adapter"))
    for other, message in [
        (Lora(8, 8.0), r"rank \[4\] and alpha 4, but training\.lora_rank=8"),
        (Lora(4, 4.0, dora=True), r"is no DoRA, but training\.lora_dora=True"),
        (
            Lora(4, 4.0, ["to_q", "to_v"]),
            r"32 layers .*'to_k', .*lora_targets=\['to_q', 'to_v'\] means 16",
        ),
        (Lora(4, 4.0, [*ATTENTION, "proj_in"]), r"32 layers .*lora_targets=.*'proj_in'\] means 36, .*proj_in' among"),
    ]:
        with pytest.raises(ModelError, match=message):
            LoraPolicy(champion, other, "cpu", "auto", 0)
    LoraPolicy(champion, Lora(4, 4.0, ATTENTION[::-1]), "cpu", "auto", 0)  # their order means nothing


def test_a_champion_is_not_rounded_by_a_half_precision_base(world: Path, tmp_path: Path) -> None:
    train(plan_in(world, tmp_path, steps=2))
    saved = sorted(load_file(tmp_path / "adapter" / ADAPTER_FILE).values(), key=lambda t: (t.shape, t.sum().item()))
    champion = ModelRef(str(world / "base"), adapter=str(tmp_path / "adapter"))
    policy = LoraPolicy(champion, Lora(4, 4.0), "cpu", "bfloat16", 0)
    loaded = sorted(policy.weights().values(), key=lambda t: (t.shape, t.sum().item()))
    for ours, theirs in zip(loaded, saved, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_an_overflowed_step_is_noticed_and_skipped(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float16 training scales the loss; the scaler is torch's own, on the CPU."""
    run = Run(plan_in(world, tmp_path, mixed_precision="no"))
    plain = torch.optim.AdamW(run.policy.parameters(), lr=1e-3)
    run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=3e38)
    run.accelerator.native_amp = True
    run.optimizer = AcceleratedOptimizer(plain, scaler=run.accelerator.scaler)
    run.accelerator._optimizers = [run.optimizer]
    before = {name: tensor.clone() for name, tensor in run.policy.weights().items()}
    metrics = run.step(0)
    assert metrics["skipped"] == 1.0 and metrics["grad_norm"] == 0.0
    for name, tensor in run.policy.weights().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_metrics_cut_short_by_a_kill_do_not_stop_the_resume(world: Path, tmp_path: Path) -> None:
    """Checkpoints at 2, 4, 6 but only three whole lines: it goes on from step 2."""
    train(plan_in(world, tmp_path))
    (tmp_path / "checkpoint.json").unlink()
    (tmp_path / "checkpoint-000004").rename(tmp_path / "checkpoint-000002")
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines[:3]) + "\n" + lines[3][:10])
    steps: list[int] = []
    train(plan_in(world, tmp_path), lambda step, metrics: steps.append(step))
    assert steps == [3, 4, 5, 6]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6


def test_adapter_weights_train_in_float32_under_a_half_precision_base(world: Path) -> None:
    policy = LoraPolicy(ModelRef(str(world / "base")), Lora(4, 4.0), "cpu", "bfloat16", 0)
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert policy.network.conv_in.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("method", ["lora", "full"])
def test_mixed_precision_still_starts_at_ln_2_and_moves_the_right_way(world: Path, tmp_path: Path, method: str) -> None:
    plan = plan_in(world, tmp_path, method=method, mixed_precision="bf16", batch_size=12, micro_batch_size=6)
    run = Run(plan)
    first = run.step(0)
    assert first["margin"] == 0.0, "reference and policy are the same network in the same precision"
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and first["skipped"] == 0.0
    assert all(p.dtype == torch.float32 for p in run.policy.parameters())
    metrics = run.loss(run.pairs.read(positions_of_step(0, 12, 12, 0))).metrics
    assert metrics["winner_error_delta"].mean() < metrics["loser_error_delta"].mean()


def test_divergence_stops_the_run_and_keeps_the_last_good_checkpoint(world: Path, tmp_path: Path) -> None:
    plan = plan_in(world, tmp_path, checkpoint_every=1)
    broken = tmp_path / "checkpoint-000002" / "weights.safetensors"

    class Cut(RuntimeError):
        pass

    def stop(step: int, metrics: dict[str, float]) -> None:
        if step == 3:
            raise Cut

    with pytest.raises(Cut):
        train(plan, stop)
    poisoned = {name: torch.full_like(tensor, torch.nan) for name, tensor in load_file(broken).items()}
    save_file(poisoned, broken)
    with pytest.raises(TrainingDiverged, match=r"step 3: loss nan.*learning_rate"):
        train(plan)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-000001", "checkpoint-000002"]


def test_pairs_come_in_epochs_that_are_permutations() -> None:
    steps = [positions_of_step(step, 5, 12, seed=3) for step in range(12)]
    flat = [position for step in steps for position in step]
    for epoch in range(5):
        assert sorted(index for e, index in flat if e == epoch) == list(range(12))
    assert [i for e, i in flat if e == 0] != [i for e, i in flat if e == 1]


def test_the_winner_is_the_side_labelled_one(world: Path) -> None:
    from data.columns import latents
    from data.shards import read_shard

    pairs = PreferencePairs(world / "pairs")
    table = read_shard(world / "pairs" / "00000-of-00002.arrow")
    batch = pairs.read([(0, row) for row in range(table.num_rows)])
    for row, label in enumerate(table["label_0"].to_pylist()):
        winner = latents(table[f"latent_{0 if label == 1.0 else 1}"])[row].astype(np.float32)
        np.testing.assert_array_equal(batch.winner[row].flatten().numpy(), winner)


def test_a_folder_without_a_seal_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="no manifest"):
        PreferencePairs(tmp_path)


def test_winner_and_loser_share_noise_and_timestep(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With equal latents on both sides the errors must be equal to the last bit; other noise would show."""
    run = Run(plan_in(world, tmp_path))
    batch = run.pairs.read(positions_of_step(0, 4, 12, 0))
    same = batch._replace(loser=batch.winner)
    captured: list[PairErrors] = []

    def spy(name: str, errors: PairErrors, *rest: Any) -> LossOutput:
        captured.append(errors)
        return preference_loss(name, errors, *rest)

    monkeypatch.setattr("training.loop.pair_loss.preference_loss", spy)
    run.loss(same)
    errors = captured[0]
    torch.testing.assert_close(errors.policy_winner, errors.policy_loser, rtol=1e-6, atol=0)
    assert errors.policy_winner.unique().numel() == 4  # pairs differ among themselves
