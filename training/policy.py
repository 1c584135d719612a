"""The network in training and the reference it may not drift from.

LoRA: one network; the reference is the same network with the adapter disabled, or, where it is not the base itself (a
champion's adapter, a reference that is refreshed), with a frozen adapter in its place. Full: the reference is a
frozen copy, which may wait in main memory.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from training.adapter_shape import check_adapter
from training.models import (
    ADAPTER_FILE,
    ModelRef,
    family_for,
    fuse_adapter,
    load_network,
    prefer_channels_last,
)
from training.sharding import parts, put

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import BaseTunerLayer

POLICY, REFERENCE = "policy", "reference"
VARIANTS = 64
"""Of one block that the compiler may keep; see `_compile`."""
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


@dataclass(frozen=True)
class Lora:
    """rank, alpha: the update is alpha / rank * B A (Hu et al. 2021, arXiv:2106.09685, sec. 4.1).

    targets: endings of the names of the layers that get one. dora: also train each output's magnitude (Liu et al. 2024,
    arXiv:2402.09353, eq. 5).
    """

    rank: int
    alpha: float
    targets: list[str] = field(default_factory=lambda: list(ATTENTION))
    dora: bool = False

    def config(self) -> "LoraConfig":
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank, lora_alpha=self.alpha, target_modules=self.targets, init_lora_weights="gaussian",
            use_dora=self.dora,
        )  # fmt: skip


class LoraPolicy:
    """A frozen network with a trainable adapter. Its parameters are float32 whatever the network's precision:
    one AdamW step at learning rate 1e-5 would change only 2.5 % of bfloat16 adapter weights.

    moving_reference: `refresh_reference` will be called.
    """

    def __init__(
        self, ref: ModelRef, lora: Lora, device: str, dtype: str, seed: int, moving_reference: bool = False
    ) -> None:
        self.family = family_for(ref)
        self.network = load_network(ref, device, dtype)
        self.network.requires_grad_(False)
        if ref.adapter:
            self._start_from(ref.adapter, lora)
        else:
            self._start_anew(lora, seed, [POLICY, REFERENCE] if moving_reference else [POLICY])
        prefer_channels_last(self.network)
        self._layers = _adapter_layers(self.network)

    def _start_anew(self, lora: Lora, seed: int, names: list[str]) -> None:
        """Adapters that change nothing yet, all with the same weights."""
        for name in names:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                self.network.add_adapter(lora.config(), name)
        self._train_policy_only()
        if lora.dora:
            self._measure(names)

    def _measure(self, names: list[str]) -> None:
        """DoRA's magnitudes, which were measured in the precision of the network, in float32, as each forward pass
        measures the weights: the policy then starts at the reference exactly."""
        for layer in _adapter_layers(self.network):
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
        self._train_policy_only()
        self._unround(Path(adapter) / ADAPTER_FILE)

    def _unround(self, file: Path) -> None:
        """The file's own numbers: on loading they took the precision of the network."""
        from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        own = {name.removeprefix(f"{self.family.network}."): tensor for name, tensor in load_file(file).items()}
        own = convert_unet_state_dict_to_peft(own)  # files of version 0.1 have diffusers' older names
        for name in (REFERENCE, POLICY):
            set_peft_model_state_dict(self.network, own, name)

    def _train_policy_only(self) -> None:
        self.network.set_adapter(POLICY)
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(f".{POLICY}." in name)
            if "lora_" in name:
                parameter.data = parameter.data.float()

    def parameters(self) -> list[torch.nn.Parameter]:
        return [p for p in self.network.parameters() if p.requires_grad]

    @contextmanager
    def reference(self) -> Iterator[torch.nn.Module]:
        """The reference network, without gradients.

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
        _compile(self.network)

    def refresh_reference(self) -> None:
        """From now on the reference is what the policy is at this moment."""
        self.load_reference({name.replace(f".{POLICY}.", f".{REFERENCE}."): p for name, p in self.weights().items()})

    def weights(self) -> dict[str, torch.Tensor]:
        """The trained tensors by name."""
        return {name: p.detach() for name, p in parts(self.network) if p.requires_grad}

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Put these in the place of the trained tensors."""
        _copy(weights, self.weights())

    def reference_weights(self) -> dict[str, torch.Tensor]:
        """The tensors that `refresh_reference` changes."""
        return {name: p.detach() for name, p in parts(self.network) if f".{REFERENCE}." in name}

    def load_reference(self, weights: Mapping[str, torch.Tensor]) -> None:
        _copy(weights, self.reference_weights())

    def shard_reference(self, shard: Callable[[torch.nn.Module], None]) -> None:
        """Nothing to do: the reference is the network itself."""

    def export(self, folder: Path, weights: Mapping[str, torch.Tensor]) -> Path:
        """Write the adapter as the pipeline's `load_lora_weights` reads it; returns the weights file.

        weights: by the names of `weights`, whole. In the file they have peft's names: diffusers' older ones exist for
        some layers only, and a file that mixes both loads in part.
        """
        import diffusers
        from peft import get_peft_model_state_dict

        # PEFT's names throughout: `convert_state_dict_to_diffusers` renames attention layers alone, and a file of
        # which the first layer is named otherwise loads without them, with a warning.
        state = get_peft_model_state_dict(self.network, dict(weights), adapter_name=POLICY)
        state = {name: tensor.contiguous().cpu() for name, tensor in state.items()}
        config = self.network.peft_config[POLICY].to_dict()
        config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
        part = self.family.network
        told: dict[str, Any] = {f"{part}_lora_layers": state, f"{part}_lora_adapter_metadata": config}
        getattr(diffusers, self.family.pipeline).save_lora_weights(folder, **told)
        return folder / ADAPTER_FILE


