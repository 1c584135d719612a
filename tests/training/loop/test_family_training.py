"""Every family trains on its own shards, and what it exports is what plain diffusers loads."""

import math
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from data.columns import latents
from data.shards import ShardError, read_shard
from tests.families import FamilyBases
from tests.rounding import of_margins
from tests.training.worlds import Shapes, make_plan
from training.adapter.lora import Lora
from training.loop.dataset import PreferencePairs, positions_of_step
from training.loop.lora_policy import LoraPolicy
from training.loop.run import Run
from training.loop.trainer import train
from training.model.families import family_for
from training.model.family import Conditions
from training.model.loading import embed_negative, load_pipeline
from training.model.noise import Diffusion
from training.model.reference import ADAPTER_FILE, ModelError
from training.model.stable_diffusion import StableDiffusion
from training.plan import TrainingPlan

pytestmark = pytest.mark.numerical

SHAPES = {
    "sdxl": Shapes((4, 8, 8), (77, 40), 24), "sdxl-words": Shapes((4, 8, 8), (77, 40), 24),
    "sd3": Shapes((16, 8, 8), (333, 48), 40), "sd3-no-t5": Shapes((16, 8, 8), (333, 48), 40),
    "flux-dev": Shapes((16, 8, 8), (512, 48), 16), "flux-schnell": Shapes((16, 8, 8), (512, 48), 16),
}  # fmt: skip
NAMES = ["sdxl", "sd3", "flux-dev", "flux-schnell"]


def plan_in(bases: FamilyBases, name: str, folder: Path, **changes: Any) -> TrainingPlan:
    shapes = changes.pop("shapes", SHAPES[name])
    if not (folder / "base").exists():
        (folder / "base").symlink_to(bases.folder(name))
    return make_plan(folder, shapes, **{"guidance_input": 3.5 if name == "flux-dev" else 1.0, **changes})


