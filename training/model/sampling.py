"""Draws images from a diffusion model. Knows nothing of files, scores or Prefect.

One generator per image: a picture depends on its own seed and prompt, never on the batch, shard or device
count it was drawn with (the idea of NVlabs/edm2's StackedRandomGenerator).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from training.model.families import family_of
from training.model.family import PromptEmbeddings

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
from training.model.schedulers import scheduler_names


@dataclass(frozen=True)
class Sampler:
    """How pictures are drawn. Everything here changes the picture; batch size is not among it.

    scheduler: class name in diffusers. options: overrides of the scheduler's config. steps: network calls.
    guidance: classifier-free guidance scale; 1.0 = no guidance (one network row an image instead of two). For
    guidance-distilled models (FLUX.1 dev) the guidance they take as an input.
    height, width: pixels; None = the model's own size.
    """

    scheduler: str
    steps: int
    guidance: float
    options: dict[str, Any] = field(default_factory=dict)
    height: int | None = None
    width: int | None = None


def use_sampler(pipeline: "DiffusionPipeline", sampler: Sampler) -> None:
    """Give the pipeline the sampler's scheduler. Raises ValueError for an unknown name."""
    import diffusers

    if sampler.scheduler not in scheduler_names():
        raise ValueError(f"generation.scheduler={sampler.scheduler!r} is no diffusers scheduler: {scheduler_names()}")
    scheduler = getattr(diffusers, sampler.scheduler)
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **sampler.options)


@torch.no_grad()
def embed_prompts(pipeline: "DiffusionPipeline", prompts: Sequence[str], batch_size: int = 64) -> PromptEmbeddings:
    """The text encoders' output, a row a prompt, rounded to float16 as the shards keep it."""
    family = family_of(pipeline)
    chunks = [list(prompts[start : start + batch_size]) for start in range(0, len(prompts), batch_size)]
    return PromptEmbeddings.cat([family.embed(pipeline, chunk).map(torch.Tensor.half) for chunk in chunks])


@torch.no_grad()
def negative_prompt(pipeline: "DiffusionPipeline") -> PromptEmbeddings:
    """What guidance leads away from, one row, rounded to float16: the empty prompt, or what the model was trained with
    in its place."""
    return family_of(pipeline).negative(pipeline).map(torch.Tensor.half)


@torch.no_grad()
def sample_latents(
    pipeline: "DiffusionPipeline",
    embeddings: PromptEmbeddings,
    negative: PromptEmbeddings,
    seeds: Sequence[int],
    sampler: Sampler,
) -> torch.Tensor:
    """Final latents in model space, float16 (n, C, h, w) on the CPU; one image per row of `embeddings`.

    negative: one row, see `negative_prompt`. seeds: n.
    The generators live on the CPU, so a seed means the same picture on every device.
    """
    family = family_of(pipeline)
    precision = getattr(pipeline, family.network).dtype
    latents = family.sample(
        pipeline,
        embeddings.to(pipeline.device, precision),
        negative.expand(len(seeds)).to(pipeline.device, precision) if sampler.guidance > 1.0 else None,
        num_inference_steps=sampler.steps,
        guidance_scale=sampler.guidance,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        height=sampler.height,
        width=sampler.width,
    )
    return _finite(latents.to("cpu", torch.float16), "latents", precision)


@torch.no_grad()
def decode_latents(pipeline: "DiffusionPipeline", latents: torch.Tensor) -> np.ndarray:
    """Pictures of the stored latents, uint8 (n, H, W, 3), rounded to nearest (truncation would darken them)."""
    pixels = _finite(family_of(pipeline).decode(pipeline, latents).float(), "pictures", pipeline.vae.dtype)
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
    pipeline: "DiffusionPipeline",
    embeddings: PromptEmbeddings,
    negative: PromptEmbeddings,
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
