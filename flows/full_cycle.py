"""The flow `rlaif`: prompts -> generate -> score -> pair -> train -> evaluate -> gate -> champion, once or N times."""

import logging
from contextlib import AbstractContextManager
from typing import Annotated

from prefect import flow
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from pydantic import Field

from flows import stages
from tasks.hand_over import hand_over
from tasks.plan_cycle import plan_cycle
from tasks.progress import show_logs
from tasks.promote import promote
from tasks.record.checks import check
from tasks.record.plan import PlannedCycle
from tasks.record.recipe import ParameterError, Recipe, resolve
from tasks.record.runs import begin_run
from tasks.record.settings import (
    GivenEvaluation,
    GivenExecution,
    GivenGate,
    GivenGeneration,
    GivenPairing,
    GivenTraining,
)
from tasks.record.workspace import Experiment, exclusive, experiment_at
from tasks.write_report import write_report

log = logging.getLogger(__name__)


@flow(name="rlaif", flow_run_name="{experiment}-{preset}")
def full_cycle(
    preset: str = "shapes",
    scorer: str | None = None,
    judges: list[str] | None = None,
    base_model: str | None = None,
    prompts: str | None = None,
    cycles: Annotated[int, Field(ge=1, le=1000)] = 1,
    experiment: str = "default",
    workspace: str = "workspace",
    seed: Annotated[int, Field(ge=0, lt=2**53)] = 0,
    candidates_of: str | None = None,
    generation: GivenGeneration = GivenGeneration(),
    pairing: GivenPairing = GivenPairing(),
    training: GivenTraining = GivenTraining(),
    evaluation: GivenEvaluation = GivenEvaluation(),
    gate: GivenGate = GivenGate(),
    execution: GivenExecution = GivenExecution(),
) -> list[str]:
    """Align a text-to-image model from AI feedback, and keep the result only if it is better.

    The same parameters after a crash finish the run where it stopped. Returns the paths of the reports.

    Args:
        preset: a recipe under recipes/ (or the path of a TOML file) that names everything left open here.
        scorer: who labels the training pairs: a scorer ("hpsv2", "clip:owner/name", a plug-in, module:Class) or
            several, "mean(pickscore,hpsv2)", "agree(pickscore,clip)"; docs/scorers.md has them all.
        judges: who judges the result, each written like scorer; at least one must share nothing with it.
        base_model: a diffusers folder or hub id.
        prompts: a file (.txt .json .jsonl .csv .parquet .arrow) or hub data set, with an optional ':column'.
        cycles: turns of the loop; each starts from the champion of those before.
        experiment: a line of cycles that share a champion.
        workspace: the folder that holds experiments.
        seed: everything random derives from it and the cycle's number.
        candidates_of: folder of an earlier cycle whose candidates are labelled anew instead of drawing others.
        generation: how candidates are drawn.
        pairing: how scores become pairs.
        training: the loss, Diffusion-DPO or another, and its recipe.
        evaluation: held-out prompts.
        gate: what it takes to become champion.
        execution: devices, batch and shard sizes.
    """
    show_logs()
    flat = {
        "scorer": scorer, "judges": judges, "base_model": base_model, "prompts": prompts,
        "candidates_of": candidates_of,
    }  # fmt: skip
    sections = {
        "generation": generation, "pairing": pairing, "training": training,
        "evaluation": evaluation, "gate": gate, "execution": execution,
    }  # fmt: skip
    if candidates_of and cycles != 1:
        raise ParameterError(f"cycles={cycles}: with candidates_of it must be 1; the next needs candidates of its own")
    recipe = resolve(preset, seed, flat, sections)
    where = experiment_at(workspace, experiment)
    check(recipe, where.folder)
    with exclusive(where.folder), silent_stages():
        return run_cycles(where, recipe, cycles)


def silent_stages() -> AbstractContextManager[object]:
    """No heartbeats of the stages' own: they live and die with this flow's process, and its heartbeat goes on.

    Every flow with a heartbeat waits up to a second for its thread to end; a cycle has eleven stages.
    """
    return temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None})


def run_cycles(experiment: Experiment, recipe: Recipe, cycles: int) -> list[str]:
    """Begin a run or resume the unfinished one of these parameters; finished cycles are passed over."""
    run = begin_run(experiment, recipe, cycles)
    try:
        for number in run.cycles:
            if not experiment.cycle(number).finished.is_file():
                run_cycle(plan_cycle(experiment, run.recipe, number))
    except Exception as error:
        run.note_failure(error)
        raise
    run.finish()
    return [str(experiment.cycle(number).report) for number in run.cycles]


def run_cycle(cycle: PlannedCycle) -> None:
    """One turn of the loop."""
    stages.generate(cycle.folder)
    stages.score(cycle.folder)
    stages.pair(cycle.folder)
    stages.train(cycle.folder)
    stages.evaluate(cycle.folder)
    decision = promote(cycle)
    hand_over(cycle)
    report = write_report(cycle)
    cycle.finish(decision.promoted)
    log.info("cycle %s finished; report: %s", cycle.folder.name, report)
