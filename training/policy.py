"""The network in training and the reference it may not drift from.

LoRA: one network; the reference is the same network with the adapter disabled, or, where training starts from
a champion's adapter, with that frozen adapter in its place. Full: the reference is a frozen copy.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from training.models import (
    ADAPTER_FILE,
    ModelError,
    ModelRef,
    fuse_adapter,
    load_unet,
    prefer_channels_last,
    resolve_dtype,
)

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from peft.tuners.tuners_utils import BaseTunerLayer

POLICY, REFERENCE = "policy", "reference"


@dataclass(frozen=True)
class Lora:
    """rank, alpha: the update is alpha / rank * B A (Hu et al. 2021, arXiv:2106.09685, sec. 4.1).

    targets: endings of the names of the layers that get one.
    """

    rank: int
    alpha: float
    targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])


class LoraPolicy:
    """A frozen UNet with a trainable adapter. Its parameters are float32 whatever the UNet's precision:
    one AdamW step at learning rate 1e-5 would change only 2.5 % of bfloat16 adapter weights."""

    def __init__(self, ref: ModelRef, lora: Lora, device: str, dtype: str, seed: int) -> None:
        self.unet = load_unet(ref, device, "float32")  # adapters are loaded in the precision of the network
        self.unet.requires_grad_(False)
        if ref.adapter:
            self._start_from(ref.adapter, lora)
        else:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                self.unet.add_adapter(_config(lora), POLICY)
        prefer_channels_last(self.unet)
        self._layers = _adapter_layers(self.unet)
        self._narrow(resolve_dtype(dtype, device))

    def _start_from(self, adapter: str, lora: Lora) -> None:
        """The champion's adapter twice: frozen as the reference, and as where the policy starts."""
        for name in (REFERENCE, POLICY):
            self.unet.load_lora_adapter(adapter, weight_name=ADAPTER_FILE, adapter_name=name, prefix="unet")
        config = self.unet.peft_config[POLICY]
        found, asked = (config.r, float(config.lora_alpha)), (lora.rank, float(lora.alpha))
        if found != asked:
            raise ModelError(
                f"training.lora_rank={lora.rank} and lora_alpha={lora.alpha:g}, but the champion's adapter {adapter} "
                f"has rank {found[0]} and alpha {found[1]:g}; train with these, or give a new name as experiment to "
                "start from the base model"
            )
        self.unet.set_adapter(POLICY)
        for name, parameter in self.unet.named_parameters():
            parameter.requires_grad_(f".{POLICY}." in name)

    def _narrow(self, precision: torch.dtype) -> None:
        """Everything but the adapters in the given precision."""
        for name, parameter in self.unet.named_parameters():
            if "lora_" not in name:
                parameter.data = parameter.data.to(precision)

    def parameters(self) -> list[torch.nn.Parameter]:
        return [p for p in self.unet.parameters() if p.requires_grad]

    @contextmanager
    def reference(self) -> Iterator["UNet2DConditionModel"]:
        """The reference network, without gradients.

        Flips a flag on the cached adapter layers: peft's own switch walks every module twice a step.
        """
        frozen = REFERENCE in self.unet.peft_config
        for layer in self._layers:
            if frozen:
                layer._active_adapter = [REFERENCE]
            else:
                layer._disable_adapters = True
        try:
            with torch.no_grad():
                yield self.unet
        finally:
            for layer in self._layers:
                layer._active_adapter = [POLICY]
                layer._disable_adapters = False

    def weights(self) -> dict[str, torch.Tensor]:
        """The trained tensors by name."""
        return {name: p.detach() for name, p in self.unet.named_parameters() if p.requires_grad}

    def export(self, folder: Path) -> Path:
        """Write the adapter as `StableDiffusionPipeline.load_lora_weights` reads it; returns the weights file."""
        from diffusers import StableDiffusionPipeline
        from peft import get_peft_model_state_dict

        # PEFT's names throughout: `convert_state_dict_to_diffusers` renames attention layers alone, and a file of
        # which the first layer is named otherwise loads without them, with a warning.
        state = get_peft_model_state_dict(self.unet, adapter_name=POLICY)
        state = {name: tensor.contiguous().cpu() for name, tensor in state.items()}
        config = self.unet.peft_config[POLICY].to_dict()
        config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
        StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=state, unet_lora_adapter_metadata=config)
        return folder / ADAPTER_FILE


class FullPolicy:
    """Every weight of the UNet trains; the reference is a frozen copy of its start.

    Both in float32, under the same autocast: a reference in another precision differs from the start already.
    """

    def __init__(self, ref: ModelRef, device: str) -> None:
        self.unet = load_unet(ref, device, "float32")
        if ref.adapter:
            fuse_adapter(self.unet, ref.adapter)
        prefer_channels_last(self.unet)
        self._reference = deepcopy(self.unet).requires_grad_(False)
        self.unet.requires_grad_(True)

    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self.unet.parameters())

    @contextmanager
    def reference(self) -> Iterator["UNet2DConditionModel"]:
        """The frozen copy, without gradients."""
        with torch.no_grad():
            yield self._reference

    def weights(self) -> dict[str, torch.Tensor]:
        """All tensors by name."""
        return {name: parameter.detach() for name, parameter in self.unet.named_parameters()}

    def export(self, folder: Path) -> Path:
        """Write the UNet as `UNet2DConditionModel.from_pretrained` reads it; returns the weights file."""
        self.unet.save_pretrained(folder)
        return folder / "diffusion_pytorch_model.safetensors"


Policy = LoraPolicy | FullPolicy


def _config(lora: Lora) -> "object":
    from peft import LoraConfig

    return LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.targets, init_lora_weights="gaussian")


def _adapter_layers(unet: "UNet2DConditionModel") -> list["BaseTunerLayer"]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]
