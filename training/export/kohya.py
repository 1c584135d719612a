"""A diffusers LoRA under the keys that ComfyUI, A1111, Forge and sd-scripts read.

    python -m training.kohya TRAINING_FOLDER --to lora.safetensors [--dtype float16]

Stable Diffusion 1.x and 2.x keep diffusers' layer names (`lora_unet_down_blocks_0_...`). SDXL gets those of the
original U-Net (`lora_unet_input_blocks_...`), on which sd-scripts trains it and which every loader takes. SD3 and Flux
keep `transformer.` and the dotted names, which ComfyUI maps itself. Read in ComfyUI (comfy/lora.py, comfy/utils.py,
comfy/weight_adapter), A1111 1.10 (extensions-builtin/Lora) and kohya-ss/sd-scripts 48d368f (networks/lora.py).

diffusers' own `convert_state_dict_to_kohya` is not used: it writes the rank as alpha, whatever the adapter's alpha is,
and leaves the DoRA magnitudes of a U-Net under diffusers' name.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.safetensors_file import read_header, save_tensors
from training.adapter.layers import CONFIG, Layer, Tensors, read_layers
from training.export.finished import finished_adapter
from training.model.reference import ModelError, model_index

XL = "StableDiffusionXLPipeline"
UNETS = ("StableDiffusionPipeline", XL)
TRANSFORMERS = ("StableDiffusion3Pipeline", "FluxPipeline")

_RESNET = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1",
           "conv_shortcut": "skip_connection"}  # fmt: skip
_OUTER = {"conv_in": "input_blocks.0.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0",
          "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
          "add_embedding.linear_2": "label_emb.0.2"}  # fmt: skip


@dataclass(frozen=True)
class Base:
    """What of the base model decides the keys. pipeline: its class. unet: the U-Net's config; empty where none.

    prediction_type: "epsilon" or "v_prediction"; None where the scheduler has none.
    """

    pipeline: str
    unet: Mapping[str, Any]
    prediction_type: str | None = None

    @classmethod
    def read(cls, base: str, revision: str | None = None) -> "Base":
        """From a diffusers folder or the hub; loads no weights. Raises ModelError for a class without known keys."""
        from diffusers import DDPMScheduler, UNet2DConditionModel

        pipeline = str(model_index(base, revision).get("_class_name"))
        if pipeline not in UNETS + TRANSFORMERS:
            raise ModelError(f"{base!r} is a {pipeline}; keys are known for {', '.join(UNETS + TRANSFORMERS)}")
        if pipeline in TRANSFORMERS:
            return cls(pipeline, {})
        unet = UNet2DConditionModel.load_config(base, subfolder="unet", revision=revision)
        scheduler = DDPMScheduler.load_config(base, subfolder="scheduler", revision=revision)
        return cls(pipeline, unet, scheduler.get("prediction_type", "epsilon"))


def to_kohya(layers: Sequence[Layer], base: Base) -> Tensors:
    """The tensors under the keys that belong to the base."""
    state: Tensors = {}
    for layer in layers:
        state |= _dotted(layer) if base.pipeline in TRANSFORMERS else _flat(layer, base)
    return state


def _flat(layer: Layer, base: Base) -> Tensors:
    import torch

    name = _flat_name(layer, base)
    tensors = {f"{name}.lora_down.weight": layer.down, f"{name}.lora_up.weight": layer.up}
    return tensors | {f"{name}.alpha": torch.tensor(layer.alpha)} | _magnitude(name, layer)


def _flat_name(layer: Layer, base: Base) -> str:
    xl = base.pipeline == XL
    if layer.part == "unet":
        prefix, name = "lora_unet", _original_name(layer.name, base.unet) if xl else layer.name
    elif layer.part == "text_encoder":
        prefix, name = "lora_te1" if xl else "lora_te", _text_name(layer.name)
    else:
        prefix, name = "lora_te2", _text_name(layer.name)
    return f"{prefix}_{name.replace('.', '_')}"


def _text_name(name: str) -> str:
    """transformers 5 has dropped the `text_model.` in which every loader still expects CLIP's layers."""
    return name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}"


def _original_name(name: str, unet: Mapping[str, Any]) -> str:
    """A layer of diffusers' SDXL U-Net as the original code names it.

    There all blocks of one direction are numbered through: `layers_per_block` of them a level, then one that halves
    the resolution (on the way down, after `input_blocks.0` = conv_in); on the way up each level has one more and the
    last of it doubles the resolution.
    """
    level = unet["layers_per_block"] + 1
    match name.split("."):
        case ["down_blocks", block, "downsamplers", "0", "conv"]:
            return f"input_blocks.{(int(block) + 1) * level}.0.op"
        case ["down_blocks", block, kind, index, *rest]:
            return f"input_blocks.{1 + int(block) * level + int(index)}.{_inner(name, kind, rest)}"
        case ["mid_block", "attentions", "0", *rest]:
            return f"middle_block.1.{'.'.join(rest)}"
        case ["mid_block", "resnets", "0" | "1" as index, *rest]:
            return f"middle_block.{2 * int(index)}.{_resnet(name, rest)}"
        case ["up_blocks", block, "upsamplers", "0", "conv"]:
            behind = 2 if "CrossAttn" in unet["up_block_types"][int(block)] else 1
            return f"output_blocks.{int(block) * level + level - 1}.{behind}.conv"
        case ["up_blocks", block, kind, index, *rest]:
            return f"output_blocks.{int(block) * level + int(index)}.{_inner(name, kind, rest)}"
    if name not in _OUTER:
        raise ModelError(f"adapter: the layer {name} has no counterpart in the original SDXL U-Net")
    return _OUTER[name]


