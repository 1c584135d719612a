"""Draws images from a diffusion model. Knows nothing of files, scores or Prefect.

One generator per image: a picture depends on its own seed and prompt, never on the batch, shard or device
count it was drawn with (the idea of NVlabs/edm2's StackedRandomGenerator).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


@dataclass(frozen=True)
class Sampler:
    """How pictures are drawn. Everything here changes the picture; batch size is not among it.

    scheduler: class name in diffusers. options: overrides of the scheduler's config. steps: network calls.
    guidance: classifier-free guidance scale; 1.0 = no guidance (one network row an image instead of two).
    height, width: pixels; None = the model's own size.
    """

    scheduler: str
    steps: int
    guidance: float
    options: dict[str, Any] = field(default_factory=dict)
    height: int | None = None
    width: int | None = None


def scheduler_names() -> list[str]:
    """The diffusers schedulers that a Sampler may name."""
    import diffusers

    return sorted(name for name in dir(diffusers.schedulers) if name.endswith("Scheduler") and name[0].isupper())


def scheduler_options(name: str) -> list[str]:
    """The options that a scheduler of diffusers takes; it would silently ignore others."""
    import inspect

    import diffusers

    return [option for option in inspect.signature(getattr(diffusers, name).__init__).parameters if option != "self"]


def use_sampler(pipeline: "StableDiffusionPipeline", sampler: Sampler) -> None:
    """Give the pipeline the sampler's scheduler. Raises ValueError for an unknown name."""
    import diffusers

    if sampler.scheduler not in scheduler_names():
        raise ValueError(f"generation.scheduler={sampler.scheduler!r} is no diffusers scheduler: {scheduler_names()}")
    scheduler = getattr(diffusers, sampler.scheduler)
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **sampler.options)


@torch.no_grad()
def embed_prompts(pipeline: "StableDiffusionPipeline", prompts: Sequence[str], batch_size: int = 64) -> torch.Tensor:
    """The text encoder's output, shape (prompts, tokens, width), rounded to float16 as the shards keep it."""
    parts = []
    for start in range(0, len(prompts), batch_size):
        chunk = list(prompts[start : start + batch_size])
        embedded, _ = pipeline.encode_prompt(chunk, pipeline.device, 1, do_classifier_free_guidance=False)
        parts.append(embedded.half())
    return torch.cat(parts)


@torch.no_grad()
def sample_latents(
    pipeline: "StableDiffusionPipeline",
    embeddings: torch.Tensor,
    negative: torch.Tensor,
    seeds: Sequence[int],
    sampler: Sampler,
) -> torch.Tensor:
    """Final latents in model space, float16 (n, C, h, w) on the CPU; one image per row of `embeddings`.

    embeddings: (n, tokens, width). negative: (1, tokens, width), the empty prompt. seeds: n.
    The generators live on the CPU, so a seed means the same picture on every device.
    """
    precision = pipeline.unet.dtype
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    guided = sampler.guidance > 1.0
    output = pipeline(
        prompt_embeds=embeddings.to(pipeline.device, precision),
        negative_prompt_embeds=negative.expand(len(seeds), -1, -1).to(pipeline.device, precision) if guided else None,
        num_inference_steps=sampler.steps,
        guidance_scale=sampler.guidance,
        generator=generators,
        height=sampler.height,
        width=sampler.width,
        output_type="latent",
    )
    latents: torch.Tensor = output.images
    return _finite(latents.to("cpu", torch.float16), "latents", precision)


@torch.no_grad()
def decode_latents(pipeline: "StableDiffusionPipeline", latents: torch.Tensor) -> np.ndarray:
    """Pictures of the stored latents, uint8 (n, H, W, 3), rounded to nearest (truncation would darken them)."""
    latents = latents.to(pipeline.device, pipeline.vae.dtype) / pipeline.vae.config.scaling_factor
    pixels = _finite(pipeline.vae.decode(latents).sample.float(), "pictures", pipeline.vae.dtype)
    pixels = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    images: np.ndarray = pixels.permute(0, 2, 3, 1).cpu().numpy()
    return images


def _finite(values: torch.Tensor, what: str, precision: torch.dtype) -> torch.Tensor:
    """Not-a-number latents would become black pictures, which rank like pictures."""
    if not values.isfinite().all():
        raise FloatingPointError(
            f"the sampled {what} are not finite in {precision}; use execution.dtype=bfloat16 or float32"
        )
    return values


def sample_images(
    pipeline: "StableDiffusionPipeline",
    embeddings: torch.Tensor,
    negative: torch.Tensor,
    seeds: Sequence[int],
    sampler: Sampler,
    batch_size: int,
    on_batch: Callable[[int], None] = lambda images: None,
) -> tuple[torch.Tensor, np.ndarray]:
    """Latents (n, C, h, w) float16 and pictures (n, H, W, 3) uint8, in batches of `batch_size` rows.

    on_batch is told the number of pictures of each finished batch (progress).
    """
    use_sampler(pipeline, sampler)
    latents, images = [], []
    for start in range(0, len(seeds), batch_size):
        rows = slice(start, start + batch_size)
        drawn = sample_latents(pipeline, embeddings[rows], negative, seeds[rows], sampler)
        latents.append(drawn)
        images.append(decode_latents(pipeline, drawn))
        on_batch(len(drawn))
    return torch.cat(latents), np.concatenate(images)
