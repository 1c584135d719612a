"""Rows of Parquet, Arrow and JSON-lines files, in order and one value at a time, without holding the file in memory.

Knows nothing of scorers. pyarrow is loaded when a table is read.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

BATCH_ROWS = 64


class Table(Protocol):
    """A file of rows."""

    path: Path
    columns: list[str]

    def rows(self, columns: Sequence[str]) -> list[dict[str, Any]]:
        """Some columns of all rows, in order."""
        ...

    def stream(self, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """The same, a part of the file at a time."""
        ...

    def value(self, column: str, row: int) -> Any:
        """One value; rows in order are fast, as the part of the file that was read last is kept."""
        ...


def read_table(path: Path) -> Table:
    """The table in a .parquet, .arrow or .jsonl file. Raises ValueError, naming the file, when it is none."""
    import pyarrow as pa

    try:
        return JsonLines(path) if path.suffix == ".jsonl" else Arrow(path)
    except (pa.ArrowInvalid, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as {path.suffix}: {error}") from error


def image_source(value: Any, path: Path, row: int) -> bytes | Path:
    """The encoded image or its file out of a cell: bytes, a `datasets.Image` struct, or a path beside the table.

    Raises ValueError for an empty cell and for other types.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return value
    if isinstance(value, str) and value:
        return path.parent / value
    raise ValueError(f"{path}, row {row}: holds no image but {value!r:.40}; remove the row")


class JsonLines:
    """One JSON object a line; has no images but by path, so that it fits the memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows = [json.loads(line) for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        if bad := [row for row, value in enumerate(self._rows) if not isinstance(value, dict)]:
            raise ValueError(f"{path}, row {bad[0]}: is no JSON object")
        self.columns = list(dict.fromkeys(name for row in self._rows for name in row))

    def rows(self, columns: Sequence[str]) -> list[dict[str, Any]]:
        return list(self.stream(columns))

    def stream(self, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        return ({name: row.get(name) for name in columns} for row in self._rows)

    def value(self, column: str, row: int) -> Any:
        return self._rows[row].get(column)


class Arrow:
    """A Parquet file, an Arrow IPC file, or an Arrow stream as `datasets` caches it; read part by part."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._parts: _Parts = _ParquetParts(path) if path.suffix == ".parquet" else _IpcParts(path)
        self.columns = self._parts.columns
        self._ends = list(accumulate(self._parts.sizes))
        self._last: tuple[str, int, Any] | None = None

    def rows(self, columns: Sequence[str]) -> list[dict[str, Any]]:
        return list(self.stream(columns))

    def stream(self, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        for batch in self._parts.batches(columns):
            yield from batch.to_pylist()

    def value(self, column: str, row: int) -> Any:
        part = bisect_right(self._ends, row)
        if self._last is None or self._last[:2] != (column, part):
            self._last = (column, part, self._parts.read(part, [column]).column(0))
        return self._last[2][row - self._ends[part]].as_py()


class _Parts(Protocol):
    """The pieces in which a file can be read."""

    columns: list[str]
    sizes: list[int]

    def read(self, part: int, columns: Sequence[str]) -> Any:
        """A pyarrow.Table of one part."""
        ...

    def batches(self, columns: Sequence[str]) -> Iterator[Any]:
        """All rows as pyarrow tables or batches, few enough rows in each to hold encoded images."""
        ...


class _ParquetParts:
    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        self._file = pq.ParquetFile(path)
        self.columns = list(self._file.schema_arrow.names)
        groups = range(self._file.metadata.num_row_groups)
        self.sizes = [self._file.metadata.row_group(group).num_rows for group in groups]

    def read(self, part: int, columns: Sequence[str]) -> Any:
        return self._file.read_row_group(part, columns=list(columns))

    def batches(self, columns: Sequence[str]) -> Iterator[Any]:
        yield from self._file.iter_batches(BATCH_ROWS, columns=list(columns))


class _IpcParts:
    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        source = pa.memory_map(str(path))  # nothing is copied before a value is asked for
        try:
            reader = pa.ipc.open_file(source)
            self._batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
        except pa.ArrowInvalid:
            source.seek(0)
            reader = pa.ipc.open_stream(source)
            self._batches = list(reader)
        self.columns, self.sizes = list(reader.schema.names), [batch.num_rows for batch in self._batches]

    def read(self, part: int, columns: Sequence[str]) -> Any:
        import pyarrow as pa

        return pa.Table.from_batches([self._batches[part]]).select(list(columns))

    def batches(self, columns: Sequence[str]) -> Iterator[Any]:
        for part in range(len(self.sizes)):
            yield from self.read(part, columns).to_batches(max_chunksize=BATCH_ROWS)
