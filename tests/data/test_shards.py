"""Shards give back what was written, to us and to four public readers, and show damage."""

import itertools
import os
import tempfile
from pathlib import Path

import duckdb
import numpy as np
import polars
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.columns import latent_column, latents, trainable
from data.manifest import make_manifest, verify, write_manifest
from data.schema import IMAGE, candidate_schema, pair_schema, score_schema
from data.shards import ShardError, adopt_shard, read_shard, write_shard
from tests.data.shard_world import FIRST, METADATA, ROWS, SCHEMA, SHARDS, contents, png, row, seal, shard_rows, table


def test_a_slice_carries_no_bits_of_its_neighbours(folder: Path) -> None:
    """Five rows of eight, and the same five alone: Arrow itself writes another last byte of `has_label`."""
    eight = table(*(row(i) for i in range(8)))
    cut = write_shard(folder / "cut.arrow", eight.slice(0, 5), SCHEMA)
    alone = write_shard(folder / "alone.arrow", table(*(row(i) for i in range(5))), SCHEMA)
    assert cut.sha256 == alone.sha256


def test_rows_of_another_schema_are_not_written(folder: Path) -> None:
    with pytest.raises(ShardError, match="not written: column margin is missing, expected float"):
        write_shard(folder / "a.arrow", table(row(0)).drop_columns("margin"), SCHEMA)
    assert contents(folder) == {}


def test_every_truncation_is_an_error(folder: Path) -> None:
    path = folder / "a.arrow"
    schema = score_schema({})
    scores = pa.table({"candidate_id": ["a", "b"], "score": pa.array([1, 2], pa.float32())}, schema=schema)
    whole = write_shard(path, scores, schema)
    for length in reversed(range(whole.bytes)):
        os.truncate(path, length)
        with pytest.raises(ShardError, match=r"a\.arrow: found .*; expected a complete shard\. Delete"):
            adopt_shard(path, schema, 2)


def test_a_shard_of_another_plan_is_not_adopted(folder: Path) -> None:
    path = seal(folder, row(0))
    assert adopt_shard(folder / "absent.arrow", SCHEMA) is None
    assert adopt_shard(path, SCHEMA, 1) == adopt_shard(path, None)
    other = pair_schema(4, 2, ["clip"], METADATA | {"config_hash": "other"})
    with pytest.raises(ShardError, match=r'config_hash is "c0ffee", expected "other". Another plan wrote it: delete'):
        adopt_shard(path, other)
    with pytest.raises(ShardError, match="found 1 rows, expected 2"):
        adopt_shard(path, SCHEMA, 2)


MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None


def test_pyarrow_reads_a_shard_without_this_project(sealed: Path) -> None:
    found = pa.ipc.open_file(pa.memory_map(str(sealed / FIRST))).read_all()
    assert found.equals(shard_rows(0)) and found.schema.metadata == SCHEMA.metadata


def test_a_column_that_is_read_is_not_copied(sealed: Path) -> None:
    before = pa.total_allocated_bytes()
    found = read_shard(sealed / FIRST, ["latent_0"])
    view = latents(found.column("latent_0").chunk(1))
    assert view[:, 0].tolist() == list(range(64, ROWS))
    assert pa.total_allocated_bytes() == before


@pytest.mark.parametrize("by_card", [False, True])
def test_datasets_decodes_the_images(by_card: bool, sealed: Path, tmp_path: Path) -> None:
    """By naming the files, and by opening the folder, where the card's header tells which files are data."""
    import datasets

    place = {"cache_dir": str(tmp_path), "split": "train"}
    files = str(sealed / "*.arrow")
    found = (
        datasets.load_dataset(str(sealed), **place)
        if by_card
        else datasets.load_dataset("arrow", data_files=files, **place)
    )
    assert len(found) == SHARDS * ROWS
    image = found[3]["image_1"]
    assert image.size == (2, 2) and image.convert("RGB").getpixel((0, 0)) == (7, 0, 7)  # png(2 * 3 + 1)
    assert found[3]["latent_0"] == [3.0, 0.0, 0.0, -1.0] and found[3]["score_clip_1"] == -0.75


def test_polars_reads_scores_and_latents(sealed: Path) -> None:
    found = polars.read_ipc(sealed / FIRST)
    assert found.schema["latent_0"] == polars.Array(polars.Float16, 4)
    assert found["latent_0"][3].to_list() == [3.0, 0.0, 0.0, -1.0]
    assert found.select(polars.col("score_clip_0") - polars.col("score_clip_1")).to_series().unique().to_list() == [1.0]
    assert found["image_0"].struct.field("bytes")[3] == png(6)


