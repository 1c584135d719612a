"""Pairs of images that people, or an earlier run, have labelled, as one stream whatever the format.

Where each format was looked up:

- Pick-a-Pic v1 and v2: the feature lists in the data-set cards of yuvalkirstain/pickapic_v1 and _v2, and what
  trainer/datasetss/clip_hf_dataset.py of yuvalkirstain/PickScore does with them,
- HPDv2: README of tgxs002/HPSv2 (test.json with image_path and rank, train.json with file_path and
  human_preference, images in test/ and train/), and that inversion_score in its training/train.py counts a smaller
  rank as better,
- ImageReward: data/test.json and test.py of THUDM/ImageReward (generations, ranking; 1 is best, ties occur),
- this project's preference shards: docs/shards.md; they are read by the names of their columns.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.cells import caption_of, label_of, picture_of
from data.hub import HubTable, is_hub_id
from data.ids import prompt_id
from data.tables import Table, load_json, read_table, table_files

IMAGE_COLUMNS = (("jpg_0", "jpg_1"), ("image_0", "image_1"))
OPTIONAL_COLUMNS = ("label_1", "has_label", "prompt_id", "pair_id")
RANKINGS = {"rank": -1, "ranking": -1, "human_preference": 1}
"""Key of a ranked record -> whether a larger number is better (1) or worse (-1)."""
RANKED_IMAGES = ("image_path", "file_path", "generations")


@dataclass(frozen=True)
class LabelledPair:
    """Two images of one prompt and which of them was preferred."""

    id: str
    """The pair's own id, else "file:row" or "file:record:i-j"."""
    prompt_id: str
    """Equal for pairs of one prompt, which are not independent of each other."""
    prompt: str
    image_0: bytes | Path
    """The encoded image, or its file; `data.pictures.open_image` reads both."""
    image_1: bytes | Path
    label_0: float
    """1 when image 0 was preferred, 0 when image 1 was, 0.5 for a tie."""


class Labelled(Iterable[LabelledPair]):
    """A labelled set that can be walked through any number of times."""

    def __init__(self, name: str, files: list[Path], images: Path | None, split: str) -> None:
        self.name, self._files, self._images, self._split = name, files, images, split
        self.unlabelled = 0
        """How many pairs without a label the last walk has passed so far."""

    def __iter__(self) -> Iterator[LabelledPair]:
        self.unlabelled = 0
        if not self._files:
            yield from self._pairs(HubTable(self.name, self._split))
        for file in self._files:
            yield from ranked_pairs(file, self._images) if file.suffix == ".json" else self._pairs(read_table(file))

    def _pairs(self, table: Table) -> Iterator[LabelledPair]:
        images = _images_of(table)
        for index, row in enumerate(table.rows(_columns(table, images))):
            try:
                pair = _pair(row, images, table, index)
            except ValueError as error:
                raise ValueError(f"{table.name}, row {index}: {error}") from error
            self.unlabelled += pair is None
            if pair is not None:
                yield pair


def read_labelled(source: str | Path, images: str | Path | None = None, split: str = "test") -> Labelled:
    """The labelled pairs of a file, a folder of tables, or a data set on the hub; reads nothing before it is walked.

    `source`: .parquet or .arrow of Pick-a-Pic or of this project, a folder of such files, .json of HPDv2 or
    ImageReward, or "owner/name" of a data set with Pick-a-Pic's columns, which is streamed by `datasets`.
    `images`: the folder that the names in a .json are relative to; None = the folder of the .json, or the one in it
    that is called like the .json (test/ beside test.json). `split`: of a data set on the hub.
    Rows without a label are passed over and counted. Walking raises ValueError, naming file and row, for other
    columns, a label that is not 0, 0.5 or 1, and a missing image.
    Raises ValueError for a folder without tables, FileNotFoundError for what is neither here nor a hub id.
    """
    folder = Path(images).expanduser() if images is not None else None
    place = Path(source).expanduser()
    if place.is_dir():
        files = table_files(place, (".parquet", ".arrow"))
        if not files:
            raise ValueError(f"{place}: holds no .parquet or .arrow files; give the .json of a ranked set itself")
        return Labelled(str(source), files, folder, split)
    if place.is_file():
        if place.suffix not in (".parquet", ".arrow", ".json", ".jsonl"):
            raise ValueError(f"{place}: is no labelled set; known are .parquet, .arrow, .jsonl and .json")
        return Labelled(str(source), [place], folder, split)
    if is_hub_id(str(source)):
        return Labelled(str(source), [], folder, split)
    raise FileNotFoundError(f"{place}: there is no such file or folder, and it is no data-set id like owner/name")


