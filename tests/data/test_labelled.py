"""Labelled sets in the formats they are published in, as one stream of pairs."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data.hub import HubTable
from data.ids import prompt_id
from data.labelled import LabelledPair, read_labelled
from data.pictures import open_image
from data.schema import pair_schema


def png(path: Path, level: int) -> bytes:
    Image.new("RGB", (6, 4), (level, level, level)).save(path)
    return path.read_bytes()


@pytest.fixture
def data(tmp_path: Path) -> list[bytes]:
    return [png(tmp_path / "one.png", level) for level in range(0, 250, 25)]


def level(image: bytes | Path) -> int:
    return int(open_image(image)[0, 0, 0])


def pickapic(data: list[bytes], rows: int = 4) -> pa.Table:
    """The columns of Pick-a-Pic that matter, and one more that does not; row 2 has no label."""
    return pa.table(
        {
            "are_different": [True] * rows,
            "caption": ["a cat", "a cat", "a dog", "cafe\u0301"][:rows],
            "has_label": [True, True, False, True][:rows],
            "jpg_0": data[:rows],
            "jpg_1": data[rows : 2 * rows],
            "label_0": [1.0, 0.5, 0.0, 0.0][:rows],
            "label_1": [0.0, 0.5, 0.0, 1.0][:rows],
            "ranking_id": list(range(rows)),
        }
    )


EXPECTED = [("a cat", 0, 100, 1.0), ("a cat", 25, 125, 0.5), ("cafe\u0301", 75, 175, 0.0)]


def seen(pairs: list[LabelledPair]) -> list[tuple[str, int, int, float]]:
    return [(pair.prompt, level(pair.image_0), level(pair.image_1), pair.label_0) for pair in pairs]


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_pickapic_files(data: list[bytes], tmp_path: Path, suffix: str) -> None:
    path, table = tmp_path / f"test.{suffix}", pickapic(data)
    if suffix == "parquet":
        pq.write_table(table, path, row_group_size=3)
    else:
        with pa.ipc.new_stream(str(path), table.schema) as writer:  # as `datasets` caches it
            writer.write_table(table)
    labelled = read_labelled(path)
    for _ in range(2):  # a second walk is the first one again
        pairs = list(labelled)
        assert seen(pairs) == EXPECTED and labelled.unlabelled == 1
        assert [pair.id for pair in pairs] == [f"test.{suffix}:{row}" for row in (0, 1, 3)]
        assert pairs[0].prompt_id == pairs[1].prompt_id != pairs[2].prompt_id


def test_a_folder_of_files_in_order(data: list[bytes], tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("test-00001", "test-00000"):
        pq.write_table(pickapic(data), tmp_path / "data" / f"{name}.parquet")
    labelled = read_labelled(tmp_path / "data")
    pairs = list(labelled)
    assert seen(pairs) == 2 * EXPECTED and labelled.unlabelled == 2
    assert [pair.id for pair in pairs[::3]] == ["test-00000.parquet:0", "test-00001.parquet:0"]


def test_a_data_set_as_the_hub_streams_it(data: list[bytes], tmp_path: Path) -> None:
    """`datasets` treats a folder as it treats a repository; images stay encoded."""
    from datasets import Features, Value
    from datasets import Image as ImageFeature

    (tmp_path / "set").mkdir()
    pq.write_table(pickapic(data), tmp_path / "set" / "test.parquet")
    labelled = read_labelled("owner/name")
    labelled.name = str(tmp_path / "set")
    assert seen(list(labelled)) == EXPECTED and labelled.unlabelled == 1
    feature = Features({"caption": Value("string"), "image_0": ImageFeature()}).arrow_schema
    table = pa.table({"caption": ["x"], "image_0": [{"bytes": data[3], "path": None}]}, schema=feature)
    (tmp_path / "other").mkdir()
    pq.write_table(table, tmp_path / "other" / "test.parquet")
    assert next(HubTable(str(tmp_path / "other"), "test").rows(["image_0"])) == {
        "image_0": {"bytes": data[3], "path": None}
    }


def test_shards_of_this_project(data: list[bytes], tmp_path: Path) -> None:
    """Written with the schema of data.schema, which this reader knows by column names only."""
    schema = pair_schema(4, None, ["pickscore"], {})
    rows = [
        {
            "pair_id": f"pair{row}", "prompt_id": prompt_id("a cat"), "caption": "a cat", "has_label": row != 1,
            "image_0": {"bytes": data[row], "path": None}, "image_1": {"bytes": data[row + 3], "path": None},
            "label_0": [1.0, None, 0.0][row], "label_1": [0.0, None, 1.0][row], "latent_0": [0.0] * 4,
            "latent_1": [0.0] * 4,
        }
        for row in range(3)
    ]  # fmt: skip
    table = pa.Table.from_pylist(rows, schema=schema)
    with pa.ipc.new_file(str(tmp_path / "pairs-00000.arrow"), schema) as writer:
        writer.write_table(table)
    labelled = read_labelled(tmp_path)
    pairs = list(labelled)
    assert seen(pairs) == [("a cat", 0, 75, 1.0), ("a cat", 50, 125, 0.0)] and labelled.unlabelled == 1
    assert [pair.id for pair in pairs] == ["pair0", "pair2"]
    assert {pair.prompt_id for pair in pairs} == {prompt_id("a cat")}


def ranked(tmp_path: Path, name: str, records: Any) -> Path:
    (tmp_path / "test").mkdir(exist_ok=True)
    for number in range(4):
        png(tmp_path / "test" / f"{number}.png", 10 * number)
    (tmp_path / name).write_text(json.dumps(records))
    return tmp_path / name


FILES = [f"{number}.png" for number in range(4)]


def test_hpdv2_rankings(tmp_path: Path) -> None:
    """A smaller rank is better; the folder called like the file is found."""
    record = {"prompt": "a cat", "image_path": FILES, "rank": [2, 0, 1, 1], "raw_annotations": []}
    pairs = list(read_labelled(ranked(tmp_path, "test.json", [record])))
    assert seen(pairs) == [
        ("a cat", 0, 10, 0.0), ("a cat", 0, 20, 0.0), ("a cat", 0, 30, 0.0),
        ("a cat", 10, 20, 1.0), ("a cat", 10, 30, 1.0), ("a cat", 20, 30, 0.5),
    ]  # fmt: skip
    assert pairs[0].id == "test.json:0:0-1" and len({pair.prompt_id for pair in pairs}) == 1


def test_hpdv2_choices(tmp_path: Path) -> None:
    """Of train.json: 1 is the one that was preferred, so larger is better."""
    record = {"prompt": "x", "file_path": FILES[:2], "human_preference": [0, 1], "user_hash": "u"}
    path = ranked(tmp_path, "train.json", [record])
    assert seen(list(read_labelled(path, tmp_path / "test"))) == [("x", 0, 10, 0.0)]
    with pytest.raises(ValueError, match=r"train\.json: image '0\.png' is not there .*train/0\.png\); .* --images"):
        list(read_labelled(path))


def test_imagereward_rankings(tmp_path: Path) -> None:
    """1 is best, and two images can share a rank, as in the record 005864-0033 of the published test set."""
    record = {"id": "005864-0033", "prompt": "x", "generations": FILES, "ranking": [1, 3, 2, 2]}
    pairs = list(read_labelled(ranked(tmp_path, "test.json", [record, record]), tmp_path / "test"))
    assert [pair.label_0 for pair in pairs] == 2 * [1.0, 1.0, 1.0, 0.0, 0.0, 0.5]
    assert pairs[-1].id == "test.json:1:2-3"


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ({"prompt": "x"}, "must be a list of records"),
        ([{"prompt": "x", "images": []}], r"record 0: has prompt, images; expected prompt, image_path or"),
        ([{"image_path": FILES, "rank": [1, 2, 3, 4]}], "record 0: has image_path, rank; expected prompt"),
        ([{"prompt": "x", "image_path": FILES, "rank": [1]}], "record 0: has 4 images and 1 ranks"),
        (["x"], "record 0: has no keys"),
    ],
)
def test_other_json_is_refused(tmp_path: Path, records: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(read_labelled(ranked(tmp_path, "test.json", records)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_0": [0.7, 1.0, 1.0, 1.0]}, r"test\.parquet, row 0: label_0 is 0\.7, expected 0, 0\.5 or 1"),
        ({"caption": [None, "a", "b", "c"]}, "row 0: caption is None, expected text"),
        ({"jpg_1": [None, b"x", b"x", b"x"]}, "row 0: holds no image but None"),
        ({"caption": None}, "lacks caption; it has are_different"),
        ({"jpg_0": None}, "lacks jpg_0 and jpg_1 or image_0 and image_1"),
    ],
)
def test_damaged_tables_are_refused(data: list[bytes], tmp_path: Path, change: dict, message: str) -> None:
    table = pickapic(data)
    for name, values in change.items():
        table = table.drop_columns(name)
        table = table if values is None else table.append_column(name, pa.array(values))
    pq.write_table(table, tmp_path / "test.parquet")
    with pytest.raises(ValueError, match=message):
        list(read_labelled(tmp_path / "test.parquet"))


def test_what_is_no_set_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no \.parquet or \.arrow files; give the \.json"):
        read_labelled(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"notes\.txt: is no labelled set"):
        read_labelled(tmp_path / "notes.txt")
    with pytest.raises(FileNotFoundError, match="no such file or folder, and it is no data-set id"):
        read_labelled(tmp_path / "nowhere")
