"""A picture depends on its seed and prompt alone, and is the one plain diffusers draws."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tiny import save_pipeline
from training.model.families import family_for
from training.model.family import TimeSampling
from training.model.loading import load_pipeline
from training.model.noise import Diffusion, draw
from training.model.reference import ModelRef
from training.model.sampling import Sampler, embed_prompts, negative_prompt, sample_images, use_sampler

pytestmark = pytest.mark.numerical

PROMPTS = ["a red circle", "a blue square", "two green triangles"]
SAMPLERS = [
    Sampler("DPMSolverMultistepScheduler", 4, 1.0, {"timestep_spacing": "trailing"}),
    Sampler("DDIMScheduler", 4, 5.0),
    Sampler("EulerAncestralDiscreteScheduler", 4, 5.0),  # draws noise at every step
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: s.scheduler)
def test_a_picture_does_not_depend_on_its_batch(base: Path, sampler: Sampler) -> None:
    pipeline = load_pipeline(ModelRef(str(base)))
    embeddings, negative = embed_prompts(pipeline, PROMPTS), negative_prompt(pipeline)
    together = sample_images(pipeline, embeddings, negative, [5, 6, 7], sampler, 3)[1]
    for row, seed in [(2, 7), (0, 5)]:
        alone = sample_images(pipeline, embeddings[row : row + 1], negative, [seed], sampler, 1)[1]
        assert np.abs(alone[0].astype(int) - together[row]).max() <= 1
    assert np.abs(together[0].astype(int) - together[1]).max() > 10


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: s.scheduler)
def test_equals_the_plain_diffusers_pipeline(base: Path, sampler: Sampler) -> None:
    from diffusers import StableDiffusionPipeline

    ours = load_pipeline(ModelRef(str(base)))
    embeddings, negative = embed_prompts(ours, PROMPTS[:1]), negative_prompt(ours)
    image = sample_images(ours, embeddings, negative, [11], sampler, 1)[1][0]
    plain = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    plain.set_progress_bar_config(disable=True)
    use_sampler(plain, sampler)
    expected = plain(
        PROMPTS[0], num_inference_steps=sampler.steps, guidance_scale=sampler.guidance,
        generator=torch.Generator().manual_seed(11), output_type="np",
    ).images[0]  # fmt: skip
    assert np.abs(image.astype(float) - expected * 255).max() <= 2.5  # latents and embeddings are kept in float16


def test_an_unknown_scheduler_lists_the_known_ones(base: Path) -> None:
    with pytest.raises(ValueError, match=r"'Nope'.*DDIMScheduler"):
        use_sampler(load_pipeline(ModelRef(str(base))), Sampler("Nope", 1, 1.0))


def process_of(base: Path) -> Diffusion:
    ref = ModelRef(str(base))
    process = family_for(ref).process(ref, (4, 8, 8), TimeSampling())
    assert isinstance(process, Diffusion)
    return process


def a_time(generator: torch.Generator) -> torch.Tensor:
    return torch.randint(1000, (), generator=generator)


def test_noise_is_a_function_of_seed_pair_and_epoch() -> None:
    noise, times = draw(1, [("a", 0), ("b", 0), ("a", 1)], (4, 8, 8), a_time)
    alone, time = draw(1, [("b", 0)], (4, 8, 8), a_time)
    torch.testing.assert_close(alone[0], noise[1], rtol=0, atol=0)
    assert time[0] == times[1]
    assert (noise[0] != noise[2]).all() and (draw(2, [("a", 0)], (4, 8, 8), a_time)[0][0] != noise[0]).all()


def test_noise_and_timesteps_have_the_right_distribution() -> None:
    noise, times = draw(0, [(str(i), 0) for i in range(2000)], (4, 4, 4), a_time)
    assert abs(noise.mean().item()) < 0.01 and abs(noise.std().item() - 1) < 0.01
    assert times.min() < 10 and times.max() > 989 and abs(times.float().mean().item() - 499.5) < 20


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_targets(tmp_path: Path, kind: str) -> None:
    """v = sqrt(abar) noise - sqrt(1 - abar) x0."""
    save_pipeline(tmp_path, prediction_type=kind)
    process = process_of(tmp_path)
    x, noise, times = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    abar = process.schedule.alphas_cumprod[times].view(2, 1, 1, 1)
    expected = noise if kind == "epsilon" else abar.sqrt() * noise - (1 - abar).sqrt() * x
    torch.testing.assert_close(process.target(x, noise, times), expected)


def test_unsupported_prediction_types_are_refused(tmp_path: Path) -> None:
    save_pipeline(tmp_path, prediction_type="sample")
    with pytest.raises(ValueError, match="prediction_type='sample'"):
        process_of(tmp_path)