def picture(pipeline: Any) -> np.ndarray:
    drawn = pipeline(
        "a red circle", num_inference_steps=2, guidance_scale=3.5, height=32, width=32, output_type="np",
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    return np.asarray(drawn.images[0])


@pytest.mark.parametrize(("name", "dora"), [*((name, False) for name in NAMES), ("sdxl", True), ("sd3", True)])
def test_an_adapter_trains_and_loads_in_plain_diffusers(
    bases: FamilyBases, tmp_path: Path, name: str, dora: bool
) -> None:
    seen: list[dict[str, float]] = []
    lora = Lora(4, 8.0, dora=dora)
    plan = plan_in(bases, name, tmp_path, steps=3, learning_rate=3e-2, lora=lora)
    record = train(plan, lambda step, metrics: seen.append(metrics))
    assert seen[0]["margin"] == 0.0 and seen[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert len(seen) == 3 and seen[1]["margin"] != 0.0 and all(metrics["grad_norm"] > 0 for metrics in seen)
    plain = FamilyBases.plain.__wrapped__(bases, name)  # its own: other tests give the shared one another sampler
    before = picture(plain)
    plain.load_lora_weights(tmp_path / "out" / "adapter", weight_name=ADAPTER_FILE)
    try:
        after = picture(plain)
        assert np.abs(after - before).max() > 1e-3
        np.testing.assert_allclose(picture(load_pipeline(record.model)), after, atol=1e-4)
        theirs, policy = getattr(plain, plain_network(name)), LoraPolicy(record.model, lora, "cpu", "auto", 0)
        inputs = inputs_of(name)
        with torch.no_grad():
            torch.testing.assert_close(
                policy.family.predict(policy.network, *inputs), policy.family.predict(theirs, *inputs),
                rtol=1e-4, atol=1e-4,
            )  # fmt: skip
    finally:
        plain.unload_lora_weights()


def plain_network(name: str) -> str:
    return "unet" if name.startswith("sdxl") else "transformer"


def inputs_of(name: str) -> tuple[torch.Tensor, torch.Tensor, Conditions]:
    """Something to predict from, of the family's shapes."""
    from training.model.family import PromptEmbeddings

    shapes, generator = SHAPES[name], torch.Generator().manual_seed(1)
    tokens = torch.randn(2, *shapes.embedding, generator=generator)
    prompts = PromptEmbeddings(tokens, torch.randn(2, shapes.pooled or 0, generator=generator))
    sizes = torch.tensor([[32.0, 32, 0, 0, 32, 32]] * 2)
    times = torch.tensor([100, 800]) if name.startswith("sdxl") else torch.tensor([0.1, 0.8])
    return torch.randn(2, *shapes.latent, generator=generator), times, Conditions(prompts, sizes, 3.5)


@pytest.mark.parametrize("name", NAMES)
def test_one_step_lowers_the_winners_error_relative_to_the_losers(
    bases: FamilyBases, tmp_path: Path, name: str
) -> None:
    run = Run(plan_in(bases, name, tmp_path, learning_rate=1e-3, batch_size=12, micro_batch_size=12))
    run.step(0)
    metrics = run.loss(run.pairs.read(positions_of_step(0, 12, 12, 0))).metrics
    assert metrics["winner_error_delta"].mean() < metrics["loser_error_delta"].mean()


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux-dev"])
def test_a_full_training_exports_a_network(bases: FamilyBases, tmp_path: Path, name: str) -> None:
    record = train(plan_in(bases, name, tmp_path, steps=1, method="full"))
    assert record.metrics["margin"] == 0.0 and record.model.network == str(tmp_path / "out" / plain_network(name))
    kind = getattr(diffusers, family_for(record.model).network_class)
    tuned, start = kind.from_pretrained(record.model.network), getattr(bases.plain(name), plain_network(name))
    changed = [(a - b).abs().max() > 0 for a, b in zip(tuned.parameters(), start.parameters(), strict=True)]
    assert any(changed)
    assert np.abs(picture(load_pipeline(record.model)) - picture(bases.plain(name))).max() > 1e-4


def conditions_of(run: Run, epoch: int = 0) -> tuple[Conditions, int]:
    """What the network is told about all pairs of an epoch, winners first."""
    batch = run.pairs.read([(epoch, index) for index in range(len(run.pairs))])
    return run.loss._inputs(batch, [epoch] * len(run.pairs), 2).conditions, len(run.pairs)


@pytest.mark.parametrize("told", [True, False])
def test_each_picture_has_its_own_size_and_the_pair_its_pooled_embedding(
    bases: FamilyBases, tmp_path: Path, told: bool
) -> None:
    """Against the columns themselves. Where the shards tell no sizes, pictures are whole: 4 pixels a latent pixel."""
    run = Run(plan_in(bases, "sdxl", tmp_path, shapes=SHAPES["sdxl"]._replace(latent=(4, 8, 12), time_ids=told)))
    conditions, count = conditions_of(run)
    tables = [read_shard(tmp_path / "pairs" / f"{index:05d}-of-00002.arrow") for index in range(2)]
    won = [int(label) for table in tables for label in table["label_1"].to_pylist()]
    expected = [[32, 48, 0, 0, 32, 48]] * 2 * count
    if told:
        sides = [[row for table in tables for row in table[f"time_ids_{side}"].to_pylist()] for side in (0, 1)]
        winners = [sides[side][row] for row, side in enumerate(won)]
        expected = winners + [sides[1 - side][row] for row, side in enumerate(won)]
        assert winners != sides[0]
    assert conditions.time_ids is not None and conditions.time_ids.tolist() == expected
    pooled = np.concatenate([latents(table["pooled_embedding"]) for table in tables]).astype(np.float32)
    assert conditions.prompts.pooled is not None
    np.testing.assert_array_equal(conditions.prompts.pooled.numpy(), np.concatenate([pooled, pooled]))
    run.loss(run.pairs.read([(0, 0), (0, 1)]))


@pytest.mark.parametrize("name", ["sdxl", "sdxl-words", "sd3-no-t5"])
def test_dropped_prompts_are_those_of_both_sides_and_what_the_model_knows_as_empty(
    bases: FamilyBases, tmp_path: Path, name: str
) -> None:
    plan = plan_in(bases, name, tmp_path, prompt_dropout=0.3)
    run, empty = Run(plan), embed_negative(bases.ref(name))
    plain = PreferencePairs(Path(plan.pairs)).read([(0, index) for index in range(12)]).prompts
    assert empty.pooled is not None and plain.pooled is not None
    dropped = 0
    for epoch in range(25):
        prompts = conditions_of(run, epoch)[0].prompts
        assert prompts.pooled is not None
        for row in range(12):
            assert torch.equal(prompts.tokens[row], prompts.tokens[12 + row])
            assert torch.equal(prompts.pooled[row], prompts.pooled[12 + row])
            gone = not torch.equal(prompts.tokens[row], plain.tokens[row])
            torch.testing.assert_close(prompts.tokens[row], (empty.tokens if gone else plain.tokens[row][None])[0])
            torch.testing.assert_close(prompts.pooled[row], (empty.pooled if gone else plain.pooled[row][None])[0])
            dropped += gone
    assert 0.2 < dropped / 300 < 0.4  # 3.8 standard deviations
    assert (empty.tokens.abs().max() == 0) == (name == "sdxl")


def test_pairs_of_another_family_are_refused(bases: FamilyBases, tmp_path: Path) -> None:
    run = Run(plan_in(bases, "sdxl", tmp_path, shapes=SHAPES["sdxl"]._replace(pooled=None)))
    with pytest.raises(ShardError, match="no column pooled_embedding, which a StableDiffusionXLPipeline takes"):
        run.step(0)


def test_dora_starts_at_the_reference_in_half_precision(bases: FamilyBases, tmp_path: Path) -> None:
    """Its magnitudes are those of the rounded weights that it stands on, not rounded themselves."""
    run = Run(plan_in(bases, "sdxl", tmp_path, lora=Lora(4, 4.0, dora=True), dtype="bfloat16", mixed_precision="bf16"))
    metrics = run.step(0)
    assert metrics["margin"] == 0.0 and metrics["grad_norm"] > 0


def test_a_champion_with_dora_is_not_continued_without(bases: FamilyBases, tmp_path: Path) -> None:
    record = train(plan_in(bases, "sdxl", tmp_path, steps=1, lora=Lora(4, 4.0, dora=True)))
    with pytest.raises(ModelError, match=r"is a DoRA, but training\.lora_dora=False"):
        LoraPolicy(record.model, Lora(4, 4.0), "cpu", "auto", 0)
    Run(plan_in(bases, "sdxl", tmp_path, model=record.model, lora=Lora(4, 4.0, dora=True))).step(0)


class _AsVelocity(StableDiffusion):
    """The same network, read as one that predicts the velocity its noise stands for."""

    def __init__(self, schedule: DDPMScheduler) -> None:
        self.schedule = schedule

    def predict(self, network: Any, noisy: torch.Tensor, times: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        alpha = self.schedule.alphas_cumprod[times].sqrt().view(-1, 1, 1, 1)
        return (super().predict(network, noisy, times, conditions) - (1 - alpha**2).sqrt() * noisy) / alpha


def test_kappa_means_the_same_for_epsilon_and_velocity_models(tmp_path: Path) -> None:
    run = Run(make_plan(tmp_path, beta=200.0, learning_rate=1e-2))
    run.step(0)
    batch = run.pairs.read(positions_of_step(0, 12, 12, 0))
    as_noise = run.loss(batch)
    assert isinstance(run.loss.process, Diffusion)
    schedule = DDPMScheduler.from_config(run.loss.process.schedule.config, prediction_type="v_prediction")
    run.loss.process, run.loss.family = Diffusion(schedule), _AsVelocity(schedule)
    run.loss.plan = run.plan.changed(error_space="epsilon")
    as_velocity = run.loss(batch)
    torch.testing.assert_close(as_velocity.loss, as_noise.loss, rtol=0, atol=of_margins(100.0, 1.5, 256))
    assert as_noise.metrics["margin"].abs().max() > 0.05
    run.loss.plan = run.plan
    assert (run.loss(batch).loss - as_noise.loss).abs().max() > 0.01  # in its own space it would be another loss
