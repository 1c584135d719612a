"""What a judge asks of the model behind it, and what it gets: the words that `endpoint`, `local` and `judge` share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

NAME = "vlm"
CONFIG, WEIGHTS = ("config.json",), ("model.safetensors", "model.safetensors.index.json")
PROCESSORS = ("processor_config.json", "preprocessor_config.json")

Parts: TypeAlias = tuple[str | np.ndarray, ...]
"""A question as the model gets it: texts, and pictures as uint8 (height, width, 3)."""


@dataclass(frozen=True)
class Answer:
    """What the model wrote."""

    text: str
    cut: bool = False
    """Whether it had not finished at `max_tokens`: "Rating: 1" may be the start of "Rating: 10"."""


@dataclass(frozen=True)
class Identity:
    """Which model it is."""

    version: str
    origin: str
    revision: str | None
    weights: str
    """Digest of the weights alone."""
    facts: Mapping[str, str]
    """What beside the files determines the answers."""
    files: Sequence[Path] = ()


def picture(image: np.ndarray, max_side: int | None) -> Image:
    """A uint8 array (height, width, 3) as PIL image, its longer side shrunk to `max_side` if it is longer."""
    import PIL.Image

    found = PIL.Image.fromarray(np.ascontiguousarray(image))
    if max_side is None or max(found.size) <= max_side:
        return found
    width, height = (max(1, round(side * max_side / max(found.size))) for side in found.size)
    return found.resize((width, height), PIL.Image.Resampling.LANCZOS)