def test_duckdb_queries_the_light_columns(sealed: Path) -> None:
    heavy = [field.name for field in SCHEMA if "halffloat" in str(field.type)]
    light = read_shard(sealed / FIRST).drop_columns(heavy)
    connection = duckdb.connect()
    connection.register("light", light)
    won = connection.sql("SELECT count(*), min(score_clip_0 - score_clip_1) FROM light WHERE label_0 > label_1")
    assert won.fetchall() == [(ROWS, 1.0)]
    images = connection.sql("SELECT image_0.bytes FROM light WHERE caption = 'prompt 3'")
    assert images.fetchall() == [(png(6),)]


def test_duckdb_still_needs_the_light_columns(sealed: Path) -> None:
    """When this fails, the card's advice can go."""
    connection = duckdb.connect()
    with pytest.raises(duckdb.Error, match="Unsupported Internal Arrow Type"):
        connection.register("whole", read_shard(sealed / FIRST))
        connection.sql("SELECT caption FROM whole").fetchall()


BITS = st.lists(st.integers(0, 2**16 - 1), min_size=4, max_size=4)  # every float16, NaN payloads included


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(st.text(max_size=5), st.binary(max_size=9), BITS), min_size=1, max_size=3),
    count=st.integers(0, 140),
    cuts=st.lists(st.integers(0, 140), max_size=4),
)
def test_any_rows_in_any_slicing_come_back_bit_by_bit(
    rows: list[tuple[str, bytes, list[int]]], count: int, cuts: list[int]
) -> None:
    """And the file does not depend on the slicing: equal rows are equal bytes."""
    drawn = list(itertools.islice(itertools.cycle(rows), count))
    schema = candidate_schema(4, {}).append(pa.field("odd", pa.bool_()))
    halves = np.array([bits for *_, bits in drawn], np.uint16).reshape(count, 4).view(np.float16)
    columns = {name: pa.array([str(i) for i in range(count)]) for name in schema.names}
    columns |= {"caption": pa.array([caption for caption, *_ in drawn], pa.string())}
    columns |= {"image": pa.array([{"bytes": data, "path": None} for _, data, _ in drawn], IMAGE)}
    columns |= {"latent": latent_column(halves) if count else pa.array([], pa.list_(pa.float16(), 4))}
    columns |= {"seed": pa.array([None if i % 3 else i for i in range(count)], pa.int64())}
    columns |= {"odd": pa.array([i % 5 == 1 for i in range(count)])}
    columns |= {"candidate_index": pa.array(range(count), pa.int32())}
    whole = pa.Table.from_arrays([columns[name].cast(schema.field(name).type) for name in schema.names], schema=schema)
    edges = [0, *sorted(min(cut, count) for cut in cuts), count]
    slices = [whole.slice(a, b - a).to_batches() for a, b in itertools.pairwise(edges)]
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        one = write_shard(Path(name) / "one.arrow", whole, schema)
        many = write_shard(Path(name) / "many.arrow", itertools.chain(*slices), schema)
        found = read_shard(Path(name) / "many.arrow")
        sizes = [batch.num_rows for batch in found.to_batches()]
        assert latents(found.column("latent")).tobytes() == halves.tobytes()
        assert found.drop_columns("latent").equals(whole.drop_columns("latent"))
    assert (one.sha256, one.rows, one.bytes) == (many.sha256, many.rows, many.bytes)
    assert sizes == [64] * (count // 64) + [count % 64] * (count % 64 > 0)


def test_unknown_columns_are_named(tmp_path: Path) -> None:
    path = seal(tmp_path, row(0))
    assert read_shard(path, ["margin", "caption"]).column_names == ["margin", "caption"]
    with pytest.raises(ShardError, match="has no column score_hps_0; expected one of"):
        read_shard(path, ["score_hps_0"])


def test_a_shard_without_rows_is_a_shard(tmp_path: Path) -> None:
    """When no pair of a shard's prompts reaches the margin."""
    path = tmp_path / "00000-of-00001.arrow"
    record = write_shard(path, shard_rows(0).slice(0, 0), SCHEMA)
    write_manifest(tmp_path, make_manifest({"train": [record]}, "c", "now"))
    assert verify(tmp_path, "deep").rows == 0 == len(read_shard(path))
    assert latents(read_shard(path)["latent_0"]).shape == (0, 4)


def test_swapping_the_sides_complements_the_labels(tmp_path: Path) -> None:
    original = table(row(0, 1.0), row(1, 0.0), row(2, 0.5), row(3, None))
    names = [name.translate(str.maketrans("01", "10")) for name in SCHEMA.names]
    swapped = original.rename_columns(names).select(SCHEMA.names)
    assert swapped.column("label_0").to_pylist() == [0.0, 1.0, 0.5, None]
    assert trainable(swapped) == trainable(original)
    record = write_shard(tmp_path / "a.arrow", swapped, SCHEMA)
    write_manifest(tmp_path, make_manifest({"train": [record]}, "c", "now"))
    verify(tmp_path, "deep")
