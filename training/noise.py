"""The random draws of training, and the noised inputs and targets they give.

Every draw is a function of (seed, pair, epoch) alone: the same pair sees the same noise whatever the batch
size or an interruption in between. So a resumed run needs no random state.
"""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import DDPMScheduler


def draw(
    seed: int, draws: Sequence[tuple[str, int]], shape: tuple[int, ...], timesteps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise (n, *shape) float32 and timesteps (n,) int64 in [0, timesteps), one for each (pair id, epoch)."""
    noise, times = [], []
    for pair, epoch in draws:
        digest = hashlib.sha256(f"{seed}:{pair}:{epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        times.append(torch.randint(timesteps, (), generator=generator))
        noise.append(torch.randn(shape, generator=generator))
    return torch.stack(noise), torch.stack(times)


def target(schedule: "DDPMScheduler", latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """What the network should predict: the noise, or the velocity (Salimans & Ho 2022, arXiv:2202.00512, app. D).

    Raises ValueError for another prediction type.
    """
    kind = schedule.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return schedule.get_velocity(latents, noise, times)
    raise ValueError(f"prediction_type={kind!r} of the base model's scheduler: supported are epsilon, v_prediction")
