"""Where the files of a scorer's weights are, and a digest of them.

Knows folders and hub ids, nothing of models. torch is never loaded here.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from data.files import file_sha256
from data.hub import is_hub_id

log = logging.getLogger(__name__)

PINNED = {
    "THUDM/ImageReward": "5736be03b2652728fb87788c9797b0570450ab72",
    "google-bert/bert-base-uncased": "86b5e0934494bd15c9632b12f734a8a67f723594",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": "1c2b8495b28150b8a4922ee1c8edee224c284c0c",
    "openai/clip-vit-large-patch14": "32bd64288804d66eefd0ccbe215aa642df71cc41",
    "xswu/HPSv2": "697403c78157020a1ae59d23f111aa58ced35b0a",
    "yuvalkirstain/PickScore_v1": "a4e4367c6dfa7288a00c550414478f865b875800",
}
"""Commit of each default repository that is used unless another one is asked for. From the cache paths that public
code of several authors names; the files themselves could not be fetched where this was written."""


def commit_of(repository: str, revision: str | None) -> str | None:
    """The revision that is asked for, else the pinned one, else None: the newest."""
    return revision or PINNED.get(repository)


def existing_folder(source: str, scorer: str) -> Path:
    """The folder that a source names. Raises ValueError when there is none."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise ValueError(f"scorer {scorer!r}: no folder {source!r} (looked at {folder.absolute()})")
    return folder


def first_file(folder: Path, names: Sequence[str], scorer: str) -> Path:
    """The first of several names that is a file in the folder. Raises ValueError when none is."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:20]) or "nothing"
    wanted = " or ".join(names)
    raise ValueError(f"scorer {scorer!r}: folder {str(folder)!r} lacks {wanted}; it holds {found}")


def check_hub(repository: str, revision: str | None, probes: Sequence[str], scorer: str) -> None:
    """Raises ValueError when HF_HUB_OFFLINE is set and the cache has none of the probed files."""
    from huggingface_hub import constants, try_to_load_from_cache

    commit = commit_of(repository, revision)
    cached = (try_to_load_from_cache(repository, name, revision=commit) for name in probes)
    if constants.HF_HUB_OFFLINE and not any(isinstance(path, str) for path in cached):
        raise ValueError(f"scorer {scorer!r}: HF_HUB_OFFLINE is set and {repository!r} is not in the cache")


@dataclass(frozen=True)
class Snapshot:
    """The files of a source on this machine."""

    folder: Path
    origin: str
    """For people: the source as it was given, for a hub id with its commit."""
    revision: str | None
    """Commit of the hub repository; None = a local folder."""


def local_copy(source: str, revision: str | None, patterns: Sequence[str], scorer: str) -> Snapshot:
    """The files of a source on this machine.

    Of a hub repository only files that match `patterns` are fetched, and only those not in the cache. Without a
    revision the pinned commit is taken, and of a repository that is not pinned the newest, with a warning that names
    it: a repository that moves on changes scores.
    Raises ValueError for a folder that does not exist, and what huggingface_hub raises when it cannot fetch.
    """
    if not is_hub_id(source):
        return Snapshot(existing_folder(source, scorer), source, None)
    from huggingface_hub import snapshot_download

    commit = commit_of(source, revision)
    folder = Path(snapshot_download(source, revision=commit, allow_patterns=list(patterns)))
    if commit is None:
        log.warning("scorer %r: %s is not pinned; revision=%r is what is used now", scorer, source, folder.name)
    return Snapshot(folder, f"{source}@{folder.name}", folder.name)


def files_digest(files: Iterable[Path]) -> list[str]:
    """ "name sha256" of each file, sorted: equal for equal contents, wherever the folder is."""
    return sorted(f"{path.name} {_sha256(path, *_state(path))}" for path in files)


def contents_digest(files: Iterable[Path]) -> str:
    """16 hex digits over the contents of files alone: renamed weights are the same weights."""
    digests = sorted(_sha256(path, *_state(path)) for path in files)
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:16]


def _state(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


@lru_cache(maxsize=256)  # weights have gigabytes, and several scorers of a run may share them
def _sha256(path: Path, _size: int, _modified: int) -> str:
    return file_sha256(path)


def fingerprint(files: Iterable[Path], **facts: str) -> str:
    """16 hex digits over named facts and the contents of files; any change of either changes it."""
    record = json.dumps({**facts, "files": files_digest(files)}, sort_keys=True)
    return hashlib.sha256(record.encode()).hexdigest()[:16]
