"""The layers of a LoRA or DoRA, whoever named its tensors. Reads state dicts; knows nothing of files or models."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from training.model.reference import ModelError

if TYPE_CHECKING:
    import torch

Tensors = dict[str, "torch.Tensor"]

CONFIG = "lora_adapter_metadata"
"""Where diffusers keeps PEFT's config, as JSON with prefixed keys, in the header of a LoRA file."""

_TENSOR = re.compile(
    r"(?P<part>[a-z][a-z0-9_]*)\.(?P<layer>.+?)\."
    r"(?:(?P<factor>lora_A|lora_B|lora(?:_linear_layer)?\.(?:down|up))\.weight|lora_magnitude_vector)"
)


@dataclass(frozen=True)
class Layer:
    """The adapter of one layer: the update is scale * up @ down.

    down: (rank, in, ...). up: (out, rank, ...), convolutions with their kernel. magnitude: DoRA's, (out,) values.
    """

    part: str
    name: str
    down: "torch.Tensor"
    up: "torch.Tensor"
    magnitude: "torch.Tensor | None"
    scale: float

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])

    @property
    def alpha(self) -> float:
        """Loaders scale by alpha / rank."""
        return self.scale * self.rank


class TensorName(NamedTuple):
    """Of one tensor: the part of the pipeline, the layer in it, and down, up or magnitude."""

    part: str
    layer: str
    role: str


def name_of(key: str) -> TensorName | None:
    """What a tensor of an adapter file is, None when it is no part of a plain LoRA or DoRA."""
    match = _TENSOR.fullmatch(key)
    if match is None:
        return None
    factor = match["factor"] or "magnitude"
    role = "down" if factor.endswith(("A", "down")) else "up" if factor.endswith(("B", "up")) else factor
    return TensorName(match["part"], match["layer"], role)


def read_layers(state: Mapping[str, "torch.Tensor"], config: Mapping[str, Any], network: str) -> list[Layer]:
    """The layers of a diffusers or PEFT LoRA with prefixed keys (`unet.`, `transformer.`, `text_encoder.`).

    config: PEFT's, with the same prefixes, as diffusers writes it into the file; empty = the scale is 1, as diffusers
    takes it then. network: the name of the network in its pipeline, `Family.network`. Raises ModelError for tensors
    that are no plain LoRA or DoRA of that network or of a text encoder.
    """
    found: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    for key, tensor in state.items():
        name = name_of(key)
        if name is None or not (name.part == network or name.part.startswith("text_encoder")):
            raise ModelError(f"adapter: {key} is no part of a LoRA or DoRA of a linear or convolution layer")
        found.setdefault((name.part, name.layer), {})[name.role] = tensor
    return [_layer(part, name, tensors, config) for (part, name), tensors in sorted(found.items())]


def _layer(part: str, name: str, tensors: Tensors, config: Mapping[str, Any]) -> Layer:
    if not {"down", "up"} <= tensors.keys():
        raise ModelError(f"adapter: {part}.{name} has only {sorted(tensors)}, expected down and up")
    scale = _scale(part, name, int(tensors["down"].shape[0]), config)
    return Layer(part, name, tensors["down"], tensors["up"], tensors.get("magnitude"), scale)


def _scale(part: str, name: str, rank: int, config: Mapping[str, Any]) -> float:
    """alpha / rank (Hu et al. 2021, arXiv:2106.09685, sec. 4.1), or alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732)."""
    from peft.utils.other import get_pattern_key

    own = {key.removeprefix(f"{part}."): value for key, value in config.items() if key.startswith(f"{part}.")}
    if not own:
        return 1.0
    pattern = own.get("alpha_pattern") or {}
    alpha = float(pattern.get(get_pattern_key(list(pattern), name), own["lora_alpha"]))
    return alpha / (rank**0.5 if own.get("use_rslora") else rank)


def peft_state(layers: Sequence[Layer]) -> Tensors:
    """The same layers under PEFT's names, prefixed by their part."""
    state: Tensors = {}
    for layer in layers:
        name = f"{layer.part}.{layer.name}"
        state |= {f"{name}.lora_A.weight": layer.down, f"{name}.lora_B.weight": layer.up}
        if layer.magnitude is not None:
            state[f"{name}.lora_magnitude_vector"] = layer.magnitude
    return state
