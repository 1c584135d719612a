"""A scorer that knows nothing: the null control of a training. `--param scorer=bench.random_labels:RandomLabels`."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from scoring.scorers.images import check_inputs
from scoring.scorers.scorer import ScorerInfo, ScoringError


class RandomLabels:
    """A number in [0, 1) out of the hash of the pixels: the same picture always gets the same, whatever it shows."""

    def __init__(self, source: str | None = None, device: str = "cpu") -> None:
        self.info = ScorerInfo("random", "sha256", "uniform", lowest=0.0, highest=1.0, needs_prompt=False)
        self._closed = False

    def score(self, images: Any, prompts: Sequence[str]) -> np.ndarray:
        if self._closed:
            raise ScoringError("scorer 'random' is closed")
        check_inputs(images, prompts)
        digests = [hashlib.sha256(np.ascontiguousarray(image).tobytes()).digest() for image in images]
        return np.array([int.from_bytes(digest[:3], "big") / 2**24 for digest in digests], np.float32)

    def close(self) -> None:
        """There is no memory to free."""
        self._closed = True
