"""Tables and values as Markdown, for the cards of data sets and models."""

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


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(_escape(cell) for cell in line) + " |" for line in lines)


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")
