"""Writes what others need to use the model that a cycle trained."""

import json

from prefect import task

from tasks.record.plan import PlannedCycle
from tasks.train import training_plan
from training.export.outputs import write_outputs


@task(task_run_name="hand-over")
def hand_over(cycle: PlannedCycle) -> None:
    """Write the trained weights under ComfyUI's keys, and the model card with the verdicts."""
    write_outputs(cycle.training, training_plan(cycle), cycle.preferences, json.loads(cycle.results.read_text()))
