"""Cycles of a recipe without a server: the product's own tasks, called as plain functions one after another.

A cycle that lies there finished is left as it is, like everything that the tasks publish.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from data.files import write_json
from scoring.labels.expressions import parse
from tasks.evaluate import judge_models
from tasks.generate import generate_shard
from tasks.pair import pair_candidates
from tasks.plan_cycle import plan_cycle
from tasks.promote import promote
from tasks.record.champion import Champion, starting_model
from tasks.record.plan import PlannedCycle
from tasks.record.recipe import Recipe
from tasks.record.settings import GivenPairing
from tasks.record.workspace import Experiment, Part
from tasks.relabel import relabel
from tasks.score import score_shard
from tasks.train import train_policy
from training.loop.checkpoint import CheckpointRecord
from training.model.reference import ModelRef


def draw(cycle: PlannedCycle, part: Part) -> None:
    """Pictures and scores of one part."""
    for index in range(cycle.shards(part)):
        generate_shard.fn(cycle, part, index)
    for name in cycle.plan.scorer_names(part):
        for index in range(cycle.shards(part)):
            score_shard.fn(cycle, part, name, index)


def make_pairs(experiment: Experiment, recipe: Recipe, number: int) -> PlannedCycle:
    """A cycle up to its sealed preferences."""
    cycle = plan_cycle.fn(experiment, recipe, number)
    draw(cycle, "candidates")
    pair_candidates.fn(cycle)
    return cycle


def other_pairs(cycle: PlannedCycle, scorer: str) -> Path:
    """Pairs of the same candidates by another scorer."""
    expression = parse(scorer)
    for name in expression.leaves:
        for index in range(cycle.shards("candidates")):
            score_shard.fn(cycle, "candidates", name, index)
    relabel.fn(cycle, expression, GivenPairing())
    return cycle.relabelled(expression)


def gate_and_promote(cycle: PlannedCycle) -> None:
    """The product's way: the trained model becomes champion if held-out judges say that it is better."""
    draw(cycle, "base")
    draw(cycle, "tuned")
    judge_models.fn(cycle)
    promote.fn(cycle)


def promote_anyway(cycle: PlannedCycle) -> None:
    """What is trained becomes champion, whatever it is worth."""
    (model, label), champion = cycle.tuned(), Champion.read(cycle.experiment)
    changes = {"cycle": cycle.plan.cycle, "model": model, "label": label}
    champion.model_copy(update=changes).write(cycle.experiment)
    write_json(cycle.promotion, {"promoted": True})


def run_cycles(
    experiment: Experiment,
    recipe: Recipe,
    cycles: int,
    decide: Callable[[PlannedCycle], None],
    twin: Experiment | None = None,
) -> ModelRef:
    """The champion after so many cycles, each from the champion of those before; the base if none was accepted.

    twin: an experiment of the same recipe; its cycles are adopted as long as they start from the same model.
    """
    for number in range(1, cycles + 1):
        if experiment.cycle(number).promotion.is_file():
            continue
        if twin:
            _adopt(twin, experiment, recipe, number)
        cycle = make_pairs(experiment, recipe, number)
        train_policy.fn(cycle)
        decide(cycle)
    model = Champion.read(experiment).model
    return model.within(experiment.folder) if model else ModelRef(recipe.base_model, recipe.revision)


def promoted(experiment: Experiment) -> list[int]:
    """The cycles whose model was accepted."""
    return [decision.cycle for decision in Champion.read(experiment).history if decision.promoted]


def _adopt(twin: Experiment, experiment: Experiment, recipe: Recipe, number: int) -> None:
    """Link the twin's pairs and training of a cycle, unless it starts from another model."""
    theirs, ours = twin.cycle(number), experiment.cycle(number)
    if CheckpointRecord.read(theirs.training) is None or ours.plan_file.is_file():  # half a training must not be shared
        return
    plan = PlannedCycle.open(theirs.folder).plan
    start = starting_model(experiment, recipe, plan.base_digest)
    if (plan.start, plan.start_label) == (start.model.to_dict(), start.label):
        skipped = shutil.ignore_patterns("evaluation", "promotion.json", "relabelled")
        shutil.copytree(theirs.folder, ours.folder, copy_function=os.link, ignore=skipped)
