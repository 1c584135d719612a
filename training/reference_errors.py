"""The reference's errors, kept: two numbers a pair and draw, so that later epochs need no reference at all.

Sound only because the reference is frozen and the noise is a function of pair and draw (see `training.noise`).
"""

from collections.abc import Sequence

import torch

Entry = tuple[list[int], list[int], torch.Tensor]
"""Indices, draws, and errors (sides, n)."""


class ReferenceErrors:
    """Squared errors by (pair, draw, side), NaN where not known yet. draws: different noises of each pair."""

    def __init__(self, pairs: int, draws: int) -> None:
        self.values = torch.full((pairs, draws, 2), torch.nan)
        self._new: list[Entry] = []

    def get(self, indices: Sequence[int], draws: Sequence[int], sides: int) -> torch.Tensor:
        """(sides, n): of the winners, then (sides=2) of the losers; NaN where not known."""
        return self.values[list(indices), list(draws), :sides].T

    def put(self, indices: Sequence[int], draws: Sequence[int], errors: torch.Tensor) -> None:
        """Keep errors (sides, n)."""
        self.values[list(indices), list(draws), : len(errors)] = errors.T.to("cpu", torch.float32)
        self._new.append((list(indices), list(draws), errors.cpu()))

    def take_new(self) -> "list[Entry]":
        """What was put since the last call: other processes need it, since each epoch divides the pairs anew."""
        new, self._new = self._new, []
        return new

    def clear(self) -> None:
        """Forget all: the reference has changed."""
        self.values.fill_(torch.nan)
        self._new = []
