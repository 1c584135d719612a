"""The table of the losses: its statistics on made-up outcomes, and its run on a few pictures of the real world."""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from bench.arms import ARMS, RANDOM, Arm
from bench.cycles import gate_and_promote, make_pairs, other_pairs, promote_anyway, run_cycles
from bench.loss_table import (
    CONTROL,
    RECIPE,
    RECIPE_CONTROL,
    Estimate,
    comparison,
    finding,
    outcomes,
    over_seeds,
    pooled,
    table,
)
from bench.losses import default_recipe, run
from bench.random_labels import RandomLabels
from data.ids import score_column
from data.shards import read_shard
from scoring.tools.clauses import Clause
from scoring.tools.contract import Skipped, Trial, clauses
from scoring.verdict.pair_statistics import clustered_interval
from tasks.record.plan import PlannedCycle
from tasks.record.recipe import Recipe
from tasks.record.settings import Generation
from tasks.record.workspace import experiment_at
from training.loss.table import LOSSES, LossOptions, check_options
from training.settings import Training


def made_up(seeds: int, prompts: int, shift: float, generator: np.random.Generator) -> np.ndarray:
    """Outcomes (seeds, prompts): half of them ties, and a prompt that is lost under one seed likely lost under all."""
    latent = generator.normal(size=prompts) * 1.5 + generator.normal(size=(seeds, prompts)) + shift
    return np.where(np.abs(latent) < 1.2, 0.5, (1 + np.sign(latent)) / 2)


def test_equal_pictures_are_even_and_no_win() -> None:
    scores = np.random.default_rng(0).normal(size=(3, 40))
    even = pooled(outcomes(scores, scores, higher_is_better=True))
    assert even == (0.5, 0.5, 0.5) and finding(even) == "**does not help**"


def test_the_better_picture_wins_whichever_way_the_judge_counts() -> None:
    base, other = np.array([1.0, 1.0, 1.0]), np.array([2.0, 1.0, 0.5])
    np.testing.assert_array_equal(outcomes(base, other, higher_is_better=True), [1, 0.5, 0])
    np.testing.assert_array_equal(outcomes(base, other, higher_is_better=False), [0, 0.5, 1])


def test_the_interval_covers_as_often_as_it_says() -> None:
    """And one that took every picture for an independent one would not."""
    generator = np.random.default_rng(1)
    truth, repeats = made_up(1, 2_000_000, 0.2, generator).mean(), 1000
    trials = [made_up(3, 128, 0.2, generator) for _ in range(repeats)]
    covered = sum(low <= truth <= high for _, low, high in map(pooled, trials)) / repeats
    naive = sum(low <= truth <= high for _, low, high in (pooled(t.reshape(1, -1)) for t in trials)) / repeats
    assert 0.93 <= covered <= 0.97 and naive < 0.88


def test_ties_narrow_the_interval() -> None:
    """The reason for Student's: an interval made for shares of wins is too wide where many outcomes are ties."""
    values = np.random.default_rng(2).choice([0, 0.5, 0.5, 0.5, 1], (1, 500))
    mean, low, high = pooled(values)
    other, wide_low, wide_high = clustered_interval(values[0], [str(i) for i in range(500)])
    assert mean == pytest.approx(other) and high - low < 0.75 * (wide_high - wide_low)


def test_an_arm_is_compared_with_random_labels_prompt_by_prompt() -> None:
    generator = np.random.default_rng(3)
    null = made_up(3, 200, 0.0, generator)
    better = np.minimum(1.0, null + 0.5 * (generator.random((3, 200)) < 0.1))
    gap = pooled(better - null)
    assert 0 < gap.low < gap.mean == pytest.approx(better.mean() - null.mean())
    assert gap.high - gap.low < 0.6 * (pooled(better).high - pooled(better).low)
    found = {
        name: dict.fromkeys(("oracle", "hpsv2", "pickscore"), v) for name, v in {"dpo": better, CONTROL: null}.items()
    }
    first, second = table(found)[2:]
    assert f"{gap.mean:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]" in first and "|  |" in second
    assert f"{gap.mean:+.3f} [" in comparison(found, "dpo", CONTROL)[0]
    spread = over_seeds(better - null)
    assert spread.mean == pytest.approx(gap.mean)


def test_findings_are_said_as_they_are() -> None:
    words = [finding(pooled(np.full((2, 9), 0.5) + np.linspace(-0.1, 0.1, 9) + shift)) for shift in (0.2, 0.0, -0.2)]
    assert words == ["helps", "**does not help**", "**harms**"]
    won, no_more, more = Estimate(0.6, 0.55, 0.65), Estimate(0.01, -0.02, 0.04), Estimate(0.05, 0.02, 0.08)
    assert [finding(won, above) for above in (no_more, more)] == ["**does not help**", "helps"]


@pytest.mark.parametrize("clause", clauses(), ids=lambda clause: clause.__name__)
def test_random_labels_are_a_scorer(clause: Clause) -> None:
    with suppress(Skipped):
        clause(Trial(RandomLabels))


