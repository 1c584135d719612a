"""Folders for the tests of shards."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.card import dataset_card
from data.files import write_text
from data.manifest import read_manifest
from data.schema import read_metadata
from data.shards import open_shard
from tests.data.shard_world import FIRST, build


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory where possible: these tests call fsync hundreds of times."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as path:
        yield Path(path)


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete preference folder with its card: three shards of 70 pairs."""
    folder = tmp_path_factory.mktemp("preferences")
    build(folder)
    metadata = read_metadata(open_shard(folder / FIRST).schema)
    write_text(folder / "README.md", dataset_card(read_manifest(folder), metadata))
    return folder
