"""Trains on the sealed preference shards of a cycle."""

import logging
from pathlib import Path

from prefect import task

from data.manifest import verify
from tasks.progress import progress
from tasks.record.plan import PlannedCycle
from tasks.record.recipe import Recipe
from training.loop.checkpoint import CheckpointRecord
from training.loop.launch import launch, process_count
from training.model.reference import ModelRef
from training.plan import TrainingPlan

log = logging.getLogger(__name__)


@task(task_run_name="train-policy")
def train_policy(cycle: PlannedCycle) -> CheckpointRecord:
    """Train from the cycle's start model; resumes at the last checkpoint, or returns what is finished."""
    finished = CheckpointRecord.read(cycle.training)
    if finished:
        log.info("%s: complete, kept", cycle.training)
        return finished
    return run_training(cycle.plan.recipe, training_plan(cycle))


def run_training(recipe: Recipe, plan: TrainingPlan) -> CheckpointRecord:
    """Check the shards' sums, then train with progress; goes on at the last checkpoint."""
    verify(plan.pairs, "checksum")
    with progress("train", plan.training.steps, "step") as advance:
        done = 0

        def on_step(step: int, metrics: dict[str, float]) -> None:
            nonlocal done
            accuracy = metrics.get("implicit_accuracy")  # sft compares nothing
            note = f"loss {metrics['loss']:.4f}" + (f" accuracy {accuracy:.2f}" if accuracy is not None else "")
            advance(step - done, note)
            done = step

        training, execution = recipe.training, recipe.execution
        processes = process_count(execution.processes, execution.device, training.batch_size)
        record = launch(plan, processes, on_step)
    log.info("trained: %s", {name: round(value, 5) for name, value in record.metrics.items()})
    return record


def training_plan(cycle: PlannedCycle) -> TrainingPlan:
    """The trainer's plan of a cycle."""
    plan = cycle.plan
    return plan_training(
        plan.recipe, cycle.start(), cycle.preferences, cycle.training, plan.cycle_seed, plan.code["rlaif"]
    )


def plan_training(recipe: Recipe, model: ModelRef, pairs: Path, output: Path, seed: int, version: str) -> TrainingPlan:
    """The recipe's numbers, with paths filled in. version: of this code."""
    return TrainingPlan(
        model=model, pairs=str(pairs), output=str(output), seed=seed, version=version, training=recipe.training,
        execution=recipe.execution.of_training(),
    )  # fmt: skip
