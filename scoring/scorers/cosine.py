"""The part that CLIP-like scorers share: embed images and prompts, scale the cosine between them.

Knows nothing of a particular model: a subclass supplies two encoders and a scale. Importing this module does
not load torch.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cachetools import LRUCache

from scoring.scorers.images import Images
from scoring.scorers.model import ModelScorer

if TYPE_CHECKING:
    import torch

KEPT_TEXTS = 4096
"""Embeddings of prompts that are kept, those longest unused go first: 16 MB at a width of 1024."""


class CosineScorer(ModelScorer):
    """Scores scale * cos(image embedding, text embedding).

    A prompt that repeats in a call is embedded once, and a call with the prompts of an earlier one embeds none. Not
    prompt by prompt across calls: an embedding has the float32 noise of the batch it was made in, and a score must
    not depend on what was scored before.
    """

    def __init__(self, device: str, batch_size: int) -> None:
        super().__init__(device, batch_size)
        self._texts: LRUCache[tuple[str, ...], torch.Tensor] = LRUCache(KEPT_TEXTS, getsizeof=len)

    @abc.abstractmethod
    def _image_features(self, images: Images) -> torch.Tensor:
        """uint8 images -> (n, width), not normalised."""

    @abc.abstractmethod
    def _text_features(self, prompts: Sequence[str]) -> torch.Tensor:
        """Prompts -> (n, width), not normalised."""

    def _scale(self) -> torch.Tensor | float:
        """What the cosine is multiplied by."""
        return 1.0

    def _score(self, images: Images, prompts: Sequence[str]) -> torch.Tensor:
        texts = self._embedded_texts(prompts)
        pictures = _unit(self._chunks(self._image_features, images))
        return self._scale() * (pictures * texts).sum(-1)

    def _embedded_texts(self, prompts: Sequence[str]) -> torch.Tensor:
        """Unit vectors (n, width) in float32 of the prompts."""
        distinct = tuple(dict.fromkeys(prompts))
        texts = self._texts.get(distinct)
        if texts is None:
            texts = _unit(self._chunks(self._text_features, distinct))
            if len(distinct) <= self._texts.maxsize:
                self._texts[distinct] = texts
        row = {prompt: index for index, prompt in enumerate(distinct)}
        return texts[[row[prompt] for prompt in prompts]]

    def close(self) -> None:
        self._texts.clear()
        super().close()


def _unit(features: torch.Tensor) -> torch.Tensor:
    """(n, width) scaled to length 1, in float32."""
    import torch

    return torch.nn.functional.normalize(features.float(), dim=-1)
