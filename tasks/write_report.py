"""Writes the report of a decided cycle."""

from pathlib import Path

from prefect import task
from prefect.context import TaskRunContext

from data.files import write_text
from tasks.record.plan import PlannedCycle
from tasks.record.results import Results, read_judged
from tasks.report.artifacts import publish
from tasks.report.page import page, render


@task(task_run_name="report")
def write_report(cycle: PlannedCycle) -> Path:
    """Write `report.html` of a decided cycle, anew each time, and publish artifacts when Prefect runs this."""
    results = Results.read(cycle)
    judged = {judge.text: read_judged(cycle, judge, "tuned") for judge in cycle.plan.recipe.judges}
    values = page(cycle, results, judged)
    write_text(cycle.report, render(values))
    if TaskRunContext.get():
        publish(values["decision"]["reasons"][0], cycle, results, judged)
    return cycle.report
