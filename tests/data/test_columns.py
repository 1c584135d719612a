"""Latents as arrays and back, and which rows can be trained on."""

import numpy as np
import pyarrow as pa
import pytest

from data.columns import latent_column, latents, trainable


def labels(*rows: tuple[bool, bool, float | None]) -> pa.Table:
    has_label, different, label = zip(*rows, strict=True)
    columns = {"has_label": has_label, "are_different": different, "label_0": pa.array(label, pa.float32())}
    return pa.table(columns)


def test_trainable_rows_have_a_decision_between_different_images_that_is_no_tie() -> None:
    rows = [(True, True, 1.0), (True, True, 0.0), (True, True, 0.5), (True, False, 1.0)]
    table = labels(*rows, (False, True, 1.0), (True, True, None), (False, True, None))
    assert trainable(table).to_pylist() == [True, True, False, False, False, False, False]
    assert table.filter(trainable(table)).column("label_0").to_pylist() == [1.0, 0.0]
    batch = table.to_batches()[0]
    assert batch.filter(trainable(batch)).num_rows == 2


def test_latents_of_a_slice_are_the_rows_of_the_slice_and_a_view() -> None:
    """`FixedSizeListArray.values` ignores the offset and would return row 0 for row 2."""
    values = np.arange(20, dtype=np.float16).reshape(5, 4)
    column = latent_column(values)
    assert np.array_equal(latents(column), values)
    assert np.array_equal(latents(column.slice(2, 2)), values[2:4])
    assert latents(column.slice(2)).ctypes.data == latents(column).ctypes.data + 2 * 4 * 2
    assert np.array_equal(latents(pa.chunked_array([column.slice(3), column.slice(0, 1)])), values[[3, 4, 0]])
    assert latents(column.slice(5)).shape == (0, 4)
    assert latents(pa.chunked_array([], column.type)).shape == (0, 4)


def test_null_latents_are_refused() -> None:
    with pytest.raises(ValueError, match="found null among 2 latents"):
        latents(pa.array([[1.0, 2.0], None], pa.list_(pa.float16(), 2)))
