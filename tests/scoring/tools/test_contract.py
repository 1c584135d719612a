"""The contract holds for built-ins and the documented example, and each clause catches the scorer that breaks it."""

import re
import sys
import unittest
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from scoring.scorers.scorer import ScorerInfo
from scoring.tools.contract import Broken, Outcome, Trial, check_contract, clauses, main

DOCS = Path(__file__).resolve().parents[3] / "docs" / "scorers.md"
LUMA = np.array([0.299, 0.587, 0.114])


def documented(what: str) -> str:
    """The one Python block of docs/scorers.md that contains a text."""
    (block,) = [code for code in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S) if what in code]
    return block


class Good:
    """Keeps every clause; the broken ones below change one thing each. Its score depends on the prompt too."""

    takes_tensors = True

    def __init__(self, source: str | None = None, device: str = "cpu", gain: float = 1.0) -> None:
        self.info: Any = ScorerInfo("good", f"gain {gain}", "levels", lowest=0.0, highest=1000.0)
        self.weights, self.gain = LUMA, gain

    def one(self, image: np.ndarray, prompt: str) -> float:
        return self.gain * float((image @ self.weights).mean()) + len(prompt) % 7

    def arrays(self, images: Any, prompts: Sequence[str]) -> list[np.ndarray]:
        if len(images) != len(prompts):
            raise ValueError("need one prompt an image")
        arrays = [np.asarray(image) for image in images]
        arrays = arrays if isinstance(images, list) else [array.transpose(1, 2, 0) for array in arrays]
        if any(array.dtype != np.uint8 for array in arrays):
            raise ValueError("need uint8")
        return arrays

    def score(self, images: Any, prompts: Sequence[str]) -> Any:
        arrays = self.arrays(images, prompts)
        return np.array([self.one(a, p) for a, p in zip(arrays, prompts, strict=True)], np.float32)

    def close(self) -> None:
        del self.weights


def with_info(**changes: Any) -> type:
    class Changed(Good):
        def __init__(self) -> None:
            super().__init__()
            for name, value in changes.items():
                object.__setattr__(self.info, name, value)  # as a plug-in's own kind of info may have it

    return Changed


def scoring(score: Callable[..., Any]) -> type:
    return type("Changed", (Good,), {"score": score})


class Noisy(Good):
    def score(self, images: Any, prompts: Sequence[str]) -> Any:
        return super().score(images, prompts) + np.random.default_rng().random(len(prompts), dtype=np.float32)


class Relative(Good):
    """Normalises over the batch, as some published scorers do."""

    def score(self, images: Any, prompts: Sequence[str]) -> Any:
        scores = super().score(images, prompts)
        return scores + scores.max(initial=0)


class OneSize(Good):
    def score(self, images: Any, prompts: Sequence[str]) -> Any:
        np.stack([np.asarray(image) for image in images] or [np.zeros(1)])
        return super().score(images, prompts)


class NoPixel(Good):
    def one(self, image: np.ndarray, prompt: str) -> float:
        if image.shape[0] == 1:
            raise ZeroDivisionError("1 // 2")
        return super().one(image, prompt)


class Writes(Good):
    def score(self, images: Any, prompts: Sequence[str]) -> Any:
        scores = super().score(images, prompts)
        for image in images if isinstance(images, list) else []:
            if image.flags.writeable and image.dtype == np.uint8:
                image[0, 0] = 255
        return scores


class NeedsToWrite(Good):
    def score(self, images: Any, prompts: Sequence[str]) -> Any:
        for image in images if isinstance(images, list) else []:
            image[0, 0] = image[0, 0]
        return super().score(images, prompts)


class Transposed(Good):
    def arrays(self, images: Any, prompts: Sequence[str]) -> list[np.ndarray]:
        arrays = super().arrays(images, prompts)
        return arrays if isinstance(images, list) else [array[..., ::-1] for array in arrays]


