"""A diffusers LoRA under the keys that ComfyUI, A1111, Forge and sd-scripts read.

    python -m training.kohya TRAINING_FOLDER --to lora.safetensors [--dtype float16]

Stable Diffusion 1.x and 2.x keep diffusers' layer names (`lora_unet_down_blocks_0_...`), SDXL gets those of the
original U-Net (`lora_unet_input_blocks_...`), SD3 and Flux keep `transformer.` and the dotted names
(`training.adapter.kohya_keys`).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.safetensors_file import read_header, save_tensors
from training.adapter.kohya_keys import KohyaKeys
from training.adapter.layers import CONFIG, Layer, Tensors, read_layers
from training.model.families import FAMILIES, family_for
from training.model.family import Family
from training.model.reference import ModelError, ModelRef, read_config


@dataclass(frozen=True)
class Base:
    """What of the base model decides the keys: its family, the config of its network, and what it predicts."""

    family: Family
    network: Mapping[str, Any]
    prediction_type: str = "epsilon"

    @classmethod
    def read(cls, base: str, revision: str | None = None) -> "Base":
        """From a diffusers folder or the hub; loads no weights. Raises ModelError for a class without known keys."""
        ref = ModelRef(base, revision)
        family = family_for(ref)
        if family.kohya is None:
            known = [name for name, other in FAMILIES.items() if other.kohya is not None]
            raise ModelError(f"{base!r} is a {family.pipeline}; keys are known for {', '.join(known)}")
        scheduler = read_config(ref, "scheduler", "scheduler_config.json")
        return cls(family, read_config(ref, family.network), scheduler.get("prediction_type", "epsilon"))

    @property
    def keys(self) -> KohyaKeys:
        """How the tensors are named. Raises ModelError for a family without known keys."""
        if self.family.kohya is None:
            raise ModelError(f"no keys are known for a {self.family.pipeline}")
        return self.family.kohya


def to_kohya(layers: Sequence[Layer], base: Base) -> Tensors:
    """The tensors under the keys that belong to the base."""
    state: Tensors = {}
    for layer in layers:
        state |= base.keys.tensors(layer, base.network)
    return state


def write_kohya(adapter: Path, target: Path, base: Base, title: str = "", dtype: str | None = None) -> Path:
    """Convert a diffusers LoRA file; returns `target`, which is replaced.

    title: for people, by default the target's name. dtype: of the weights, None = as they are; alphas stay float32.
    What `training_metadata` has put into the adapter's header is handed on.
    """
    import torch
    from safetensors.torch import load_file

    told = read_header(adapter)
    layers = read_layers(load_file(adapter), json.loads(told.get(CONFIG, "{}")), base.family.network)
    state = to_kohya(layers, base)
    if dtype is not None:
        state = {k: tensor if k.endswith(".alpha") else tensor.to(getattr(torch, dtype)) for k, tensor in state.items()}
    about = {key: value for key, value in told.items() if key.startswith("rlaif.")}
    header = base.keys.header(layers, base.network, base.prediction_type, title or target.stem)
    return save_tensors(state, target, header | about)
