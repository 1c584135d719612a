"""What a row of human preferences says, and that it says the same to whoever reads it."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from data.human import decision, human_data, read_pair
from data.labelled import read_labelled
from data.pictures import open_image
from tests.data.human_world import ROWS, encoded, row, save


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "labelled"),
        ({"label_1": None, "has_label": None, "are_different": None}, "labelled"),
        ({"label_0": 0.5, "label_1": 0.5}, "ties"),
        ({"label_0": float("nan")}, "unlabelled"),
        ({"has_label": False}, "unlabelled"),
        ({"label_0": 1.0, "label_1": 1.0}, "unlabelled"),
        ({"jpg_1": ROWS[0]["jpg_0"]}, "identical"),
    ],
)
def test_what_a_row_says(changes: dict[str, object], expected: str) -> None:
    assert decision(row(0, **changes)) == expected


@pytest.mark.parametrize(
    "data", [b"", b"no picture", encoded(1)[:100], b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"]
)
def test_broken_and_dangerous_files_are_no_pictures(data: bytes) -> None:
    assert read_pair(row(0, jpg_1=data), 0, 32, 32) is None


PICTURE = encoded(1)
DECIDED = {"caption": "a", "jpg_0": encoded(0), "jpg_1": PICTURE, "label_0": 1.0}


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({}, "pairs"),
        ({"jpg_1": {"bytes": PICTURE, "path": None}}, "pairs"),
        ({"jpg_1": {"bytes": PICTURE, "path": "nowhere.png"}}, "pairs"),
        ({"jpg_1": {"bytes": None, "path": "one.png"}}, "pairs"),
        ({"jpg_1": {"bytes": b"", "path": "one.png"}}, "pairs"),
        ({"jpg_0": "zero.png", "jpg_1": "one.png"}, "pairs"),
        ({"label_0": "1.0", "label_1": "0.0"}, "pairs"),
        ({"label_0": 1, "has_label": 1}, "pairs"),
        ({"has_label": 0}, "unlabelled"),
        ({"has_label": "false"}, "unlabelled"),
        ({"label_0": float("nan")}, "unlabelled"),
        ({"label_0": None, "jpg_0": None, "jpg_1": None}, "unlabelled"),
        ({"label_0": 0.0, "label_1": 0.0}, "unlabelled"),
        ({"jpg_1": {"bytes": None, "path": "nowhere.png"}}, "broken"),
        ({"jpg_1": None}, "broken"),
        ({"jpg_0": None, "jpg_1": None}, "broken"),
        ({"jpg_0": {"bytes": None, "path": None}, "jpg_1": {"bytes": None, "path": None}}, "broken"),
        ({"jpg_1": PICTURE[:60]}, "broken"),
        ({"caption": None}, "broken"),
        ({"label_0": "left"}, "refused"),
        ({"label_0": 0.7}, "refused"),
        ({"has_label": "perhaps"}, "refused"),
    ],
)
@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_row_means_the_same_to_the_import_and_to_the_scorers_accuracy(
    changes: dict[str, Any], outcome: str, suffix: str, tmp_path: Path
) -> None:
    """The import counts what is broken, up to a share; the labelled reader names it. Nothing else tells them apart."""
    (tmp_path / "zero.png").write_bytes(encoded(0))
    (tmp_path / "one.png").write_bytes(PICTURE)
    table = pa.Table.from_pylist([{**DECIDED, **changes}])
    if suffix == ".parquet":
        parquet.write_table(table, tmp_path / "a.parquet")
    else:
        with pa.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as writer:
            writer.write_table(table)
    source = str(tmp_path / f"a{suffix}")
    assert (imported(source), labelled(source)) == (outcome, outcome)


def imported(source: str) -> str:
    """What the import makes of the only row."""
    (only,) = human_data(source).rows(0)
    try:
        verdict = decision(only)
    except ValueError:
        return "refused"
    pair = read_pair(only, 0, 40, 48) if verdict == "labelled" else None
    if pair is None:
        return "broken" if verdict == "labelled" else verdict
    assert (pair.files, pair.label_0, pair.caption) == ((encoded(0), PICTURE), 1.0, "a")
    return "pairs"


def labelled(source: str) -> str:
    """What the reader of labelled sets makes of it."""
    pairs = read_labelled(source)
    try:
        found = list(pairs)
        for pair in found:
            assert [open_image(image).shape for image in (pair.image_0, pair.image_1)] == [(48, 40, 3)] * 2
            assert (pair.label_0, pair.prompt) == (1.0, "a")
    except ValueError as error:
        return "refused" if re.search("label_0 is|has_label is", str(error)) else "broken"
    assert pairs.unlabelled == 1 - len(found)
    return "pairs" if found else "unlabelled"


def test_files_beside_a_table_are_imported_as_if_they_were_in_it(tmp_path: Path) -> None:
    names = [{**ROWS[0], "jpg_0": "zero.jpg", "jpg_1": "one.png"}]
    (tmp_path / "zero.jpg").write_bytes(ROWS[0]["jpg_0"])
    (tmp_path / "one.png").write_bytes(ROWS[0]["jpg_1"])
    parquet.write_table(pa.Table.from_pylist(names), tmp_path / "names.parquet")
    (tmp_path / "bytes").mkdir()
    save(tmp_path / "bytes" / "bytes.parquet", ROWS[:1])
    by_name, by_bytes = (
        read_pair(next(human_data(str(place)).rows(0)), 0, 32, 32)
        for place in (tmp_path / "names.parquet", tmp_path / "bytes")
    )
    assert by_name is not None and by_bytes is not None and by_name.files == by_bytes.files
    for ours, theirs in zip(by_name.pictures, by_bytes.pictures, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_equal_files_beside_the_table_are_identical(tmp_path: Path) -> None:
    for name in ("zero.png", "one.png"):
        (tmp_path / name).write_bytes(PICTURE)
    assert decision({**DECIDED, "jpg_0": tmp_path / "zero.png", "jpg_1": tmp_path / "one.png"}) == "identical"
