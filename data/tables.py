"""Rows of other people's tables: text, CSV, JSON, JSON lines, Parquet, Arrow files and streams, and folders of them.

A table gives its rows in order, from any row on without reading what lies before, and single values; a file with
pictures is never in memory as a whole. Knows nothing of what a column means (`data.cells`) and nothing of the hub
(`data.hub`). pyarrow is loaded when a table is read.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import pyarrow as pa

Row = dict[str, Any]
TEXTS = (".txt", ".json", ".jsonl")
BATCH_ROWS = 64
"""Rows that are in memory at a time: few enough to hold encoded pictures."""


class Table(Protocol):
    """Rows under named columns."""

    @property
    def name(self) -> str:
        """The file or data set, for messages."""
        ...

    @property
    def folder(self) -> Path | None:
        """What paths in its cells are relative to; None where no file lies beside it."""
        ...

    @property
    def columns(self) -> list[str]: ...

    @property
    def text_columns(self) -> list[str]:
        """Those columns that may hold text."""
        ...

    def count(self) -> int:
        """How many rows there are; 0 where nobody says."""
        ...

    def rows(self, columns: Sequence[str], start: int = 0) -> Iterator[Row]:
        """Some columns of the rows from `start` on, in order. Raises ValueError, naming the file, for damage."""
        ...


class FileTable(Table, Protocol):
    """A table in a file here, of which any value can be looked up."""

    def value(self, column: str, row: int) -> Any:
        """One value; rows in order are fast, as the part of the file that was read last is kept."""
        ...


def read_table(path: Path) -> FileTable:
    """The table in a .txt, .csv, .json, .jsonl, .parquet or .arrow file.

    The lines of a .txt and texts in JSON, where objects could be, are the one column `text`; values of a .csv are
    texts. Raises ValueError, naming the file, when there is no such table in it.
    """
    with _readable(path):
        return TextTable(path) if path.suffix.lower() in TEXTS else ArrowTable(path)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, ValueError, OSError, RecursionError) as error:  # the last: JSON that is nested too deep
        raise ValueError(f"{path}: cannot be read as {path.suffix}: {error}") from error


def load_json(path: Path, **options: Any) -> Any:
    """The content of a JSON file. `options`: as of `json.loads`. Raises ValueError, naming the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), **options)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is no JSON: {error}") from error


def table_files(place: Path, suffixes: Sequence[str]) -> list[Path]:
    """The file itself, or all files of a folder and its sub-folders with one of these suffixes, ordered by name."""
    files = [place] if place.is_file() else sorted(place.rglob("*"))
    return [path for path in files if path.suffix.lower() in suffixes and not path.name.startswith(".")]


@dataclass(frozen=True)
class TableFiles:
    """Files that are read as one table, one after another."""

    files: tuple[Path, ...]

    def identity(self) -> Row:
        """What tells the files from others. Sizes and times stand for contents: to hash 335 GB takes an hour."""
        stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in self.files]
        return {"files": [list(stat) for stat in stats]}

    def count(self) -> int:
        return sum(read_table(path).count() for path in self.files)

    def parts(self, start: int) -> Iterator[tuple[Table, int]]:
        """The tables that hold the rows from `start` of all files on, each with the first of its rows to read."""
        for path in self.files:
            table = read_table(path)
            if start < table.count():
                yield table, start
            start = max(0, start - table.count())


class TextTable:
    """A .txt, .json or .jsonl file. They hold pictures by path only, and so fit the memory."""

    def __init__(self, path: Path) -> None:
        self.name, self.folder = str(path), path.parent
        self._rows = _as_rows(_values(path))
        self.columns = list(dict.fromkeys(name for row in self._rows for name in row))
        self.text_columns = self.columns

    def count(self) -> int:
        return len(self._rows)

    def rows(self, columns: Sequence[str], start: int = 0) -> Iterator[Row]:
        return ({name: row.get(name) for name in columns} for row in islice(self._rows, start, None))

    def value(self, column: str, row: int) -> Any:
        return self._rows[row].get(column)


def _values(path: Path) -> list[Any]:
    """One value a row: a text or what JSON makes of it."""
    kind, text = path.suffix.lower(), path.read_text(encoding="utf-8-sig")
    if kind == ".json":
        content = json.loads(text)
        return content if isinstance(content, list) else [content]
    lines = text.split("\n")  # `splitlines` knows nine more ends of a line, which may stand in a text
    return lines if kind == ".txt" else [json.loads(line) for line in lines if line.strip()]


