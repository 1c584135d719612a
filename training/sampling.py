"""Draws images from a diffusion model. Knows nothing of files, scores or Prefect.

One generator per image: a picture depends on its own seed and prompt, never on the batch, shard or device
count it was drawn with (the idea of NVlabs/edm2's StackedRandomGenerator).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from training.families import family_of
from training.family import PromptEmbeddings, read_config
from training.models import ModelRef, family_for

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


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


def scheduler_names() -> list[str]:
    """The diffusers schedulers that a Sampler may name: not those that lack a library."""
    import diffusers

    names = [name for name in dir(diffusers.schedulers) if name.endswith("Scheduler") and name[0].isupper()]
    known = {name: getattr(diffusers, name, None) for name in names}  # some are listed but gone
    return sorted(name for name, kind in known.items() if kind is not None and not hasattr(kind, "_backends"))


def scheduler_options(name: str) -> list[str]:
    """The options that a scheduler of diffusers takes; it would silently ignore others."""
    import inspect

    import diffusers

    return [option for option in inspect.signature(getattr(diffusers, name).__init__).parameters if option != "self"]


def flow_scheduler(name: str, options: Mapping[str, Any]) -> bool:
    """Whether a scheduler with these options draws from models trained by flow matching; else from diffusion models."""
    told = bool(options.get("use_flow_sigmas")) and options.get("prediction_type") == "flow_prediction"
    return name.startswith("FlowMatch") or told


FLOW_SIGMAS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
"""Options with which a solver for diffusion models draws from flow models."""


def scheduler_fault(ref: ModelRef, name: str, options: Mapping[str, Any]) -> str | None:
    """Why a scheduler with these options cannot draw from the model as its pipeline calls it, None where it can.

    Tried, without loading weights: one step of a tiny picture. What a scheduler asserts about its options cannot be
    read from its signature.
    """
    import diffusers

    config = read_config(ref, "scheduler", "scheduler_config.json")
    picture = torch.ones(1, 4, 2, 2)
    try:
        scheduler = getattr(diffusers, name).from_config(config, **options)
        family_for(ref).start_sampling(scheduler, 4)
        scheduler.step(picture, scheduler.timesteps[0], picture)
    except Exception as error:  # of whatever kind: each scheduler has its own
        return f"{type(error).__name__}: {error}".rstrip(": ")
    return None


def flow_schedulers(ref: ModelRef) -> list[str]:
    """The schedulers that can draw from a flow model; those that need FLOW_SIGMAS as options say so."""
    names = [name for name in scheduler_names() if "Inverse" not in name]  # those lead back to the noise
    own = [name for name in names if name.startswith("FlowMatch") and scheduler_fault(ref, name, {}) is None]
    told = [name for name in names if "use_flow_sigmas" in scheduler_options(name)]
    return own + [f"{name} with {FLOW_SIGMAS}" for name in told if scheduler_fault(ref, name, FLOW_SIGMAS) is None]


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
