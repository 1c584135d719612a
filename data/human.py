"""Where human preference data lie: Parquet and Arrow files, or a data set on the hub. Read from any row on."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pyarrow import parquet

from data.preferences import KNOWN, check_columns

if TYPE_CHECKING:
    from datasets import IterableDataset

SUFFIXES = (".parquet", ".arrow")
ROWS_AT_A_TIME = 64
HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?::(\w+))?")
Row = dict[str, Any]


@dataclass(frozen=True)
class LocalData:
    """Files, in the order of their names."""

    files: tuple[Path, ...]

    def identity(self) -> Row:
        """What tells the source from another. Sizes and times stand for contents: to hash 335 GB takes an hour."""
        stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in self.files]
        return {"files": [list(each) for each in stats]}

    def count(self) -> int:
        return sum(_rows_of(path) for path in self.files)

    def rows(self, start: int) -> Iterator[Row]:
        """From row `start` of all files together on."""
        for path in self.files:
            there = _rows_of(path)
            if start < there:
                yield from (_parquet_rows if path.suffix == ".parquet" else _arrow_rows)(path, start)
            start = max(0, start - there)


@dataclass(frozen=True)
class HubData:
    """One split of a data set at one commit, streamed: nothing is kept on disk."""

    name: str
    split: str
    commit: str
    examples: int

    def identity(self) -> Row:
        return {"hub": self.name, "split": self.split, "commit": self.commit}

    def count(self) -> int:
        """0 = the hub does not say."""
        return self.examples

    def rows(self, start: int) -> Iterator[Row]:
        return stream_rows(_open_hub(self.name, self.split, self.commit), start)


HumanData = LocalData | HubData


def human_data(source: str) -> HumanData:
    """The preference data that `pairs` names, their columns checked. Raises ValueError saying what would work."""
    place = Path(source).expanduser()
    if place.exists() or place.suffix in SUFFIXES:
        return _local(source, place.absolute())
    return _hub(source)


def _local(source: str, place: Path) -> LocalData:
    files = [place] if place.is_file() else [path for path in sorted(place.rglob("*")) if path.suffix in SUFFIXES]
    files = [path for path in files if path.suffix in SUFFIXES and not path.name.startswith(".")]
    if not files:
        raise ValueError(
            f"pairs={source!r}: neither sealed preference shards (with a manifest.json) nor a .parquet or .arrow file "
            "or folder of them"
        )
    for path in files:
        try:
            check_columns(_names_of(path))
        except (ValueError, OSError) as error:  # Arrow's own errors are ValueErrors
            raise ValueError(f"pairs={source!r}: {path}: {error}") from error
    return LocalData(tuple(files))


def _names_of(path: Path) -> list[str]:
    if path.suffix == ".parquet":
        return list(parquet.read_schema(path).names)
    names = list(_arrow_table(path).schema.names)
    if "pair_id" in names and "latent_0" in names:
        raise ValueError(
            "a preference shard of ours without its manifest.json: finish the run that writes it, or give the folder "
            "that holds the manifest"
        )
    return names


def _rows_of(path: Path) -> int:
    return int(parquet.read_metadata(path).num_rows if path.suffix == ".parquet" else _arrow_table(path).num_rows)


def _arrow_table(path: Path) -> pa.Table:
    """Mapped, not read. Arrow has two formats; `datasets` keeps its cache in the second."""
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except pa.ArrowInvalid:
        return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()


def _arrow_rows(path: Path, start: int) -> Iterator[Row]:
    table = _arrow_table(path)
    table = table.select(_known(table.schema.names))
    for first in range(start, table.num_rows, ROWS_AT_A_TIME):
        yield from table.slice(first, ROWS_AT_A_TIME).to_pylist()


def _parquet_rows(path: Path, start: int) -> Iterator[Row]:
    """Row groups that lie before the start are not read."""
    file = parquet.ParquetFile(path)
    names, groups = _known(file.schema_arrow.names), list(range(file.num_row_groups))
    while groups and start >= file.metadata.row_group(groups[0]).num_rows:
        start -= file.metadata.row_group(groups.pop(0)).num_rows
    for batch in file.iter_batches(ROWS_AT_A_TIME, groups, names):
        yield from batch.slice(min(start, batch.num_rows)).to_pylist()
        start = max(0, start - batch.num_rows)


def _known(names: Iterable[str]) -> list[str]:
    there = set(names)
    return [name for name in KNOWN if name in there]


def _hub(source: str) -> HubData:
    match = HUB_NAME.fullmatch(source)
    if not match:
        raise ValueError(
            f"pairs={source!r}: no such folder or file, and no hub data set 'owner/name' or 'owner/name:split'"
        )
    from huggingface_hub import HfApi

    name, split = match[1], match[2] or "train"
    try:
        commit = str(HfApi().dataset_info(name).sha)
        dataset = _open_hub(name, split, commit)
        names = dataset.column_names or list(next(iter(dataset)))
    except Exception as error:  # the libraries raise a dozen unrelated kinds; all mean the same to the user
        raise ValueError(
            f"pairs={source!r}: no such folder or file, and as a hub data set it cannot be read: {error}"
        ) from error
    try:
        check_columns(names)
    except ValueError as error:
        raise ValueError(f"pairs={source!r}: {error}") from error
    known = (dataset.info.splits or {}).get(split)
    return HubData(name, split, commit, known.num_examples if known else 0)


def _open_hub(name: str, split: str, commit: str) -> "IterableDataset":
    from datasets import load_dataset

    dataset: IterableDataset = load_dataset(name, split=split, revision=commit, streaming=True)
    return dataset


def stream_rows(dataset: "IterableDataset", start: int) -> Iterator[Row]:
    """The columns that say something, pictures as files."""
    from datasets import Image

    if dataset.column_names:
        dataset = dataset.select_columns(_known(dataset.column_names))
    for name, kind in (dataset.features or {}).items():
        if isinstance(kind, Image):
            dataset = dataset.cast_column(name, Image(decode=False))
    yield from dataset.skip(start)
