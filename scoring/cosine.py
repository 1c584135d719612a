"""The part that CLIP-like scorers share: embed images and prompts, scale the cosine between them.

Knows nothing of a particular model: a subclass supplies two encoders and a scale. Importing this module does
not load torch.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from scoring.scorer import ScorerInfo, ScoringError, check_inputs

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item", np.ndarray, str)


class CosineScorer(abc.ABC):
    """Scores scale * cos(image embedding, text embedding).

    The towers run in float32 on the CPU and under float16 autocast on CUDA; normalising, the dot product and
    the scale are always float32, because a float16 result ties images whose scores really differ (its step is
    2.4e-4 at 0.27).
    """

    info: ScorerInfo

    def __init__(self, model: torch.nn.Module, device: str, batch_size: int) -> None:
        """`batch_size`: how many images, or prompts, go through a tower at once, >= 1."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        self._model: Any = model.to(device).eval().requires_grad_(False)
        self._device, self._batch_size = device, batch_size

    @abc.abstractmethod
    def _image_features(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """uint8 arrays (height, width, 3) -> (n, width), not normalised."""

    @abc.abstractmethod
    def _text_features(self, prompts: Sequence[str]) -> torch.Tensor:
        """Prompts -> (n, width), not normalised."""

    def _scale(self) -> torch.Tensor | float:
        """What the cosine is multiplied by."""
        return 1.0

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
        """Scores image i against prompt i: uint8 arrays (height, width, 3) of any sizes -> float32 (n,).

        A prompt that repeats in one call is embedded once. A score does not depend on the other images and
        prompts of the call, up to the float32 noise of another matrix shape (about 1e-7 of a cosine).
        Raises ValueError for inputs of another kind or of different numbers, ScoringError after `close`.
        """
        import torch

        check_inputs(images, prompts)
        if self._model is None:
            raise ScoringError(f"scorer {self.info.name!r} is closed")
        if not len(images):
            return np.zeros(0, dtype=np.float32)
        rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        with torch.inference_mode():
            texts = self._embed(self._text_features, list(rows))[[rows[prompt] for prompt in prompts]]
            scores = self._scale() * (self._embed(self._image_features, images) * texts).sum(-1)
        result: np.ndarray = scores.float().cpu().numpy()
        return result

    def close(self) -> None:
        """Drops the model and gives cached memory of a CUDA device back."""
        import torch

        self._model = None
        if torch.device(self._device).type == "cuda":
            torch.cuda.empty_cache()

    def _embed(self, encode: Callable[[Sequence[Item]], torch.Tensor], items: Sequence[Item]) -> torch.Tensor:
        """Unit vectors (n, width) in float32, computed in chunks."""
        import torch

        starts = range(0, len(items), self._batch_size)
        chunks = [encode(items[start : start + self._batch_size]) for start in starts]
        return torch.nn.functional.normalize(torch.cat(chunks).float(), dim=-1)

    def _autocast(self) -> torch.autocast:
        """float16 on CUDA, nothing elsewhere; bfloat16 moves scores by several percent of their spread."""
        import torch

        return torch.autocast("cuda", dtype=torch.float16, enabled=torch.device(self._device).type == "cuda")


def compute_dtype(device: str) -> str:
    """Name of the arithmetic that the towers use on a device, a part of the fingerprint."""
    return "float16-autocast" if device.startswith("cuda") else "float32"
