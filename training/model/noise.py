"""How pictures are noised in training: the random draws, and the two processes that models are trained with.

Every draw is a function of (seed, pair, draw number) alone: the same pair sees the same noise whatever the batch
size, the number of processes or an interruption in between. So a resumed run needs no random state.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

if TYPE_CHECKING:
    from diffusers import DDPMScheduler

ErrorSpace = Literal["prediction", "epsilon", "velocity"]
Density = Literal["uniform", "logit-normal"]


class NoiseProcess(Protocol):
    """What leads from a picture to noise. times: (n,), integers for `Diffusion`, in [0, 1] for `FlowMatching`."""

    def draw_time(self, generator: torch.Generator) -> torch.Tensor:
        """One training time, a tensor without dimensions."""

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """The noised latents (n, C, h, w)."""

    def target(self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """What the network should predict, (n, C, h, w)."""

    def level(self, times: torch.Tensor) -> torch.Tensor:
        """How far along the process, in [0, 1]: 0 is the picture, 1 is noise. (n,)"""

    def error_factor(self, times: torch.Tensor, space: ErrorSpace) -> torch.Tensor | None:
        """Times this, (n,), a squared error of the network's own prediction is one in `space`; None = 1."""


def draw(
    seed: int,
    draws: Sequence[tuple[str, int]],
    shape: tuple[int, ...],
    draw_time: Callable[[torch.Generator], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise (n, *shape) float32 and times (n,), one for each (pair id, number of the draw)."""
    noise, times = [], []
    for pair, number in draws:
        generator = generator_of(f"{seed}:{pair}:{number}")
        times.append(draw_time(generator))
        noise.append(torch.randn(shape, generator=generator))
    return torch.stack(noise), torch.stack(times)


def generator_of(key: str) -> torch.Generator:
    """A generator on the CPU that is a function of the key alone."""
    digest = hashlib.sha256(key.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _per_image(values: torch.Tensor) -> torch.Tensor:
    """(n,) as (n, 1, 1, 1)."""
    return values.view(-1, 1, 1, 1)


class Diffusion:
    """x_t = alpha_t x_0 + sigma_t noise with alpha_t^2 + sigma_t^2 = 1 (Ho et al. 2020, arXiv:2006.11239, eq. 4).

    The network predicts the noise or the velocity alpha_t noise - sigma_t x_0 (Salimans & Ho 2022, arXiv:2202.00512,
    app. D). Raises ValueError for another prediction type.
    """

    def __init__(self, schedule: "DDPMScheduler") -> None:
        self.schedule, self.kind = schedule, schedule.config.prediction_type
        self.steps: int = schedule.config.num_train_timesteps
        if self.kind not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"prediction_type={self.kind!r} of the base model's scheduler: supported are epsilon, v_prediction"
            )

    def draw_time(self, generator: torch.Generator) -> torch.Tensor:
        return torch.randint(self.steps, (), generator=generator)

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        noisy: torch.Tensor = self.schedule.add_noise(latents, noise, times)
        return noisy

    def target(self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        if self.kind == "epsilon":
            return noise
        velocity: torch.Tensor = self.schedule.get_velocity(latents, noise, times)
        return velocity

    def level(self, times: torch.Tensor) -> torch.Tensor:
        return times / self.steps

    def error_factor(self, times: torch.Tensor, space: ErrorSpace) -> torch.Tensor | None:
        """At a fixed x_t an error e of the noise is an error e / alpha_t of the velocity."""
        own = "epsilon" if self.kind == "epsilon" else "velocity"
        if space in ("prediction", own):
            return None
        alpha_squared = self.schedule.alphas_cumprod.to(times.device)[times]
        return alpha_squared if space == "epsilon" else 1 / alpha_squared


class FlowMatching:
    """x_s = (1 - s) x_0 + s noise; the network predicts noise - x_0 (Lipman et al. 2022, arXiv:2210.02747; as written
    here Esser et al. 2024, arXiv:2403.03206, eq. 13).

    density: of s before the shift; logit-normal is the sigmoid of a standard normal (the same, eq. 19). shift: see
    `shifted`.
    """

    def __init__(self, density: Density, shift: float) -> None:
        self.density, self.shift = density, shift

    def draw_time(self, generator: torch.Generator) -> torch.Tensor:
        if self.density == "uniform":
            return shifted(torch.rand((), generator=generator), self.shift)
        return shifted(torch.randn((), generator=generator).sigmoid(), self.shift)

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        s = _per_image(times)
        return (1 - s) * latents + s * noise

    def target(self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        return noise - latents

    def level(self, times: torch.Tensor) -> torch.Tensor:
        return times

    def error_factor(self, times: torch.Tensor, space: ErrorSpace) -> torch.Tensor | None:
        """At a fixed x_s an error e of the noise is an error e / (1 - s) of the velocity."""
        return (1 - times).square() if space == "epsilon" else None


def shifted(s: torch.Tensor, shift: float) -> torch.Tensor:
    """Towards more noise for larger pictures: shift s / (1 + (shift - 1) s) (Esser et al. 2024, eq. 23)."""
    return shift * s / (1 + (shift - 1) * s)


def shift_of(scheduler: Mapping[str, Any], tokens: int) -> float:
    """The shift that a flow model's scheduler config asks for.

    tokens: the transformer's picture tokens, from which a "dynamic" shift follows as in diffusers' FluxPipeline: its
    logarithm is linear in them, or, where the config says so, the shift itself.
    """
    if not scheduler.get("use_dynamic_shifting"):
        return float(scheduler.get("shift", 1.0))
    few, many = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
    low, high = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
    found = float(low + (high - low) * (tokens - few) / (many - few))
    return found if scheduler.get("time_shift_type") == "linear" else math.exp(found)
