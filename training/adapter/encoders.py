"""The text encoders' part of a LoRA file: added to an encoder, fused into it, named as every loader expects it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from data.safetensors_file import read_header
from training.adapter.layers import CONFIG, Layer, peft_state, read_layers
from training.adapter.shape import adapted_encoders
from training.model.reference import ADAPTER_FILE, ModelError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from peft import LoraConfig


PREFIX = "text_model."
"""What the names of CLIP's layers begin with in LoRA files. In models without a projection transformers 5 has dropped
it."""


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
    layers = read_layers(state, json.loads(read_header(file).get(CONFIG, "{}")), part)
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