class Repeats(Good):
    """One prompt for all images, and images without prompts left out."""

    def score(self, images: Any, prompts: Sequence[str]) -> Any:
        prompts = list(prompts) * len(images) if len(prompts) == 1 else prompts
        return super().score(images[: len(prompts)], prompts[: len(images)])


class LeavesOut(Good):
    """Refuses too few prompts, and ignores those that are too many."""

    def score(self, images: Any, prompts: Sequence[str]) -> Any:
        return super().score(images, prompts[: len(images)])


class Crashes(Good):
    def score(self, images: Any, prompts: Sequence[str]) -> Any:
        if isinstance(images, list) and images and images[0].dtype != np.uint8:
            raise KeyError(images[0].dtype)
        return super().score(images, prompts)


class Unseeded(Good):
    def __init__(self) -> None:
        super().__init__()
        self.weights = np.random.default_rng().random(3)


class Renamed(Good):
    def __init__(self) -> None:
        super().__init__()
        self.info = replace(self.info, fingerprint=str(id(self)))


class Immortal(Good):
    def close(self) -> None:
        pass


class NoClose(Good):
    close: Any = None


class Ignores(Good):
    def one(self, image: np.ndarray, prompt: str) -> float:
        return super().one(image, "")


class NoInfo(Good):
    def __init__(self) -> None:
        super().__init__()
        self.info = None


BROKEN = [
    ("info_is_complete", with_info(unit="")),
    ("info_is_complete", NoInfo),
    ("info_is_sensible", with_info(lowest=1000.0, highest=0.0)),
    ("info_is_sensible", with_info(lowest=float("-inf"))),
    ("info_is_sensible", with_info(typical_spread=0.0)),
    ("info_is_sensible", with_info(preference_scale=float("nan"))),
    ("info_is_sensible", with_info(preference_scale=-1.0)),
    ("info_is_sensible", with_info(preference_scale=1.0, higher_is_better=False)),
    ("info_is_json", with_info(typical_spread=np.float32(1))),
    ("no_image", scoring(lambda self, i, p: Good.score(self, i, p) if len(p) else np.zeros((0, 1)))),
    ("one_image", scoring(lambda self, i, p: Good.score(self, i, p).squeeze())),
    ("finite_numbers", scoring(lambda self, i, p: [1e39] * len(Good.score(self, i, p)))),
    ("finite_numbers", scoring(lambda self, i, p: Good.score(self, i, p) * (np.nan if len(p) == 6 else 1))),
    ("within_bounds", with_info(highest=50.0)),
    ("within_bounds", with_info(lowest=200.0)),
    ("repeatable", Noisy),
    ("independent_of_the_batch", Relative),
    ("mixed_sizes", OneSize),
    ("mixed_sizes", NoPixel),
    ("inputs_unchanged", Writes),
    ("inputs_unchanged", NeedsToWrite),
    ("prompt_counts_as_declared", Ignores),
    ("prompt_counts_as_declared", with_info(needs_prompt=False)),
    ("tensors_like_arrays", Transposed),
    ("one_prompt_an_image", Repeats),
    ("one_prompt_an_image", LeavesOut),
    ("no_float_images", Crashes),
    ("two_instances_agree", Unseeded),
    ("two_instances_agree", Renamed),
    ("closed_is_closed", Immortal),
]


def failed(outcomes: Sequence[Outcome]) -> dict[str, str]:
    return {outcome.clause: outcome.seen for outcome in outcomes if outcome.status == "fail"}


def test_a_good_scorer_keeps_every_clause() -> None:
    outcomes = check_contract(Good)
    assert [outcome.status for outcome in outcomes] == ["pass"] * len(clauses()), failed(outcomes)


@pytest.mark.parametrize(("clause", "make"), BROKEN, ids=[f"{c}-{i}" for i, (c, _) in enumerate(BROKEN)])
def test_a_broken_scorer_is_caught_by_the_clause_it_breaks(clause: str, make: Callable[[], Any]) -> None:
    assert list(failed(check_contract(make))) == [clause]


