"""Human preference data in Pick-a-Pic's columns (Kirstain et al. 2023, arXiv:2305.01569): what a row says.

Knows which rows decide something and how a picture of any size is fitted to the size trained at. Knows nothing of
where rows come from (`data.human`) or of models (`training.model.pair_encoder`).
"""

import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

NEEDED = ("caption", "jpg_0", "jpg_1", "label_0")
KNOWN = (*NEEDED, "label_1", "has_label", "are_different", "model_0", "model_1")
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Plain pictures. Pillow knows more, some of which start other programs to be read."""
BROKEN_SHARE = 0.05
"""More broken pictures than that are no accident."""


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
    the size trained at, and its time ids (`training.model.family.TIME_IDS`)."""

    row: int
    caption: str
    label_0: float
    models: tuple[str, str]
    files: tuple[bytes, bytes]
    pictures: tuple[np.ndarray, np.ndarray]
    time_ids: tuple[list[int], list[int]]


def check_columns(names: Iterable[str]) -> None:
    """Raises ValueError naming the columns that are needed and not there."""
    there = list(names)
    if missing := [name for name in NEEDED if name not in there]:
        raise ValueError(
            f"no column {', '.join(missing)}; preference data as in Pick-a-Pic has {', '.join(NEEDED)} (pictures as "
            f"bytes, label_0 1 where jpg_0 is preferred, 0 where jpg_1 is, 0.5 for a tie); there are {', '.join(there)}"
        )


def decision(row: Mapping[str, Any]) -> str:
    """'labelled', or why the row says nothing: 'unlabelled', 'ties' or 'identical'.

    Raises ValueError for a label that is none of 0, 0.5 and 1: then the data are of another kind.
    """
    first, second = (_number(row.get(name)) for name in ("label_0", "label_1"))
    if row.get("has_label") is False or first is None:
        return "unlabelled"
    if first not in (0.0, 0.5, 1.0):
        raise ValueError(f"label_0 is {first}, expected 0, 0.5 or 1, as in Pick-a-Pic")
    if second is not None and first + second != 1.0:
        return "unlabelled"
    if first == 0.5:
        return "ties"
    same = row.get("are_different") is False or file_of(row["jpg_0"]) == file_of(row["jpg_1"])
    return "identical" if same else "labelled"


def _number(value: Any) -> float | None:
    return None if value is None or math.isnan(value) else float(value)


def file_of(cell: Any) -> bytes:
    """The encoded file, from plain bytes or from the struct of `datasets.Image`."""
    return (cell.get("bytes") if isinstance(cell, Mapping) else cell) or b""


def read_pair(row: Mapping[str, Any], index: int, height: int, width: int) -> HumanPair | None:
    """A labelled row with its pictures decoded and fitted; None when one is broken or the caption is missing."""
    from PIL import Image

    files = (file_of(row["jpg_0"]), file_of(row["jpg_1"]))
    if not isinstance(row["caption"], str):
        return None
    try:
        fitted = [fit(Image.open(io.BytesIO(data), formats=FORMATS).convert("RGB"), height, width) for data in files]
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # Pillow's words for damaged images
        return None
    models = (str(row.get("model_0") or "unknown"), str(row.get("model_1") or "unknown"))
    (first, ids_0), (second, ids_1) = fitted
    return HumanPair(
        index, row["caption"], float(row["label_0"]), models, files, (first, second), (ids_0, ids_1)
    )  # fmt: skip


def fit(picture: "Image", height: int, width: int) -> tuple[np.ndarray, list[int]]:
    """The picture at height x width, and its time ids: scaled until it just covers that (Lanczos, which smooths before
    it shrinks), then cropped in the middle.

    Time ids as SDXL was trained with them (arXiv:2307.01952, sec. 2.2): the size before scaling, the crop's place
    after it, and the size trained at.
    """
    from PIL import Image

    scale = max(height / picture.height, width / picture.width)
    tall, wide = max(height, round(picture.height * scale)), max(width, round(picture.width * scale))
    top, left = (tall - height) // 2, (wide - width) // 2
    scaled = picture.resize((wide, tall), Image.Resampling.LANCZOS)
    cropped = scaled.crop((left, top, left + width, top + height))
    return np.asarray(cropped), [picture.height, picture.width, top, left, height, width]
