"""Compares a cycle's labels with those of the cycle whose candidates it uses."""

import dataclasses
import logging

from prefect import task

from data.files import write_json
from tasks.record.labels import compare_labels
from tasks.record.plan import PlannedCycle
from tasks.record.scores import is_scored
from tasks.record.source import source_cycle

log = logging.getLogger(__name__)


@task(task_run_name="compare-labels")
def compare_with_source(cycle: PlannedCycle) -> None:
    """Write how a cycle's labels compare with those of the cycle whose candidates it uses, if it does."""
    recipe = cycle.plan.recipe
    source = source_cycle(recipe)
    if source is None:
        return
    if not is_scored(source, source.plan.recipe.scorer):
        log.warning("%s: not scored, so there is nothing to compare with", recipe.candidates_of)
        return
    agreement = compare_labels(cycle, cycle.plan.recipe.scorer, recipe.pairing, source)
    write_json(cycle.comparison, dataclasses.asdict(agreement))
