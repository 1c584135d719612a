"""Columns as numpy arrays and back, and which rows of a preference shard can be trained on."""

import math

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def latents(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Fixed-size float16 lists as an array (row, value): a read-only view of one chunk, a copy of several."""
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    parts = [_latent_view(chunk) for chunk in chunks]
    if len(parts) == 1:
        return parts[0]
    return np.concatenate([np.empty((0, column.type.list_size), np.float16), *parts])


def _latent_view(array: pa.FixedSizeListArray) -> np.ndarray:
    if array.null_count or array.values.null_count:
        raise ValueError(f"found null among {len(array)} latents or embeddings; expected numbers in each row")
    values = array.flatten()  # `.values` would ignore the offset of a slice and return other rows
    view = np.frombuffer(values.buffers()[1], np.float16, len(values), offset=2 * values.offset)
    return view.reshape(len(array), array.type.list_size)


def latent_column(values: np.ndarray) -> pa.FixedSizeListArray:
    """The inverse of `latents`: one fixed-size float16 list per row of an array (row, ...)."""
    rows = np.ascontiguousarray(values, np.float16).reshape(len(values), math.prod(values.shape[1:]))
    numbers = pa.Array.from_buffers(pa.float16(), rows.size, [None, pa.py_buffer(rows)])
    return pa.FixedSizeListArray.from_arrays(numbers, type=pa.list_(pa.float16(), rows.shape[1]))


def trainable(table: pa.Table | pa.RecordBatch) -> pa.ChunkedArray | pa.BooleanArray:
    """A mask for `table.filter`: rows with a decision, between two different images, that is no tie."""
    decided = pc.and_(table.column("has_label"), table.column("are_different"))
    mask = pc.and_(decided, pc.not_equal(table.column("label_0"), pa.scalar(0.5, pa.float32())))
    return pc.fill_null(mask, False)
