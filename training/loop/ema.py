"""The exponential moving average of the trained weights."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class Ema:
    """Exponential moving average of the trained tensors, float32, by name (Polyak & Juditsky 1992).

    It starts at the tensors given. Update n, counted from 0: average += (1 - d) * (tensor - average) with
    d = min(decay, (1 + n) / (10 + n)), TensorFlow's warm-up, so that the start is forgotten early on. Raises ValueError
    unless 0 <= decay < 1. (diffusers' EMAModel keeps the average in the tensors' own precision and by position, and
    forgets the start at once.)
    """

    def __init__(self, parameters: "Mapping[str, torch.Tensor]", decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"training.ema={decay}: must be in [0, 1); 0.999 averages about a thousand steps")
        self.decay, self.updates = decay, 0
        self._average = {name: tensor.detach().float().clone() for name, tensor in parameters.items()}

    def update(self, parameters: "Mapping[str, torch.Tensor]") -> None:
        """After an optimizer step. Raises ValueError for tensors of other names."""
        import torch

        _check_names(self._average, parameters)
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        latest = [parameters[name].detach().float() for name in self._average]
        torch._foreach_lerp_(list(self._average.values()), latest, 1 - decay)
        self.updates += 1

    def weights(self) -> "dict[str, torch.Tensor]":
        """The averages, not copied."""
        return dict(self._average)

    def state(self) -> dict[str, Any]:
        """For `torch.save`; tensors and a number only."""
        return {"updates": self.updates, "average": self.weights()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state()`. Raises ValueError for tensors of other names."""
        _check_names(self._average, state["average"])
        _copy(state["average"], self._average)
        self.updates = int(state["updates"])


def _check_names(own: "Mapping[str, torch.Tensor]", other: "Mapping[str, torch.Tensor]") -> None:
    if own.keys() != other.keys():
        raise ValueError(f"the average is of other tensors than these: {sorted(own.keys() ^ other.keys())[:4]}")


def _copy(source: "Mapping[str, torch.Tensor]", target: "Mapping[str, torch.Tensor]") -> None:
    from training.loop.sharding import put

    for name, tensor in target.items():
        put(source[name], tensor)
