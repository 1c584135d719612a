"""Who becomes champion, and that a kill in between changes nothing."""

import json
from pathlib import Path

import pytest

from data.files import write_json
from scoring.verdict.gates import GateDecision
from tasks.promote import promote
from tasks.record.champion import Champion, starting_model
from tasks.record.plan import Plan, PlannedCycle
from tasks.record.recipe import ParameterError, Recipe, resolve
from tasks.record.results import Results
from tasks.record.runs import Run, begin_run
from tasks.record.settings import Given, GivenTraining, Settings
from tasks.record.workspace import Experiment, experiment_at
from training.loop.checkpoint import CheckpointRecord
from training.model.reference import ModelRef

NOTHING: dict[str, Given[Settings]] = {}


@pytest.fixture
def recipe(tiny_preset: Path) -> Recipe:
    return resolve(str(tiny_preset), 0, {}, NOTHING)


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    return experiment_at(str(tmp_path), "x")


def judged(
    experiment: Experiment, recipe: Recipe, number: int, accepted: bool, champion: int | None = None
) -> PlannedCycle:
    """A cycle that has been trained and judged."""
    plan = Plan(
        cycle=number, cycle_seed=1, champion=champion, start=ModelRef(recipe.base_model).to_dict(), start_label="base",
        labellers=[], base_digest="d", recipe=recipe, prompts={"training": 1, "evaluation": 10}, code={},
    )  # fmt: skip
    cycle = PlannedCycle(experiment.cycle(number).folder, plan)
    decision = GateDecision(accepted, ["because"])
    write = {cycle.plan_file: plan.model_dump(), cycle.results: {
        "verdicts": [], "control": [], "decision": {"promoted": decision.promoted, "reasons": decision.reasons},
        "labelled_by": [f"scorer-{number}"]}}  # fmt: skip
    for path, values in write.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, values)
    cycle.training.mkdir()
    CheckpointRecord(
        model=ModelRef(recipe.base_model), method="lora", steps=1, pairs=1, beta=2.0, kappa=1.0,
        sha256=f"{number:064d}", metrics={},
    ).write(cycle.training)  # fmt: skip
    assert Results.read(cycle).decision == decision
    return cycle


def test_an_accepted_model_is_where_the_next_cycle_starts(experiment: Experiment, recipe: Recipe) -> None:
    decision = promote.fn(judged(experiment, recipe, 1, accepted=True))
    assert decision.promoted
    champion, model, label, labellers = starting_model(experiment, recipe, "digest")
    assert (champion, model.adapter) == (1, "cycles/0001/training/adapter")
    assert label.endswith("+000000000000") and labellers == ["scorer-1"]


def test_a_rejected_model_changes_nothing_but_the_history(experiment: Experiment, recipe: Recipe) -> None:
    promote.fn(judged(experiment, recipe, 1, accepted=True))
    promote.fn(judged(experiment, recipe, 2, accepted=False, champion=1))
    champion = Champion.read(experiment)
    assert champion.cycle == 1
    assert [(entry.cycle, entry.promoted) for entry in champion.history] == [(1, True), (2, False)]


def test_a_model_judged_against_a_former_champion_is_not_promoted(experiment: Experiment, recipe: Recipe) -> None:
    promote.fn(judged(experiment, recipe, 2, accepted=True))
    decision = promote.fn(judged(experiment, recipe, 1, accepted=True, champion=None))
    assert not decision.promoted and "cycle 2 became champion" in decision.reasons[0]
    assert Champion.read(experiment).cycle == 2


def test_a_kill_between_champion_and_promotion_record_keeps_the_decision(
    experiment: Experiment, recipe: Recipe
) -> None:
    cycle = judged(experiment, recipe, 1, accepted=True)
    first = promote.fn(cycle)
    cycle.promotion.unlink()  # as if killed before it was written
    promote.fn(judged(experiment, recipe, 2, accepted=True, champion=1))
    assert promote.fn(cycle) == first
    assert json.loads(cycle.promotion.read_text()) == first.model_dump()
    champion = Champion.read(experiment)
    assert champion.cycle == 2 and [entry.cycle for entry in champion.history] == [1, 2]


def test_a_champion_of_another_shape_or_base_is_refused(
    experiment: Experiment, recipe: Recipe, tiny_preset: Path
) -> None:
    promote.fn(judged(experiment, recipe, 1, accepted=True))
    other = resolve(str(tiny_preset), 0, {}, NOTHING | {"training": GivenTraining(lora_rank=8)})
    with pytest.raises(ParameterError, match=r"training\.lora_rank=8.*trained with 4"):
        starting_model(experiment, other, "digest")
    fewer, turned = (
        resolve(str(tiny_preset), 0, {}, NOTHING | {"training": GivenTraining(lora_targets=targets)})
        for targets in (["to_q"], recipe.training.lora_targets[::-1])
    )
    with pytest.raises(ParameterError, match=r"training\.lora_targets=\['to_q'\].*trained with \['to_q', 'to_k'"):
        starting_model(experiment, fewer, "digest")
    assert starting_model(experiment, turned, "digest")[0] == 1
    with pytest.raises(ParameterError, match=r"base_model='elsewhere'.*another name as experiment"):
        starting_model(experiment, recipe.model_copy(update={"base_model": "elsewhere"}), "digest")


def test_a_run_that_fails_twice_in_the_same_way_does_not_block_the_nights_to_come(
    experiment: Experiment, recipe: Recipe
) -> None:
    first = begin_run(experiment, recipe, 1)
    first.note_failure(ValueError("no pairs"))
    again = begin_run(experiment, recipe, 1)
    assert again.path == first.path, "one failure may pass"
    again.note_failure(ValueError("no pairs"))
    other = begin_run(experiment, recipe, 1)
    assert other.path != first.path and other.cycles == [2]


def test_a_run_file_of_another_version_is_passed_over(experiment: Experiment, recipe: Recipe) -> None:
    run = begin_run(experiment, recipe, 1)
    old = {**run.record.model_dump(), "unheard_of": 1}
    write_json(run.path, old)
    assert begin_run(experiment, recipe, 1).cycles == [2]
    assert isinstance(run, Run)
