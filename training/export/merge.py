"""Base, tuned network and adapter as one pipeline folder that needs neither this project nor PEFT.

    python -m training.merge TRAINING_FOLDER --to FOLDER [--dtype float16]

The weights are added in float32 and rounded once.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from data.files import publish_folder
from data.safetensors_file import read_header
from training.adapter.layers import CONFIG, peft_state, read_layers
from training.model.families import family_for, family_of
from training.model.loading import quiet_libraries
from training.model.reference import ADAPTER_FILE, Dtype, ModelError, ModelRef

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def merge(model: ModelRef, target: Path, dtype: str = "float32") -> Path:
    """Write the whole pipeline in `dtype` as `from_pretrained` of its class reads it; returns `target`.

    Raises ModelError for a target that is there, an unknown dtype, and an adapter of layers that the base lacks.
    """
    import torch

    if dtype not in get_args(Dtype):
        raise ModelError(f"dtype={dtype!r}; choose one of {', '.join(get_args(Dtype))}")
    if target.exists():
        raise ModelError(f"{target}: is there already; remove it or name another folder")
    pipeline = fused_pipeline(model)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            torch.nn.Module.to(part, getattr(torch, dtype))  # the libraries' own `to` warns of computing in it
    publish_folder(target, lambda folder: pipeline.save_pretrained(folder))
    return target


def fused_pipeline(model: ModelRef) -> "DiffusionPipeline":
    """The base's own pipeline class in float32 on the CPU, with everything that training changed in its weights."""
    import torch
    from diffusers import DiffusionPipeline

    quiet_libraries()
    network = family_for(model).network
    pipeline = DiffusionPipeline.from_pretrained(model.base, revision=model.revision, dtype=torch.float32)
    if model.network:
        tuned = type(getattr(pipeline, network)).from_pretrained(model.network, dtype=torch.float32)
        pipeline.register_modules(**{network: tuned})
    if model.adapter:
        fuse(pipeline, Path(model.adapter) / ADAPTER_FILE)
    return pipeline


def fuse(pipeline: "DiffusionPipeline", adapter: Path) -> None:
    """Add a LoRA file to the weights of the networks that it belongs to, for good."""
    from safetensors.torch import load_file

    config = json.loads(read_header(adapter).get(CONFIG, "{}"))
    network = family_of(pipeline).network
    layers = read_layers(load_file(adapter), config, network)
    # All layers under PEFT's names: where a file mixes naming schemes, diffusers leaves layers out.
    state = peft_state(layers)
    for part in sorted({layer.part for layer in layers}):
        if getattr(pipeline, part, None) is None:
            raise ModelError(f"{adapter}: is for a {part}, which {type(pipeline).__name__} does not have")
        _check_layers(getattr(pipeline, part), part, [layer.name for layer in layers if layer.part == part], adapter)
        _load(pipeline, part, state, config)
        pipeline.fuse_lora(components=[part])
    pipeline.unload_lora_weights()


def _check_layers(network: Any, part: str, names: list[str], adapter: Path) -> None:
    known = {name.removeprefix("text_model.") for name, _ in network.named_modules()}
    missing = [name for name in names if name.removeprefix("text_model.") not in known]
    if missing:
        raise ModelError(f"{adapter}: the base's {part} has no layer {missing[0]}; it belongs to another base model")


def _load(pipeline: "DiffusionPipeline", part: str, state: dict[str, Any], config: dict[str, Any]) -> None:
    metadata = {key: value for key, value in config.items() if key.startswith(f"{part}.")} or None
    if not part.startswith("text_encoder"):
        getattr(pipeline, part).load_lora_adapter(state, prefix=part, metadata=metadata, adapter_name="fused")
        return
    pipeline.load_lora_into_text_encoder(
        state, None, getattr(pipeline, part), prefix=part, metadata=metadata, adapter_name="fused"
    )
