"""Scores from a judge that only compares, on the random pictures of the report's tests."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data.pictures import open_image
from data.shards import read_shard
from scoring.scorers.scorer import ScoringError
from tasks.compare import compared_scores
from tasks.record.plan import PlannedCycle
from tasks.record.workspace import Part
from tests.tasks.report.test_report import finished_cycle


class Brighter:
    """Prefers the brighter picture, and is surer the more the two differ; counts what it is asked."""

    info = SimpleNamespace(name="brighter", version="1", unit="win rate")
    compares = True

    def __init__(self) -> None:
        self.asked = 0

    def compare(self, first: list, second: list, prompts: list[str]) -> np.ndarray:
        self.asked += len(prompts)
        gaps = [float(a.mean() - b.mean()) for a, b in zip(first, second, strict=True)]
        return 1 / (1 + np.exp(-np.array(gaps)))


def scored(cycle: PlannedCycle, part: Part, judge: Any) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the first shard, and the mean brightness of its pictures."""
    table = read_shard(cycle.part(part).candidates(0))
    images = [open_image(row["bytes"]) for row in table["image"].to_pylist()]
    advanced: list[int] = []
    scores = compared_scores(judge, cycle, part, 0, images, table["caption"].to_pylist(), advanced.append)
    assert scores.dtype == np.float32 and sum(advanced) == len(images) == len(scores)
    return scores, np.array([image.mean() for image in images])


@pytest.fixture
def cycle(tmp_path: Path) -> PlannedCycle:
    return finished_cycle(tmp_path)


def test_candidates_score_how_surely_they_beat_their_mates(cycle: PlannedCycle) -> None:
    judge = Brighter()
    scores, light = scored(cycle, "candidates", judge)
    groups, lights = scores.reshape(-1, 4), light.reshape(-1, 4)
    for group, own in zip(groups, lights, strict=True):
        chance = 1 / (1 + np.exp(-(own[:, None] - own[None, :])))
        expected = [(chance[i].sum() - 0.5) / 3 for i in range(4)]
        np.testing.assert_allclose(group, expected, atol=1e-6)
    assert judge.asked == 6 * len(groups)
    np.testing.assert_allclose(groups.mean(axis=1), 0.5, atol=1e-6)


def test_in_the_evaluation_a_picture_meets_the_base_s_of_its_prompt(cycle: PlannedCycle) -> None:
    (base, light), (tuned, other) = (scored(cycle, part, Brighter()) for part in ("base", "tuned"))
    assert (base == 0.5).all()
    np.testing.assert_allclose(tuned, 1 / (1 + np.exp(-(other - light))), atol=1e-6)


@pytest.mark.parametrize("answer", [np.array([0.5]), np.full(6, np.nan), np.full(6, 1.5)])
def test_what_is_no_probability_is_refused(cycle: PlannedCycle, answer: np.ndarray) -> None:
    judge = SimpleNamespace(info=Brighter.info, compare=lambda *_: answer)
    with pytest.raises(ScoringError, match=r"'brighter' compared 6 pairs and returned"):
        scored(cycle, "candidates", judge)
