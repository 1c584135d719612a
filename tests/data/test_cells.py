"""What a cell means: a label, a yes or no, a picture."""

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from data.cells import caption_of, flag, label_of, picture_of

NAN = float("nan")


@pytest.mark.parametrize(
    ("row", "label"),
    [
        ({"label_0": 1.0}, 1.0),
        ({"label_0": 0}, 0.0),
        ({"label_0": True, "label_1": False}, 1.0),
        ({"label_0": "1"}, 1.0),
        ({"label_0": " 0.5 ", "label_1": "0.5"}, 0.5),
        ({"label_0": Decimal("0")}, 0.0),
        ({"label_0": 1.0, "label_1": None, "has_label": None}, 1.0),
        ({"label_0": 1.0, "label_1": NAN, "has_label": NAN}, 1.0),
        ({"label_0": 1.0, "has_label": 1}, 1.0),
        ({"label_0": 1.0, "has_label": "true"}, 1.0),
        ({}, None),
        ({"label_0": None}, None),
        ({"label_0": NAN}, None),
        ({"label_0": "nan"}, None),
        ({"label_0": ""}, None),
        ({"label_0": None, "label_1": 1.0}, None),
        ({"label_0": 1.0, "label_1": 1.0}, None),
        ({"label_0": 0.0, "label_1": 0.0}, None),
        *(({"label_0": 1.0, "has_label": no}, None) for no in (False, 0, 0.0, "False", "false", "0", " 0 ")),
    ],
)
def test_labels(row: dict[str, Any], label: float | None) -> None:
    """None, because an undecided row is never trained on."""
    assert label_of(row) == label


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label_0": 0.7}, r"label_0 is 0\.7, expected 0, 0\.5 or 1"),
        ({"label_0": 2}, r"label_0 is 2\.0, expected 0, 0\.5 or 1"),
        ({"label_0": float("inf")}, "label_0 is inf, expected 0"),
        ({"label_0": "left"}, "label_0 is 'left', expected 0, 0.5 or 1"),
        ({"label_0": [1]}, r"label_0 is \[1\], expected 0"),
        ({"label_0": 1, "label_1": "right"}, "label_1 is 'right', expected 0"),
        ({"label_0": 1, "has_label": "perhaps"}, "has_label is 'perhaps', expected true or false"),
        ({"label_0": 1, "has_label": 2}, "has_label is 2, expected true or false"),
        ({"label_0": 1, "has_label": 0.5}, "has_label is 0.5, expected true or false"),
    ],
)
def test_labels_of_another_kind_are_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        label_of(row)


def test_a_flag_that_says_nothing_is_neither_true_nor_false() -> None:
    assert [flag("x", value) for value in (None, NAN, "", " ")] == [None] * 4
    assert [flag("x", value) for value in (True, 1, 1.0, "TRUE", "1")] == [True] * 5


def test_pictures(tmp_path: Path) -> None:
    assert picture_of(b"x") == picture_of({"bytes": b"x", "path": "a.png"}, tmp_path) == b"x"
    for cell in ("deep/a.png", {"bytes": None, "path": "deep/a.png"}, {"bytes": b"", "path": "deep/a.png"}):
        assert picture_of(cell, tmp_path) == tmp_path / "deep/a.png"
    assert picture_of(str(tmp_path / "a.png"), Path("/other")) == tmp_path / "a.png"
    assert picture_of(tmp_path / "a.png") == tmp_path / "a.png"


@pytest.mark.parametrize("cell", [None, b"", "", {"bytes": None, "path": None}, {}, 3, [1, 2], NAN])
def test_a_cell_without_a_picture_is_told(cell: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no image but .*; remove the row"):
        picture_of(cell, tmp_path)


def test_a_path_names_nothing_where_no_file_lies_beside_the_table() -> None:
    """On the hub: its rows must not name files of this machine."""
    for cell in ("/etc/hostname", {"bytes": None, "path": "/etc/hostname"}):
        with pytest.raises(ValueError, match="holds no image but '/etc/hostname'"):
            picture_of(cell, None)


def test_a_caption_is_text() -> None:
    assert caption_of("") == ""
    with pytest.raises(ValueError, match="caption is None, expected text"):
        caption_of(None)
