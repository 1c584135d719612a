"""Pictures that were just drawn, kept in memory so that scoring need not decode the files again.

Only where the file gives back the very same pixels: a PNG does, a JPEG does not, and what is scored is always what
is stored. Bounded, the shards longest unused go first.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from cachetools import LRUCache

from data.pictures import open_image

LIMIT = 2 << 30
"""Bytes of pictures that are kept at most: 2,700 of 512 x 512 pixels."""
_kept: LRUCache[Path, np.ndarray] = LRUCache(LIMIT, getsizeof=lambda images: images.nbytes)


def keep(shard: Path, images: np.ndarray, image_format: str) -> None:
    """Remember the pictures of a published shard, uint8 (n, height, width, 3), in the order of its rows."""
    if image_format != "png" or images.nbytes > LIMIT:
        return
    _kept[shard] = images


def forget() -> None:
    """Give the memory back."""
    _kept.clear()


def pictures(shard: Path, rows: slice, encoded: Sequence[bytes]) -> list[np.ndarray]:
    """Some rows of a shard as uint8 (height, width, 3): from memory where they are kept, else decoded."""
    if shard in _kept:
        return list(_kept[shard][rows])
    with ThreadPoolExecutor(8) as threads:  # Pillow decodes outside the interpreter's lock
        return list(threads.map(open_image, encoded))
