"""What a cell of somebody's table means, the same for every reader: a picture, a caption, who was preferred.

Knows values. Knows nothing of files' formats (`data.tables`) and opens nothing.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TRUTH = {"true": True, "1": True, "false": False, "0": False}


def picture_of(value: Any, folder: Path | None = None) -> bytes | Path:
    """The encoded picture that a cell holds, or its file.

    value: bytes, a path, or both in the struct of `datasets.Image`, of which the bytes count where there are any.
    folder: of the table, which a path is relative to; None = there is none, so that a path names nothing.
    Raises ValueError for an empty cell, a path that names nothing, and values of other types.
    """
    content = (value.get("bytes") or value.get("path")) if isinstance(value, Mapping) else value
    if isinstance(content, Path) or (isinstance(content, bytes) and content):
        return content
    if isinstance(content, str) and content and folder is not None:
        return folder / content
    raise ValueError(f"holds no image but {content!r:.40}; remove the row")


def caption_of(value: Any) -> str:
    """The caption that a cell holds. Raises ValueError when it is no text."""
    if not isinstance(value, str):
        raise ValueError(f"caption is {value!r:.40}, expected text")
    return value


def label_of(row: Mapping[str, Any]) -> float | None:
    """Which picture a row prefers: 1 = the first, 0 = the second, 0.5 = neither; None = nobody decided.

    Undecided is a row without label_0, with `has_label` false, or with a label_1 that is not 1 - label_0, as in
    Pick-a-Pic. NaN and empty text are no label; numbers may be texts, and truth may be numbers.
    Raises ValueError for a label_0 that is none of 0, 0.5 and 1: then the data are of another kind.
    """
    first, second = (_number(name, row.get(name)) for name in ("label_0", "label_1"))
    if first is None or flag("has_label", row.get("has_label")) is False:
        return None
    if first not in (0.0, 0.5, 1.0):
        raise ValueError(f"label_0 is {first}, expected 0, 0.5 or 1")
    return first if second is None or first + second == 1.0 else None


def flag(name: str, value: Any) -> bool | None:
    """A cell that says yes or no: a truth value, 0 or 1, also as text; None where it says nothing."""
    if _is_empty(value):
        return None
    text = str(int(value) if isinstance(value, float) and value.is_integer() else value).strip().lower()
    if text not in TRUTH:
        raise ValueError(f"{name} is {value!r:.40}, expected true or false")
    return TRUTH[text]


def _number(name: str, value: Any) -> float | None:
    if _is_empty(value):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is {value!r:.40}, expected 0, 0.5 or 1") from error
    return None if math.isnan(number) else number


def _is_empty(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))
