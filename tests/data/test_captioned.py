"""Captioned images in every layout: what comes back is what was written, and damage is named."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data.captioned import read_captioned
from data.pictures import open_image

CAPTIONS = {"a.png": "a red circle", "b.png": "It\u2019s, \u201ctwo\u201d\nlines", "deep/c.png": "1"}
ORDER = sorted(CAPTIONS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images of different sizes and levels, one in a sub-folder."""
    for row, name in enumerate(ORDER):
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4 + row, 5), (10 * row, 20, 30)).save(path)
    return tmp_path / "set"


def as_csv(folder: Path, column: str = "text") -> None:
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8-sig") as file:  # as spreadsheets write it
        csv.writer(file).writerows([["file_name", column, "size"], *([name, CAPTIONS[name], 1] for name in ORDER)])


def as_jsonl(folder: Path, column: str = "text") -> None:
    lines = [json.dumps({"file_name": name, column: CAPTIONS[name]}) for name in ORDER]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def as_parquet(folder: Path, column: str = "text") -> None:
    table = pa.table({"file_name": ORDER, column: [CAPTIONS[name] for name in ORDER]})
    pq.write_table(table, folder / "metadata.parquet")


def as_json(folder: Path, column: str = "") -> None:
    (folder / "captions.json").write_text(json.dumps(CAPTIONS))


def as_sidecars(folder: Path, column: str = "") -> None:
    for name, caption in CAPTIONS.items():
        (folder / name).with_suffix(".txt").write_text(caption + "\n")


LAYOUTS = [as_csv, as_jsonl, as_parquet, as_json, as_sidecars]


@pytest.mark.parametrize("write", LAYOUTS)
def test_folders(folder: Path, write: Any) -> None:
    write(folder)
    found = read_captioned(folder)
    assert len(found) == 3 and {item.id: item.prompt for item in found} == CAPTIONS
    for item in found:
        np.testing.assert_array_equal(item.open(), open_image(folder / item.id))
    assert found[1].id == found[1:][0].id == list(found)[1].id and found[-1].open().shape == (5, 6, 3)


@pytest.mark.parametrize("write", [as_csv, as_jsonl, as_parquet])
@pytest.mark.parametrize("column", ["prompt", "caption"])
def test_columns_of_captions(folder: Path, write: Any, column: str) -> None:
    write(folder, column)
    assert read_captioned(folder)[0].prompt == CAPTIONS["a.png"]
    assert read_captioned(folder, column)[0].prompt == CAPTIONS["a.png"]
    with pytest.raises(ValueError, match=rf"metadata.*: lacks title; name .* one of file_name, {column}"):
        read_captioned(folder, "title")


def test_any_column_can_be_named(folder: Path) -> None:
    as_parquet(folder, "alt text")
    with pytest.raises(ValueError, match="lacks text or prompt or caption"):
        read_captioned(folder)
    assert read_captioned(folder, "alt text")[0].prompt == CAPTIONS["a.png"]


def test_nothing_is_decoded_before_it_is_asked_for(folder: Path) -> None:
    as_json(folder)
    (folder / "b.png").write_bytes(b"no picture")
    found = read_captioned(folder)
    assert found[0].open().shape == (5, 4, 3)
    with pytest.raises(ValueError, match=r"b\.png: is no picture that can be read"):
        found[1].open()


@pytest.mark.parametrize("write", LAYOUTS)
def test_an_image_without_caption_is_named(folder: Path, write: Any) -> None:
    write(folder)
    shutil.copy(folder / "a.png", folder / "z.png")
    with pytest.raises(ValueError, match=r"set: 'z\.png' has no caption; write one to z\.txt or"):
        read_captioned(folder)
    shutil.copy(folder / "a.png", folder / "zz.png")
    with pytest.raises(ValueError, match=r"\(and 1 more like it\)"):
        read_captioned(folder)


@pytest.mark.parametrize("write", LAYOUTS)
def test_a_caption_without_image_is_named(folder: Path, write: Any) -> None:
    write(folder)
    (folder / "a.png").unlink()
    with pytest.raises(ValueError, match=r"a\.(png|txt)' (has a caption, but there is no such image|belongs to no)"):
        read_captioned(folder)


def test_duplicates_are_named(folder: Path, tmp_path: Path) -> None:
    as_csv(folder)
    with (folder / "metadata.csv").open("a") as file:
        file.write("./a.png,again,1\r\n")
    with pytest.raises(ValueError, match=r"'a\.png' has two captions; keep one"):
        read_captioned(folder)
    (folder / "metadata.csv").unlink()
    (folder / "captions.json").write_text('{"a.png": "x", "b.png": "y", "deep/c.png": "z", "a.png": "w"}')
    with pytest.raises(ValueError, match=r"'a\.png' has two captions"):
        read_captioned(folder)
    (folder / "captions.json").unlink()
    as_sidecars(folder)
    shutil.copy(folder / "a.png", folder / "a.jpg")
    with pytest.raises(ValueError, match=r"'a\.txt' is the caption of two images"):
        read_captioned(folder)


