"""What people preferred, in Pick-a-Pic's columns (Kirstain et al. 2023, arXiv:2305.01569).

Where such data lie, which of their rows decide something, and their pictures at the size trained at. Knows nothing of
models (`training.model.pair_encoder`), nor of what becomes of a pair.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.cells import caption_of, flag, label_of, picture_of
from data.hub import HubTable
from data.pictures import decode_image, fit
from data.tables import Row, TableFiles, read_table, table_files

PICTURES = ("jpg_0", "jpg_1")
NEEDED = ("caption", *PICTURES, "label_0")
KNOWN = (*NEEDED, "label_1", "has_label", "are_different", "model_0", "model_1")
SUFFIXES = (".parquet", ".arrow")
HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?::(\w+))?")
BROKEN_SHARE = 0.05
"""More broken pictures than that are no accident."""


@dataclass(frozen=True)
class HumanData:
    """Files, or one split of a data set on the hub at one commit, which is streamed. Read from any row on."""

    source: TableFiles | HubTable

    def identity(self) -> Row:
        """What tells the source from another."""
        return self.source.identity()

    def count(self) -> int:
        """How many rows there are; 0 = the hub does not say."""
        return self.source.count()

    def rows(self, start: int) -> Iterator[Row]:
        """The columns that say something of the rows from `start` on; a picture is bytes, a file, or None."""
        for table, first in self.source.parts(start):
            names = [name for name in KNOWN if name in table.columns]
            for row in table.rows(names, first):
                yield row | {name: _picture(row[name], table.folder) for name in PICTURES}


def _picture(cell: Any, folder: Path | None) -> bytes | Path | None:
    try:
        return picture_of(cell, folder)
    except ValueError:
        return None


def human_data(source: str) -> HumanData:
    """The preference data that `pairs` names, their columns checked. Raises ValueError saying what would work."""
    place = Path(source).expanduser()
    if place.exists() or place.suffix in SUFFIXES:
        return HumanData(_local(source, place.absolute()))
    return HumanData(_hub(source))


def _local(source: str, place: Path) -> TableFiles:
    files = table_files(place, SUFFIXES) if place.exists() else [place]
    if not files:
        raise ValueError(
            f"pairs={source!r}: neither sealed preference shards (with a manifest.json) nor a .parquet or .arrow file "
            "or folder of them"
        )
    for path in files:
        try:
            _check_file(read_table(path).columns, path)
        except ValueError as error:
            raise ValueError(f"pairs={source!r}: {error}") from error
    return TableFiles(tuple(files))


def _check_file(columns: list[str], path: Path) -> None:
    if "pair_id" in columns and "latent_0" in columns:
        raise ValueError(
            f"{path}: a preference shard of ours without its manifest.json: finish the run that writes it, or give the "
            "folder that holds the manifest"
        )
    try:
        _check_columns(columns)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _hub(source: str) -> HubTable:
    match = HUB_NAME.fullmatch(source)
    if not match:
        raise ValueError(
            f"pairs={source!r}: no such folder or file, and no hub data set 'owner/name' or 'owner/name:split'"
        )
    try:
        table = HubTable.newest(match[1], match[2] or "train")
        columns = table.columns
    except ValueError as error:
        raise ValueError(
            f"pairs={source!r}: no such folder or file, and as a hub data set it cannot be read: {error}"
        ) from error
    try:
        _check_columns(columns)
    except ValueError as error:
        raise ValueError(f"pairs={source!r}: {error}") from error
    return table


def _check_columns(names: Iterable[str]) -> None:
    """Raises ValueError naming the columns that are needed and not there."""
    there = list(names)
    if missing := [name for name in NEEDED if name not in there]:
        raise ValueError(
            f"no column {', '.join(missing)}; preference data as in Pick-a-Pic has {', '.join(NEEDED)} (pictures as "
            f"bytes, label_0 1 where jpg_0 is preferred, 0 where jpg_1 is, 0.5 for a tie); there are {', '.join(there)}"
        )


@dataclass
class Counts:
    """What became of the source's rows. pairs: taken. The others were left out, each for one reason."""

    rows: int = 0
    pairs: int = 0
    ties: int = 0
    unlabelled: int = 0
    identical: int = 0
    broken: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def text(self) -> str:
        """All numbers in one line, the reasons also as shares of the rows."""

        def share(count: int) -> str:
            return f"{count} ({100 * count / max(1, self.rows):.1f} %)"

        return (
            f"{self.pairs} pairs of {self.rows} rows; left out: {share(self.ties)} ties, {share(self.unlabelled)} "
            f"without a decision, {share(self.identical)} of identical images, {share(self.broken)} broken"
        )

    def check(self) -> None:
        """Raises ValueError when too many pictures are broken; a single one says nothing."""
        judged = self.pairs + self.broken
        if self.broken > max(1, BROKEN_SHARE * judged):
            raise ValueError(
                f"{self.broken} of {judged} labelled pairs have a picture that cannot be read, more than "
                f"{BROKEN_SHARE:.0%}; the source is damaged, or its columns jpg_0 and jpg_1 hold something else"
            )


class HumanPair(NamedTuple):
    """One row that is taken. row: its place in the source. For each side: the file, the picture as uint8 (H, W, 3) of
    the size trained at, and its time ids (`data.pictures.fit`)."""

    row: int
    caption: str
    label_0: float
    models: tuple[str, str]
    files: tuple[bytes, bytes]
    pictures: tuple[np.ndarray, np.ndarray]
    time_ids: tuple[list[int], list[int]]


def decision(row: Mapping[str, Any]) -> str:
    """'labelled', or why the row says nothing: 'unlabelled', 'ties' or 'identical'.

    Raises ValueError for a label that is none of 0, 0.5 and 1: then the data are of another kind.
    """
    label = label_of(row)
    if label is None:
        return "unlabelled"
    if label == 0.5:
        return "ties"
    if flag("are_different", row.get("are_different")) is False:
        return "identical"
    files = _files(row)
    return "identical" if files is not None and files[0] == files[1] else "labelled"


def read_pair(row: Mapping[str, Any], index: int, height: int, width: int) -> HumanPair | None:
    """A labelled row with its pictures decoded and fitted; None when one is broken or the caption is missing."""
    label, files = label_of(row), _files(row)
    if label is None or files is None:
        return None
    try:
        caption = caption_of(row["caption"])
        (first, ids_0), (second, ids_1) = (fit(decode_image(data), height, width) for data in files)
    except ValueError:
        return None
    models = (str(row.get("model_0") or "unknown"), str(row.get("model_1") or "unknown"))
    return HumanPair(
        row=index, caption=caption, label_0=label, models=models, files=files, pictures=(first, second),
        time_ids=(ids_0, ids_1),
    )  # fmt: skip


def _files(row: Mapping[str, Any]) -> tuple[bytes, bytes] | None:
    """The encoded pictures of both sides; None where one is missing."""
    try:
        first, second = (picture_of(row[name]) for name in PICTURES)
        return _contents(first), _contents(second)
    except (ValueError, OSError):
        return None


def _contents(picture: bytes | Path) -> bytes:
    return picture if isinstance(picture, bytes) else picture.read_bytes()
