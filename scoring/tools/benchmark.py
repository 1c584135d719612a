"""HPSv2's benchmark of a folder of images: the mean score of every style, and what the original package prints.

    python -m scoring.benchmark IMAGES PROMPTS [--scorer hpsv2:v2.1] [--device cpu] [--batch 64]

IMAGES/anime/00012.jpg belongs to entry 12, counted from 0, of the list of strings PROMPTS/anime.json; every
sub-folder of IMAGES is a style. Follows `evaluate_benchmark` of hpsv2 1.2.0 (github.com/tgxs002/HPSv2,
hpsv2/evaluation.py), but for two things: a missing image is an error and not left out, and beside the original's
mean of folds stand the plain mean and its interval. Knows how to read the folders and to sum up; scores come from
any scorer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from data.commands import JsonFile, check_figures, ends_with, run, tell
from data.pictures import open_image
from scoring.scorers.registry import load_scorer
from scoring.scorers.scorer import Scorer, ScoringError, info_of, score_images
from scoring.verdict.intervals import mean_difference_interval

FOLD = 80
"""Images in a fold of the original's table: 800 prompts a style make ten."""
LISTED = 20
"""How many missing files an error names."""


@dataclass(frozen=True)
class Item:
    """One image to score."""

    path: Path
    prompt: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table, in hundredths where the scores are cosines."""

    style: str
    images: int
    mean: float
    low: float
    """Lower end of the 95 % interval of the mean over images (Student's t)."""
    high: float
    compatible: float
    """The original's number: the mean over consecutive folds of 80 of their means. Where the images are no multiple
    of 80 those of the last fold count more, and it is not the mean. For "Average" the mean over all images."""
    fold_std: float | None
    """The original's second number: standard deviation (divided by n) of the fold means; None for "Average". It
    says how much blocks of prompts differ, not how sure the mean is."""


def find_items(images: Path, prompts: Path) -> dict[str, list[Item]]:
    """Style -> its images in the order of its prompts; styles sorted by name.

    Raises ValueError when there is no style, when a style has no readable list of at least two prompts, and when
    images are missing, naming them.
    """
    styles = sorted(path.name for path in images.iterdir() if path.is_dir()) if images.is_dir() else []
    if not styles:
        raise ValueError(f"{images}: no folder with a sub-folder for every style")
    found = {
        style: [Item(images / style / f"{number:05d}.jpg", text) for number, text in enumerate(read_prompts(file))]
        for style, file in ((style, prompts / f"{style}.json") for style in styles)
    }
    missing = [str(item.path) for items in found.values() for item in items if not item.path.is_file()]
    if missing:
        more = f" and {len(missing) - LISTED} more" if len(missing) > LISTED else ""
        raise ValueError(f"{len(missing)} images are missing: {', '.join(missing[:LISTED])}{more}")
    return found


def read_prompts(file: Path) -> list[str]:
    """The prompts of one style. Raises ValueError, naming the file, for anything but a list of strings."""
    try:
        prompts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: no list of prompts: {error}") from error
    if not isinstance(prompts, list) or len(prompts) < 2 or not all(isinstance(text, str) for text in prompts):
        raise ValueError(f"{file}: no list of at least two strings")
    return prompts


def score_items(scorer: Scorer, items: Mapping[str, Sequence[Item]], batch: int) -> dict[str, np.ndarray]:
    """Style -> the scores (n,) of its images, `batch` of them read and scored at a time.

    Raises ValueError for a file that is no picture, and what `score_images` raises.
    """
    from tqdm import tqdm

    scores: dict[str, list[np.ndarray]] = {style: [] for style in items}
    with ThreadPoolExecutor() as pool, tqdm(total=sum(map(len, items.values())), unit="image") as progress:
        for style, own in items.items():
            for some in (own[start : start + batch] for start in range(0, len(own), batch)):
                pictures = list(pool.map(open_image, (item.path for item in some)))
                scores[style].append(score_images(scorer, pictures, [item.prompt for item in some]))
                progress.update(len(some))
    return {style: np.concatenate(parts) for style, parts in scores.items()}


def summarise(scores: Mapping[str, np.ndarray], factor: float = 1.0) -> list[Row]:
    """One row a style, then "Average" over all images; `factor` multiplies every score."""
    values = {style: factor * own.astype(np.float64) for style, own in scores.items()}
    return [*(_row(style, own, fold_means(own)) for style, own in values.items()), _average(values.values())]


def fold_means(values: np.ndarray) -> np.ndarray:
    """Means of consecutive folds of 80 values; the last fold has what is left."""
    return np.array([values[start : start + FOLD].mean() for start in range(0, len(values), FOLD)])


def _row(style: str, values: np.ndarray, folds: np.ndarray) -> Row:
    low, high = mean_difference_interval(values, 0.95)
    return Row(
        style=style, images=len(values), mean=float(values.mean()), low=low, high=high, compatible=float(folds.mean()),
        fold_std=float(folds.std()),
    )  # fmt: skip


def _average(values: Iterable[np.ndarray]) -> Row:
    """Over all images, not over the styles, as the original does."""
    together = np.concatenate(list(values))
    low, high = mean_difference_interval(together, 0.95)
    mean = float(together.mean())
    return Row(style="Average", images=len(together), mean=mean, low=low, high=high, compatible=mean, fold_std=None)


def table(rows: Iterable[Row]) -> str:
    """The rows as text; the last two columns have the digits that the original prints."""
    titles = ("style", "images", "mean", "95 % interval", "hpsv2-compatible", "std of folds")
    cells = [
        (row.style, str(row.images), f"{row.mean:.2f}", f"[{row.low:.2f}, {row.high:.2f}]", f"{row.compatible:.2f}",
         "" if row.fold_std is None else f"{row.fold_std:.4f}")
        for row in rows
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(titles, *cells, strict=True)]
    lines = (zip(line, widths, strict=True) for line in (titles, *cells))
    return "\n".join("  ".join(text.ljust(width) for text, width in line).rstrip() for line in lines)


@ends_with(ValueError, OSError, ScoringError)
def command(
    images: Annotated[Path, typer.Argument(help="Folder with a sub-folder of images for each style.")],
    prompts: Annotated[Path, typer.Argument(help="Folder with a JSON list of prompts for each style.")],
    scorer: Annotated[str, typer.Option(help="As in a preset.")] = "hpsv2:v2.1",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
    batch: Annotated[int, typer.Option(min=1, help="Images that are scored together.")] = 64,
    json_file: JsonFile = None,
) -> None:
    """Print HPSv2's table of a folder of images: the mean score of every style, as the original package prints it."""
    check_figures(json_file)
    items = find_items(images, prompts)
    loaded = load_scorer(scorer, {}, device)
    info, scores = info_of(loaded), score_items(loaded, items, batch)
    factor = 100.0 if info.unit == "cosine" else 1.0
    rows = summarise(scores, factor)

    def text() -> None:
        print(f"{info.name} {info.version}, {info.preprocessing}, fingerprint {info.fingerprint}, scores x {factor:g}")
        print(table(rows))

    figures = {"scorer": asdict(info), "factor": factor, "rows": [asdict(row) for row in rows]}
    tell(figures, json_file, text)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command on a command line; returns its exit status (`data.commands`)."""
    return run(command, "python -m scoring.benchmark", arguments)


if __name__ == "__main__":
    raise SystemExit(main())
