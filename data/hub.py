"""Data sets on the Hugging Face hub as tables, and names of repositories, told apart from folders.

`datasets` does the reading, and is loaded when a table is read.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from data.tables import Row, Table

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def is_hub_id(source: str) -> bool:
    """Whether a source is "owner/name" on the hub rather than a folder here.

    What exists is a folder. "owner/name" is taken for a folder that is missing when "owner" is a folder here,
    so that a mistyped path is reported as such and not looked up on the hub.
    """
    path = Path(source)
    return HUB_ID.fullmatch(source) is not None and not path.exists() and not path.parent.is_dir()


@dataclass(frozen=True)
class HubTable:
    """One split of a data set; pictures stay encoded. Raises ValueError, naming it, whenever it cannot be read.

    commit: None = the newest. streamed: nothing is kept on disk; else the whole data set is downloaded once, and can
    then be read without a network.
    """

    name: str
    split: str
    commit: str | None = None
    streamed: bool = True

    @classmethod
    def newest(cls, name: str, split: str) -> "HubTable":
        """A data set pinned to the commit that is its newest now."""
        from huggingface_hub import HfApi

        with _readable(name, split):
            return cls(name, split, str(HfApi().dataset_info(name).sha))

    @property
    def folder(self) -> None:
        """No file of this machine belongs to it, whatever paths its rows hold."""

    @property
    def columns(self) -> list[str]:
        return self._facts[0]

    @property
    def text_columns(self) -> list[str]:
        return self.columns

    def identity(self) -> Row:
        """What tells the rows from others."""
        return {"hub": self.name, "split": self.split, "commit": self.commit}

    def count(self) -> int:
        return self._facts[1]

    def parts(self, start: int) -> Iterator[tuple[Table, int]]:
        """Itself, from row `start` on: as `data.tables.TableFiles` tells of files."""
        yield self, start

    def rows(self, columns: Sequence[str], start: int = 0) -> Iterator[Row]:
        from datasets import Image

        with _readable(self.name, self.split):
            dataset = self._open()
            if dataset.column_names:
                dataset = dataset.select_columns(list(columns))
            for name, feature in (dataset.features or {}).items():
                if isinstance(feature, Image):
                    dataset = dataset.cast_column(name, Image(decode=False))
            for row in dataset.skip(start) if self.streamed else islice(dataset, start, None):
                yield {name: row.get(name) for name in columns}

    @cached_property
    def _facts(self) -> tuple[list[str], int]:
        """The columns, and how many rows the hub counts: 0 = it does not say."""
        with _readable(self.name, self.split):
            dataset = self._open()
            split = (dataset.info.splits or {}).get(self.split)
            return list(dataset.column_names or next(iter(dataset))), split.num_examples if split else 0

    def _open(self) -> Any:
        from datasets import load_dataset

        return load_dataset(self.name, split=self.split, revision=self.commit, streaming=self.streamed)


@contextmanager
def _readable(name: str, split: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the libraries raise a dozen unrelated kinds; all mean the same to the user
        raise ValueError(f"{name}, split {split}: {type(error).__name__}: {error}") from error
