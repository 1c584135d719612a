"""Text encoders that are trained together with the network: start, direction, invariance, resume, and what is handed
over."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data.safetensors_file import read_header
from tests.families import FamilyBases
from tests.rounding import of_margins
from tests.training.adapters import draw, load, save_base
from tests.training.loop.test_family_training import SHAPES, picture
from tests.training.together import train_in_two
from tests.training.worlds import make_plan
from training.adapter.lora import Lora
from training.adapter.shape import adapted_encoders, check_encoders
from training.export.kohya import Base, write_kohya
from training.export.merge import merge
from training.export.outputs import write_outputs
from training.loop.dataset import PairBatch, positions_of_step
from training.loop.full_policy import FullPolicy
from training.loop.lora_policy import LoraPolicy
from training.loop.run import Run
from training.loop.trainer import train
from training.model.families import family_for
from training.model.family import PromptEmbeddings
from training.model.loading import embed_negative, load_encoders, load_pipeline
from training.model.reference import ADAPTER_FILE, ModelError, ModelRef
from training.model.sampling import negative_prompt
from training.plan import TrainingPlan

NAMES = ["sd", "sdxl", "sd3", "flux-dev"]
ENCODERS = {"sd": 1, "sdxl": 2, "sd3": 2, "flux-dev": 1}


class Worlds:
    """A tiny base and pairs of each family, saved when they are asked for."""

    def __init__(self, folder: Path, bases: FamilyBases) -> None:
        self._folder, self._bases = folder, bases

    def plan(self, name: str, output: Path, **changes: Any) -> TrainingPlan:
        folder = self._folder / name
        folder.mkdir(exist_ok=True)
        if name != "sd" and not (folder / "base").exists():
            (folder / "base").symlink_to(self._bases.folder(name))
        values = {"text_encoders": True, "guidance_input": 3.5 if name == "flux-dev" else 1.0, **changes}
        return make_plan(folder, SHAPES.get(name), output=str(output), **values)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory, bases: FamilyBases) -> Worlds:
    return Worlds(tmp_path_factory.mktemp("text"), bases)


def batch_of(run: Run) -> PairBatch:
    """All twelve pairs."""
    return run.pairs.read(positions_of_step(0, 12, 12, 0))


def copied(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def of_encoders(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith("text_encoder")}


def embedded(run: Run, batch: PairBatch, reference: bool = False) -> PromptEmbeddings:
    """What the network is told of the prompts of a batch, winners first."""
    inputs = run.loss._inputs(batch, [epoch for _, epoch in batch.draws], 2)
    if reference:
        with run.policy.reference():
            return run.loss._embed(run.policy.encoders, inputs).conditions.prompts
    with torch.no_grad():
        return run.loss._embed(run.encoders, inputs).conditions.prompts


def known(value: torch.Tensor | None) -> torch.Tensor:
    assert value is not None
    return value


def assert_same(ours: PromptEmbeddings, theirs: PromptEmbeddings, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours.tokens.float(), theirs.tokens.float(), rtol=tolerance, atol=tolerance)
    if ours.pooled is not None:
        torch.testing.assert_close(ours.pooled.float(), known(theirs.pooled).float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_the_policy_starts_at_the_reference_and_its_encoders_move_the_right_way(
    worlds: Worlds, tmp_path: Path, name: str
) -> None:
    """Also by themselves: with the network's adapter put back, the encoders' step alone lowers the winners' errors."""
    run = Run(worlds.plan(name, tmp_path, batch_size=12, micro_batch_size=12))
    before, batch = copied(run.policy.weights()), batch_of(run)
    first = run.loss(batch)
    first.loss.sum().backward()
    # Several processes would wait for ever for a gradient that never comes.
    assert all(parameter.grad is not None for parameter in run.policy.parameters())
    run.optimizer.zero_grad()
    assert first.metrics["margin"].tolist() == [0.0] * 12
    metrics = run.step(0)
    assert metrics["margin"] == 0.0 and metrics["loss"] == pytest.approx(math.log(2), abs=1e-7)
    moved = {key for key, tensor in of_encoders(run.policy.weights()).items() if not torch.equal(tensor, before[key])}
    assert len({key.split(".")[0] for key in moved}) == ENCODERS[name]
    run.policy.load({key: tensor for key, tensor in before.items() if not key.startswith("text_encoder")})
    after = run.loss(batch).metrics
    assert after["margin"].abs().max() > 0
    assert after["winner_error_delta"].mean() < after["loser_error_delta"].mean()


