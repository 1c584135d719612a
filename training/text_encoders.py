"""Text encoders that are trained together with the network: what they make of captions, and their part of an adapter.

Only the CLIP encoders (`Family.text_encoders`), only by LoRA (DoRA stays the network's: diffusers does not find the
magnitudes of a text encoder). Their embeddings are computed in every step; what else the network is told of a prompt
(T5's embedding) is taken from the shards.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from training.adapter_shape import adapted_encoders
from training.family import Family, PromptEmbeddings
from training.lora_layers import CONFIG, Layer, peft_state, read_layers
from training.models import ADAPTER_FILE, ModelError, ModelRef, family_for, load_trainable_encoders
from training.safetensors_file import read_metadata
from training.transfer import to_device

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from peft import LoraConfig

PREFIX = "text_model."
"""What the names of CLIP's layers begin with in LoRA files. In models without a projection transformers 5 has dropped
it."""


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


def fuse_encoders(pipeline: "DiffusionPipeline", adapter: str) -> None:
    """Add an adapter's part for the text encoders to their weights for good, as `models.fuse_adapter` does the
    network's. Raises ModelError for an encoder or a layer that the pipeline does not have."""
    from diffusers.utils.peft_utils import recurse_remove_peft_layers
    from peft.tuners.tuners_utils import BaseTunerLayer

    for part in adapted_encoders(adapter):
        encoder = getattr(pipeline, part, None)
        if encoder is None:
            raise ModelError(f"{adapter}: is for a {part}, which {type(pipeline).__name__} does not have here")
        add_tuned(encoder, part, Path(adapter) / ADAPTER_FILE, ["fused"])
        for layer in encoder.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.merge(adapter_names=["fused"])
        recurse_remove_peft_layers(encoder)
        del encoder.peft_config
        encoder._hf_peft_config_loaded = False


def add_tuned(encoder: torch.nn.Module, part: str, file: Path, names: Sequence[str]) -> "LoraConfig":
    """Give an encoder its part of a LoRA file, under each of these names, in float32; returns the adapter's config.

    By PEFT itself: transformers' loader knows no magnitudes (DoRA), and warns of every other adapter.
    Raises ModelError for a layer that the encoder does not have.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    state = {name: tensor for name, tensor in load_file(file).items() if name.startswith(f"{part}.")}
    layers = read_layers(state, json.loads(read_metadata(file).get(CONFIG, "{}")))
    if not hasattr(encoder, PREFIX.rstrip(".")):
        layers = [replace(layer, name=layer.name.removeprefix(PREFIX)) for layer in layers]
    own = {name.removeprefix(f"{part}."): tensor for name, tensor in peft_state(layers).items()}
    config = _config(layers)
    for name in names:
        encoder.add_adapter(config, name)
        for key, parameter in encoder.named_parameters():
            if f".{name}." in key:
                parameter.data = parameter.data.float()
        if lost := set_peft_model_state_dict(encoder, own, name).unexpected_keys:
            raise ModelError(f"{file}: the base's {part} has no place for {lost[0]}; it belongs to another base model")
    return config


def _config(layers: Sequence[Layer]) -> "LoraConfig":
    from peft import LoraConfig

    first = layers[0]
    return LoraConfig(
        r=first.rank, lora_alpha=first.alpha, use_dora=first.magnitude is not None,
        target_modules=sorted({layer.name.rsplit(".", 1)[-1] for layer in layers}),
        rank_pattern={layer.name: layer.rank for layer in layers if layer.rank != first.rank},
        alpha_pattern={layer.name: layer.alpha for layer in layers if layer.alpha != first.alpha},
    )  # fmt: skip


def portable(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An encoder's tensors under the names that every version of transformers and every loader knows."""
    return {name if name.startswith(PREFIX) else PREFIX + name: tensor for name, tensor in state.items()}
