"""Cycles of a recipe without a server: the product's own tasks, called as plain functions one after another.

A cycle that lies there finished is left as it is, like everything that the tasks publish.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from data.files import write_json
from scoring.labels.expressions import leaves, parse
from tasks.evaluate import judge_models
from tasks.generate import generate_shard, trained_model
from tasks.models import absolute
from tasks.pair import pair_candidates
from tasks.plan_cycle import plan_cycle
from tasks.promote import promote
from tasks.record.champion import current_model, read_champion
from tasks.record.plan import read_plan
from tasks.record.recipe import Recipe
from tasks.record.runs import Run
from tasks.record.settings import Pairing
from tasks.record.workspace import Cycle, Experiment, Part
from tasks.relabel import relabel, relabelled
from tasks.score import score_shard
from tasks.train import train_policy
from training.loop.checkpoint import CheckpointRecord
from training.model.reference import ModelRef


def draw(cycle: Cycle, part: Part) -> None:
    """Pictures and scores of one part."""
    plan = read_plan(cycle)
    for index in range(plan.shards(part)):
        generate_shard.fn(cycle, part, index)
    for name in plan.scorer_names(part):
        for index in range(plan.shards(part)):
            score_shard.fn(cycle, part, name, index)


def make_pairs(experiment: Experiment, recipe: Recipe, number: int) -> Cycle:
    """A cycle up to its sealed preferences."""
    cycle = experiment.cycle(number)
    plan_cycle.fn(experiment, Run(recipe=recipe, cycles=[number]), number)
    draw(cycle, "training")
    pair_candidates.fn(cycle)
    return cycle


def other_pairs(cycle: Cycle, scorer: str) -> Path:
    """Pairs of the same candidates by another scorer."""
    for name in leaves(parse(scorer)):
        for index in range(read_plan(cycle).shards("training")):
            score_shard.fn(cycle, "training", name, index)
    relabel.fn(cycle, scorer, Pairing())
    return relabelled(cycle, scorer)


def gate_and_promote(experiment: Experiment, cycle: Cycle) -> None:
    """The product's way: the trained model becomes champion if held-out judges say that it is better."""
    draw(cycle, "base")
    draw(cycle, "tuned")
    judge_models.fn(cycle)
    promote.fn(experiment, cycle)


def promote_anyway(experiment: Experiment, cycle: Cycle) -> None:
    """What is trained becomes champion, whatever it is worth."""
    plan, record, champion = read_plan(cycle), CheckpointRecord.read(cycle.training), read_champion(experiment)
    assert record is not None, "promoted without a trained model"
    model, label = trained_model(plan, cycle, record)
    write_json(experiment.champion, champion | {"cycle": plan.cycle, "model": model.to_dict(), "label": label})
    write_json(cycle.promotion, {"promoted": True})


def run_cycles(
    experiment: Experiment,
    recipe: Recipe,
    cycles: int,
    decide: Callable[[Experiment, Cycle], None],
    twin: Experiment | None = None,
) -> ModelRef:
    """The champion after so many cycles, each from the champion of those before; the base if none was accepted.

    twin: an experiment of the same recipe; its cycles are adopted as long as they start from the same model.
    """
    for number in range(1, cycles + 1):
        cycle = experiment.cycle(number)
        if cycle.promotion.is_file():
            continue
        if twin:
            _adopt(twin, experiment, recipe, number)
        make_pairs(experiment, recipe, number)
        train_policy.fn(cycle)
        decide(experiment, cycle)
    model = read_champion(experiment)["model"]
    return absolute(ModelRef.read(model), experiment.folder) if model else ModelRef(recipe.base_model, recipe.revision)


def promoted(experiment: Experiment) -> list[int]:
    """The cycles whose model was accepted."""
    return [entry["cycle"] for entry in read_champion(experiment)["history"] if entry["promoted"]]


def _adopt(twin: Experiment, experiment: Experiment, recipe: Recipe, number: int) -> None:
    """Link the twin's pairs and training of a cycle, unless it starts from another model."""
    theirs, ours = twin.cycle(number), experiment.cycle(number)
    if CheckpointRecord.read(theirs.training) is None or ours.plan.is_file():  # half a training must not be shared
        return
    plan = read_plan(theirs)
    start, label = current_model(experiment, recipe, plan.base_digest)[1:3]
    if (plan.start, plan.start_label) == (start.to_dict(), label):
        skipped = shutil.ignore_patterns("evaluation", "promotion.json", "relabelled")
        shutil.copytree(theirs.folder, ours.folder, copy_function=os.link, ignore=skipped)
