"""A policy that trains an adapter, on the network and, where asked for, on the text encoders.

One network; the reference is the same network with the adapter disabled, or, where it is not the base itself (a
champion's adapter, a reference that is refreshed), with a frozen adapter in its place. The text encoders, where they
are trained too, likewise.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from training.adapter.encoders import add_tuned, portable
from training.adapter.lora import PROJECTIONS
from training.adapter.shape import adapted_encoders, check_adapter, check_encoders, check_text_encoders
from training.adapter.text_encoders import TextEncoders, load_text_encoders
from training.loop.network import compile_blocks, put_all
from training.loop.sharding import parts
from training.model.families import family_for
from training.model.loading import load_network, prefer_channels_last
from training.model.reference import ADAPTER_FILE, ModelRef

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer
from training.adapter.lora import Lora

POLICY, REFERENCE = "policy", "reference"
"""The names of the adapters."""


class LoraPolicy:
    """A frozen network with a trainable adapter. Its parameters are float32 whatever the network's precision:
    one AdamW step at learning rate 1e-5 would change only 2.5 % of bfloat16 adapter weights.

    moving_reference: `refresh_reference` will be called. text_encoders: train them too; `encoders` is None else.
    """

    def __init__(
        self, ref: ModelRef, lora: Lora, device: str, dtype: str, seed: int, *, moving_reference: bool = False,
        text_encoders: bool = False,
    ) -> None:  # fmt: skip
        check_text_encoders("lora", text_encoders, ref)
        self.family = family_for(ref)
        self.network = load_network(ref, device, dtype)
        self.network.requires_grad_(False)
        self.encoders = load_text_encoders(ref, device, dtype) if text_encoders else None
        names = [POLICY, REFERENCE] if moving_reference or ref.adapter else [POLICY]
        if ref.adapter:
            self._start_from(ref.adapter, lora)
        else:
            self._start_anew(self.network, lora, seed, names)
        prefer_channels_last(self.network)
        if self.encoders is not None:
            wanted = replace(lora, targets=PROJECTIONS, dora=False)
            self._start_encoders(self.encoders, ref.adapter, wanted, seed, names)
        self._layers = [layer for part in self._parts().values() for layer in _adapter_layers(part)]

    def _parts(self) -> dict[str, torch.nn.Module]:
        """Everything that has adapters, by its name in the pipeline."""
        return {self.family.network: self.network} | (self.encoders.parts() if self.encoders is not None else {})

    def _start_encoders(
        self, encoders: TextEncoders, adapter: str | None, lora: Lora, seed: int, names: list[str]
    ) -> None:
        """Each from the champion, or, where that left it alone, anew."""
        tuned = adapted_encoders(adapter) if adapter else []
        if adapter:
            check_encoders(adapter, lora)
        for part, encoder in encoders.parts().items():
            if adapter and part in tuned:
                add_tuned(encoder, part, Path(adapter) / ADAPTER_FILE, [REFERENCE, POLICY])
                _train_policy_only(encoder)
            else:
                self._start_anew(encoder, lora, seed, names)
        encoders.freeze_unread()

    def _start_anew(self, network: torch.nn.Module, lora: Lora, seed: int, names: list[str]) -> None:
        """Adapters that change nothing yet, all with the same weights."""
        for name in names:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                network.add_adapter(lora.config(), name)
        _train_policy_only(network)
        if lora.dora:
            self._measure(network, names)

    def _measure(self, network: torch.nn.Module, names: list[str]) -> None:
        """DoRA's magnitudes, which were measured in the precision of the network, in float32, as each forward pass
        measures the weights: the policy then starts at the reference exactly."""
        for layer in _adapter_layers(network):
            for name in names:
                magnitude = layer.lora_magnitude_vector[name]
                norm = magnitude.get_weight_norm(layer.get_base_layer().weight.float(), 0.0, 1.0)
                magnitude.weight.data = norm.detach()

    def _start_from(self, adapter: str, lora: Lora) -> None:
        """The champion's adapter twice: frozen as the reference, and as where the policy starts."""
        names = [name for name, _ in self.network.named_modules()]
        check_adapter(Path(adapter) / ADAPTER_FILE, self.family.network, lora, names, f"the adapter {adapter}")
        for name in (REFERENCE, POLICY):
            self.network.load_lora_adapter(
                adapter, weight_name=ADAPTER_FILE, adapter_name=name, prefix=self.family.network
            )
        _train_policy_only(self.network)
        self._unround(Path(adapter) / ADAPTER_FILE)

    def _unround(self, file: Path) -> None:
        """The file's own numbers: on loading they took the precision of the network."""
        from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        prefix = f"{self.family.network}."
        named = [(name, tensor) for name, tensor in load_file(file).items() if name.startswith(prefix)]
        own = {name.removeprefix(prefix): tensor for name, tensor in named}
        own = convert_unet_state_dict_to_peft(own)  # files of version 0.1 have diffusers' older names
        for name in (REFERENCE, POLICY):
            set_peft_model_state_dict(self.network, own, name)

    def _named(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """All parameters; those of the text encoders begin with their encoder's name."""
        yield from parts(self.network)
        if self.encoders is not None:
            yield from self.encoders.named_parameters()

    def _of_part(self, part: str, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Those of one of `_parts`, by their names in it."""
        prefix = "" if part == self.family.network else f"{part}."
        own = {f"{prefix}{name}" for name, _ in self._parts()[part].named_parameters()}
        return {name.removeprefix(prefix): each for name, each in weights.items() if name in own}

    def parameters(self) -> list[torch.nn.Parameter]:
        return [p for _, p in self._named() if p.requires_grad]

    @contextmanager
    def reference(self) -> Iterator[torch.nn.Module]:
        """The reference network, without gradients. Inside, `encoders` are the reference's too.

        Flips a flag on the cached adapter layers: peft's own switch walks every module twice a step.
        """
        frozen = REFERENCE in self.network.peft_config
        for layer in self._layers:
            if frozen:
                layer._active_adapter = [REFERENCE]
            else:
                layer._disable_adapters = True
        try:
            with torch.no_grad():
                yield self.network
        finally:
            for layer in self._layers:
                layer._active_adapter = [POLICY]
                layer._disable_adapters = False

    def compile(self) -> None:
        """Compile the network's repeated blocks."""
        compile_blocks(self.network)

    def refresh_reference(self) -> None:
        """From now on the reference is what the policy is at this moment."""
        self.load_reference({name.replace(f".{POLICY}.", f".{REFERENCE}."): p for name, p in self.weights().items()})

    def weights(self) -> dict[str, torch.Tensor]:
        """The trained tensors by name."""
        return {name: p.detach() for name, p in self._named() if p.requires_grad}

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Put these in the place of the trained tensors."""
        put_all(weights, self.weights())

    def reference_weights(self) -> dict[str, torch.Tensor]:
        """The tensors that `refresh_reference` changes."""
        return {name: p.detach() for name, p in self._named() if f".{REFERENCE}." in name}

    def load_reference(self, weights: Mapping[str, torch.Tensor]) -> None:
        put_all(weights, self.reference_weights())

    def shard_reference(self, shard: Callable[[torch.nn.Module], None]) -> None:
        """Nothing to do: the reference is the network itself."""

    def export(self, folder: Path, weights: Mapping[str, torch.Tensor]) -> Path:
        """Write the adapter as the pipeline's `load_lora_weights` reads it; returns the weights file.

        weights: by the names of `weights`, whole. In the file they have peft's names: diffusers' older ones exist for
        some layers only, and a file that mixes both loads in part.
        """
        import diffusers

        told: dict[str, Any] = {}
        for part, network in self._parts().items():
            state, config = _adapter_of(network, self._of_part(part, weights))
            state = state if part == self.family.network else portable(state)
            told |= {f"{part}_lora_layers": state, f"{part}_lora_adapter_metadata": config}
        getattr(diffusers, self.family.pipeline).save_lora_weights(folder, **told)
        return folder / ADAPTER_FILE


def _train_policy_only(network: torch.nn.Module) -> None:
    network.set_adapter(POLICY)
    for config in network.peft_config.values():
        config.base_model_name_or_path = None  # transformers notes a folder of this machine
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(f".{POLICY}." in name)
        if "lora_" in name:
            parameter.data = parameter.data.float()


def _adapter_of(
    network: torch.nn.Module, weights: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The policy's tensors under PEFT's names, and PEFT's config as JSON values. weights: by their names in network."""
    from peft import get_peft_model_state_dict

    # PEFT's names throughout: `convert_state_dict_to_diffusers` renames attention layers alone, and a file of
    # which the first layer is named otherwise loads without them, with a warning.
    state = get_peft_model_state_dict(network, weights, adapter_name=POLICY)
    config = network.peft_config[POLICY].to_dict()
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    return {name: tensor.contiguous().cpu() for name, tensor in state.items()}, plain


def _adapter_layers(network: torch.nn.Module) -> "list[BaseTunerLayer]":
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
