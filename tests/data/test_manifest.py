"""The seal of a data set finds what is missing, added, changed or of another kind."""

import contextlib
import json
import os
from pathlib import Path

import pyarrow as pa
import pytest

from data.manifest import MANIFEST, make_manifest, read_manifest, verify, write_manifest
from data.schema import pair_schema, score_schema
from data.shards import ShardError, ShardRecord, adopt_shard, read_shard, write_shard
from tests.data.shard_world import (
    METADATA,
    ROWS,
    SCHEMA,
    SHARDS,
    build,
    contents,
    row,
    seal,
    table,
)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_is_caught_by_the_checksum_but_not_by_opening(folder: Path) -> None:
    """Arrow has no checksum: without ours, a caption would silently become another."""
    path = seal(folder, row(0), row(1))
    flip(path, path.read_bytes().index(b"prompt 0"))
    verify(folder, "open")
    assert read_shard(path).column("caption").to_pylist() == ["qrompt 0", "prompt 1"]
    with pytest.raises(ShardError, match=r"found sha256 .*, expected .*The file changed after it was sealed"):
        verify(folder)


def test_a_bit_flipped_anywhere_is_caught_and_never_more_than_a_shard_error(folder: Path) -> None:
    """Every byte of a small file, so also those of the footer, the schema and its JSON."""
    schema = score_schema({"scorer": "clip"})
    scores = pa.table({"candidate_id": ["a"], "score": pa.array([1], pa.float32())}, schema=schema)
    path = folder / "0.arrow"
    record = write_shard(path, scores, schema)
    write_manifest(folder, make_manifest({"train": [record]}, "c", "now"))
    for position in range(record.bytes):
        flip(path, position)
        with pytest.raises(ShardError, match="found sha256"):
            verify(folder)
        with contextlib.suppress(ShardError):
            verify(folder, "open")
            adopt_shard(path, schema, 1)
        flip(path, position)
    verify(folder, "deep")


def test_levels_and_a_missing_manifest(folder: Path) -> None:
    with pytest.raises(ShardError, match=r"no manifest\.json; the data set is unfinished\. Rerun the flow"):
        verify(folder)
    seal(folder, row(0))
    with pytest.raises(ValueError, match="level is 'full', expected one of"):
        verify(folder, "full")  # type: ignore[arg-type]
    (folder / MANIFEST).write_text("{}")
    with pytest.raises(ShardError, match=r"found KeyError.*expected a rlaif-shards manifest"):
        verify(folder)


def test_missing_stray_and_shorter_shards_are_named(folder: Path) -> None:
    build(folder)
    (folder / "00003-of-00003.arrow").write_bytes(b"")
    with pytest.raises(ShardError, match=r"00003-of-00003.arrow: found a shard that manifest.json does not name"):
        verify(folder, "open")
    (folder / "00003-of-00003.arrow").rename(folder / ".aside")
    os.truncate(folder / "00001-of-00003.arrow", 100)
    with pytest.raises(ShardError, match=r"00001-of-00003.arrow: found 100 bytes, expected \d{5} bytes"):
        verify(folder, "open")
    (folder / "00001-of-00003.arrow").unlink()
    with pytest.raises(ShardError, match=r"00001-of-00003.arrow: found nothing, expected \d{5} bytes"):
        verify(folder, "open")


def test_one_data_set_has_one_schema(folder: Path) -> None:
    other = pair_schema(4, 2, ["clip"], METADATA | {"config_hash": "other"})
    records = [write_shard(folder / "0.arrow", table(row(0)), SCHEMA)]
    records.append(write_shard(folder / "1.arrow", table(row(1)).cast(other), other))
    write_manifest(folder, make_manifest({"train": records}, "c", "now"))
    with pytest.raises(ShardError, match=r'1.arrow: metadata config_hash is "other", expected "c0ffee"'):
        verify(folder, "open")


def test_an_unknown_major_version_is_refused_with_both_numbers(folder: Path) -> None:
    path = folder / "a.arrow"
    future = SCHEMA.with_metadata({"rlaif": '{"schema_version": "2.0"}'})
    write_shard(path, table(row(0)).cast(future), future)
    with pytest.raises(ShardError, match=r"a\.arrow: schema version 2\.0, this code reads 1\.x"):
        read_shard(path)
    (folder / MANIFEST).write_text('{"schema_version": "3.1"}')
    with pytest.raises(ShardError, match=r"manifest\.json: schema version 3\.1, this code reads 1\.x"):
        read_manifest(folder)


def test_the_manifest_tells_what_was_sealed(folder: Path) -> None:
    build(folder)
    manifest = read_manifest(folder)
    assert (manifest.rows, len(manifest.shards), manifest.config_hash) == (SHARDS * ROWS, SHARDS, "c0ffee")
    later = make_manifest(manifest.splits, "c0ffee", "2027-01-01T00:00:00Z")
    assert later.dataset_id == manifest.dataset_id and later.created_at != manifest.created_at
    assert make_manifest({"train": manifest.shards[1:]}, "c0ffee", "").dataset_id != manifest.dataset_id
    found = json.loads((folder / MANIFEST).read_text())
    assert found["format"] == "rlaif-shards" and found["splits"]["train"]["rows"] == SHARDS * ROWS


def test_a_folder_with_an_absent_shard_cannot_be_sealed(folder: Path) -> None:
    absent = ShardRecord("0.arrow", 1, 100, "0" * 64)
    with pytest.raises(ShardError, match=r"0\.arrow: found nothing, expected 100 bytes"):
        write_manifest(folder, make_manifest({"train": [absent]}, "c", "now"))
    assert contents(folder) == {}
