"""The keys under which ComfyUI, A1111, Forge and sd-scripts read a LoRA. Which of these a family has, it states itself.

Read in ComfyUI (comfy/lora.py, comfy/utils.py, comfy/weight_adapter), A1111 1.10 (extensions-builtin/Lora) and
kohya-ss/sd-scripts 48d368f (networks/lora.py). diffusers' own `convert_state_dict_to_kohya` is not used: it writes the
rank as alpha, whatever the adapter's alpha is, and leaves the DoRA magnitudes of a U-Net under diffusers' name.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from training.adapter.layers import Layer, Tensors
from training.model.reference import ModelError


class KohyaKeys(ABC):
    """One way to name the tensors of a LoRA. network: the config of the network that it belongs to."""

    @abstractmethod
    def tensors(self, layer: Layer, network: Mapping[str, Any]) -> Tensors:
        """The tensors of one layer under its keys. Raises ModelError for a layer that has none."""

    @abstractmethod
    def header(
        self, layers: Sequence[Layer], network: Mapping[str, Any], prediction_type: str, title: str
    ) -> dict[str, str]:
        """What the file says of itself. prediction_type: "epsilon" or "v_prediction"; title: for people."""


class DottedKeys(KohyaKeys):
    """`transformer.` and dotted names, as of SD3 and Flux, which ComfyUI maps itself."""

    def tensors(self, layer: Layer, network: Mapping[str, Any]) -> Tensors:
        """The scale goes into the weights, since ComfyUI does not read PEFT's config in the header."""
        name = layer.name if not layer.part.startswith("text_encoder") else text_name(layer.name)
        name = f"{layer.part}.{name}"
        up = (layer.up.float() * layer.scale).to(layer.up.dtype)
        return {f"{name}.lora_A.weight": layer.down, f"{name}.lora_B.weight": up} | magnitude(name, layer)

    def header(
        self, layers: Sequence[Layer], network: Mapping[str, Any], prediction_type: str, title: str
    ) -> dict[str, str]:
        return {"format": "pt"}


class FlatKeys(KohyaKeys):
    """`lora_unet_` and diffusers' layer names with underscores, as of Stable Diffusion 1.x and 2.x.

    text_encoders: what the names of a text encoder's layers begin with, by its part of the pipeline.
    """

    def __init__(self, text_encoders: Mapping[str, str]) -> None:
        self.text_encoders = text_encoders

    def tensors(self, layer: Layer, network: Mapping[str, Any]) -> Tensors:
        import torch

        name = f"{self._prefix(layer.part)}_{self._name(layer, network).replace('.', '_')}"
        tensors = {f"{name}.lora_down.weight": layer.down, f"{name}.lora_up.weight": layer.up}
        return tensors | {f"{name}.alpha": torch.tensor(layer.alpha)} | magnitude(name, layer)

    def _prefix(self, part: str) -> str:
        return self.text_encoders.get(part, "lora_te2") if part.startswith("text_encoder") else "lora_unet"

    def _name(self, layer: Layer, network: Mapping[str, Any]) -> str:
        return (
            text_name(layer.name) if layer.part.startswith("text_encoder") else self.network_name(layer.name, network)
        )

    def network_name(self, name: str, network: Mapping[str, Any]) -> str:
        """The name of a layer of the network before its dots become underscores."""
        return name

    def header(
        self, layers: Sequence[Layer], network: Mapping[str, Any], prediction_type: str, title: str
    ) -> dict[str, str]:
        """`ss_*` as sd-scripts writes and A1111 reads them, `modelspec.*` of ModelSpec 1.0.1."""
        dora = any(layer.magnitude is not None for layer in layers)
        return {
            "format": "pt",
            "ss_network_module": "lycoris.kohya" if dora else "networks.lora",
            "ss_network_dim": _uniform([layer.rank for layer in layers]),
            "ss_network_alpha": _uniform([layer.alpha for layer in layers]),
            **self.generation(network, prediction_type == "v_prediction", title),
        }

    def generation(self, network: Mapping[str, Any], v: bool, title: str) -> dict[str, str]:
        """Which generation of the model it is for; nothing where the base does not tell.

        That is known by the width of the text encoder's output (768: SD 1.x, 1024: SD 2.x). v: it predicts velocities.
        """
        width = network.get("cross_attention_dim")
        if width == 768:
            version, architecture = "sd_v1" + "_v" * v, "stable-diffusion-v1"
        elif width == 1024:
            version, architecture = "sd_v2" + "_v" * v, "stable-diffusion-v2-768-v" if v else "stable-diffusion-v2-512"
        else:
            return {}
        return _spec(version, architecture, "diffusers", v, title) | {"ss_v2": str(width == 1024)}


class OriginalKeys(FlatKeys):
    """`lora_unet_` and the names of the original SDXL U-Net, on which sd-scripts trains it and which every loader
    takes."""

    def network_name(self, name: str, network: Mapping[str, Any]) -> str:
        return original_name(name, network)

    def generation(self, network: Mapping[str, Any], v: bool, title: str) -> dict[str, str]:
        original = "https://github.com/Stability-AI/generative-models"
        spec = _spec("sdxl_base_v1-0", "stable-diffusion-xl-v1-base", original, v, title)
        return spec | {"ss_v2": str(network.get("cross_attention_dim") == 1024)}


def _spec(version: str, architecture: str, implementation: str, v: bool, title: str) -> dict[str, str]:
    return {
        "ss_base_model_version": version, "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora", "modelspec.title": title,
        "modelspec.implementation": implementation, "modelspec.prediction_type": "v" if v else "epsilon",
    }  # fmt: skip


def _uniform(values: Sequence[float]) -> str:
    """One number for all layers, else what sd-scripts writes then."""
    return f"{values[0]:g}" if len(set(values)) == 1 else "Dynamic"


def text_name(name: str) -> str:
    """A layer of a CLIP text encoder: transformers 5 has dropped the `text_model.` in which every loader expects it."""
    return name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}"


def magnitude(name: str, layer: Layer) -> Tensors:
    """DoRA's magnitudes of the outputs, as a column: a row would be taken for those of the inputs, or broadcast."""
    if layer.magnitude is None:
        return {}
    return {f"{name}.dora_scale": layer.magnitude.reshape(-1, *[1] * (layer.down.ndim - 1))}


_RESNET = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1",
           "conv_shortcut": "skip_connection"}  # fmt: skip
_OUTER = {"conv_in": "input_blocks.0.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0",
          "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
          "add_embedding.linear_2": "label_emb.0.2"}  # fmt: skip


def original_name(name: str, unet: Mapping[str, Any]) -> str:
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
