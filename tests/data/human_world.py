"""Rows of human preferences in Pick-a-Pic's columns, for the tests of the import: 24, of which 19 are pairs."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet

from data.export import PICKAPIC


def encoded(seed: int, size: tuple[int, int] = (48, 40), kind: str = "PNG") -> bytes:
    """A smooth random picture, (height, width)."""
    rng, buffer = np.random.default_rng(seed), io.BytesIO()
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    small.resize(size[::-1], Image.Resampling.BICUBIC).save(buffer, kind)
    return buffer.getvalue()


def row(index: int, **changes: Any) -> dict[str, Any]:
    """A row of Pick-a-Pic; winners on either side, captions shared by two rows."""
    values: dict[str, Any] = {
        "caption": f"picture {index // 2}", "jpg_0": encoded(2 * index, kind="JPEG"),
        "jpg_1": encoded(2 * index + 1, (36, 64)), "label_0": float(index % 2), "label_1": 1.0 - index % 2,
        "has_label": True, "are_different": True, "model_0": "a", "model_1": "b", "image_0_uid": "x",
        "image_1_uid": "y",
    }  # fmt: skip
    return values | changes


def save(path: Path, rows: list[dict[str, Any]], schema: pa.Schema = PICKAPIC) -> Path:
    parquet.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=7)
    return path


ROWS = [row(index) for index in range(24)]


ROWS[3] = row(3, label_0=0.5, label_1=0.5)


ROWS[4] = row(4, has_label=False, label_0=None, label_1=None)


ROWS[9] = row(9, label_0=0.5, label_1=0.5)


ROWS[10] = row(10, jpg_1=encoded(20, kind="JPEG"), are_different=False)


ROWS[15] = row(15, jpg_1=encoded(5)[:60])
