"""Publish, adopt, read and verify shards: Arrow IPC files that are complete as soon as they are visible.

A shard is written beside its final name, flushed to disk, then renamed; the manifest comes last, so its
existence means that the data set is complete. Arrow IPC has no checksum of its own (a flipped bit reads as
other data), therefore the manifest carries one. Knows nothing of models, scorers or the flow that calls it.
"""

import bisect
import dataclasses
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias, get_args

import numpy as np
import pyarrow as pa

from training import pairs
from training.pairs import latents as latents

BATCH_ROWS = 64
"""Rows per record batch: bounds the writer's memory; random access is equally fast from 8 to 480."""

MANIFEST = "manifest.json"
FORMAT = "rlaif-shards"
Level = Literal["open", "checksum", "deep"]
StrPath: TypeAlias = str | os.PathLike[str]
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


Splits: TypeAlias = Mapping[str, Sequence[ShardRecord]]


@dataclass(frozen=True)
class Manifest:
    """The seal of a complete data set."""

    dataset_id: str
    """sha256 over the shards' checksums: equal for equal rows, whenever they were written."""
    schema_version: str
    config_hash: str
    created_at: str
    splits: dict[str, tuple[ShardRecord, ...]]

    @property
    def shards(self) -> tuple[ShardRecord, ...]:
        return tuple(itertools.chain.from_iterable(self.splits.values()))

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)