def test_every_clause_catches_some_scorer_and_says_what_it_is() -> None:
    assert {clause for clause, _ in BROKEN} == {clause.__name__ for clause in clauses()}
    assert all(outcome.statement.endswith(".") for outcome in check_contract(Good))


def test_a_scorer_that_does_depend_on_the_batch_is_told_what_moved() -> None:
    seen = failed(check_contract(Relative))["independent_of_the_batch"]
    assert re.fullmatch(r"splitting the batch moves score \d from [\d.]+ to [\d.]+, \S+ relative", seen)
    # The tolerance is what decides; with one as coarse as this no prompt seems to matter either.
    assert list(failed(check_contract(Relative, tolerance=10.0))) == ["prompt_counts_as_declared"]


def test_built_ins_keep_the_contract(tiny_scorer: Any, request: pytest.FixtureRequest) -> None:
    from scoring.scorers.registry import load_scorer

    name = tiny_scorer.info.name
    spec = f"{name}?source={request.getfixturevalue(f'{name}_folder')}"
    outcomes = check_contract(lambda: load_scorer(spec, {}))
    boundless = {"within_bounds"} if tiny_scorer.info.lowest is None else set()
    assert failed(outcomes) == {}
    assert {outcome.clause for outcome in outcomes if outcome.status == "skip"} == boundless


@pytest.fixture
def luma(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The module of the ten-line example, as the documentation has it."""
    (tmp_path / "luma_example.py").write_text(documented("class Luma"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "luma_example", raising=False)
    return tmp_path


def test_the_documented_example_keeps_the_contract(luma: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["luma_example:Luma"]) == 0
    assert "16 kept, 0 broken, 1 not applicable" in capsys.readouterr().out


def test_the_documented_test_runs(luma: Path) -> None:
    names: dict[str, Any] = {}
    exec(documented("class Luma"), names)
    exec(documented("def test_contract"), names)
    for clause in clauses():
        if clause.__name__ != "tensors_like_arrays":
            names["test_contract"](clause)
    names["Luma"].close = lambda self: None
    with pytest.raises(Broken, match=r"score\(\) after close\(\) gave scores"):
        names["test_contract"](next(c for c in clauses() if c.__name__ == "closed_is_closed"))


def test_a_skipped_clause_skips_in_pytest() -> None:
    class NoTensors(Good):
        takes_tensors = False

    with pytest.raises(unittest.SkipTest, match="no takes_tensors"):  # which pytest reports as skipped
        next(c for c in clauses() if c.__name__ == "tensors_like_arrays")(Trial(NoTensors))


def test_command_with_a_broken_scorer(capsys: pytest.CaptureFixture) -> None:
    assert main([f"{__name__}:Good"]) == 0
    assert main([f"{__name__}:Good", "--option", "gain=100"]) == 1
    out = capsys.readouterr().out
    assert "within_bounds: broken. Every score lies within info.lowest and info.highest. Seen: scores from" in out
    assert "16 kept, 1 broken, 0 not applicable" in out


def test_command_with_images_and_prompts(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for level in (10, 20, 30):
        Image.new("RGB", (8, 6), (level, level, level)).save(folder / f"{level}.png")
    (tmp_path / "prompts.txt").write_text("a\nab\nabc\n")
    assert main([f"{__name__}:Good", "--images", str(folder), "--prompts", str(tmp_path / "prompts.txt")]) == 0
    assert "11 to 33" in capsys.readouterr().out  # the level plus the length of the prompt
    (folder / "notes.txt").write_text("no image")
    assert main([f"{__name__}:Good", "--images", str(folder)]) == 2
    assert "notes.txt: is no picture" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_scorer"], "scorer 'no_such_scorer' is not known; known scorers:"),
        (["pickscore", "--source", "/no/such/folder"], "no folder '/no/such/folder'"),
        (["pickscore", "--option", "colour=red"], "takes no 'colour'; it takes"),
        (["pickscore", "--option", "colour"], "'colour' after '?' is not of the form key=value"),
    ],
)
def test_command_that_cannot_start(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
