"""Images with captions from disk, in the layouts that people already have; an image is decoded when it is asked for.

Known layouts, of which the first that is there counts:

- a folder with metadata.csv, .jsonl or .parquet beside the images, with a column file_name and one of text, prompt
  or caption (the "imagefolder" of Hugging Face's `datasets`, whose folder_based_builder.py names these files),
- a folder with captions.json, {"file name": "caption"},
- a folder with a .txt file beside each image, of the same name,
- one .parquet, .arrow or .jsonl file with a column of images (encoded bytes, `datasets.Image` structs or paths).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, overload

import numpy as np

from data.cells import picture_of
from data.pictures import open_image
from data.tables import FileTable, load_json, read_table

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
CAPTION_COLUMNS = ("text", "prompt", "caption")
IMAGE_COLUMNS = ("image", "jpg", "png", "webp", "file_name", "path")
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
TABLE_SUFFIXES = {".parquet", ".arrow", ".jsonl"}


@dataclass(frozen=True)
class CaptionedImage:
    """One image of a set; nothing is read before `open`."""

    id: str
    """The file name inside the folder, or "file:row" in a table."""
    prompt: str
    _source: Callable[[], bytes | Path]

    def digest(self) -> str:
        """sha256 over the prompt and the encoded image: changes with either. Raises OSError for a missing file."""
        source = self._source()
        data = source if isinstance(source, bytes) else source.read_bytes()
        return hashlib.sha256(self.prompt.encode() + b"\0" + data).hexdigest()

    def open(self) -> np.ndarray:
        """The image, uint8 (height, width, 3). Raises ValueError, naming the image, when it cannot be read."""
        source = self._source()
        try:
            return open_image(source)
        except ValueError as error:
            raise ValueError(f"{self.id}: {error}" if isinstance(source, bytes) else str(error)) from error


class Captioned(Sequence[CaptionedImage]):
    """Captioned images in a fixed order; holds captions and places, never pixels."""

    def __init__(self, items: Iterable[CaptionedImage]) -> None:
        self._items = list(items)

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[CaptionedImage]:
        return iter(self._items)

    @overload
    def __getitem__(self, index: int) -> CaptionedImage: ...
    @overload
    def __getitem__(self, index: slice) -> Captioned: ...
    def __getitem__(self, index: int | slice) -> CaptionedImage | Captioned:
        return Captioned(self._items[index]) if isinstance(index, slice) else self._items[index]


def read_captioned(path: str | Path, caption_column: str | None = None) -> Captioned:
    """The captioned images of a folder or a table, see the top of this module.

    `caption_column`: name of the column with the captions; None = the one of text, prompt and caption that is there.
    Raises ValueError, naming the file and the way out, when nothing known is there, when an image of a folder has no
    caption, a caption no image, or when an image occurs twice; FileNotFoundError when the path does not exist.
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise FileNotFoundError(f"{place}: there is no such folder or file")
    if place.is_file():
        return _from_table(place, caption_column)
    lists = [name for name in (*METADATA, "captions.json") if (place / name).is_file()]
    if len(lists) > 1:
        raise ValueError(f"{place}: holds {' and '.join(lists)}; keep the one with the captions that count")
    if not lists:
        return _from_folder(place, _sidecars(place))
    captions = _metadata if lists[0] in METADATA else _captions_json
    return _from_folder(place, captions(place / lists[0], caption_column))


def _from_folder(folder: Path, captions: list[tuple[str, Any]]) -> Captioned:
    """A caption for each image file of the folder and its sub-folders, and an image for each caption."""
    present = {image.relative_to(folder).as_posix() for image in _image_files(folder)}
    names = [name for name, _ in captions]
    _refuse(folder, [n for n, count in Counter(names).items() if count > 1], "has two captions; keep one")
    _refuse(folder, [n for n in names if n not in present], "has a caption, but there is no such image; remove either")
    missing = sorted(present - set(names))
    _refuse(folder, missing, f"has no caption; write one to {_sidecar_of(missing)} or to the file of the captions")
    _refuse(folder, [n for n, text in captions if not isinstance(text, str)], "has a caption that is no text")
    if not captions:
        raise ValueError(f"{folder}: holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}) with captions")
    return Captioned(CaptionedImage(name, text, partial(Path, folder / name)) for name, text in captions)


