"""What scorers with a network behind them share: lazy loading, chunks that survive a full memory, closing.

Knows nothing of a particular network. Importing this module does not load torch.
"""

from __future__ import annotations

import abc
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from scoring.scorers.images import Images, check_inputs
from scoring.scorers.scorer import ScorerInfo, ScoringError

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


class ModelScorer(abc.ABC):
    """Base of the built-in scorers: a subclass says how to load a network and what it makes of a batch.

    Networks run in float32 on the CPU and under float16 autocast on CUDA; what follows them (normalising, dot
    products, small heads) is float32, because a float16 result ties images whose scores really differ (its step
    is 2.4e-4 at 0.27). bfloat16 would move scores by several percent of their spread.
    """

    info: ScorerInfo
    takes_tensors = True

    def __init__(self, device: str, batch_size: int) -> None:
        """`batch_size`: how many images, or prompts, go through the network at once, >= 1."""
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be an integer >= 1, got {batch_size!r}")
        self._device, self._batch_size = device, batch_size
        self._model: Any = None
        self._closed = False

    @abc.abstractmethod
    def _load_model(self) -> torch.nn.Module:
        """The network on the CPU in float32. Raises ScoringError for weights that do not load safely."""

    @abc.abstractmethod
    def _score(self, images: Images, prompts: Sequence[str]) -> torch.Tensor:
        """The scores (n,) in float32 of n >= 1 checked inputs, by the loaded network."""

    def load(self) -> Self:
        """Reads the weights now instead of at the first score. Raises ScoringError after `close`."""
        if self._closed:
            raise ScoringError(f"scorer {self.info.name!r} is closed")
        if self._model is None:
            self._model = self._load_model().to(self._device).eval().requires_grad_(False)
        return self

    def score(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        """Scores image i against prompt i -> float32 (n,).

        `images`: uint8 arrays (height, width, 3) of any sizes, or one uint8 tensor (n, 3, height, width) on any
        device. A score does not depend on the other images and prompts of the call, up to the float32 noise of
        another matrix shape (about 1e-7 of a cosine).
        Raises ValueError for inputs of another kind or of different numbers, ScoringError after `close`.
        """
        import torch

        check_inputs(images, prompts)
        self.load()
        if not len(prompts):
            return np.zeros(0, dtype=np.float32)
        with torch.inference_mode():
            result: np.ndarray = self._score(images, prompts).float().cpu().numpy()
        return result

    def close(self) -> None:
        """Drops the network and gives cached memory of a CUDA device back."""
        import torch

        self._model, self._closed = None, True
        if torch.device(self._device).type == "cuda":
            torch.cuda.empty_cache()

    def _chunks(self, function: Callable[[Any], torch.Tensor], items: Any) -> torch.Tensor:
        """`function` over slices of `items`, joined; a chunk that does not fit the memory is halved for good.

        Raises torch.OutOfMemoryError when not even one item fits.
        """
        import torch

        parts: list[torch.Tensor] = []
        start = 0
        while start < len(items):
            size = self._batch_size
            try:
                parts.append(function(items[start : start + size]))
                start += size
                continue
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
            # Outside of the except clause: the frames of the exception hold the tensors that filled the memory.
            self._batch_size = size // 2
            log.warning("%s: out of memory, going on with %d at once", self.info.name, self._batch_size)
            torch.cuda.empty_cache()
        return torch.cat(parts)

    def _autocast(self) -> torch.autocast:
        """float16 on CUDA, nothing elsewhere."""
        import torch

        return torch.autocast("cuda", dtype=torch.float16, enabled=torch.device(self._device).type == "cuda")


def compute_dtype(device: str) -> str:
    """Name of the arithmetic that the networks use on a device, a part of the fingerprint."""
    return "float16-autocast" if device.startswith("cuda") else "float32"
