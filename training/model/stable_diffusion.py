"""Stable Diffusion 1.x and 2.x (one text encoder), and SDXL (two, pooled embeddings, sizes)."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from training.adapter.kohya_keys import FlatKeys, OriginalKeys
from training.model.family import TIME_IDS, Conditions, Family, PromptEmbeddings, TimeSampling
from training.model.noise import Diffusion, NoiseProcess
from training.model.reference import read_config

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from training.model.reference import ModelRef


EDM_SCHEDULERS = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CosineDPMSolverMultistepScheduler")
"""They scale what the network sees and predicts, so they draw nothing sensible from other models."""
EDM = "it draws from models in the formulation of EDM"


class StableDiffusion(Family):
    """Rombach et al. 2021 (arXiv:2112.10752): epsilon or v prediction."""

    pipeline = "StableDiffusionPipeline"
    odd_schedulers = dict.fromkeys(EDM_SCHEDULERS, EDM)
    kohya = FlatKeys({"text_encoder": "lora_te"})

    def text_width(self, config: Mapping[str, Any]) -> int:
        width = config["cross_attention_dim"]
        return int(width[0] if isinstance(width, list) else width)

    def embed(self, pipeline: "DiffusionPipeline", prompts: list[str]) -> PromptEmbeddings:
        tokens, _ = pipeline.encode_prompt(prompts, pipeline.text_encoder.device, 1, do_classifier_free_guidance=False)
        return PromptEmbeddings(tokens)

    def sample(
        self,
        pipeline: "DiffusionPipeline",
        prompts: PromptEmbeddings,
        negative: PromptEmbeddings | None,
        **options: Any,
    ) -> torch.Tensor:
        against = None if negative is None else negative.tokens
        drawn = pipeline(prompt_embeds=prompts.tokens, negative_prompt_embeds=against, output_type="latent", **options)
        latents: torch.Tensor = drawn.images
        return latents

    def process(self, ref: "ModelRef", latent_shape: Sequence[int], sampling: TimeSampling) -> NoiseProcess:
        from diffusers import DDPMScheduler

        return Diffusion(DDPMScheduler.from_pretrained(ref.base, subfolder="scheduler", revision=ref.revision))

    def predict(
        self, network: torch.nn.Module, noisy: torch.Tensor, times: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        prediction: torch.Tensor = network(noisy, times, conditions.prompts.tokens).sample
        return prediction

    def check(self, ref: "ModelRef") -> None:
        """Refuse a model that predicts something the losses have no target for, or is noised otherwise."""
        from training.model.reference import ModelError

        config = read_config(ref, "scheduler", "scheduler_config.json")
        if config.get("_class_name") in EDM_SCHEDULERS:
            raise ModelError(
                f"base_model={ref.base!r} has a {config['_class_name']}: it was trained in the formulation of EDM "
                "(Karras et al. 2022, arXiv:2206.00364), which training here does not know; give a base model that "
                "predicts epsilon or v with a DDPM schedule"
            )
        kind = config.get("prediction_type", "epsilon")
        if kind not in ("epsilon", "v_prediction"):
            raise ModelError(f"base_model={ref.base!r} predicts {kind!r}; supported: epsilon, v_prediction")


class StableDiffusionXL(StableDiffusion):
    """Podell et al. 2023 (arXiv:2307.01952): told the size of the picture, where it was cropped, and a pooled text
    embedding."""

    pipeline = "StableDiffusionXLPipeline"
    pooled = True
    takes_time_ids = True
    text_encoders = ("text_encoder", "text_encoder_2")
    read_to_last_but_one = ("text_encoder",)  # the other's last layer gives the pooled embedding
    kohya = OriginalKeys({"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"})

    def pooled_width(self, config: Mapping[str, Any]) -> int:
        """The network's input is the pooled embedding and the embedded time ids one after another."""
        together, each = config["projection_class_embeddings_input_dim"], config["addition_time_embed_dim"]
        return int(together) - TIME_IDS * int(each)

    def embed(self, pipeline: "DiffusionPipeline", prompts: list[str]) -> PromptEmbeddings:
        found = pipeline.encode_prompt(prompts, device=pipeline.text_encoder.device, do_classifier_free_guidance=False)
        return PromptEmbeddings(found[0], found[2])

    def negative(self, pipeline: "DiffusionPipeline") -> PromptEmbeddings:
        """The published model was trained with zeros for the empty prompt; its config says so."""
        empty = self.embed(pipeline, [""])
        return empty.map(torch.zeros_like) if pipeline.config.force_zeros_for_empty_prompt else empty

    def sample(
        self,
        pipeline: "DiffusionPipeline",
        prompts: PromptEmbeddings,
        negative: PromptEmbeddings | None,
        **options: Any,
    ) -> torch.Tensor:
        return pooled_sample(pipeline, prompts, negative, **options)

    def latent_scale(self, vae: Any, like: torch.Tensor) -> tuple[Any, Any]:
        """Some fine-tunes (Playground 2.5) measured their latents' mean and standard deviation, channel by channel;
        both or neither count, as in diffusers' pipeline, and there is no shift_factor."""
        mean, deviation = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))
        if mean is None or deviation is None:
            return 1.0, 0.0
        return like.new_tensor(deviation).view(1, -1, 1, 1), like.new_tensor(mean).view(1, -1, 1, 1)

    def predict(
        self, network: torch.nn.Module, noisy: torch.Tensor, times: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        added = {"text_embeds": conditions.prompts.pooled, "time_ids": conditions.time_ids}
        tokens = conditions.prompts.tokens
        prediction: torch.Tensor = network(noisy, times, tokens, added_cond_kwargs=added).sample
        return prediction


def pooled_sample(
    pipeline: "DiffusionPipeline", prompts: PromptEmbeddings, negative: PromptEmbeddings | None, **options: Any
) -> torch.Tensor:
    """Latents from a pipeline that takes pooled embeddings and a negative prompt."""
    against = PromptEmbeddings(None, None) if negative is None else negative
    drawn = pipeline(
        prompt_embeds=prompts.tokens, pooled_prompt_embeds=prompts.pooled,
        negative_prompt_embeds=against.tokens, negative_pooled_prompt_embeds=against.pooled,
        output_type="latent", **options,
    )  # fmt: skip
    latents: torch.Tensor = drawn.images
    return latents
