"""Stable Diffusion 3 and 3.5, and Flux: transformers trained by flow matching."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from training.adapter.kohya_keys import DottedKeys
from training.model.family import Conditions, Family, PromptEmbeddings, TimeSampling
from training.model.noise import FlowMatching, NoiseProcess, shift_of
from training.model.reference import read_config
from training.model.stable_diffusion import pooled_sample

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from training.model.reference import ModelRef

PATCH = 2
"""Latent pixels a side that make one token, in both."""


class _FlowModel(Family):
    network = "transformer"
    flow = True
    pooled = True
    patch = PATCH
    kohya = DottedKeys()

    def text_width(self, config: Mapping[str, Any]) -> int:
        return int(config["joint_attention_dim"])

    def pooled_width(self, config: Mapping[str, Any]) -> int:
        return int(config["pooled_projection_dim"])

    def process(self, ref: "ModelRef", latent_shape: Sequence[int], sampling: TimeSampling) -> NoiseProcess:
        tokens = (latent_shape[-2] // PATCH) * (latent_shape[-1] // PATCH)
        own = shift_of(read_config(ref, "scheduler", "scheduler_config.json"), tokens)
        return FlowMatching(sampling.density, sampling.shift or own)


class StableDiffusion3(_FlowModel):
    """Esser et al. 2024 (arXiv:2403.03206): three text encoders, of which T5 may be left out."""

    pipeline = "StableDiffusion3Pipeline"
    network_class = "SD3Transformer2DModel"
    text_encoders = ("text_encoder", "text_encoder_2")

    def embed(self, pipeline: "DiffusionPipeline", prompts: list[str]) -> PromptEmbeddings:
        found = pipeline.encode_prompt(
            prompts, prompts, prompts, device=pipeline.text_encoder.device, do_classifier_free_guidance=False
        )
        return PromptEmbeddings(found[0], found[2])

    def embed_anew(self, pipeline: "DiffusionPipeline", prompts: list[str], kept: PromptEmbeddings) -> PromptEmbeddings:
        """CLIP's rows come first, then T5's, for which a pipeline without it has zeros."""
        found, rows = self.embed(pipeline, prompts), pipeline.tokenizer_max_length
        tokens = torch.cat([found.tokens[:, :rows], kept.tokens[:, rows:].to(found.tokens)], dim=1)
        return PromptEmbeddings(tokens, found.pooled)

    def sample(
        self,
        pipeline: "DiffusionPipeline",
        prompts: PromptEmbeddings,
        negative: PromptEmbeddings | None,
        **options: Any,
    ) -> torch.Tensor:
        return pooled_sample(pipeline, prompts, negative, **options)

    def start_sampling(self, scheduler: Any, steps: int) -> None:
        """mu, the shift's logarithm for the picture's size, is given only where the model's shift is dynamic."""
        given = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}
        scheduler.set_timesteps(steps, **given)

    def predict(
        self, network: torch.nn.Module, noisy: torch.Tensor, times: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        prediction: torch.Tensor = network(
            hidden_states=noisy, timestep=times * 1000, encoder_hidden_states=conditions.prompts.tokens,
            pooled_projections=conditions.prompts.pooled,
        ).sample  # fmt: skip
        return prediction


class Flux(_FlowModel):
    """Black Forest Labs' FLUX.1: latents packed to tokens, CLIP and T5, and (dev) guidance as an input.

    `Sampler.guidance` is that input; nothing is drawn twice for it.
    """

    pipeline = "FluxPipeline"
    network_class = "FluxTransformer2DModel"
    sample_size = 128  # its config names none; its pipeline has this one

    def embed(self, pipeline: "DiffusionPipeline", prompts: list[str]) -> PromptEmbeddings:
        tokens, pooled, _ = pipeline.encode_prompt(prompts, None, device=pipeline.text_encoder.device)
        return PromptEmbeddings(tokens, pooled)

    def embed_anew(self, pipeline: "DiffusionPipeline", prompts: list[str], kept: PromptEmbeddings) -> PromptEmbeddings:
        """CLIP gives the pooled embedding, T5 the tokens. (`encode_prompt` would ask for both.)"""
        pooled = pipeline._get_clip_prompt_embeds(prompts, device=pipeline.text_encoder.device)
        return PromptEmbeddings(kept.tokens, pooled)

    def sample(
        self,
        pipeline: "DiffusionPipeline",
        prompts: PromptEmbeddings,
        negative: PromptEmbeddings | None,
        **options: Any,
    ) -> torch.Tensor:
        scale, side = pipeline.vae_scale_factor, pipeline.default_sample_size * pipeline.vae_scale_factor
        height, width = (options.pop(name) or side for name in ("height", "width"))
        packed = pipeline(
            prompt_embeds=prompts.tokens, pooled_prompt_embeds=prompts.pooled, output_type="latent",
            height=height, width=width, **options,
        ).images  # fmt: skip
        # The pipeline rounds the picture down to whole tokens.
        return unpack(packed, *(side // (scale * PATCH) * PATCH for side in (height, width)))

    def start_sampling(self, scheduler: Any, steps: int) -> None:
        """mu is always given, and evenly spaced sigmas, but to schedulers that make flow sigmas themselves."""
        if scheduler.config.get("use_flow_sigmas"):
            scheduler.set_timesteps(steps, mu=1.0)
        else:
            scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=1.0)

    def predict(
        self, network: torch.nn.Module, noisy: torch.Tensor, times: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        height, width = noisy.shape[-2:]
        tokens = conditions.prompts.tokens
        told = torch.full((len(noisy),), conditions.guidance, device=noisy.device)
        packed = network(
            hidden_states=pack(noisy), timestep=times, encoder_hidden_states=tokens,
            pooled_projections=conditions.prompts.pooled,
            guidance=told if takes_guidance(network) else None,
            txt_ids=torch.zeros(tokens.shape[1], 3, device=noisy.device, dtype=noisy.dtype),
            img_ids=positions(height // PATCH, width // PATCH).to(noisy.device, noisy.dtype),
        ).sample  # fmt: skip
        return unpack(packed, height, width)


def takes_guidance(network: torch.nn.Module) -> bool:
    """Whether the network was distilled with guidance as an input (dev) or without (schnell).

    network: may be wrapped for several processes.
    """
    return bool(getattr(network, "module", network).config.guidance_embeds)


def pack(latents: torch.Tensor) -> torch.Tensor:
    """(n, C, h, w) as tokens (n, h w / 4, 4 C): each holds a patch of 2 x 2, channel first."""
    count, channels, height, width = latents.shape
    patches = latents.view(count, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(count, -1, channels * PATCH * PATCH)


def unpack(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The inverse of `pack`. height, width: of the latents."""
    patches = tokens.view(len(tokens), height // PATCH, width // PATCH, -1, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, height, width)


def positions(height: int, width: int) -> torch.Tensor:
    """(0, row, column) of each token, (height * width, 3)."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)