@contextmanager
def _published(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that appears under `path` only when its bytes are complete and on disk.

    One process owns a path at a time, so temporaries of the same name are left-overs of a killed run.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in _temporaries(path):
        stale.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # glob readers skip names with a dot
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # before the rename, or the name may reach the disk before the data
        os.replace(temporary, path)
        fsync_path(path.parent)  # or the new name itself may be lost with the power
    finally:
        temporary.unlink(missing_ok=True)


def _temporaries(path: Path) -> list[Path]:
    ours = re.compile(re.escape(f".{path.name}.") + r"\d+\.tmp")  # `a` must not claim those of `a.json`
    return [path.with_name(name) for name in os.listdir(path.parent) if ours.fullmatch(name)]


def fsync_path(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: StrPath, text: str) -> None:
    """Replace a text file as a whole: readers see the old text or the new one."""
    with _published(Path(path)) as file:
        file.write(text.encode())


def write_json(path: StrPath, obj: object) -> None:
    """Replace a JSON file as a whole. NaN and infinity are refused, since JSON has neither: write null."""
    try:
        text = json.dumps(obj, sort_keys=True, indent=2, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{path}: not written: {error}. JSON has no NaN or infinity; write null.") from error
    write_text(path, text + "\n")


def write_shard(path: StrPath, batches: Batches, schema: pa.Schema) -> ShardRecord:
    """Publish rows as one Arrow IPC file; equal rows give equal bytes, however they were batched."""
    path, rows = Path(path), 0
    options = pa.ipc.IpcWriteOptions(compression=None)  # JPEG and Gaussian latents do not compress
    with _published(path) as file, pa.ipc.new_file(file, schema, options=options) as writer:
        for batch in _rebatched(path, batches, schema):
            writer.write_batch(batch)
            rows += batch.num_rows
    return _record(path, rows)


def _rebatched(path: Path, batches: Batches, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    waiting = schema.empty_table()
    for batch in batches.to_batches() if isinstance(batches, pa.Table) else batches:
        if difference := pairs.column_difference(batch.schema, schema):
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
    return ShardRecord(path.name, rows, path.stat().st_size, _sha256(path))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    if schema is not None and (difference := pairs.schema_difference(reader.schema, schema)):
        raise ShardError(f"{path}: {difference}. {way_out}")
    found = _count_rows(path, reader)
    if rows is not None and found != rows:
        raise ShardError(f"{path}: found {found} rows, expected {rows}. {way_out}")
    return _record(path, found)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        way_out = "Delete the file and rerun the stage that writes it."
        raise ShardError(f"{path}: found {error}; expected a complete shard. {way_out}") from error


def open_shard(path: StrPath) -> pa.ipc.RecordBatchFileReader:
    """Map a shard into memory; no row is read yet."""
    with _readable(Path(path)):
        reader = pa.ipc.open_file(pa.memory_map(os.fspath(path)))
        metadata = pairs.read_metadata(reader.schema)
    _check_major(path, metadata.get("schema_version"))
    return reader


def _check_major(path: StrPath, version: object) -> None:
    try:
        pairs.check_version(version)
    except ValueError as error:
        raise ShardError(f"{path}: {error}") from error


def _count_rows(path: Path, reader: pa.ipc.RecordBatchFileReader) -> int:
    with _readable(path):
        return int(reader.count_rows())


def read_shard(path: StrPath, columns: Sequence[str] | None = None) -> pa.Table:
    """The shard as a table over the mapped file: columns that are not touched are never read from disk."""
    reader = open_shard(path)
    names = reader.schema.names if columns is None else list(columns)
    if missing := [name for name in names if name not in reader.schema.names]:
        raise ShardError(f"{path}: has no column {missing[0]}; expected one of {reader.schema.names}")
    with _readable(Path(path)):
        return reader.read_all().select(names)


class ShardRows:
    """Random access to the rows of one shard.

    Pickles as its path: a mapping cannot travel to a worker, and a record batch would travel as a copy.
    """

    def __init__(self, path: StrPath) -> None:
        self.path = Path(path)
        reader = open_shard(self.path)
        self.schema: pa.Schema = reader.schema
        with _readable(self.path):  # opening a batch costs ten times what reading a row of it does
            self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self._ends = list(itertools.accumulate(batch.num_rows for batch in self._batches))

    def __reduce__(self) -> tuple[type["ShardRows"], tuple[Path]]:
        return type(self), (self.path,)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def row(self, index: int, columns: Sequence[str] | None = None) -> dict[str, Any]:
        """One row; latents and embeddings as read-only float16 views, images as {"bytes", "path"}."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path}: row {index} asked, the shard has rows 0 to {len(self) - 1}")
        which = bisect.bisect_right(self._ends, index)
        batch = self._batches[which]
        local = index - self._ends[which] + batch.num_rows
        names = self.schema.names if columns is None else columns
        return {name: _cell(batch.column(name), local) for name in names}

    def column_array(self, name: str) -> np.ndarray:
        """A whole column as numpy: latents as (row, value), nulls of number columns as NaN."""
        kind = self.schema.field(name).type
        column = pa.chunked_array([batch.column(name) for batch in self._batches], kind)
        return latents(column) if pa.types.is_fixed_size_list(kind) else column.to_numpy()


def _cell(column: pa.Array, row: int) -> Any:
    if pa.types.is_fixed_size_list(column.type):
        return latents(column.slice(row, 1))[0]
    return column[row].as_py()


def make_manifest(records: Splits, config_hash: str, created_at: str) -> Manifest:
    """The manifest before it is published: the data-set card quotes it and must be there first."""
    splits = {split: tuple(records[split]) for split in sorted(records)}
    sums = "".join(shard.sha256 for shards in splits.values() for shard in shards)
    dataset_id = hashlib.sha256(sums.encode()).hexdigest()
    return Manifest(dataset_id, pairs.SCHEMA_VERSION, config_hash, created_at, splits)


def write_manifest(folder: StrPath, records: Splits, config_hash: str, created_at: str) -> Path:
    """Seal a folder whose shards are all published; refuse when one is absent or has another size."""
    manifest = make_manifest(records, config_hash, created_at)
    for shard in manifest.shards:
        _check_size(Path(folder), shard)
    splits = {split: _split_entry(shards) for split, shards in manifest.splits.items()}
    path = Path(folder) / MANIFEST
    write_json(path, dataclasses.asdict(manifest) | {"format": FORMAT, "splits": splits})
    return path


def _split_entry(shards: Sequence[ShardRecord]) -> dict[str, Any]:
    rows = sum(shard.rows for shard in shards)
    return {"rows": rows, "shards": [dataclasses.asdict(shard) for shard in shards]}


def read_manifest(folder: StrPath) -> Manifest:
    """The seal of a folder; ShardError when there is none: the data set is unfinished."""
    path = Path(folder) / MANIFEST
    if not path.exists():
        way_out = "Rerun the flow to complete it."
        raise ShardError(f"{folder}: no {MANIFEST}; the data set is unfinished. {way_out}")
    try:
        found = json.loads(path.read_text())
        _check_major(path, found["schema_version"])
        return _parse_manifest(found)
    except (KeyError, TypeError, AttributeError, UnicodeError, json.JSONDecodeError) as error:
        way_out = "Delete the file and rerun the flow to seal the data set again."
        raise ShardError(f"{path}: found {error!r}; expected a {FORMAT} manifest. {way_out}") from error


def _parse_manifest(found: dict[str, Any]) -> Manifest:
    shards = {split: entry["shards"] for split, entry in found["splits"].items()}
    splits = {split: tuple(ShardRecord(**shard) for shard in shards[split]) for split in shards}
    names = ("dataset_id", "schema_version", "config_hash", "created_at")
    return Manifest(**{name: found[name] for name in names}, splits=splits)


def verify(folder: StrPath, level: Level = "checksum") -> Manifest:
    """Check a sealed data set; ShardError names the first file that is not what it should be.

    open:     manifest, no stray shard, sizes, footers, row counts, schema version, one schema. Instant, and
              blind to changed bytes.
    checksum: and the sha256 of each file. Once per machine before training.
    deep:     and each row: see `training.pairs.row_problems`, and ids are unique. After writing, or in doubt.
    """
    if level not in get_args(Level):
        raise ValueError(f"level is {level!r}, expected one of {get_args(Level)}")
    folder, manifest = Path(folder), read_manifest(folder)
    _check_files(folder, manifest)
    for shard in manifest.shards if level != "open" else ():
        _check_sum(folder / shard.file, shard)  # before any byte of a damaged file is interpreted
    _check_footers(folder, manifest)
    if level == "deep":
        _check_rows(folder, manifest)
    return manifest


def _check_size(folder: Path, shard: ShardRecord) -> None:
    path = folder / shard.file
    found = path.stat().st_size if path.exists() else None
    if found != shard.bytes:
        seen = "nothing" if found is None else f"{found} bytes"
        raise ShardError(f"{path}: found {seen}, expected {shard.bytes} bytes. Delete it and rerun the flow.")


def _check_files(folder: Path, manifest: Manifest) -> None:
    known = {shard.file for shard in manifest.shards}
    if stray := sorted({path.name for path in folder.glob("[!.]*.arrow")} - known):
        raise ShardError(f"{folder / stray[0]}: found a shard that {MANIFEST} does not name. Move it away.")
    for shard in manifest.shards:
        _check_size(folder, shard)


def _check_footers(folder: Path, manifest: Manifest) -> None:
    first: pa.Schema | None = None
    for shard in manifest.shards:
        path = folder / shard.file
        reader = open_shard(path)
        first = first or reader.schema
        if difference := pairs.schema_difference(reader.schema, first):
            raise ShardError(f"{path}: {difference}, as in the first shard. Make the data set again.")
        if (found := _count_rows(path, reader)) != shard.rows:
            raise ShardError(f"{path}: found {found} rows, {MANIFEST} says {shard.rows}. Rerun the flow.")


def _check_sum(path: Path, shard: ShardRecord) -> None:
    if (found := _sha256(path)) != shard.sha256:
        way_out = "The file changed after it was sealed. Delete it and rerun the flow."
        raise ShardError(f"{path}: found sha256 {found}, expected {shard.sha256} by {MANIFEST}. {way_out}")


def _check_rows(folder: Path, manifest: Manifest) -> None:
    seen: set[str] = set()
    for shard in manifest.shards:
        path, first = folder / shard.file, 0
        for batch in _batches(path):
            with _readable(path):
                batch.validate(full=True)
            for row, problem in itertools.chain(pairs.row_problems(batch), pairs.repeated_ids(batch, seen)):
                raise ShardError(f"{path}: row {first + row}: {problem}. Delete it and rerun the flow.")
            first += batch.num_rows


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    reader = open_shard(path)
    for index in range(reader.num_record_batches):
        yield reader.get_batch(index)


def export_pickapic(folder_in: StrPath, path_out: StrPath, keep_ties: bool = False) -> Path:
    """A sealed data set as one Parquet file with the columns that public Diffusion-DPO scripts read.

    The images are plain bytes, because those scripts decode them themselves. Only trainable rows go out,
    because one of the scripts takes a tie for a win of side 0; `keep_ties=True` exports every row.
    """
    from pyarrow import parquet

    path, manifest = Path(path_out), verify(folder_in, "checksum")
    with _published(path) as file, parquet.ParquetWriter(file, pairs.PICKAPIC) as writer:
        files = [Path(folder_in) / shard.file for shard in manifest.shards]
        for batch in itertools.chain.from_iterable(map(_batches, files)):
            kept = batch if keep_ties else batch.filter(pairs.trainable(batch))
            if kept.num_rows:
                writer.write_batch(pairs.pickapic_rows(kept))
    return path
