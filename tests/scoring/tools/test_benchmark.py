"""The benchmark table against the one that the original package prints for the same folder."""

import json
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bench.original_hpsv2 import original, put_model
from scoring.tools import benchmark
from scoring.tools.benchmark import Row, find_items, fold_means, read_prompts, summarise
from tests.scoring.conftest import HPSV2_CONFIG

STYLES = {"anime": 99, "concept-art": 80, "paintings": 100, "photo": 91}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Images and prompts of four styles, some of them no multiple of a fold."""
    root, rng = tmp_path_factory.mktemp("benchmark"), np.random.default_rng(0)
    (root / "prompts").mkdir()
    for style, count in STYLES.items():
        (root / "images" / style).mkdir(parents=True)
        prompts = [f"{style} number {number}, &quot;detailed&quot;" for number in range(count)]
        (root / "prompts" / f"{style}.json").write_text(json.dumps(prompts))
        for number in range(count):
            height, width = [(8, 8), (8, 12), (20, 6)][number % 3]
            pixels = rng.integers(0, 256, (height, width, 3)) * number // count  # brighter by and by: folds differ
            Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / style / f"{number:05d}.jpg")
    return root / "images", root / "prompts"


@pytest.fixture(scope="session")
def evaluation() -> Iterator[types.ModuleType]:
    """hpsv2.evaluation."""
    pytest.importorskip("hpsv2")
    with original("evaluation") as module:
        yield module


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> int:
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, arguments)])
    return benchmark.main()


def test_the_table_has_the_digits_of_the_original(
    evaluation: types.ModuleType,
    folders: tuple[Path, Path],
    hpsv2_folder: Path,
    hpsv2_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    images, prompts = folders
    put_model(evaluation, HPSV2_CONFIG, hpsv2_checkpoint.parent)
    evaluation.evaluate("benchmark", str(images), data_path=str(prompts), checkpoint_path=str(hpsv2_checkpoint))
    printed = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("images ")]
    theirs = {style: numbers for _, style, *numbers in printed}
    _run(monkeypatch, images, prompts, "--scorer", f"hpsv2?source={hpsv2_folder}", "--batch", 32)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    ours = {style: rest[4:] for style, *rest in lines[2:]}
    assert len({numbers[0] for numbers in theirs.values()}) > 3
    assert ours.keys() == theirs.keys() == {*STYLES, "Average"}
    # Two digits of a mean and four of a deviation: scores that differ by rounding may fall on either side of a half.
    for style, numbers in theirs.items():
        assert len(ours[style]) == len(numbers)
        for mine, number, digit in zip(ours[style], numbers, (1e-2, 1e-4), strict=False):
            assert float(mine) == pytest.approx(float(number), abs=1.1 * digit), style
    means = {style: rest[1] for style, *rest in lines[2:]}
    assert means["paintings"] != theirs["paintings"][0]  # 100 images: the original's number is not the mean


def test_rows_by_hand() -> None:
    """Folds of 80 and 20; the interval of (0 x 80, 5 x 20): mean 1, s = sqrt(400 / 99), t(99) = 1.98422."""
    values = np.repeat([0.0, 5.0], [80, 20]).astype(np.float32)
    first, average = summarise({"x": values})
    half = 1.9842169515 * np.sqrt(400 / 99) / 10
    assert fold_means(values).tolist() == [0, 5]
    assert (first.low, first.high) == pytest.approx((1 - half, 1 + half))
    assert first == Row(style="x", images=100, mean=1, low=first.low, high=first.high, compatible=2.5, fold_std=2.5)
    assert (average.style, average.mean, average.compatible, average.fold_std) == ("Average", 1, 1, None)
    both = summarise({"x": values, "y": np.array([3, 3], np.float32)}, factor=100)[-1]
    assert both.images == 102 and both.mean == both.compatible == pytest.approx(100 * 106 / 102)


def test_missing_images_are_listed(folders: tuple[Path, Path], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    (prompts / "anime.json").write_text(json.dumps(["x"] * 103))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "anime").symlink_to(folders[0] / "anime")
    with pytest.raises(ValueError, match=r"^4 images are missing: .*anime/00099.jpg, .*00102.jpg$"):
        find_items(tmp_path / "images", prompts)
    (prompts / "anime.json").write_text(json.dumps(["x"] * 130))
    with pytest.raises(ValueError, match=r"^31 images are missing: .*00118.jpg and 11 more$"):
        find_items(tmp_path / "images", prompts)


@pytest.mark.parametrize("text", ['{"a": "b"}', '["a", 1]', '["a"]', "no json", None])
def test_prompts_of_another_form_are_refused(text: str | None, tmp_path: Path) -> None:
    file = tmp_path / "photo.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=f"^{file}: no list"):
        read_prompts(file)


def test_wrong_folders_end_in_one_line(
    folders: tuple[Path, Path],
    hpsv2_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    images, prompts = folders
    assert _run(monkeypatch, tmp_path, prompts) == 2
    assert re.search(r"error: .*: no folder with a sub-folder", capsys.readouterr().err)
    assert _run(monkeypatch, images, tmp_path) == 2
    assert re.search(r"error: .*anime.json: no list of prompts", capsys.readouterr().err)
    (tmp_path / "pictures" / "anime").mkdir(parents=True)
    (tmp_path / "anime.json").write_text('["a", "b"]')
    for number in (0, 1):
        (tmp_path / "pictures" / "anime" / f"{number:05d}.jpg").write_text("no picture")
    assert _run(monkeypatch, tmp_path / "pictures", tmp_path, "--scorer", f"hpsv2?source={hpsv2_folder}") == 2
    assert re.search(r"error: .*00000.jpg: is no picture", capsys.readouterr().err)