def _as_rows(values: list[Any]) -> list[Row]:
    if all(value is None or isinstance(value, str) for value in values):
        return [{"text": value} for value in values]
    for row, value in enumerate(values):
        if not isinstance(value, dict):
            raise ValueError(f"row {row} is no JSON object but {value!r:.40}; keep one kind of row")
    return values


class ArrowTable:
    """A Parquet file, an Arrow IPC file or stream (as `datasets` caches it), or a .csv file; read part by part."""

    def __init__(self, path: Path) -> None:
        self.name, self.folder, self._path = str(path), path.parent, path
        self._parts = _PARTS[path.suffix.lower()](path)
        self.columns = list(self._parts.schema.names)
        self.text_columns = [field.name for field in self._parts.schema if _holds_text(field.type)]
        self._ends = list(accumulate(self._parts.sizes))
        self._last: tuple[str, int, Any] | None = None

    def count(self) -> int:
        return self._ends[-1] if self._ends else 0

    def rows(self, columns: Sequence[str], start: int = 0) -> Iterator[Row]:
        part = bisect_right(self._ends, start)
        skipped = start - (self._ends[part - 1] if part else 0)
        with _readable(self._path):
            for batch in self._parts.batches(part, list(columns)):
                yield from batch.slice(min(skipped, batch.num_rows)).to_pylist()
                skipped = max(0, skipped - batch.num_rows)

    def value(self, column: str, row: int) -> Any:
        part = bisect_right(self._ends, row)
        if self._last is None or self._last[:2] != (column, part):
            with _readable(self._path):
                self._last = (column, part, self._parts.read(part, [column]).column(0))
        return self._last[2][row - self._ends[part]].as_py()


def _holds_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


class _Parts(Protocol):
    """The pieces in which a file can be read."""

    schema: pa.Schema
    sizes: list[int]

    def read(self, part: int, columns: list[str]) -> pa.Table:
        """Some columns of one part."""
        ...

    def batches(self, part: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """The rows from a part on, at most BATCH_ROWS at a time."""
        ...


class _ParquetParts:
    """The row groups of a Parquet file."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        self._file = pq.ParquetFile(path)
        self.schema = self._file.schema_arrow
        groups = range(self._file.metadata.num_row_groups)
        self.sizes = [self._file.metadata.row_group(group).num_rows for group in groups]

    def read(self, part: int, columns: list[str]) -> pa.Table:
        return self._file.read_row_group(part, columns=columns)

    def batches(self, part: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
        yield from self._file.iter_batches(BATCH_ROWS, range(part, len(self.sizes)), columns)


class _ArrowParts:
    """The record batches of an Arrow file, which is mapped: nothing is copied before a value is asked for."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        source = pa.memory_map(str(path))
        try:
            reader = pa.ipc.open_file(source)
            # Batches may be compressed: they are neither kept, nor unpacked as a whole to count their rows.
            counted = pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(included_fields=[0]))
            self.sizes = [counted.get_batch(index).num_rows for index in range(reader.num_record_batches)]
            self._batch: Callable[[int], pa.RecordBatch] = reader.get_batch
        except pa.ArrowInvalid:  # then it is a stream, which can only be read in order, or no Arrow
            source.seek(0)
            reader = pa.ipc.open_stream(source)
            batches = list(reader)
            self.sizes, self._batch = [batch.num_rows for batch in batches], batches.__getitem__
        self.schema = reader.schema

    def read(self, part: int, columns: list[str]) -> pa.Table:
        import pyarrow as pa

        return pa.Table.from_batches([self._batch(part)]).select(columns)

    def batches(self, part: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
        for index in range(part, len(self.sizes)):
            yield from self.read(index, columns).to_batches(max_chunksize=BATCH_ROWS)


class _CsvParts:
    """A .csv as texts, in one part: it holds pictures by path only, and so fits the memory."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        from pyarrow import csv

        options = {"parse_options": csv.ParseOptions(newlines_in_values=True)}
        names = csv.open_csv(path, **options).schema.names
        as_text = csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()))
        table = csv.read_csv(path, convert_options=as_text, **options)
        last = {name: index for index, name in enumerate(names)}  # spreadsheets write several columns without a name
        self._table = table.select(list(last.values()))
        self.schema, self.sizes = self._table.schema, [self._table.num_rows]

    def read(self, part: int, columns: list[str]) -> pa.Table:
        return self._table.select(columns)

    def batches(self, part: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
        for index in range(part, 1):
            yield from self.read(index, columns).to_batches(max_chunksize=BATCH_ROWS)


_PARTS: dict[str, Callable[[Path], _Parts]] = {".parquet": _ParquetParts, ".arrow": _ArrowParts, ".csv": _CsvParts}
