"""Four public readers, random access and the export see the same rows in a sealed folder."""

import itertools
import tempfile
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from data.card import dataset_card
from data.columns import latent_column, latents, trainable
from data.export import PICKAPIC, export_pickapic
from data.files import write_text
from data.manifest import make_manifest, read_manifest, verify, write_manifest
from data.schema import IMAGE, candidate_schema, read_metadata
from data.shards import ShardError, open_shard, read_shard, write_shard
from tests.data.test_shards import (
    METADATA,
    ROWS,
    SCHEMA,
    SHARDS,
    build,
    png,
    row,
    seal,
    shard_rows,
    table,
)

MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
FIRST = "00000-of-00003.arrow"


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete preference folder with its card: three shards of 70 pairs."""
    folder = tmp_path_factory.mktemp("preferences")
    build(folder)
    metadata = read_metadata(open_shard(folder / FIRST).schema)
    write_text(folder / "README.md", dataset_card(read_manifest(folder), metadata))
    return folder


# Public readers


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


# The card


def header(card: str) -> Any:
    """The YAML at the top of a card."""
    start, text, _ = card.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(text)


def test_the_code_on_the_card_runs(sealed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    card = (sealed / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    assert 'data_files="*.arrow"' in code and FIRST in code
    monkeypatch.chdir(sealed)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    names: dict[str, object] = {}
    exec(code, names)
    assert len(names["rows"]) == SHARDS * ROWS  # type: ignore[arg-type]


def test_the_card_tells_scorers_label_rule_and_every_column(sealed: Path) -> None:
    rule = {"label_rule": {"by": "clip", "margin": 0.1}, "base_model": {"id": "a|b", "revision": "r1"}}
    card = dataset_card(read_manifest(sealed), METADATA | rule)
    assert header(card) == {
        "tags": ["text-to-image", "preference", "diffusion-dpo"],
        "configs": [{"config_name": "default", "data_files": "*.arrow"}],
    }
    assert "| clip | 1 | cosine | not recorded |" in card and "by clip, margin 0.1. Train on rows" in card
    assert "| base model | id a\\|b, revision r1 |" in card and "| code | not recorded |" in card
    told = card.split("## Columns")[1]
    shown = {name.replace("score_clip", "score_<scorer>").removesuffix("_1") for name in SCHEMA.names}
    assert not [name for name in shown if name not in told]


def test_the_card_names_the_files_of_several_splits(sealed: Path) -> None:
    one, *others = read_manifest(sealed).shards
    manifest = make_manifest({"validation": [one], "train": others}, "c", "now")
    (config,) = header(dataset_card(manifest, {}))["configs"]
    assert config == {
        "config_name": "default",
        "data_files": [
            {"split": "train", "path": [shard.file for shard in others]},
            {"split": "validation", "path": [FIRST]},
        ],
    }


# Our own readers


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


def test_the_pickapic_export_holds_bytes_and_no_ties(tmp_path: Path) -> None:
    """A public script reads label 0.5 as a win of side 0, and opens `jpg_0` from raw bytes."""
    seal(tmp_path, row(0, 1.0), row(1, 0.5), row(2, 0.0), row(3, None))
    found = pq.read_table(export_pickapic(tmp_path, tmp_path / "out" / "pairs.parquet")).to_pylist()
    assert [(r["caption"], r["label_0"], r["label_1"]) for r in found] == [
        ("prompt 0", 1, 0),
        ("prompt 2", 0, 1),
    ]
    assert found[1]["jpg_0"] == png(4) and found[1]["jpg_1"] == png(5)
    assert set(found[0]) == set(PICKAPIC.names)
    everything = pq.read_table(export_pickapic(tmp_path, tmp_path / "all.parquet", keep_ties=True))
    assert everything.column("label_0").to_pylist() == [1.0, 0.5, 0.0, None]
