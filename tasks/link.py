"""Gives a cycle the pictures of the one that it labels anew, so that nothing is drawn twice."""

import json
import os
import shutil
from pathlib import Path

from prefect import task

from tasks.record.plan import PlannedCycle
from tasks.record.source import source_cycle
from tasks.record.workspace import Part


@task(task_run_name="link-candidates")
def link_candidates(cycle: PlannedCycle) -> None:
    """Link the candidates of the cycle that `candidates_of` names, where the disk can, else copy them.

    Also the evaluation's pictures of the base, which depend on nothing that a label can change, if they were drawn by
    the same code in the same precision as the tuned ones will be. Does nothing for a cycle that draws its own.
    """
    source = source_cycle(cycle.plan.recipe)
    if source is None:
        return
    parts: list[Part] = ["candidates", "base", "control"] if _same_evaluation(cycle, source) else ["candidates"]
    for part in parts:
        ours, theirs = cycle.part(part), source.part(part)
        for index in range(ours.shards):
            _link(theirs.embeddings(index), ours.embeddings(index))
            _link(theirs.candidates(index), ours.candidates(index))


def _same_evaluation(cycle: PlannedCycle, source: PlannedCycle) -> bool:
    """Whether both would draw the same pictures of the base."""
    ours, theirs = (json.loads(where.prompts_file.read_text())["evaluation"] for where in (cycle, source))
    plans = (cycle.plan, source.plan)
    new, old = [(plan.recipe.execution.device, plan.recipe.execution.dtype, plan.code) for plan in plans]
    return bool(ours == theirs and new == old)


def _link(old: Path, new: Path) -> None:
    if new.exists() or not old.is_file():
        return
    new.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(old, new)
    except OSError:  # another disk, or one without links
        shutil.copyfile(old, new.with_suffix(".copy"))
        new.with_suffix(".copy").replace(new)