def _image_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)


def _sidecar_of(names: Sequence[str]) -> str:
    return Path(names[0]).with_suffix(".txt").as_posix() if names else ""


def _refuse(place: Path, names: Sequence[str], why: str) -> None:
    if names:
        more = f" (and {len(names) - 1} more like it)" if len(names) > 1 else ""
        raise ValueError(f"{place}: {names[0]!r} {why}{more}")


def _sidecars(folder: Path) -> list[tuple[str, Any]]:
    """File name and text of the .txt file beside it, for those images that have one."""
    pairs = [(image, image.with_suffix(".txt")) for image in _image_files(folder)]
    pairs = [(image, text) for image, text in pairs if text.is_file()]
    shared = [text.name for text, count in Counter(text for _, text in pairs).items() if count > 1]
    _refuse(folder, shared, "is the caption of two images; rename one of them")
    orphans = sorted(set(folder.rglob("*.txt")) - {text for _, text in pairs})
    names = [text.relative_to(folder).as_posix() for text in orphans]
    _refuse(folder, names, "belongs to no image; remove it, or name it like an image")
    return [(i.relative_to(folder).as_posix(), t.read_text(encoding="utf-8-sig").strip()) for i, t in pairs]


def _captions_json(path: Path, caption_column: str | None) -> list[tuple[str, Any]]:
    # As pairs, because a dict would keep the last of two captions and say nothing.
    content = load_json(path, object_pairs_hook=list)
    if not isinstance(content, list) or not all(isinstance(item, tuple) for item in content):
        raise ValueError(f'{path}: must be one object {{"file name": "caption"}}')
    return content


def _metadata(path: Path, caption_column: str | None) -> list[tuple[str, Any]]:
    table = read_table(path)
    columns = table.columns
    if "file_name" not in columns:
        raise ValueError(f"{path}: lacks the column file_name; it has {', '.join(columns) or 'none'}")
    caption = _only(path, columns, caption_column)
    rows = table.rows(["file_name", caption])
    return [(Path(str(row["file_name"])).as_posix(), row[caption]) for row in rows]


def _only(path: Path, columns: Sequence[str], wanted: str | None) -> str:
    """The column of the captions. Raises ValueError when it is not there, or not clear which it is."""
    fitting = [name for name in ((wanted,) if wanted else CAPTION_COLUMNS) if name in columns]
    if len(fitting) == 1:
        return fitting[0]
    why = f"has {' and '.join(fitting)}" if fitting else f"lacks {wanted or ' or '.join(CAPTION_COLUMNS)}"
    raise ValueError(f"{path}: {why}; name the column of the captions, one of {', '.join(columns)}")


def _from_table(path: Path, caption_column: str | None) -> Captioned:
    if path.suffix not in TABLE_SUFFIXES:
        raise ValueError(f"{path}: is no table ({', '.join(sorted(TABLE_SUFFIXES))}) and no folder of images")
    table = read_table(path)
    caption = _only(path, table.columns, caption_column)
    images = [name for name in IMAGE_COLUMNS if name in table.columns]
    if not images:
        raise ValueError(f"{path}: lacks a column of images ({' or '.join(IMAGE_COLUMNS)}): {', '.join(table.columns)}")
    captions = [row[caption] for row in table.rows([caption])]
    ids = [f"{path.name}:{row}" for row in range(len(captions))]
    bad = [name for name, text in zip(ids, captions, strict=True) if not isinstance(text, str)]
    _refuse(path, bad, "has no caption; remove the row")
    return Captioned(CaptionedImage(ids[row], text, _place(table, images[0], row)) for row, text in enumerate(captions))


def _place(table: FileTable, column: str, row: int) -> Callable[[], bytes | Path]:
    def place() -> bytes | Path:
        try:
            return picture_of(table.value(column, row), table.folder)
        except ValueError as error:
            raise ValueError(f"{table.name}, row {row}: {error}") from error

    return place