def test_unclear_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    as_csv(folder)
    as_json(folder)
    with pytest.raises(ValueError, match=r"holds metadata\.csv and captions\.json; keep the one"):
        read_captioned(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        read_captioned(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="there is no such folder or file"):
        read_captioned(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("content", "message"),
    [('["a"]', "must be one object"), ("{", "is no JSON"), ('{"a.png": 1, "b.png": "", "deep/c.png": ""}', "no text")],
)
def test_damaged_captions_json(folder: Path, content: str, message: str) -> None:
    (folder / "captions.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_captioned(folder)


def test_metadata_with_two_captions_or_none(folder: Path) -> None:
    names = {"file_name": ORDER, "text": list("abc"), "prompt": list("def")}
    pq.write_table(pa.table(names), folder / "metadata.parquet")
    with pytest.raises(ValueError, match="has text and prompt; name the column"):
        read_captioned(folder)
    assert [item.prompt for item in read_captioned(folder, "prompt")] == list("def")
    pq.write_table(pa.table({"text": list("abc")}), folder / "metadata.parquet")
    with pytest.raises(ValueError, match="lacks the column file_name; it has text"):
        read_captioned(folder)


def table_of(folder: Path, kind: str) -> pa.Table:
    data = [(folder / name).read_bytes() for name in ORDER]
    columns: dict[str, Any] = {"prompt": [CAPTIONS[name] for name in ORDER]}
    if kind == "struct":
        columns["image"] = pa.array([{"bytes": b, "path": None} for b in data])
    elif kind == "struct of paths":
        columns["image"] = pa.array([{"bytes": None, "path": name} for name in ORDER])
    else:
        columns |= {"jpg": data} if kind == "bytes" else {"path": ORDER}
    return pa.table(columns)


def write_table(table: pa.Table, path: Path, kind: str) -> Path:
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=2)
    else:
        with (pa.ipc.new_file if kind == "file" else pa.ipc.new_stream)(str(path), table.schema) as writer:
            for batch in table.to_batches(max_chunksize=2):
                writer.write_batch(batch)
    return path


@pytest.mark.parametrize("container", ["parquet", "file", "stream"])
@pytest.mark.parametrize("kind", ["struct", "struct of paths", "bytes", "path"])
def test_tables(folder: Path, container: str, kind: str) -> None:
    """Two row groups or batches, read forwards and backwards."""
    suffix = ".parquet" if container == "parquet" else ".arrow"
    path = write_table(table_of(folder, kind), folder / f"table{suffix}", container)
    found = read_captioned(path)
    assert [item.id for item in found] == [f"{path.name}:{row}" for row in range(3)]
    assert [item.prompt for item in found] == [CAPTIONS[name] for name in ORDER]
    for row in (0, 1, 2, 1, 0):
        np.testing.assert_array_equal(found[row].open(), open_image(folder / ORDER[row]))


def test_a_table_as_datasets_writes_it(folder: Path) -> None:
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    rows = {"image": [str(folder / name) for name in ORDER], "text": list("abc")}
    features = Features({"image": ImageFeature(), "text": Value("string")})
    Dataset.from_dict(rows, features=features).to_parquet(folder / "written.parquet")
    found = read_captioned(folder / "written.parquet")
    assert [item.open().shape for item in found] == [(5, 4, 3), (5, 5, 3), (5, 6, 3)]


def test_json_lines_with_paths(folder: Path) -> None:
    lines = [json.dumps({"image": name, "caption": CAPTIONS[name]}) for name in ORDER]
    (folder / "list.jsonl").write_text("\n".join(lines))
    found = read_captioned(folder / "list.jsonl")
    assert [item.open().shape[1] for item in found] == [4, 5, 6] and found[1].prompt == CAPTIONS["b.png"]


def test_damaged_tables(folder: Path) -> None:
    bad = folder / "bad.parquet"
    bad.write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"bad\.parquet: cannot be read as \.parquet"):
        read_captioned(bad)
    (folder / "bad.jsonl").write_text('{"a": 1}\n{')
    with pytest.raises(ValueError, match=r"bad\.jsonl: cannot be read as \.jsonl"):
        read_captioned(folder / "bad.jsonl")
    with pytest.raises(ValueError, match=r"a\.png: is no table"):
        read_captioned(folder / "a.png")
    pq.write_table(pa.table({"text": ["a"]}), bad)
    with pytest.raises(ValueError, match="lacks a column of images"):
        read_captioned(bad)
    pq.write_table(pa.table({"text": ["a", None], "image": [b"x", b"y"]}), bad)
    with pytest.raises(ValueError, match=r"'bad\.parquet:1' has no caption"):
        read_captioned(bad)
    pq.write_table(pa.table({"text": ["a", "b"], "image": [b"x", None]}), bad)
    found = read_captioned(bad)
    with pytest.raises(ValueError, match=r"bad\.parquet:0: 1 bytes: is no picture"):
        found[0].open()
    with pytest.raises(ValueError, match=r"bad\.parquet, row 1: holds no image but None"):
        found[1].open()
