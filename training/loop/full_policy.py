"""A policy that trains every weight; its reference is a frozen copy, which may wait in main memory."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from training.adapter.shape import check_text_encoders
from training.adapter.text_encoders import TextEncoders
from training.loop.network import compile_blocks, put_all
from training.loop.sharding import parts
from training.model.families import family_for
from training.model.loading import fuse_adapter, load_network, prefer_channels_last
from training.model.reference import ModelRef

if TYPE_CHECKING:
    pass


class FullPolicy:
    """Every weight of the network trains; the reference is a frozen copy of its start.

    Both in float32, under the same autocast: a reference in another precision differs from the start already.
    offload: the copy waits in main memory and visits the device for its forward pass. needs_reference: False where
    nobody will ask for it, and no copy is made.
    """

    encoders: TextEncoders | None = None

    def __init__(self, ref: ModelRef, device: str, offload: bool = False, needs_reference: bool = True) -> None:
        check_text_encoders("full", False, ref)
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
        moves = self._home != self._device
        with torch.no_grad():
            yield self._frozen().to(self._device) if moves else self._frozen()
        if moves:
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
            compile_blocks(network)

    def refresh_reference(self) -> None:
        """From now on the reference is what the policy is at this moment."""
        self.load_reference(self.weights())

    def weights(self) -> dict[str, torch.Tensor]:
        """All tensors by name."""
        return {name: parameter.detach() for name, parameter in parts(self.network)}

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Put these in the place of the trained tensors."""
        put_all(weights, self.weights())

    def reference_weights(self) -> dict[str, torch.Tensor]:
        """The tensors that `refresh_reference` changes."""
        return {name: parameter.detach() for name, parameter in parts(self._frozen())}

    def load_reference(self, weights: Mapping[str, torch.Tensor]) -> None:
        put_all(weights, self.reference_weights())

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
