"""Files that are complete as soon as they are visible: written beside, flushed, renamed. And their checksums.

Knows bytes and names. Knows nothing of what is in a file.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeAlias

StrPath: TypeAlias = str | os.PathLike[str]


@contextmanager
def published(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that appears under `path` only when its bytes are complete and on disk."""
    with published_path(path) as temporary, temporary.open("wb") as file:
        yield file


@contextmanager
def published_path(path: Path) -> Iterator[Path]:
    """Yield a name beside `path` for a library to write to; what it wrote is flushed and takes the name `path`.

    One process owns a path at a time, so temporaries of the same name are left-overs of a killed run.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in _temporaries(path):
        stale.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # glob readers skip names with a dot
    try:
        yield temporary
        fsync_path(temporary)  # before the rename, or the name may reach the disk before the data
        os.replace(temporary, path)
        fsync_path(path.parent)  # or the new name itself may be lost with the power
    finally:
        temporary.unlink(missing_ok=True)


def _temporaries(path: Path) -> list[Path]:
    ours = re.compile(re.escape(f".{path.name}.") + r"\d+\.tmp")  # `a` must not claim those of `a.json`
    return [path.with_name(name) for name in os.listdir(path.parent) if ours.fullmatch(name)]


def fsync_path(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: StrPath, text: str) -> None:
    """Replace a text file as a whole: readers see the old text or the new one."""
    with published(Path(path)) as file:
        file.write(text.encode())


def write_json(path: StrPath, obj: object) -> None:
    """Replace a JSON file as a whole. NaN and infinity are refused, since JSON has neither: write null."""
    try:
        text = json.dumps(obj, sort_keys=True, indent=2, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{path}: not written: {error}. JSON has no NaN or infinity; write null.") from error
    write_text(path, text + "\n")


def file_sha256(path: Path) -> str:
    """64 hex digits over the contents of a file, which is read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def publish_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a hidden folder beside `folder`, flush it, then give it its name in one step.

    A folder of that name from before is replaced.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    hidden = folder.parent / f".{folder.name}.tmp"
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir()
    write(hidden)
    for path in [*hidden.rglob("*"), hidden]:
        fsync_path(path)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(hidden, folder)
    fsync_path(folder.parent)
