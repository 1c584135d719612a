"""The reference's errors, kept: two numbers a pair and draw, so that later epochs need no reference at all.

Sound only because the reference is frozen and the noise is a function of pair and draw (see `training.model.noise`).
"""

from collections.abc import Sequence

import numpy as np
import torch

from training.model.devices import to_device

Entry = tuple[list[int], list[int], torch.Tensor]
"""Indices, draws, and errors (sides, n)."""


class ReferenceErrors:
    """Squared errors by (pair, draw, side), NaN where not known yet. draws: different noises of each pair.

    The numbers stay on the device; what is known is noted in main memory, so that to ask is not to wait.
    """

    def __init__(self, pairs: int, draws: int, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")
        self.values = torch.full((pairs, draws, 2), torch.nan, device=self.device)
        self._known = np.zeros((pairs, draws), bool)
        self._new: list[Entry] = []

    def missing(self, indices: Sequence[int], draws: Sequence[int]) -> list[int]:
        """Which of these (pair, draw) are not known yet, by their places in the sequences."""
        return [int(place) for place in np.flatnonzero(~self._known[list(indices), list(draws)])]

    def get(self, indices: Sequence[int], draws: Sequence[int], sides: int) -> torch.Tensor:
        """(sides, n): of the winners, then (sides=2) of the losers; NaN where not known."""
        return self.values.flatten(0, 1)[self._places(indices, draws), :sides].T

    def put(self, indices: Sequence[int], draws: Sequence[int], errors: torch.Tensor) -> None:
        """Keep errors (sides, n)."""
        self.values.view(-1, 2)[self._places(indices, draws), : len(errors)] = errors.T.float()
        self._known[list(indices), list(draws)] = True
        self._new.append((list(indices), list(draws), errors))

    def take_new(self) -> "list[Entry]":
        """What was put since the last call: other processes need it, since each epoch divides the pairs anew."""
        new, self._new = self._new, []
        return new

    def load(self, values: torch.Tensor) -> None:
        """Go on from the `values` of before."""
        self.values.copy_(values)
        self._known = ~values[..., 0].isnan().cpu().numpy()

    def clear(self) -> None:
        """Forget all: the reference has changed."""
        self.values.fill_(torch.nan)
        self._new = []
        self._known[:] = False

    def _places(self, indices: Sequence[int], draws: Sequence[int]) -> torch.Tensor:
        places = torch.tensor(indices) * self.values.shape[1] + torch.tensor(draws)
        return to_device(places, self.device)
