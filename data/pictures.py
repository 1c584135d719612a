"""Encoded pictures and arrays: the one decoder, for scorers, imports and reports, and the encoder of candidates."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""What is opened: plain pictures. Pillow knows more, some of which start other programs to be read."""


def open_image(source: bytes | Path | Image) -> np.ndarray:
    """An encoded picture, a file or a PIL image as uint8 (height, width, 3).

    Transparent pictures are composited on white, because dropping the alpha channel shows colours that nobody
    saw. The EXIF orientation is ignored, as all published scorers do. Raises ValueError, naming the file, when it
    is no picture.
    """
    import PIL.Image

    if isinstance(source, PIL.Image.Image):
        return _rgb(source)
    name = f"{len(source)} bytes" if isinstance(source, bytes) else str(source)
    try:
        with PIL.Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            return _rgb(image)
    except (OSError, SyntaxError, PIL.Image.DecompressionBombError) as error:  # Pillow's words for damaged files
        raise ValueError(f"{name}: is no picture that can be read: {error}") from error


def _rgb(image: Image) -> np.ndarray:
    import PIL.Image

    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", layer.size, "white"), layer)
    return np.asarray(image.convert("RGB"))


def encode_image(image: np.ndarray, kind: str) -> bytes:
    """uint8 (H, W, 3) as a PNG, or as a JPEG of quality 95 without chroma subsampling."""
    import PIL.Image

    buffer = io.BytesIO()
    options = {"compress_level": 1} if kind == "png" else {"quality": 95, "subsampling": 0}
    PIL.Image.fromarray(image).save(buffer, format=kind.upper(), **options)
    return buffer.getvalue()
