"""What a row of human preferences says, and that it says the same to whoever reads it."""

import pytest

from data.human import decision, read_pair
from tests.data.human_world import ROWS, encoded, row


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
