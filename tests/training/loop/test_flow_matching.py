"""Flow matching is that of diffusers: noise, targets, time shifts; and errors of one prediction as those of another."""

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from hypothesis import given, settings
from hypothesis import strategies as st

from training.loss.errors import squared_error
from training.model.family import TimeSampling
from training.model.flow_models import Flux, StableDiffusion3, pack, positions, unpack
from training.model.noise import Diffusion, ErrorSpace, FlowMatching, draw, shift_of, shifted
from training.model.reference import ModelRef

pytestmark = pytest.mark.numerical

SHIFTS = [
    {"shift": 3.0},
    {"shift": 1.0},
    {"use_dynamic_shifting": True, "shift": 3.0},
    {"use_dynamic_shifting": True, "base_shift": 0.3, "max_shift": 2.0, "max_image_seq_len": 1024},
    {"use_dynamic_shifting": True, "time_shift_type": "linear"},
]


def a_batch(count: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 4, 8, 8, generator=generator), torch.randn(count, 4, 8, 8, generator=generator)


def save_scheduler(folder: Path, config: dict[str, object]) -> ModelRef:
    FlowMatchEulerDiscreteScheduler(**config).save_pretrained(folder / "scheduler")
    return ModelRef(str(folder))


@pytest.mark.parametrize("config", SHIFTS, ids=json.dumps)
@pytest.mark.parametrize("family", [StableDiffusion3(), Flux()], ids=["sd3", "flux"])
def test_times_are_shifted_as_in_sampling(
    tmp_path: Path, family: StableDiffusion3 | Flux, config: dict[str, object]
) -> None:
    """The sigmas a pipeline would step through for pictures of 48 x 64 latents, which are 24 x 32 tokens."""
    ref = save_scheduler(tmp_path, config)
    process = family.process(ref, (16, 48, 64), TimeSampling())
    assert isinstance(process, FlowMatching)
    scheduler, evenly = FlowMatchEulerDiscreteScheduler(**config), torch.linspace(1, 0.05, 20)
    known = scheduler.config
    mu = calculate_shift(24 * 32, known.base_image_seq_len, known.max_image_seq_len, known.base_shift, known.max_shift)
    scheduler.set_timesteps(sigmas=evenly.numpy(), mu=mu if known.use_dynamic_shifting else None)
    torch.testing.assert_close(shifted(evenly, process.shift), scheduler.sigmas[:-1])


def test_a_shift_that_is_asked_for_wins_over_the_schedulers(tmp_path: Path) -> None:
    process = StableDiffusion3().process(
        save_scheduler(tmp_path, {"shift": 3.0}), (16, 8, 8), TimeSampling("uniform", 2)
    )
    assert isinstance(process, FlowMatching)
    assert (process.shift, process.density) == (2, "uniform")


def test_schedulers_that_say_nothing_do_not_shift() -> None:
    assert shift_of({}, 256) == 1.0
    torch.testing.assert_close(shifted(torch.linspace(0, 1, 5), 1.0), torch.linspace(0, 1, 5))


def test_noised_latents_are_the_schedulers() -> None:
    scheduler, (latents, noise) = FlowMatchEulerDiscreteScheduler(shift=3.0), a_batch()
    scheduler.set_timesteps(10)
    chosen = torch.tensor([0, 3, 6, 9])
    expected = scheduler.scale_noise(latents, scheduler.timesteps[chosen], noise)
    ours = FlowMatching("uniform", 3.0).add_noise(latents, noise, scheduler.sigmas[chosen])
    torch.testing.assert_close(ours, expected)


