"""Trains on the sealed preference shards of a cycle."""

import json
import logging
from pathlib import Path
from typing import Any

from prefect import task

from data.manifest import verify
from tasks.models import absolute
from tasks.progress import progress
from tasks.record.plan import Plan, read_plan
from tasks.record.recipe import Recipe
from tasks.record.workspace import Cycle
from training.adapter.lora import Lora
from training.export.outputs import write_outputs
from training.loop.checkpoint import CheckpointRecord
from training.loop.launch import launch, process_count
from training.model.reference import ModelRef
from training.plan import TrainingPlan
from training.settings import Section, Training

log = logging.getLogger(__name__)


@task(task_run_name="train-policy")
def train_policy(cycle: Cycle) -> CheckpointRecord:
    """Train from the cycle's start model; resumes at the last checkpoint, or returns what is finished."""
    finished = CheckpointRecord.read(cycle.training)
    if finished:
        log.info("%s: complete, kept", cycle.training)
        return finished
    plan = read_plan(cycle)
    return run_training(plan.recipe, training_plan(plan, cycle))


def run_training(recipe: Recipe, plan: TrainingPlan) -> CheckpointRecord:
    """Check the shards' sums, then train with progress; goes on at the last checkpoint."""
    verify(plan.pairs, "checksum")
    with progress("train", plan.steps, "step") as advance:
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


@task(task_run_name="hand-over")
def hand_over(cycle: Cycle) -> None:
    """Write what others need to use the trained model: ComfyUI's keys, and the card with the verdicts."""
    plan = read_plan(cycle)
    write_outputs(cycle.training, training_plan(plan, cycle), cycle.preferences, json.loads(cycle.results.read_text()))


def training_plan(plan: Plan, cycle: Cycle) -> TrainingPlan:
    """The trainer's plan of a cycle."""
    start = absolute(ModelRef.read(plan.start), cycle.folder.parent.parent)
    return plan_training(plan.recipe, start, cycle.preferences, cycle.training, plan.cycle_seed, plan.code["rlaif"])


def plan_training(recipe: Recipe, model: ModelRef, pairs: Path, output: Path, seed: int, version: str) -> TrainingPlan:
    """The recipe's numbers, with paths filled in. version: of this code."""
    training = recipe.training
    return TrainingPlan(
        model=model,
        pairs=str(pairs),
        output=str(output),
        lora=lora_of(training),
        seed=seed,
        version=version,
        batch_size=training.batch_size,
        **shared_fields(training),
        **shared_fields(recipe.execution),
    )


def lora_of(training: Training) -> Lora:
    return Lora(training.lora_rank, training.lora_alpha, training.lora_targets, training.lora_dora)


def shared_fields(section: Section) -> dict[str, Any]:
    """What a section says of the fields of a training plan that have the same name."""
    shared = set(TrainingPlan.__dataclass_fields__) & set(type(section).model_fields) - {"batch_size"}
    return {name: getattr(section, name) for name in shared}
