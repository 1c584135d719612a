"""Text encoders that are trained together with the network: what they make of captions.

Only the CLIP encoders (`Family.text_encoders`), only by LoRA (DoRA stays the network's: diffusers does not find the
magnitudes of a text encoder). Their embeddings are computed in every step; what else the network is told of a prompt
(T5's embedding) is taken from the shards.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from training.model.devices import to_device
from training.model.families import family_for
from training.model.family import Family, PromptEmbeddings
from training.model.loading import load_trainable_encoders
from training.model.reference import ModelRef

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class TextEncoders(torch.nn.Module):
    """The trainable encoders of a pipeline as one module, which may be wrapped for several processes."""

    def __init__(self, family: Family, pipeline: "DiffusionPipeline") -> None:
        super().__init__()
        self.family, self.pipeline = family, pipeline
        for name in family.text_encoders:
            self.add_module(name, getattr(pipeline, name).requires_grad_(False))
        self._zeros = bool(pipeline.config.get("force_zeros_for_empty_prompt", False))

    def forward(self, captions: Sequence[str | None], kept: PromptEmbeddings) -> PromptEmbeddings:
        """One row a caption. None: the empty prompt, which may be zeros (SDXL). kept: see `Family.embed_anew`."""
        with _without_warnings(self.pipeline):
            found = self.family.embed_anew(self.pipeline, [caption or "" for caption in captions], kept)
        if not self._zeros or None not in captions:
            return found
        told = to_device(torch.tensor([caption is not None for caption in captions]), found.tokens.device)
        return found.map(lambda each: each * told.view(-1, *[1] * (each.ndim - 1)))

    def parts(self) -> dict[str, torch.nn.Module]:
        """The encoders by their names in the pipeline."""
        return dict(self.named_children())

    def freeze_unread(self) -> None:
        """Leave out of training the layers that no embedding depends on: several processes would wait for their
        gradients for ever."""
        for part in self.family.read_to_last_but_one:
            last = getattr(self, part).config.num_hidden_layers - 1
            for name, parameter in getattr(self, part).named_parameters():
                if f"layers.{last}." in name:
                    parameter.requires_grad_(False)


def load_text_encoders(ref: ModelRef, device: str, dtype: str) -> TextEncoders:
    """The base's own, frozen, without any adapter."""
    return TextEncoders(family_for(ref), load_trainable_encoders(ref, device, dtype))


@contextmanager
def _without_warnings(pipeline: "DiffusionPipeline") -> Iterator[None]:
    """The pipeline says of each caption that is too long that it is cut, and here it would in every step."""
    logger = logging.getLogger(type(pipeline).__module__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