def test_the_scheduler_walks_along_the_target_back_to_the_picture() -> None:
    """Euler steps with the true velocity, from pure noise."""
    scheduler, (latents, noise) = FlowMatchEulerDiscreteScheduler(shift=3.0), a_batch()
    scheduler.set_timesteps(7)
    velocity, walked = FlowMatching("uniform", 1.0).target(latents, noise, torch.ones(4)), noise
    for time in scheduler.timesteps:
        walked = scheduler.step(velocity, time, walked).prev_sample
    torch.testing.assert_close(walked, latents, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_times_have_the_density_that_is_asked_for(shift: float) -> None:
    """Logit-normal: logit(s) is normal around log(shift), since the shift multiplies the odds of s. Uniform: s is."""
    draws = [(str(index), 0) for index in range(4000)]
    normal = draw(0, draws, (1,), FlowMatching("logit-normal", shift).draw_time)[1]
    assert normal.min() > 0 and normal.max() < 1
    logits = normal.double().logit()
    assert abs(logits.mean().item() - math.log(shift)) < 0.06 and abs(logits.std().item() - 1) < 0.05
    uniform = draw(0, draws, (1,), FlowMatching("uniform", shift).draw_time)[1]
    odds = uniform / (1 - uniform) / shift
    ranks = (odds / (1 + odds)).sort().values
    assert (ranks - torch.linspace(0, 1, 4000)).abs().max() < 0.03  # Kolmogorov's distance


@settings(max_examples=60, deadline=None)
@given(time=st.integers(0, 999), seed=st.integers(0, 10**6), kind=st.sampled_from(["epsilon", "v_prediction"]))
def test_errors_of_diffusion_models_in_the_other_space(time: int, seed: int, kind: str) -> None:
    """The noise that a predicted velocity stands for, and the reverse, from x_t in float64."""
    generator = torch.Generator().manual_seed(seed)
    latents, noise, predicted = torch.randn(3, 1, 4, 4, 4, generator=generator, dtype=torch.float64)
    schedule = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=kind)
    process, times = Diffusion(schedule), torch.tensor([time])
    alpha = schedule.alphas_cumprod.double()[time].sqrt()
    sigma = (1 - alpha**2).sqrt()
    noisy, velocity = alpha * latents + sigma * noise, alpha * noise - sigma * latents
    spaces: tuple[ErrorSpace, ErrorSpace] = ("epsilon", "velocity")
    own, other = spaces if kind == "epsilon" else spaces[::-1]
    error = squared_error(predicted, noise if kind == "epsilon" else velocity).double()
    if kind == "epsilon":  # x_0 of the predicted noise gives its velocity
        meant = (predicted - sigma * noisy) / alpha
        expected = (meant - velocity).square().mean()
    else:
        meant = alpha * predicted + sigma * noisy
        expected = (meant - noise).square().mean()
    factor = process.error_factor(times, other)
    assert factor is not None
    torch.testing.assert_close(error * factor.double(), expected.view(1), rtol=1e-4, atol=0)
    assert process.error_factor(times, own) is None and process.error_factor(times, "prediction") is None


@settings(max_examples=60, deadline=None)
@given(s=st.floats(0.001, 0.999), seed=st.integers(0, 10**6))
def test_errors_of_flow_models_as_errors_of_the_noise(s: float, seed: int) -> None:
    """noise = x_s + (1 - s) velocity."""
    generator = torch.Generator().manual_seed(seed)
    latents, noise, predicted = torch.randn(3, 1, 4, 4, 4, generator=generator, dtype=torch.float64)
    noisy = (1 - s) * latents + s * noise
    expected = (noisy + (1 - s) * predicted - noise).square().mean()
    process, times = FlowMatching("uniform", 1.0), torch.tensor([s])
    factor = process.error_factor(times, "epsilon")
    assert factor is not None
    error = squared_error(predicted, process.target(latents, noise, times)).double()
    torch.testing.assert_close(error * factor.double(), expected.view(1), rtol=1e-4, atol=0)
    assert process.error_factor(times, "velocity") is None and process.error_factor(times, "prediction") is None


def test_levels_are_shares_of_the_schedule() -> None:
    """Of whatever length: metrics by quartile of noise would otherwise end in the first quartile of a short one."""
    process = Diffusion(DDPMScheduler(num_train_timesteps=200))
    assert process.level(torch.tensor([0, 100, 199])).tolist() == pytest.approx([0, 0.5, 0.995])
    assert FlowMatching("uniform", 1.0).level(torch.tensor([0.25])).tolist() == [0.25]


@settings(max_examples=20, deadline=None)
@given(channels=st.integers(1, 5), height=st.integers(1, 4), width=st.integers(1, 4))
def test_packing_is_flux_own_and_can_be_undone(channels: int, height: int, width: int) -> None:
    from diffusers import FluxPipeline

    latents = torch.randn(2, channels, 2 * height, 2 * width)
    packed = pack(latents)
    torch.testing.assert_close(packed, FluxPipeline._pack_latents(latents, 2, channels, 2 * height, 2 * width))
    torch.testing.assert_close(unpack(packed, 2 * height, 2 * width), latents, rtol=0, atol=0)
    ids = FluxPipeline._prepare_latent_image_ids(2, height, width, "cpu", torch.float32)
    torch.testing.assert_close(positions(height, width).float(), ids, rtol=0, atol=0)