def _images_of(table: Table) -> tuple[str, str]:
    """The columns of the two images. Raises ValueError when they are not there."""
    for images in IMAGE_COLUMNS:
        if set(images) <= set(table.columns):
            return images
    wanted = " or ".join(" and ".join(pair) for pair in IMAGE_COLUMNS)
    raise ValueError(f"{table.name}: lacks {wanted}; it has {', '.join(sorted(table.columns))}")


def _columns(table: Table, images: tuple[str, str]) -> list[str]:
    """All columns to read. Raises ValueError when they are not those of a labelled set."""
    names = table.columns
    if missing := [name for name in ("caption", "label_0") if name not in names]:
        raise ValueError(f"{table.name}: lacks {' and '.join(missing)}; it has {', '.join(names)}")
    return ["caption", *images, "label_0", *(name for name in OPTIONAL_COLUMNS if name in names)]


def _pair(row: Mapping[str, Any], images: tuple[str, str], table: Table, index: int) -> LabelledPair | None:
    """The pair of a row, None when it has no label."""
    label = label_of(row)
    if label is None:
        return None
    prompt = caption_of(row["caption"])
    first, second = (picture_of(row[name], table.folder) for name in images)
    return LabelledPair(
        id=row.get("pair_id") or f"{Path(table.name).name}:{index}",
        prompt_id=row.get("prompt_id") or prompt_id(prompt),
        prompt=prompt,
        image_0=first,
        image_1=second,
        label_0=label,
    )


def ranked_pairs(path: Path, images: Path | None = None) -> Iterator[LabelledPair]:
    """Every two images of each record of an HPDv2 or ImageReward .json, in order: n (n - 1) / 2 pairs of n images.

    Equal ranks are a tie. Raises ValueError, naming the record, for another format or a missing image.
    """
    records = load_json(path)
    if not isinstance(records, list):
        raise ValueError(f"{path}: must be a list of records with prompt, images and ranks")
    for index, record in enumerate(records):
        yield from _ranked(record, path, index, images)


def _ranked(record: Any, path: Path, index: int, images: Path | None) -> Iterator[LabelledPair]:
    keys = list(record) if isinstance(record, dict) else []
    ranking = next((key for key in RANKINGS if key in keys), None)
    names = next((key for key in RANKED_IMAGES if key in keys), None)
    if ranking is None or names is None or not isinstance(record.get("prompt"), str):
        wanted = f"prompt, {' or '.join(RANKED_IMAGES)}, {' or '.join(RANKINGS)}"
        raise ValueError(f"{path}, record {index}: has {', '.join(keys) or 'no keys'}; expected {wanted}")
    if len(record[names]) != len(record[ranking]):
        counts = f"{len(record[names])} images and {len(record[ranking])} ranks"
        raise ValueError(f"{path}, record {index}: has {counts}")
    goodness = [RANKINGS[ranking] * rank for rank in record[ranking]]
    files = [_image_file(name, path, images) for name in record[names]]
    prompt, group = record["prompt"], prompt_id(record["prompt"])
    for i, j in itertools.combinations(range(len(files)), 2):
        label = 0.5 * (1 + (goodness[i] > goodness[j]) - (goodness[i] < goodness[j]))
        yield LabelledPair(
            id=f"{path.name}:{index}:{i}-{j}", prompt_id=group, prompt=prompt, image_0=files[i], image_1=files[j],
            label_0=label,
        )  # fmt: skip


def _image_file(name: str, path: Path, images: Path | None) -> Path:
    """Where an image of a ranked set is. Raises ValueError with the places that were looked at."""
    roots = [images] if images is not None else [path.parent, path.parent / path.stem]
    places = [root / name for root in roots]
    for place in places:
        if place.is_file():
            return place
    looked = " and ".join(str(place) for place in places)
    raise ValueError(f"{path}: image {name!r} is not there (looked at {looked}); name its folder with --images")
