"""Tables of every format give back what was written, from any row on, and name the file when they cannot."""

import csv
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.tables import TableFiles, read_table, table_files

ROWS = [{"text": f"row {index}", "other": f"{index % 3}"} for index in range(150)]
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)

Rows = list[dict[str, Any]]


def as_csv(rows: Rows, path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text", "other"], quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)


def as_json(rows: Rows, path: Path) -> None:
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8", newline="")


def as_jsonl(rows: Rows, path: Path) -> None:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8", newline="")


def as_parquet(rows: Rows, path: Path) -> None:
    pq.write_table(table_of(rows), path, row_group_size=70)


def as_arrow(rows: Rows, path: Path, new: Callable[..., Any] = pa.ipc.new_file, **options: Any) -> None:
    with new(str(path), table_of(rows).schema, **options) as writer:
        writer.write_table(table_of(rows), max_chunksize=70)


def as_stream(rows: Rows, path: Path) -> None:
    as_arrow(rows, path, pa.ipc.new_stream)


def as_compressed(rows: Rows, path: Path) -> None:
    as_arrow(rows, path, options=pa.ipc.IpcWriteOptions(compression="lz4"))


def table_of(rows: Rows) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=pa.schema([("text", pa.string()), ("other", pa.string())]))


FORMATS = {
    "csv": as_csv, "json": as_json, "jsonl": as_jsonl, "parquet": as_parquet, "arrow": as_arrow,
    "stream.arrow": as_stream, "compressed.arrow": as_compressed,
}  # fmt: skip


@pytest.mark.parametrize("kind", FORMATS)
def test_rows_from_any_row_on_and_single_values(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind}"
    FORMATS[kind](ROWS, path)
    table = read_table(path)
    assert (table.columns, table.text_columns, table.count()) == (["text", "other"], ["text", "other"], 150)
    assert table.name == str(path) and table.folder == tmp_path
    for start in (0, 1, 63, 64, 69, 70, 71, 139, 140, 149, 150, 400):
        assert list(table.rows(["text", "other"], start)) == ROWS[start:]
    assert list(table.rows(["other"], 148)) == [{"other": "1"}, {"other": "2"}]
    for row in (0, 149, 69, 70, 70, 69):
        assert (table.value("text", row), table.value("other", row)) == tuple(ROWS[row].values())


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=5), start=st.integers(0, 6))
def test_any_text_comes_back_from_every_format(texts: list[tuple[str, str]], start: int) -> None:
    """With commas, quotes, line breaks of every kind, and marks that look like a byte-order mark."""
    rows = [{"text": first, "other": second} for first, second in texts]
    with tempfile.TemporaryDirectory() as folder:
        for kind, write in FORMATS.items():
            write(rows, Path(folder) / f"a.{kind}")
            assert list(read_table(Path(folder) / f"a.{kind}").rows(["text", "other"], start)) == rows[start:], kind