class FullPolicy:
    """Every weight of the network trains; the reference is a frozen copy of its start.

    Both in float32, under the same autocast: a reference in another precision differs from the start already.
    offload: the copy waits in main memory and visits the device for its forward pass. needs_reference: False where
    nobody will ask for it, and no copy is made.
    """

    def __init__(self, ref: ModelRef, device: str, offload: bool = False, needs_reference: bool = True) -> None:
        self.family = family_for(ref)
        self.network = load_network(ref, device, "float32")
        if ref.adapter:
            fuse_adapter(self.network, ref.adapter, self.family.network)
        prefer_channels_last(self.network)
        self._device, self._home = device, "cpu" if offload else device
        self._reference: torch.nn.Module | None = None
        if needs_reference:
            self._reference = deepcopy(self.network).requires_grad_(False).to(self._home)
        self.network.requires_grad_(True)

    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self.network.parameters())

    @contextmanager
    def reference(self) -> Iterator[torch.nn.Module]:
        """The frozen copy, without gradients."""
        with torch.no_grad():
            yield self._frozen().to(self._device)
        self._frozen().to(self._home)

    def _frozen(self) -> torch.nn.Module:
        if self._reference is None:
            raise RuntimeError("a policy that was made without a reference was asked for it")
        return self._reference

    def shard_reference(self, shard: Callable[[torch.nn.Module], None]) -> None:
        """Divide the copy over the processes as well."""
        if self._reference is not None:
            shard(self._reference)

    def compile(self) -> None:
        """Compile the repeated blocks of both: one that is not would round otherwise."""
        for network in [self.network, *([self._reference] if self._reference is not None else [])]:
            _compile(network)

    def refresh_reference(self) -> None:
        """From now on the reference is what the policy is at this moment."""
        self.load_reference(self.weights())

    def weights(self) -> dict[str, torch.Tensor]:
        """All tensors by name."""
        return {name: parameter.detach() for name, parameter in parts(self.network)}

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Put these in the place of the trained tensors."""
        _copy(weights, self.weights())

    def reference_weights(self) -> dict[str, torch.Tensor]:
        """The tensors that `refresh_reference` changes."""
        return {name: parameter.detach() for name, parameter in parts(self._frozen())}

    def load_reference(self, weights: Mapping[str, torch.Tensor]) -> None:
        _copy(weights, self.reference_weights())

    def export(self, folder: Path, weights: Mapping[str, torch.Tensor]) -> Path:
        """Write the network as `from_pretrained` of its class reads it; returns the weights file or its index.

        weights: by the names of `weights`, whole.
        """
        import diffusers

        buffers = {name: tensor for name, tensor in self.network.state_dict().items() if name not in weights}
        with torch.device("meta"):  # a frame for the weights: the network itself may be divided among processes
            frame = getattr(diffusers, self.family.network_class).from_config(self.network.config)
        frame.load_state_dict({**weights, **buffers}, assign=True)
        frame.save_pretrained(folder)
        return next(path for path in sorted(folder.glob("diffusion_pytorch_model*")))


Policy = LoraPolicy | FullPolicy


def _compile(network: torch.nn.Module) -> None:
    """The repeated blocks. They are one function to the compiler, which has a variant for each width and picture size,
    with and without gradients, adapter and reference: after 8 of them it would run the rest uncompiled."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    network.compile_repeated_blocks()


def _copy(source: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]) -> None:
    """Raises KeyError when a tensor has no place."""
    for name, tensor in source.items():
        put(tensor, target[name])


def _adapter_layers(network: torch.nn.Module) -> "list[BaseTunerLayer]":
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
