"""What a sound row of a candidate, score or preference shard is."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from data.ids import image_uid
from data.pictures import decode_image
from data.schema import IMAGE

Problem = tuple[int, str]
"""A row's index within its batch, and what is wrong with it."""


def row_problems(batch: pa.RecordBatch) -> Iterator[Problem]:
    """Everything that makes a row of any of the three schemas unfit for use."""
    yield from _null_problems(batch)
    for field in batch.schema:
        if field.type == IMAGE:
            yield from _image_problems(batch, field.name)
        elif pa.types.is_fixed_size_list(field.type) or pa.types.is_floating(field.type):
            yield from _number_problems(batch, field.name)
    if "label_0" in batch.schema.names:
        yield from _label_problems(batch)
    if "soft_label_0" in batch.schema.names:  # since schema 1.1
        yield from _soft_label_problems(batch)


def _null_problems(batch: pa.RecordBatch) -> Iterator[Problem]:
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if column.null_count and not name.startswith(("score_", "label_", "soft_label_", "margin")):
            yield column.is_null().index(True).as_py(), f"{name} is null"


def _image_problems(batch: pa.RecordBatch, name: str) -> Iterator[Problem]:
    images, uids = batch.column(name).to_pylist(), batch.column(f"{name}_uid").to_pylist()
    for row, (image, uid) in enumerate(zip(images, uids, strict=True)):
        data = (image or {}).get("bytes") or b""
        if image_uid(data) != uid:
            yield row, f"{name} hashes to {image_uid(data)}, {name}_uid says {uid}"
        try:
            decode_image(data)
        except ValueError as error:
            yield row, f"{name} does not decode ({error})"


def _number_problems(batch: pa.RecordBatch, name: str) -> Iterator[Problem]:
    column = batch.column(name)
    for row in range(len(column)):
        values = column[row].values if pa.types.is_fixed_size_list(column.type) else column.slice(row, 1)
        numbers = np.asarray(values.drop_null()) if values is not None else np.zeros(0)
        if not np.isfinite(numbers).all():
            yield row, f"{name} is not finite"


def _label_problems(batch: pa.RecordBatch) -> Iterator[Problem]:
    names = ["label_0", "label_1", "has_label", "are_different", "image_0_uid", "image_1_uid"]
    for row, values in enumerate(batch.select(names).to_pylist()):
        first, second, has_label, different, uid_0, uid_1 = (values[name] for name in names)
        if (first, second) not in {(0.0, 1.0), (0.5, 0.5), (1.0, 0.0), (None, None)}:
            yield row, f"labels are {first} and {second}, expected 0, 0.5 or 1 and its complement"
        if has_label and first is None:
            yield row, "has_label is true but label_0 is null"
        if different != (uid_0 != uid_1):
            yield row, f"are_different is {different}, the image uids say {uid_0 != uid_1}"


def _soft_label_problems(batch: pa.RecordBatch) -> Iterator[Problem]:
    for row, values in enumerate(batch.select(["soft_label_0", "soft_label_1"]).to_pylist()):
        first, second = values.values()
        if (first, second) != (None, None) and not _complements(first, second):
            yield row, f"soft labels are {first} and {second}, expected a probability and its complement"


def _complements(first: float | None, second: float | None) -> bool:
    return first is not None and second is not None and 0 <= first <= 1 and abs(first + second - 1) < 1e-6


def repeated_ids(batch: pa.RecordBatch, seen: set[str]) -> Iterator[Problem]:
    """Rows whose id is in `seen`, which grows by the ids of the batch."""
    name = "pair_id" if "pair_id" in batch.schema.names else "candidate_id"
    for row, key in enumerate(batch.column(name).to_pylist()):
        if key in seen:
            yield row, f"{name} {key} occurs twice, expected unique ids"
        seen.add(key)