def test_random_labels_know_neither_prompt_nor_picture() -> None:
    generator = np.random.default_rng(4)
    images = [generator.integers(0, 60 + i // 3, (8, 8, 3), dtype=np.uint8) for i in range(400)]
    scorer = RandomLabels()
    scores = scorer.score(images, ["a red circle"] * 400)
    np.testing.assert_array_equal(scores, scorer.score(images, ["a blue square"] * 400))
    brightness = [image.mean() for image in images]
    assert abs(np.corrcoef(scores, brightness)[0, 1]) < 0.15 and len(set(scores)) == 400
    assert abs(scores.mean() - 0.5) < 0.05 and abs(scores.std() - 12**-0.5) < 0.02


def test_every_arm_is_one_that_the_trainer_takes() -> None:
    for arm in ARMS.values():
        options = LossOptions(**{k: v for k, v in arm.training.items() if k in LossOptions.__dataclass_fields__})
        check_options(arm.training.get("loss", "dpo"), options)
    trained = {arm.training.get("loss", "dpo") for arm in ARMS.values()}
    assert trained == set(LOSSES) - {"rdpo", "hinge"} and ARMS[CONTROL].scorer == RANDOM
    # The null control differs from DPO in nothing but who labels.
    assert ARMS[CONTROL].training == ARMS["dpo"].training
    assert ARMS[RECIPE_CONTROL].training == ARMS[RECIPE].training == {} and ARMS[RECIPE_CONTROL].scorer == RANDOM


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small(seed: int) -> Recipe:
    """The default recipe, with a few prompts and steps."""
    recipe = default_recipe(seed, max_prompts=12)
    small = {
        "generation": Generation(**recipe.generation.model_dump() | {"prompts_per_cycle": 6, "candidates": 3}),
        "training": Training(**recipe.training.model_dump() | {"steps": 3, "batch_size": 4, "micro_batch_size": 4}),
    }
    return recipe.model_copy(update=small)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("losses")


QUICK = {
    "base": Arm("base"),
    "idle": Arm(training={"learning_rate": 1e-30}),
    CONTROL: Arm(training={"learning_rate": 0.01}, scorer=RANDOM),
}


def test_a_run_judges_each_arm_and_continues_where_it_stopped(workspace: Path) -> None:
    found = run(workspace, [5], QUICK, small)
    assert {values.shape for judges in found.values() for values in judges.values()} == {(1, 12)}
    assert set(found["base"]) == {"pickscore", "hpsv2", "oracle"}
    # A policy that did not move draws the very pictures of the base; other noise draws others.
    assert all((values == 0.5).all() for values in found["idle"].values())
    assert all((found[arm]["pickscore"] != 0.5).any() for arm in ("base", CONTROL))
    results = workspace / "results.jsonl"
    lines = results.read_text()
    results.write_text(lines[:-50])  # as a kill in the middle of a line would leave it
    weights = {path: path.stat().st_mtime_ns for path in workspace.rglob("*.safetensors")}
    again = run(workspace, [5], QUICK, small)
    assert results.read_text() == lines
    assert {path: path.stat().st_mtime_ns for path in workspace.rglob("*.safetensors")} == weights
    for arm, judges in found.items():
        for judge, values in judges.items():
            np.testing.assert_array_equal(values, again[arm][judge])


def test_random_labels_are_given_to_the_same_candidates(workspace: Path) -> None:
    cycle = make_pairs(experiment_at(str(workspace), "seed-5"), small(5), 1)
    folder = other_pairs(cycle, RANDOM)
    agreement = json.loads((folder / "comparison.json").read_text())
    assert (agreement["labelled_by"], agreement["other"], agreement["pairs"]) == (RANDOM, "pickscore", 6)
    pairs = pa.concat_tables([read_shard(path) for path in folder.glob("*.arrow")])
    first, second = (np.array(pairs[score_column(RANDOM, side)]) for side in (0, 1))
    np.testing.assert_array_equal(pairs["label_0"], first > second)
    known = {uid for path in cycle.folder.glob("candidates/*") for uid in read_shard(path)["image_uid"].to_pylist()}
    assert set(pairs["image_0_uid"].to_pylist()) <= known


@pytest.mark.slow
def test_without_the_gate_every_cycle_starts_from_the_one_before(workspace: Path) -> None:
    gated, free = (experiment_at(str(workspace), name) for name in ("gated", "free"))
    base = run_cycles(gated, small(6), 1, gate_and_promote)
    assert base.adapter is None  # three steps help nobody
    last = run_cycles(free, small(6), 2, promote_anyway, twin=gated)
    assert Path(str(last.adapter)) == free.cycle(2).training / "adapter"
    assert PlannedCycle.open(free.cycle(2).folder).plan.start["adapter"] == "cycles/0001/training/adapter"
    shared = "training/checkpoint.json"  # the first cycle is the gated one's; from then on they differ
    assert (free.cycle(1).folder / shared).samefile(gated.cycle(1).folder / shared)
    assert run_cycles(free, small(6), 2, promote_anyway, twin=gated) == last
