"""Accuracies against their definitions written out, the coverage of the interval, and the command end to end."""

import io
import itertools
import json
import math
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy.special import expit

from data.labelled import LabelledPair
from scoring.labels.soft_labels import fit_scale, log_loss
from scoring.scorers.scorer import ScorerInfo, ScoringError
from scoring.tools.accuracy import ScoredPairs, agreements, main, measure, preset_lines, score_pairs
from scoring.verdict.intervals import wilson_interval
from scoring.verdict.pair_statistics import (
    clustered_interval,
    hpdv2_accuracy,
    imagereward_accuracy,
    match,
    pickscore_accuracy,
)


def ranking_pairs(scores: Sequence[float], ranks: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Order and label of every two images; a smaller rank is better."""
    both = list(itertools.combinations(range(len(scores)), 2))
    order = np.array([scores[i] - scores[j] for i, j in both])
    return order, np.array([0.5 * (1 + np.sign(ranks[j] - ranks[i])) for i, j in both])


def rankings(ties: bool) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(1)
    sets = []
    for _ in range(20):
        n = int(rng.integers(2, 7))
        scores = rng.integers(0, 4, n) if ties else rng.permutation(n)
        sets.append((scores, rng.integers(1, 5, n) if ties else rng.permutation(n) + 1))
    return sets


def test_imagereward_is_the_published_rule() -> None:
    """Over all pairs of all prompts: decided pairs count, and are right when the scorer orders them so strictly."""
    counted = right = 0
    pairs = []
    for scores, ranks in rankings(ties=True):
        for i, j in itertools.combinations(range(len(scores)), 2):
            if ranks[i] != ranks[j]:
                better, worse = (i, j) if ranks[i] < ranks[j] else (j, i)
                counted, right = counted + 1, right + int(scores[better] > scores[worse])
        pairs.append(ranking_pairs(scores.tolist(), ranks.tolist()))
    order, label = (np.concatenate(column) for column in zip(*pairs, strict=True))
    assert imagereward_accuracy(order, label) == pytest.approx(right / counted)
    assert math.isnan(imagereward_accuracy(np.ones(2), np.full(2, 0.5)))


def test_hpdv2_is_kendalls_tau_of_each_prompt() -> None:
    """Without ties 1 - inversions / pairs is (1 + tau) / 2, averaged over prompts and not over pairs."""
    from scipy.stats import kendalltau

    expected, pairs, groups = [], [], []
    for number, (scores, ranks) in enumerate(rankings(ties=False)):
        expected.append((1 + kendalltau(scores, -ranks).statistic) / 2)
        pairs.append(ranking_pairs(scores.tolist(), ranks.tolist()))
        groups += [str(number)] * len(pairs[-1][0])
    order, label = (np.concatenate(column) for column in zip(*pairs, strict=True))
    assert hpdv2_accuracy(order, label, groups) == pytest.approx(np.mean(expected))
    assert hpdv2_accuracy(order, label, groups) != pytest.approx(imagereward_accuracy(order, label))


def test_hpdv2_with_ties() -> None:
    """Three pairs of a prompt: a labelled tie is no inversion, a tie of the scorer on a decided pair is one."""
    assert hpdv2_accuracy(np.array([1.0, 0.0, -2.0]), np.array([0.5, 1.0, 0.0]), ["a"] * 3) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("probability", "label", "threshold", "expected"),
    [
        (0.9, 1.0, 0.1, 1.0), (0.9, 0.0, 0.1, 0.0), (0.9, 0.5, 0.1, 0.5), (0.52, 0.5, 0.1, 1.0), (0.52, 1.0, 0.1, 0.5),
        (0.5, 0.5, 0.0, 1.0), (0.5, 1.0, 0.0, 0.5), (0.2, 0.0, 1.0, 0.5), (0.625, 1.0, 0.25, 0.5),
    ],
)  # fmt: skip
def test_pickscore_rule(probability: float, label: float, threshold: float, expected: float) -> None:
    """|p1 - p0| <= t is a predicted tie, the edge included; both a tie 1, one of them 0.5."""
    assert pickscore_accuracy(np.array([probability]), np.array([label]), threshold) == expected


def test_match() -> None:
    assert match(np.array([2, -1, 1, 0, 0]), np.array([1, -5, -1, 3, 0])).tolist() == [1, 1, 0, 0.5, 1]


def test_interval_of_single_pairs_is_nearly_wilsons() -> None:
    outcomes = np.array([1.0] * 70 + [0.0] * 30)
    rate, low, high = clustered_interval(outcomes, [str(i) for i in range(100)])
    expected = wilson_interval(70, 100)
    assert rate == 0.7 and (low, high) == pytest.approx(expected, abs=0.006)
    assert low <= expected[0] and high >= expected[1]


def test_pairs_of_one_prompt_count_as_what_they_are_worth() -> None:
    """Ten copies of each pair say what one says, ten independent ones much more."""
    rng = np.random.default_rng(0)
    once = (rng.random(60) < 0.7).astype(float)
    prompts = [str(i) for i in range(60)]
    single = clustered_interval(once, prompts)
    copied = clustered_interval(np.repeat(once, 10), list(np.repeat(prompts, 10)))
    assert copied == pytest.approx(single, abs=1e-9)
    independent = clustered_interval((rng.random(600) < 0.7).astype(float), list(np.repeat(prompts, 10)))
    assert independent[2] - independent[1] < 0.5 * (single[2] - single[1])


def test_interval_at_the_edges() -> None:
    assert clustered_interval(np.ones(20), ["a"] * 20) == (1.0, 0.0, 1.0)  # one prompt says nothing about others
    assert math.isnan(clustered_interval(np.zeros(0), [])[0]) and clustered_interval(np.zeros(0), [])[1:] == (0.0, 1.0)
    rate, low, high = clustered_interval(np.ones(100), [str(i // 10) for i in range(100)])
    assert (rate, high) == (1.0, 1.0) and 0.6 < low < 0.75  # 10 prompts, not 100 pairs
    rate, low, high = clustered_interval(np.array([1.0, 0.0] * 50), [str(i // 2) for i in range(100)])
    assert rate == 0.5 and high - low < 0.21  # evenly mixed prompts: worth no more than their pairs


def simulated(prompts: int, mean: float, spread: float, seed: int) -> tuple[np.ndarray, list[str]]:
    """Pairs of prompts whose own accuracies follow a beta distribution, 1 to 10 pairs each."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 11, prompts)
    own = rng.beta(mean * spread, (1 - mean) * spread, prompts)
    return (rng.random(sizes.sum()) < np.repeat(own, sizes)).astype(float), [
        str(g) for g in np.repeat(range(prompts), sizes)
    ]


@pytest.mark.parametrize(("prompts", "mean"), [(10, 0.65), (30, 0.65), (100, 0.65), (100, 0.9)])
def test_coverage_of_the_interval(prompts: int, mean: float) -> None:
    """1000 simulated sets: the interval holds the truth in 93 to 97 % of them, one over pairs in less than 80 %."""
    held = naive = 0
    for seed in range(1000):
        outcomes, groups = simulated(prompts, mean, 2.0, seed)
        _, low, high = clustered_interval(outcomes, groups)
        held += low <= mean <= high
        low, high = wilson_interval(outcomes.sum(), len(outcomes))
        naive += low <= mean <= high
    assert 930 <= held <= 970 and naive < 800


class Level:
    """Scores the red level of the first pixel and counts what it is asked."""

    def __init__(self, source: str | None = None, device: str = "cpu", sign: float = 1.0, step: float = 1.0) -> None:
        self.info = ScorerInfo("level", f"{sign} {step}", "levels", higher_is_better=sign > 0, needs_prompt=False)
        self.sign, self.step, self.asked = sign, step, list[tuple[str, int]]()

    def score(self, images: Any, prompts: Sequence[str]) -> np.ndarray:
        levels = [int(image[0, 0, 0]) for image in images]
        self.asked += zip(prompts, levels, strict=True)
        return np.array([self.sign * (level // self.step) for level in levels], np.float32)

    def close(self) -> None:
        pass


def png(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (5, 4), (level, level, level)).save(file, "png")
    return file.getvalue()


def pair(prompt: str, first: int, second: int, label: float, number: int = 0) -> LabelledPair:
    return LabelledPair(f"p{number}", prompt, prompt, png(first), png(second), label)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_an_image_is_scored_once_a_prompt(batch_size: int) -> None:
    pairs = [pair("a", 1, 2, 1.0), pair("a", 2, 3, 0.0), pair("b", 1, 2, 0.5), pair("a", 3, 1, 1.0)]
    scorers = [Level(), Level(sign=-1.0)]
    scored = score_pairs(iter(pairs), scorers, batch_size)
    assert sorted(scorers[0].asked) == sorted(scorers[1].asked) == [("a", 1), ("a", 2), ("a", 3), ("b", 1), ("b", 2)]
    assert scored.scores[:, 0].tolist() == [[1, 2], [2, 3], [1, 2], [3, 1]]
    assert scored.scores[:, 1].tolist() == [[-1, -2], [-2, -3], [-1, -2], [-3, -1]]
    assert scored.prompt_ids == ["a", "a", "b", "a"] and scored.labels.tolist() == [1, 0, 0.5, 1]


def test_images_are_streamed() -> None:
    """The second batch is not asked for before the first is scored."""
    scorer = Level()

    def stream() -> Any:
        yield pair("a", 1, 2, 1.0)
        yield pair("a", 3, 4, 1.0)
        assert len(scorer.asked) == 4
        yield pair("a", 5, 6, 1.0)

    assert len(score_pairs(stream(), [scorer], 2).labels) == 3


def test_what_cannot_be_scored_is_named() -> None:
    bad = LabelledPair("row 7", "a", "a", png(1), b"no picture", 1.0)
    with pytest.raises(ValueError, match="pair row 7: 10 bytes: is no picture"):
        score_pairs([bad], [Level()])
    with pytest.raises(ValueError, match="no labelled pair"):
        score_pairs([], [Level()])


def scored(sign: float = 1.0) -> ScoredPairs:
    """Images of level 0 to 59, better with the level but for noise; every fifth pair is labelled a tie."""
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 60, (400, 2))
    label = (rng.random(400) < 1 / (1 + np.exp(-0.1 * (levels[:, 0] - levels[:, 1])))).astype(float)
    label[::5] = 0.5
    return ScoredPairs([str(i // 4) for i in range(400)], label, sign * levels[:, None, :].astype(float))


def test_measure() -> None:
    pairs = scored()
    info = ScorerInfo("level", "1", "levels", preference_scale=0.3)
    found = measure("level", info, pairs.scores[:, 0], pairs.labels, pairs.prompt_ids, 0.1)
    difference = pairs.scores[:, 0, 0] - pairs.scores[:, 0, 1]
    decided = pairs.labels != 0.5
    wins = (difference[decided] > 0) == (pairs.labels[decided] == 1)
    assert found.accuracy == pytest.approx(np.where(difference[decided] == 0, 0.5, wins).mean())
    assert 0.6 < found.low < found.accuracy < found.high < 0.95
    assert found.fitted_scale == fit_scale(difference, pairs.labels) and 0.04 < found.fitted_scale < 0.12
    assert found.log_loss == log_loss(difference, pairs.labels, 0.3) > math.log(2)  # far too sure
    assert found.fitted_log_loss < math.log(2)
    assert found.hpdv2_accuracy > found.accuracy > found.imagereward_accuracy
    groups = [prompt for prompt, label in zip(pairs.prompt_ids, pairs.labels, strict=True) if label != 0.5]
    outcomes = np.where(difference[decided] == 0, 0.5, wins)
    assert (found.accuracy, found.low, found.high) == clustered_interval(outcomes, groups)
    assert found.pickscore_accuracy == pickscore_accuracy(expit(0.3 * difference), pairs.labels, 0.1)
    unscaled = measure(
        "level", ScorerInfo("level", "1", "levels"), pairs.scores[:, 0], pairs.labels, pairs.prompt_ids, 0.1
    )
    probability = expit(found.fitted_scale * difference)
    assert unscaled.pickscore_accuracy == pickscore_accuracy(probability, pairs.labels, 0.1)
    assert unscaled.pickscore_accuracy != found.pickscore_accuracy and unscaled.log_loss is None


def test_lower_is_better() -> None:
    """The same accuracies; the scale is negative, as P = sigmoid(scale (score 0 - score 1)) has it."""
    up, down = scored(), scored(-1.0)
    first = measure("x", ScorerInfo("x", "1", "u"), up.scores[:, 0], up.labels, up.prompt_ids)
    info = ScorerInfo("x", "1", "u", higher_is_better=False)
    second = measure("x", info, down.scores[:, 0], down.labels, down.prompt_ids)
    for figure in ("accuracy", "low", "high", "pickscore_accuracy", "hpdv2_accuracy", "imagereward_accuracy"):
        assert getattr(second, figure) == pytest.approx(getattr(first, figure)), figure
    assert second.fitted_scale == pytest.approx(-first.fitted_scale) and first.fitted_scale > 0
    both = np.concatenate([up.scores, down.scores], axis=1)
    assert agreements(["up", "down"], [ScorerInfo("x", "1", "u"), info], both) == {"up / down": 1.0}
    assert agreements(["up", "down"], [info, ScorerInfo("x", "1", "u")], both)["up / down"] == 1.0
    assert agreements(["up", "down"], [info, info], both)["up / down"] < 0.05


def test_preset_lines() -> None:
    text = preset_lines("pickscore", 0.98765432)
    assert tomllib.loads(text) == {"scorers": {"pickscore": {"preference_scale": 0.987654}}}
    assert preset_lines("hpsv2:v2.0?antialias=false", 100.0) == "hpsv2:v2.0?antialias=false&preference_scale=100"
    assert preset_lines("my.judge:Judge", -1e-7) == "my.judge:Judge?preference_scale=-1e-07"


@pytest.fixture
def pickapic(tmp_path: Path) -> Path:
    """120 pairs of 40 prompts by level, every tenth without a label."""
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 250, (120, 2))
    label = (rng.random(120) < 1 / (1 + np.exp(-0.05 * (levels[:, 0] - levels[:, 1])))).astype(float)
    columns = {
        "caption": [f"prompt {i // 3}" for i in range(120)],
        "jpg_0": [png(level) for level in levels[:, 0]],
        "jpg_1": [png(level) for level in levels[:, 1]],
        "label_0": label,
        "has_label": [i % 10 != 0 for i in range(120)],
    }
    pq.write_table(pa.table(columns), tmp_path / "test.parquet")
    return tmp_path / "test.parquet"


def test_command(pickapic: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    spec, out = f"{__name__}:Level", tmp_path / "out.json"
    assert main([str(pickapic), "--scorer", spec, "--scorer", f"{spec}?sign=-1", "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    facts = {"pairs": 108, "decided": 108, "prompts": 40, "unlabelled": 12}
    assert {name: report[name] for name in facts} == facts
    first, second = report["scorers"]
    assert first["scorer"] == spec and second["scorer"] == f"{spec}?sign=-1"
    assert 0.75 < first["accuracy"] == pytest.approx(second["accuracy"])
    assert 0.03 < first["fitted_scale"] < 0.09 and report["agreement"] == {f"{spec} / {spec}?sign=-1": 1.0}
    printed = capsys.readouterr().out
    assert "108 pairs of 40 prompts, 108 decided; 12 rows without a label passed over" in printed
    assert f"{first['accuracy']:.4f} [{first['low']:.4f}, {first['high']:.4f}]" in printed
    assert f"{spec}?preference_scale={first['fitted_scale']:.6g}" in printed


def test_a_combination_is_measured_like_a_scorer(pickapic: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Level beside its opposite sign, which is turned round: they always agree, as precisely as one of them."""
    spec, out = f"{__name__}:Level", tmp_path / "out.json"
    both, contrary = f"mean({spec},2*{spec}?sign=-1)", f"agree({spec},{spec}?sign=-1)"
    assert (
        main([str(pickapic), *(x for text in (spec, both, contrary) for x in ("--scorer", text)), "--json", str(out)])
        == 0
    )
    alone, mean, agree = json.loads(out.read_text())["scorers"]
    assert mean["scorer"] == both and mean["unit"] == agree["unit"] == "sd"
    assert alone["accuracy"] == pytest.approx(mean["accuracy"]) == pytest.approx(agree["accuracy"])
    assert mean["fitted_log_loss"] == pytest.approx(alone["fitted_log_loss"], abs=1e-9)
    assert f"{both}: a combination has no scale of its own in a preset" in capsys.readouterr().out


def test_the_printed_scale_is_understood_by_the_registry(pickapic: Path, capsys: pytest.CaptureFixture) -> None:
    """Pasted back, the log loss at the scorer's own scale is that of the fitted one."""
    assert main([str(pickapic), "--scorer", f"{__name__}:Level"]) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith(f"{__name__}:Level?"))
    assert main([str(pickapic), "--scorer", line]) == 0
    loss = next(x for x in capsys.readouterr().out.splitlines() if "log loss" in x)
    own, fitted = loss.split(", ")[1:]
    assert own.split(" at ")[0] == fitted.removeprefix("fitted ")


def test_command_with_built_in_scorers(
    pickapic: Path, pickscore_folder: Path, hpsv2_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out.json"
    arguments = ["--scorer", "pickscore", "--scorer", "hpsv2", "--limit", "12", "--tie-threshold", "0.2"]
    sources = ["--source", f"pickscore={pickscore_folder}", "--source", f"hpsv2={hpsv2_folder}"]
    assert main([str(pickapic), *arguments, *sources, "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["pairs"] == 12 and [s["name"] for s in report["scorers"]] == ["pickscore", "hpsv2"]
    assert report["scorers"][0]["preference_scale"] == 1.0 and report["scorers"][1]["preference_scale"] > 1
    assert all(s["tie_threshold"] == 0.2 and s["log_loss"] > 0 for s in report["scorers"])
    assert "[scorers.pickscore]\npreference_scale = " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{set}", "--scorer", "nobody"], "unknown scorer 'nobody' at character 1"),
        (["{set}", "--scorer", "pickscore", "--source", "pickscore"], "is not of the form name=FOLDER"),
        (["/no/such/set", "--scorer", "pickscore"], "no such file or folder"),
        (["{set}", "--scorer", "pickscore", "--json", "/no/such/folder/out.json"], "/no/such/folder/out.json"),
    ],
)
def test_command_that_cannot_go_on(
    pickapic: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert main([argument.format(set=pickapic) for argument in arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_failing_scorer_ends_the_command(pickapic: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(pickapic), "--scorer", f"{__name__}:Level?step=0"]) == 2
    assert "scorer 'level' " in capsys.readouterr().err
    with pytest.raises(ScoringError):
        score_pairs([pair("a", 1, 2, 1.0)], [Level(step=0)])