@pytest.mark.parametrize("name", [*NAMES, "sd3-no-t5"])
def test_both_sides_are_told_what_the_pipeline_makes_of_the_caption(
    worlds: Worlds, bases: FamilyBases, tmp_path: Path, name: str
) -> None:
    """T5's part is the shards'; theirs is random here, so that anything else would show."""
    run = Run(worlds.plan(name, tmp_path))
    batch = batch_of(run)
    assert len(set(batch.captions)) == 12
    told = embedded(run, batch)
    winners, losers = told[:12], told[12:]
    assert torch.equal(winners.tokens, losers.tokens)
    pipeline = load_pipeline(run.plan.model)
    with torch.no_grad():
        expected = family_for(run.plan.model).embed(pipeline, batch.captions)
    if name.startswith("sd3"):
        expected = replace(expected, tokens=torch.cat([expected.tokens[:, :77], batch.prompts.tokens[:, 77:]], 1))
    if name == "flux-dev":
        expected = replace(expected, tokens=batch.prompts.tokens)
    assert_same(winners, expected)
    assert name == "sd" or torch.equal(known(winners.pooled), known(losers.pooled))
    assert (winners.tokens[0] - winners.tokens[1]).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "changes"), [
    ("sdxl", {"mixed_precision": "bf16", "lora": Lora(4, 8.0, dora=True)}), ("sd", {"refresh_reference": 1}),
    ("sd3", {"mixed_precision": "bf16"}), ("sd", {"loss": "sdpo", "error_space": "velocity"}),
], ids=str)  # fmt: skip
def test_the_margin_is_zero_at_the_start_whatever_else_is_asked_for(
    worlds: Worlds, tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    run = Run(worlds.plan(name, tmp_path, **changes))
    first = run.step(0)
    assert first["margin"] == 0.0 and first["grad_norm"] > 0
    assert {parameter.dtype for parameter in run.policy.parameters()} == {torch.float32}
    second = run.step(1)
    # The reference is refreshed before it, network and encoders.
    assert (abs(second["margin"]) < 1e-3) == ("refresh_reference" in changes)


@pytest.mark.numerical
def test_micro_batches_change_neither_loss_nor_gradient(worlds: Worlds, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"prompt_dropout": 0.3, "beta": 200.0, "learning_rate": 1e-2}
    runs = [Run(worlds.plan("sdxl", tmp_path, micro_batch_size=size, **changes)) for size in (1, 3)]
    allowed = of_margins(100.0, 1.5, 256)
    for step in range(2):
        one, three = (run.step(step) for run in runs)
        assert one["loss"] == pytest.approx(three["loss"], rel=0, abs=allowed), step
        assert one["grad_norm"] == pytest.approx(three["grad_norm"], rel=2 * allowed), step
        assert one["implicit_accuracy"] == three["implicit_accuracy"], step


@pytest.mark.numerical
def test_kept_reference_errors_are_those_of_the_reference(worlds: Worlds, tmp_path: Path) -> None:
    """The reference's embeddings do not move, whatever the policy's do. Also where a batch is known in part."""
    run = Run(worlds.plan("sd", tmp_path, noise_draws=1, beta=200.0, learning_rate=1e-2))
    run.step(0)
    seen = [index for _, index in positions_of_step(0, 4, 12, 0)]
    unseen = next(index for index in range(12) if index not in seen)
    batch = run.pairs.read([(0, seen[0]), (0, unseen), (0, seen[1])])
    found = run.loss(batch)
    run.loss.kept = None
    fresh = run.loss(batch)
    allowed = of_margins(100.0, 1.5, 256)
    torch.testing.assert_close(found.metrics["margin"], fresh.metrics["margin"], rtol=0, atol=allowed)
    assert fresh.metrics["margin"].abs().max() > 100 * allowed


def test_a_resumed_run_is_bit_equal(worlds: Worlds, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"ema": 0.9, "refresh_reference": 3, "prompt_dropout": 0.3, "beta": 200.0}
    whole = train(worlds.plan("sd", tmp_path / "whole", **changes))

    class Cut(RuntimeError):
        pass

    def stop(step: int, metrics: dict[str, float]) -> None:
        if step == 5:
            raise Cut

    plan = worlds.plan("sd", tmp_path / "cut", **changes)
    with pytest.raises(Cut):
        train(plan, stop)
    assert train(plan).sha256 == whole.sha256
    for file in ("weights", "reference"):
        one, two = (
            load_file(tmp_path / side / "checkpoint-000006" / f"{file}.safetensors") for side in ("whole", "cut")
        )
        assert one.keys() == two.keys() and of_encoders(one)
        assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.numerical
def test_two_processes_train_what_one_does(worlds: Worlds, tmp_path: Path) -> None:
    """gloo, two passes a step in each: gradients of the encoders are gathered and averaged like the network's.

    The norms, from before they are clipped, tell more than the weights: Adam divides by what a wrong scale would
    multiply. Clipped so far, its epsilon hides what rounding does where a gradient is next to nothing.
    """
    changes: dict[str, Any] = {"micro_batch_size": 1, "steps": 2, "max_grad_norm": 1e-2, "beta": 200.0}
    alone: list[float] = []
    train(worlds.plan("sdxl", tmp_path / "1", **changes), lambda _, metrics: alone.append(metrics["grad_norm"]))
    together = [metrics["grad_norm"] for metrics in train_in_two(worlds.plan("sdxl", tmp_path / "2", **changes))]
    one, two = (load_file(tmp_path / name / "adapter" / ADAPTER_FILE) for name in ("1", "2"))
    assert max((one[key] - two[key]).abs().max().item() for key in one) < 1e-4  # a tenth of a step
    assert max((tensor - two[key]).abs().max().item() for key, tensor in of_encoders(one).items()) < 1e-5
    assert together == pytest.approx(alone, rel=2 * of_margins(100.0, 1.5, 256))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.numerical
def test_the_adapter_loads_in_plain_diffusers_and_starts_the_next_training(
    worlds: Worlds, bases: FamilyBases, tmp_path: Path, name: str
) -> None:
    """One picture from the plain pipeline, ours and the merged one; the next run's policy and reference embed so."""
    lora = Lora(4, 8.0, dora=name == "sd3")
    plan = worlds.plan(name, tmp_path / "out", steps=2, learning_rate=3e-2, beta=20.0, lora=lora)
    record = train(plan)
    file = tmp_path / "out" / "adapter" / ADAPTER_FILE
    assert len(adapted_encoders(str(file.parent))) == ENCODERS[name]
    assert str(worlds._folder) not in "".join(read_header(file).values())  # transformers notes where a base lay
    plain = plain_pipeline(plan.model)
    before = picture(plain)
    plain.load_lora_weights(file.parent, weight_name=ADAPTER_FILE)
    after = picture(plain)
    assert np.abs(after - before).max() > 1e-3
    ours = load_pipeline(record.model)
    np.testing.assert_allclose(picture(ours), after, atol=1e-4)
    if not lora.dora:
        merged = plain_pipeline(ModelRef(str(merge(record.model, tmp_path / "merged"))))
        np.testing.assert_allclose(picture(merged), after, atol=1e-4)
    without = replace(record.model, adapter=str(without_encoders(file, tmp_path / "without")))
    assert np.abs(picture(load_pipeline(without)) - after).max() > 1e-4, "the encoders' part must matter"
    run = Run(plan.changed(model=record.model, output=str(tmp_path / "second")))
    batch = batch_of(run)
    with torch.no_grad():
        tuned = family_for(plan.model).embed_anew(ours, batch.captions, batch.prompts)
    for reference in (False, True):
        assert_same(embedded(run, batch, reference)[:12], tuned, 1e-4)
    assert run.loss(batch).metrics["margin"].tolist() == [0.0] * 12
    run.step(0)
    assert_same(embedded(run, batch, reference=True)[:12], tuned, 1e-4)
    assert run.loss(batch).metrics["margin"].abs().max() > 0


def plain_pipeline(ref: ModelRef) -> Any:
    """As a user of diffusers has it."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(ref.base)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def without_encoders(file: Path, folder: Path) -> Path:
    """The same adapter without its part for the text encoders."""
    folder.mkdir()
    tensors = {key: tensor for key, tensor in load_file(file).items() if not key.startswith("text_encoder")}
    save_file(tensors, folder / ADAPTER_FILE, read_header(file))
    return folder


def test_a_champion_is_not_rounded_by_a_half_precision_base(worlds: Worlds, tmp_path: Path) -> None:
    plan = worlds.plan("sdxl", tmp_path, steps=2)
    record = train(plan)
    saved = of_encoders(load_file(tmp_path / "adapter" / ADAPTER_FILE))
    policy = LoraPolicy(record.model, plan.training.lora(), "cpu", "bfloat16", 0, text_encoders=True)
    policy.export(tmp_path / "again", policy.weights())
    again = of_encoders(load_file(tmp_path / "again" / ADAPTER_FILE))
    assert saved.keys() == again.keys() and all(torch.equal(saved[key], again[key]) for key in saved)


def test_a_champion_that_left_the_encoders_alone_is_gone_on_with(worlds: Worlds, tmp_path: Path) -> None:
    """The encoders start at the base's, which are the reference's for ever."""
    record = train(worlds.plan("sd", tmp_path / "first", steps=2, learning_rate=1e-2, text_encoders=False))
    run = Run(worlds.plan("sd", tmp_path / "second", model=record.model, learning_rate=1e-2))
    batch = batch_of(run)
    start = embedded(run, batch, reference=True)
    assert run.loss(batch).metrics["margin"].tolist() == [0.0] * 12
    run.step(0)
    assert torch.equal(embedded(run, batch, reference=True).tokens, start.tokens)
    assert (embedded(run, batch).tokens - start.tokens).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["sd", "sdxl", "sdxl-words", "sd3"])
def test_dropped_prompts_are_empty_for_both_sides(worlds: Worlds, tmp_path: Path, name: str) -> None:
    """The same draws are dropped as without trained encoders; where the model knows zeros as empty, zeros."""
    run = Run(worlds.plan(name, tmp_path, prompt_dropout=0.3))
    empty = embed_negative(run.plan.model)
    assert (empty.tokens.abs().max() == 0) == (name == "sdxl")
    plain = Run(worlds.plan(name, tmp_path, prompt_dropout=0.3, text_encoders=False))
    gone = 0
    for epoch in range(4):
        batch = run.pairs.read([(epoch, index) for index in range(12)])
        told, kept = embedded(run, batch), embedded(plain, batch)
        assert torch.equal(told.tokens[:12], told.tokens[12:])
        for row in range(12):
            dropped = not torch.equal(kept.tokens[row], batch.prompts.tokens[row])
            alike = torch.allclose(told.tokens[row], empty.tokens[0], rtol=1e-3, atol=1e-3)
            if empty.pooled is not None:
                alike &= torch.allclose(known(told.pooled)[row], empty.pooled[0], rtol=1e-3, atol=1e-3)
            assert alike == dropped
            gone += dropped
    assert 4 < gone < 26


def test_an_empty_caption_is_not_the_empty_prompt(worlds: Worlds, tmp_path: Path) -> None:
    """SDXL was trained with zeros for no prompt, not for one without words."""
    run = Run(worlds.plan("sdxl", tmp_path))
    assert run.encoders is not None
    nothing, silent = run.encoders([None, ""], batch_of(run).prompts[:2]).tokens
    assert nothing.abs().max() == 0 and silent.abs().max() > 0


def test_what_embeds_for_a_tuned_model_is_tuned(worlds: Worlds, tmp_path: Path) -> None:
    """Wherever text encoders are loaded with an adapter, they have its part of them."""
    record = train(worlds.plan("sdxl-words", tmp_path, steps=2, learning_rate=3e-2, beta=20.0))
    base = replace(record.model, adapter=None)
    expected, untuned = negative_prompt(load_pipeline(record.model)), embed_negative(base)
    assert (expected.tokens.float() - untuned.tokens).abs().max() > 1e-2
    assert_same(embed_negative(record.model), expected, 1e-3)
    assert_same(negative_prompt(load_encoders(record.model)), expected, 1e-3)


def test_kohyas_keys_draw_the_same_picture_and_the_card_says_it(worlds: Worlds, tmp_path: Path) -> None:
    for kind, prefixes in (("sd", ["lora_te_"]), ("xl", ["lora_te1_", "lora_te2_"])):
        base = save_base(tmp_path, kind)
        policy = LoraPolicy(ModelRef(str(base)), Lora(4, 6.0), "cpu", "auto", 0, text_encoders=True)
        torch.manual_seed(1)
        for tensor in policy.weights().values():
            tensor.copy_(torch.randn_like(tensor) * 0.1)
        file, pipeline = policy.export(tmp_path / "adapters" / kind, policy.weights()), load(base)
        pipeline.load_lora_weights(file.parent, weight_name=file.name)
        wanted = draw(pipeline)
        pipeline.unload_lora_weights()
        kohya = write_kohya(file, tmp_path / "kohya" / f"{kind}.safetensors", Base.read(str(base)))
        pipeline.load_lora_weights(kohya.parent, weight_name=kohya.name)
        torch.testing.assert_close(draw(pipeline), wanted, rtol=0, atol=2e-5)
        for prefix in prefixes:
            assert f"{prefix}text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight" in load_file(kohya)
    plan = worlds.plan("sd", tmp_path / "trained", steps=1)
    train(plan)
    write_outputs(tmp_path / "trained", plan, Path(plan.pairs))
    assert "also tunes the text encoders" in (tmp_path / "trained" / "README.md").read_text()


def test_what_would_lose_text_encoders_is_refused(worlds: Worlds, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"training\.text_encoders=true: not with training\.method='full'.*lora"):
        Run(worlds.plan("sd", tmp_path, method="full", pairs="nowhere"))
    champion = train(worlds.plan("sd", tmp_path, steps=1)).model
    message = r"training\.text_encoders=false.*also changes text_encoder: that would be lost.*text_encoders=true"
    for method in ("lora", "full"):
        with pytest.raises(ModelError, match=message):
            Run(worlds.plan("sd", tmp_path, method=method, model=champion, text_encoders=False, pairs="nowhere"))
    with pytest.raises(ModelError, match=message):
        FullPolicy(champion, "cpu")
    other = {f"text_encoder_3.a.lora_{side}.weight": torch.zeros(1, 1) for side in "AB"}
    file = tmp_path / "adapter" / ADAPTER_FILE
    (tmp_path / "t5").mkdir()
    save_file(load_file(file) | other, tmp_path / "t5" / ADAPTER_FILE, read_header(file))
    for asked in (True, False):  # and no advice that would only lead to the other refusal
        with pytest.raises(ModelError, match=r"also changes text_encoder_3, which no training here goes on with"):
            LoraPolicy(
                replace(champion, adapter=str(tmp_path / "t5")), Lora(4, 4.0), "cpu", "auto", 0, text_encoders=asked
            )
    with pytest.raises(ModelError, match=r"has rank \[4\].*lora_rank=8"):
        LoraPolicy(champion, Lora(8, 8.0), "cpu", "auto", 0, text_encoders=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name, tensor: (name, tensor[:2] if ".lora_A." in name else tensor[:, :2]), r"rank \[2\]"),
        (lambda name, tensor: (name.replace("q_proj", "fc1"), tensor), r"on \['fc1'"),
    ],
    ids=["rank", "layers"],
)
def test_encoders_of_another_shape_are_refused(
    worlds: Worlds, tmp_path: Path, change: Callable[[str, torch.Tensor], tuple[str, torch.Tensor]], message: str
) -> None:
    """By the header alone, and before anything is loaded (`train/dpo adapter=`)."""
    record = train(worlds.plan("sd", tmp_path, steps=1))
    file = Path(str(record.model.adapter)) / ADAPTER_FILE
    state = load_file(file).items()
    other = dict(change(name, tensor) if name.startswith("text_encoder.") else (name, tensor) for name, tensor in state)
    (tmp_path / "other").mkdir()
    save_file({name: each.contiguous() for name, each in other.items()}, tmp_path / "other" / ADAPTER_FILE,
              read_header(file))  # fmt: skip
    check_encoders(str(file.parent), Lora(4, 4.0))
    with pytest.raises(ModelError, match=f"changes text_encoder with LoRA of .*{message}"):
        check_encoders(str(tmp_path / "other"), Lora(4, 4.0))
