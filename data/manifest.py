"""The seal of a data set: its shards, their sizes and checksums. Written last: where it is, the set is complete.

Arrow IPC has no checksum of its own (a flipped bit reads as other data), therefore the manifest carries one.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import pyarrow as pa

from data.files import StrPath, file_sha256, write_json
from data.row_checks import repeated_ids, row_problems
from data.schema import SCHEMA_VERSION, schema_difference
from data.shards import ShardError, ShardRecord, batches_of, check_major, count_rows, open_shard, readable

MANIFEST = "manifest.json"
FORMAT = "rlaif-shards"
Level = Literal["open", "checksum", "deep"]
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


def make_manifest(records: Splits, config_hash: str, created_at: str) -> Manifest:
    """The manifest before it is published: the data-set card quotes it and must be there first."""
    splits = {split: tuple(records[split]) for split in sorted(records)}
    sums = "".join(shard.sha256 for shards in splits.values() for shard in shards)
    dataset_id = hashlib.sha256(sums.encode()).hexdigest()
    return Manifest(dataset_id, SCHEMA_VERSION, config_hash, created_at, splits)


def write_manifest(folder: StrPath, manifest: Manifest) -> Path:
    """Seal a folder whose shards are all published. Raises ShardError when one is absent or has another size."""
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
        content = json.loads(path.read_text())
        check_major(path, content["schema_version"])
        return _parse_manifest(content)
    except (KeyError, TypeError, AttributeError, UnicodeError, json.JSONDecodeError) as error:
        way_out = "Delete the file and rerun the flow to seal the data set again."
        raise ShardError(f"{path}: found {error!r}; expected a {FORMAT} manifest. {way_out}") from error


def _parse_manifest(content: dict[str, Any]) -> Manifest:
    shards = {split: entry["shards"] for split, entry in content["splits"].items()}
    splits = {split: tuple(ShardRecord(**shard) for shard in shards[split]) for split in shards}
    names = ("dataset_id", "schema_version", "config_hash", "created_at")
    return Manifest(**{name: content[name] for name in names}, splits=splits)


def verify(folder: StrPath, level: Level = "checksum") -> Manifest:
    """Check a sealed data set; ShardError names the first file that is not what it should be.

    open:     manifest, no stray shard, sizes, footers, row counts, schema version, one schema. Instant, and
              blind to changed bytes.
    checksum: and the sha256 of each file. Once per machine before training.
    deep:     and each row: see `data.row_checks.row_problems`, and ids are unique. After writing, or in doubt.
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
    size = path.stat().st_size if path.exists() else None
    if size != shard.bytes:
        seen = "nothing" if size is None else f"{size} bytes"
        raise ShardError(f"{path}: found {seen}, expected {shard.bytes} bytes. Delete it and rerun the flow.")


def _check_files(folder: Path, manifest: Manifest) -> None:
    named = {shard.file for shard in manifest.shards}
    if stray := sorted({path.name for path in folder.glob("[!.]*.arrow")} - named):
        raise ShardError(f"{folder / stray[0]}: found a shard that {MANIFEST} does not name. Move it away.")
    for shard in manifest.shards:
        _check_size(folder, shard)


def _check_footers(folder: Path, manifest: Manifest) -> None:
    first: pa.Schema | None = None
    for shard in manifest.shards:
        path = folder / shard.file
        reader = open_shard(path)
        first = first or reader.schema
        if difference := schema_difference(reader.schema, first):
            raise ShardError(f"{path}: {difference}, as in the first shard. Make the data set again.")
        if (rows := count_rows(path, reader)) != shard.rows:
            raise ShardError(f"{path}: found {rows} rows, {MANIFEST} says {shard.rows}. Rerun the flow.")


def _check_sum(path: Path, shard: ShardRecord) -> None:
    if (digest := file_sha256(path)) != shard.sha256:
        way_out = "The file changed after it was sealed. Delete it and rerun the flow."
        raise ShardError(f"{path}: found sha256 {digest}, expected {shard.sha256} by {MANIFEST}. {way_out}")


def _check_rows(folder: Path, manifest: Manifest) -> None:
    seen: set[str] = set()
    for shard in manifest.shards:
        path, first = folder / shard.file, 0
        for batch in batches_of(path):
            with readable(path):
                batch.validate(full=True)
            for row, problem in itertools.chain(row_problems(batch), repeated_ids(batch, seen)):
                raise ShardError(f"{path}: row {first + row}: {problem}. Delete it and rerun the flow.")
            first += batch.num_rows
