"""Publish, adopt and read shards: Arrow IPC files that are complete as soon as they are visible.

Knows nothing of models, scorers or the flow that calls it. What makes a folder of shards a data set: `data.manifest`.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import pyarrow as pa

from data.files import StrPath, file_sha256, published
from data.schema import check_version, column_difference, read_metadata, schema_difference

BATCH_ROWS = 64
"""Rows per record batch: bounds the writer's memory; random access is equally fast from 8 to 480."""
Batches: TypeAlias = Iterable[pa.RecordBatch] | pa.Table


class ShardError(ValueError):
    """A shard or data set that is missing, damaged, or other than its plan or its manifest says."""


@dataclass(frozen=True)
class ShardRecord:
    """What a task returns instead of rows."""

    file: str
    rows: int
    bytes: int
    sha256: str


def write_shard(path: StrPath, batches: Batches, schema: pa.Schema) -> ShardRecord:
    """Publish rows as one Arrow IPC file; equal rows give equal bytes, however they were batched."""
    path, rows = Path(path), 0
    options = pa.ipc.IpcWriteOptions(compression=None)  # JPEG and Gaussian latents do not compress
    with published(path) as file, pa.ipc.new_file(file, schema, options=options) as writer:
        for batch in _rebatched(path, batches, schema):
            writer.write_batch(batch)
            rows += batch.num_rows
    return _record(path, rows)


def _rebatched(path: Path, batches: Batches, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    waiting = schema.empty_table()
    for batch in batches.to_batches() if isinstance(batches, pa.Table) else batches:
        if difference := column_difference(batch.schema, schema):
            raise ShardError(f"{path}: not written: {difference}. Build the rows with the shard's schema.")
        row_group = pa.Table.from_arrays(batch.columns, schema=schema)
        waiting = pa.concat_tables([waiting, row_group])
        while waiting.num_rows >= BATCH_ROWS:
            yield _fresh(waiting.slice(0, BATCH_ROWS))
            waiting = waiting.slice(BATCH_ROWS)
    if waiting.num_rows:
        yield _fresh(waiting)


def _fresh(table: pa.Table) -> pa.RecordBatch:
    # Arrow writes slices as they lie in memory, with the neighbours' bits in the last byte of a bitmap and
    # whatever lies under a null. Taking every row rebuilds the buffers, so equal rows become equal bytes.
    rows = pa.array(range(table.num_rows), pa.int32())
    return table.combine_chunks().to_batches()[0].take(rows)


def _record(path: Path, rows: int) -> ShardRecord:
    return ShardRecord(path.name, rows, path.stat().st_size, file_sha256(path))


def adopt_shard(path: StrPath, schema: pa.Schema | None, rows: int | None = None) -> ShardRecord | None:
    """The record of a shard that an earlier run published, None when there is none, else why it cannot serve.

    Nothing but the shard itself is trusted: no progress file. `schema` and `rows` are what the plan expects;
    None = do not compare.
    """
    path = Path(path)
    if not path.exists():
        return None
    reader = open_shard(path)
    way_out = "Another plan wrote it: delete the file, or use a new cycle."
    if schema is not None and (difference := schema_difference(reader.schema, schema)):
        raise ShardError(f"{path}: {difference}. {way_out}")
    count = count_rows(path, reader)
    if rows is not None and count != rows:
        raise ShardError(f"{path}: found {count} rows, expected {rows}. {way_out}")
    return _record(path, count)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Raise ShardError, naming the file, for what Arrow and the disk say of a damaged one."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        way_out = "Delete the file and rerun the stage that writes it."
        raise ShardError(f"{path}: found {error}; expected a complete shard. {way_out}") from error


def open_shard(path: StrPath) -> pa.ipc.RecordBatchFileReader:
    """Map a shard into memory; no row is read yet."""
    with readable(Path(path)):
        reader = pa.ipc.open_file(pa.memory_map(os.fspath(path)))
        metadata = read_metadata(reader.schema)
    check_major(path, metadata.get("schema_version"))
    return reader


def check_major(path: StrPath, version: object) -> None:
    """Raise ShardError, naming the file, when its schema version is one that this code cannot know."""
    try:
        check_version(version)
    except ValueError as error:
        raise ShardError(f"{path}: {error}") from error


def count_rows(path: Path, reader: pa.ipc.RecordBatchFileReader) -> int:
    """How many rows an open shard has; none is read."""
    with readable(path):
        return int(reader.count_rows())


def read_shard(path: StrPath, columns: Sequence[str] | None = None) -> pa.Table:
    """The shard as a table over the mapped file: columns that are not touched are never read from disk."""
    reader = open_shard(path)
    names = reader.schema.names if columns is None else list(columns)
    if missing := [name for name in names if name not in reader.schema.names]:
        raise ShardError(f"{path}: has no column {missing[0]}; expected one of {reader.schema.names}")
    with readable(Path(path)):
        return reader.read_all().select(names)


def batches_of(path: Path) -> Iterator[pa.RecordBatch]:
    """The rows of a shard, BATCH_ROWS at a time."""
    reader = open_shard(path)
    for index in range(reader.num_record_batches):
        yield reader.get_batch(index)
