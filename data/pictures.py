"""Encoded pictures and pixels: the one decoder, for scorers, imports, checks and reports, and the encoder.

Whoever looks at a picture of ours or of somebody else's looks at it through `decode_image`, so that it is the same
picture for everybody. Pillow is loaded when a picture is touched.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""What is opened: plain pictures. Pillow knows more, some of which start other programs to be read."""


def decode_image(source: bytes | Path | Image) -> Image:
    """An encoded picture, a file or a PIL image as a PIL image of mode RGB, which still tells its `format`.

    Transparent pictures are composited on white, because dropping the alpha channel shows colours that nobody
    saw. The EXIF orientation is ignored, as all published scorers do. Raises ValueError, naming the file, when it
    is no picture.
    """
    import PIL.Image

    if isinstance(source, PIL.Image.Image):
        return _on_white(source)
    name = f"{len(source)} bytes" if isinstance(source, bytes) else str(source)
    try:
        with PIL.Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            return _on_white(image)
    except Exception as error:  # damaged files make Pillow's decoders raise a dozen unrelated kinds
        raise ValueError(f"{name}: is no picture that can be read: {error}") from error


def open_image(source: bytes | Path | Image) -> np.ndarray:
    """The same picture as uint8 (height, width, 3). Raises what `decode_image` raises."""
    return np.asarray(decode_image(source))


def _on_white(image: Image) -> Image:
    import PIL.Image

    kind = image.format
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", layer.size, "white"), layer)
    opaque = image.convert("RGB")
    opaque.format = kind
    return opaque


def fit(picture: Image, height: int, width: int) -> tuple[np.ndarray, list[int]]:
    """The picture as uint8 (height, width, 3), and its time ids.

    It is scaled until it just covers that size (Lanczos, which smooths before it shrinks), then cropped in the middle.
    Time ids as SDXL was trained with them (arXiv:2307.01952, sec. 2.2): height and width before scaling, top and left
    of the crop after it, height and width trained at.
    """
    from PIL import Image

    scale = max(height / picture.height, width / picture.width)
    tall, wide = max(height, round(picture.height * scale)), max(width, round(picture.width * scale))
    top, left = (tall - height) // 2, (wide - width) // 2
    scaled = picture.resize((wide, tall), Image.Resampling.LANCZOS)
    cropped = scaled.crop((left, top, left + width, top + height))
    return np.asarray(cropped), [picture.height, picture.width, top, left, height, width]


def encode_image(image: np.ndarray, kind: str) -> bytes:
    """The file of a uint8 (height, width, 3) picture: a PNG, or a JPEG of quality 95 without chroma subsampling."""
    import PIL.Image

    buffer = io.BytesIO()
    options = {"compress_level": 1} if kind == "png" else {"quality": 95, "subsampling": 0}
    PIL.Image.fromarray(image).save(buffer, format=kind.upper(), **options)
    return buffer.getvalue()