@given(lines=st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n")), min_size=1))
def test_lines_of_a_text_are_a_column(lines: list[str]) -> None:
    """Ended by line feeds only: U+2028, form feed and others stand within a line."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.txt").write_text("\n".join(lines), encoding="utf-8-sig", newline="")
        table = read_table(Path(folder) / "a.txt")
        assert [row["text"] for row in table.rows(table.columns)] == lines


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl"])
def test_a_byte_order_mark_belongs_to_nothing(kind: str, tmp_path: Path) -> None:
    FORMATS[kind](ROWS[:2], tmp_path / f"a.{kind}")
    (tmp_path / f"a.{kind}").write_bytes(b"\xef\xbb\xbf" + (tmp_path / f"a.{kind}").read_bytes())
    table = read_table(tmp_path / f"a.{kind}")
    assert table.columns == ["text", "other"] and list(table.rows(["text", "other"])) == ROWS[:2]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
def test_every_type_of_text_is_text(kind: pa.DataType, tmp_path: Path) -> None:
    columns = pa.table({"a": pa.array(["x", "y"]).cast(kind), "number": [1, 2]})
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), columns.schema) as writer:
        writer.write_table(columns)
    table = read_table(tmp_path / "a.arrow")
    assert table.text_columns == ["a"] and list(table.rows(["a"], 1)) == [{"a": "y"}]


def test_what_lies_before_the_first_row_is_not_read(tmp_path: Path) -> None:
    """The first row group is damaged: it is noticed by those who read it, and by nobody else."""
    path = tmp_path / "a.parquet"
    noise = [np.random.default_rng(row).bytes(2000) for row in range(20)]
    pq.write_table(pa.table({"data": noise}), path, row_group_size=10, use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[4:400] = bytes(396)
    path.write_bytes(data)
    assert [row["data"] for row in read_table(path).rows(["data"], 10)] == noise[10:]
    assert read_table(path).value("data", 15) == noise[15]
    for read in (lambda table: next(table.rows(["data"])), lambda table: table.value("data", 9)):
        with pytest.raises(ValueError, match=r"a\.parquet: cannot be read as \.parquet: "):
            read(read_table(path))


def test_a_compressed_file_is_not_unpacked_as_a_whole(tmp_path: Path) -> None:
    """Forty batches of 250 kB, of which at most a few are in memory."""
    path, text = tmp_path / "a.arrow", np.random.default_rng(0).bytes(50_000)
    columns = pa.table({"id": list(range(200)), "data": [text] * 200})
    with pa.ipc.new_file(str(path), columns.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
        writer.write_table(columns, max_chunksize=5)
    del columns
    before = pa.total_allocated_bytes()
    table = read_table(path)
    for row in table.rows(["data"]):
        assert row["data"] == text and pa.total_allocated_bytes() - before < 2_000_000
    assert table.value("data", 199) == text and pa.total_allocated_bytes() - before < 2_000_000


def test_texts_in_json_are_a_column_and_mixed_rows_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for content, rows in (('["a", null, "b"]', ["a", None, "b"]), ('"a"', ["a"]), ("[]", [])):
        path.write_text(content)
        assert [row["text"] for row in read_table(path).rows(["text"])] == rows
    path.write_text('{"other": 3}')
    assert list(read_table(path).rows(["other", "text"])) == [{"other": 3, "text": None}]
    for content, message in (
        ('["a", {"prompt": "b"}]', "row 0 is no JSON object but 'a'; keep one kind of row"),
        ('[{"prompt": "b"}, 3]', "row 1 is no JSON object but 3"),
        ("[3]", "row 0 is no JSON object but 3"),
        ("[" * 100_000, "maximum recursion depth exceeded"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=rf"a\.json: cannot be read as \.json: {message}"):
            read_table(path)


def test_a_csv_with_more_or_fewer_values_than_columns_is_refused_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    for content, message in (
        ("prompt\na cat, red hat, 8k\n", "Expected 1 columns, got 3: a cat, red hat, 8k"),
        ("a,b\n1,2\n1\n", "Expected 2 columns, got 1: 1"),
        ("", "Empty CSV file"),
        ("a\n\xff\n", "invalid UTF8 data"),
    ):
        path.write_text(content, encoding="latin-1")
        with pytest.raises(ValueError, match=rf"a\.csv: cannot be read as \.csv: .*{message}"):
            read_table(path)


def test_a_long_csv_may_have_line_breaks_within_values(tmp_path: Path) -> None:
    """It is read in blocks of a megabyte, of which some end within a value."""
    rows = [{"text": f"{index}\n" * 500, "other": "\r\n"} for index in range(2000)]
    as_csv(rows, tmp_path / "a.csv")
    assert list(read_table(tmp_path / "a.csv").rows(["text", "other"])) == rows


def test_a_csv_holds_texts_under_the_last_column_of_a_name(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt,,\n5" vinyl,x,\ntrue,,NA\n1,,y\n')
    table = read_table(tmp_path / "a.csv")
    rows = [('5" vinyl', ""), ("true", "NA"), ("1", "y")]
    assert [(row["prompt"], row[""]) for row in table.rows(["prompt", ""])] == rows


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl", ".parquet", ".arrow", ".txt"])
def test_a_file_that_is_none_is_named(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    with pytest.raises(ValueError, match=rf"a\{suffix}: cannot be read as \{suffix}: "):
        read_table(path)
    path.write_bytes(b"\xff\xfe{ no table")
    with pytest.raises(ValueError, match=rf"a\{suffix}: cannot be read as \{suffix}: "):
        read_table(path)


def test_files_of_a_folder_are_one_table(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for index, name in enumerate(["b.parquet", "a.PARQUET", "deep/c.arrow", ".hidden.parquet", "d.jsonl"]):
        (as_arrow if name.endswith("arrow") else as_parquet)(ROWS[10 * index : 10 * index + 10], tmp_path / name)
    paths = table_files(tmp_path, (".parquet", ".arrow"))
    assert [path.name for path in paths] == ["a.PARQUET", "b.parquet", "c.arrow"]
    assert table_files(paths[0], (".parquet",)) == paths[:1] and table_files(paths[0], (".csv",)) == []
    files = TableFiles(tuple(paths))
    expected = ROWS[10:20] + ROWS[:10] + ROWS[20:30]
    assert files.count() == 30
    for start in (0, 9, 10, 15, 29, 30, 31):
        parts = files.parts(start)
        assert [row for table, first in parts for row in table.rows(["text", "other"], first)] == expected[start:]


def test_the_identity_of_files_changes_with_name_size_and_time(tmp_path: Path) -> None:
    as_parquet(ROWS, tmp_path / "a.parquet")
    files, stat = TableFiles((tmp_path / "a.parquet",)), (tmp_path / "a.parquet").stat()
    before = files.identity()
    assert before == {"files": [["a.parquet", stat.st_size, stat.st_mtime_ns]]}
    os.utime(tmp_path / "a.parquet", ns=(0, 1))
    assert files.identity() == {"files": [["a.parquet", stat.st_size, 1]]} != before
