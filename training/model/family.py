"""What every family of diffusion models has in common, and the one interface behind which families differ.

A family knows how its pipeline embeds prompts and samples, how its pictures are noised, and what its network is
called with. The trainer and the sampler know families only by this.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch

from training.adapter.kohya_keys import KohyaKeys
from training.model.noise import Density, NoiseProcess

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from training.model.reference import ModelRef
from training.model.reference import read_config

TIME_IDS = 6
"""Numbers of SDXL's size conditioning: original height and width, top and left of the crop, target height and width
(Podell et al. 2023, arXiv:2307.01952, sec. 2.2)."""


@dataclass(frozen=True)
class PromptEmbeddings:
    """What the text encoders make of prompts. tokens: (prompts, tokens, width). pooled: (prompts, width), or None."""

    tokens: torch.Tensor
    pooled: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice) -> "PromptEmbeddings":
        return self.map(lambda each: each[rows])

    def map(self, change: Any) -> "PromptEmbeddings":
        """Both tensors through the same function."""
        return PromptEmbeddings(change(self.tokens), None if self.pooled is None else change(self.pooled))

    def repeat_interleave(self, count: int) -> "PromptEmbeddings":
        return self.map(lambda each: each.repeat_interleave(count, dim=0))

    def expand(self, count: int) -> "PromptEmbeddings":
        """The one row `count` times."""
        return self.map(lambda each: each.expand(count, *each.shape[1:]))

    def to(self, device: Any, dtype: torch.dtype | None = None) -> "PromptEmbeddings":
        return self.map(lambda each: each.to(device, dtype))

    @staticmethod
    def cat(parts: Sequence["PromptEmbeddings"]) -> "PromptEmbeddings":
        pooled = [part.pooled for part in parts if part.pooled is not None]
        return PromptEmbeddings(torch.cat([part.tokens for part in parts]), torch.cat(pooled) if pooled else None)


class Conditions(NamedTuple):
    """What the network is told besides the noised latents and the time.

    prompts: one row an image. time_ids: (n, 6) float32, see TIME_IDS, for families that take them. guidance: the input
    of guidance-distilled networks; the others ignore it.
    """

    prompts: PromptEmbeddings
    time_ids: torch.Tensor | None = None
    guidance: float = 1.0


@dataclass(frozen=True)
class TimeSampling:
    """Which times flow models are trained at. shift: 0 = as the model's scheduler says. Diffusion models draw theirs
    uniformly, as they were trained."""

    density: Density = "logit-normal"
    shift: float = 0.0


class Family(ABC):
    """One family: everything that depends on which it is. A new one is a class, and an entry of `families.FAMILIES`.

    pipeline: diffusers' class. network: the component that is trained; network_class: its class. flow: noised by flow
    matching, so that only flow schedulers draw from it. odd_schedulers: those of the right kind that it cannot be drawn
    by all the same, and why. pooled: its networks take a pooled text embedding. takes_time_ids: they take sizes. patch:
    latent pixels a side that make one token. sample_size: latent pixels a side of a picture where the network's config
    names none. text_encoders: the components that can be trained with the network: the CLIP encoders. T5 is left as it
    is. read_to_last_but_one: those of them of which only the last layer but one is read. kohya: under which keys other
    programs read its LoRAs, None = not known.
    """

    pipeline: ClassVar[str]
    network: ClassVar[str] = "unet"
    network_class: ClassVar[str] = "UNet2DConditionModel"
    flow: ClassVar[bool] = False
    pooled: ClassVar[bool] = False
    takes_time_ids: ClassVar[bool] = False
    text_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    read_to_last_but_one: ClassVar[tuple[str, ...]] = ()
    odd_schedulers: ClassVar[Mapping[str, str]] = {}
    patch: ClassVar[int] = 1
    sample_size: ClassVar[int] = 128
    kohya: ClassVar[KohyaKeys | None] = None

    @abstractmethod
    def text_width(self, config: Mapping[str, Any]) -> int:
        """Of the text embeddings that a network of this config attends to."""

    def pooled_width(self, config: Mapping[str, Any]) -> int | None:
        """Of the pooled text embedding that a network of this config takes, None where it takes none."""
        return None

    @abstractmethod
    def embed(self, pipeline: "DiffusionPipeline", prompts: list[str]) -> PromptEmbeddings:
        """The text encoders' outputs."""

    def embed_anew(self, pipeline: "DiffusionPipeline", prompts: list[str], kept: PromptEmbeddings) -> PromptEmbeddings:
        """The outputs of `text_encoders` alone, which the pipeline must have. kept: known embeddings of the same
        prompts, from which that of any other encoder is taken."""
        return self.embed(pipeline, prompts)

    def negative(self, pipeline: "DiffusionPipeline") -> PromptEmbeddings:
        """What guidance leads away from: one row."""
        return self.embed(pipeline, [""])

    @abstractmethod
    def sample(
        self,
        pipeline: "DiffusionPipeline",
        prompts: PromptEmbeddings,
        negative: PromptEmbeddings | None,
        **options: Any,
    ) -> torch.Tensor:
        """Final latents in model space (n, C, h, w). negative: None = no guidance. options: of the pipeline's call."""

    def start_sampling(self, scheduler: Any, steps: int) -> None:
        """Set the scheduler's times as the pipeline does. Raises whatever the scheduler raises that cannot."""
        scheduler.set_timesteps(steps)

    @abstractmethod
    def process(self, ref: "ModelRef", latent_shape: Sequence[int], sampling: TimeSampling) -> NoiseProcess:
        """How pictures of this size are noised in training."""

    @abstractmethod
    def predict(
        self, network: torch.nn.Module, noisy: torch.Tensor, times: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        """The network's prediction (n, C, h, w). All inputs are in the network's precision, but times and time_ids."""

    def decode(self, pipeline: "DiffusionPipeline", latents: torch.Tensor) -> torch.Tensor:
        """Pictures (n, 3, H, W) in [-1, 1] of latents in model space."""
        latents = latents.to(pipeline.vae.device, pipeline.vae.dtype)
        spread, shift = self.latent_scale(pipeline.vae, latents)
        latents = latents * spread / pipeline.vae.config.scaling_factor + shift
        pictures: torch.Tensor = pipeline.vae.decode(latents).sample
        return pictures

    def encode(self, pipeline: "DiffusionPipeline", pictures: torch.Tensor) -> torch.Tensor:
        """Latents in model space (n, C, h, w) of pictures (n, 3, H, W) in [-1, 1]: the mean of the posterior."""
        mean = pipeline.vae.encode(pictures.to(pipeline.vae.device, pipeline.vae.dtype)).latent_dist.mode()
        spread, shift = self.latent_scale(pipeline.vae, mean)
        latents: torch.Tensor = (mean - shift) * pipeline.vae.config.scaling_factor / spread
        return latents

    def latent_scale(self, vae: Any, like: torch.Tensor) -> tuple[Any, Any]:
        """(spread, shift) with which the autoencoder's latents are scaling_factor * (latent - shift) / spread in model
        space, as this family's pipeline has it: numbers, or (1, C, 1, 1) on the device and in the precision of `like`.
        """
        return 1.0, getattr(vae.config, "shift_factor", None) or 0.0

    def check(self, ref: "ModelRef") -> None:  # noqa: B027 most families have nothing to refuse
        """Refuse, without loading weights, a model of this family that cannot be trained. Raises ModelError."""


def picture_scale(ref: "ModelRef") -> int:
    """Pixels of the picture a latent pixel of it covers, along each side."""
    return int(2 ** (len(read_config(ref, "vae")["block_out_channels"]) - 1))


def whole_picture(latent_shape: Sequence[int], scale: int) -> list[int]:
    """The time ids of a picture that was made or kept at its own size, uncropped."""
    height, width = latent_shape[-2] * scale, latent_shape[-1] * scale
    return [height, width, 0, 0, height, width]
