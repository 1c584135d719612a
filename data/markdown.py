"""Values and tables as Markdown, for the cards of data sets and models. Foreign text stays text."""

import re
from collections.abc import Iterable, Mapping, Sequence

NOT_RECORDED = "not recorded"


def text(value: object) -> str:
    """A JSON value in words; None is said to be not recorded."""
    if value is None:
        return NOT_RECORDED
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {text(child)}" for key, child in value.items())
    if isinstance(value, list | tuple):
        return " / ".join(text(child) for child in value)
    return str(value)


def cell(value: object) -> str:
    """A JSON value in words on one line, which ends no cell of a table and opens no HTML."""
    return re.sub(r"([\\|<])", r"\\\1", " ".join(text(value).splitlines()))


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table of values."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell(value) for value in line) + " |" for line in lines)