def _inner(name: str, kind: str, rest: list[str]) -> str:
    return f"1.{'.'.join(rest)}" if kind == "attentions" else f"0.{_resnet(name, rest)}"


def _resnet(name: str, rest: list[str]) -> str:
    inside = ".".join(rest)
    if inside not in _RESNET:
        raise ModelError(f"adapter: the layer {name} has no counterpart in the original SDXL U-Net")
    return _RESNET[inside]


def _dotted(layer: Layer) -> Tensors:
    """diffusers' names; the scale goes into the weights, since ComfyUI does not read PEFT's config in the header."""
    name = layer.name if layer.part == "transformer" else _text_name(layer.name)
    name = f"{layer.part}.{name}"
    up = (layer.up.float() * layer.scale).to(layer.up.dtype)
    return {f"{name}.lora_A.weight": layer.down, f"{name}.lora_B.weight": up} | _magnitude(name, layer)


def _magnitude(name: str, layer: Layer) -> Tensors:
    """DoRA's magnitudes of the outputs, as a column: a row would be taken for those of the inputs, or broadcast."""
    if layer.magnitude is None:
        return {}
    return {f"{name}.dora_scale": layer.magnitude.reshape(-1, *[1] * (layer.down.ndim - 1))}


def header(layers: Sequence[Layer], base: Base, title: str) -> dict[str, str]:
    """`ss_*` as sd-scripts writes and A1111 reads them, `modelspec.*` of ModelSpec 1.0.1.

    What cannot be told from the base is left out: which generation a U-Net is of is known by the width of its text
    encoder's output (768: SD 1.x, 1024: SD 2.x).
    """
    if base.pipeline in TRANSFORMERS:
        return {"format": "pt"}
    dora = any(layer.magnitude is not None for layer in layers)
    return {
        "format": "pt",
        "ss_network_module": "lycoris.kohya" if dora else "networks.lora",
        "ss_network_dim": _uniform([layer.rank for layer in layers]),
        "ss_network_alpha": _uniform([layer.alpha for layer in layers]),
        **_generation(base, title),
    }


def _uniform(values: Sequence[float]) -> str:
    """One number for all layers, else what sd-scripts writes then."""
    return f"{values[0]:g}" if len(set(values)) == 1 else "Dynamic"


def _generation(base: Base, title: str) -> dict[str, str]:
    v = base.prediction_type == "v_prediction"
    width = base.unet.get("cross_attention_dim")
    if base.pipeline == XL:
        version, architecture = "sdxl_base_v1-0", "stable-diffusion-xl-v1-base"
    elif width == 768:
        version, architecture = "sd_v1" + "_v" * v, "stable-diffusion-v1"
    elif width == 1024:
        version, architecture = "sd_v2" + "_v" * v, "stable-diffusion-v2-768-v" if v else "stable-diffusion-v2-512"
    else:
        return {}
    original = "https://github.com/Stability-AI/generative-models"
    return {
        "ss_base_model_version": version, "ss_v2": str(width == 1024), "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora", "modelspec.title": title,
        "modelspec.implementation": original if base.pipeline == XL else "diffusers",
        "modelspec.prediction_type": "v" if v else "epsilon",
    }  # fmt: skip


def write_kohya(adapter: Path, target: Path, base: Base, title: str = "", dtype: str | None = None) -> Path:
    """Convert a diffusers LoRA file; returns `target`, which is replaced.

    title: for people, by default the target's name. dtype: of the weights, None = as they are; alphas stay float32.
    What `training_metadata` has put into the adapter's header is handed on.
    """
    import torch
    from safetensors.torch import load_file

    known = read_header(adapter)
    layers = read_layers(load_file(adapter), json.loads(known.get(CONFIG, "{}")))
    state = to_kohya(layers, base)
    if dtype is not None:
        state = {k: tensor if k.endswith(".alpha") else tensor.to(getattr(torch, dtype)) for k, tensor in state.items()}
    about = {key: value for key, value in known.items() if key.startswith("rlaif.")}
    return save_tensors(state, target, header(layers, base, title or target.stem) | about)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.kohya", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, help="folder of a finished training, or of an adapter")
    parser.add_argument("--to", type=Path, required=True, metavar="FILE.safetensors")
    parser.add_argument("--base", help="base model, where the training's record does not name it")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: as trained")
    given = parser.parse_args(arguments)
    try:
        adapter, model = finished_adapter(given.source, given.base)
        written = write_kohya(adapter, given.to, Base.read(model.base, model.revision), dtype=given.dtype)
    except (ModelError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(written)


if __name__ == "__main__":
    main()
