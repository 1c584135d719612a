"""The flow `rlaif`: prompts -> generate -> score -> pair -> train -> evaluate -> gate -> champion, once or N times."""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Annotated

from filelock import FileLock, Timeout
from prefect import flow
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from pydantic import Field

from data.files import write_json
from flows import stages
from tasks.plan_cycle import plan_cycle
from tasks.progress import show_logs
from tasks.promote import promote
from tasks.record.checks import check
from tasks.record.recipe import ParameterError, Recipe, resolve
from tasks.record.runs import begin_run, end_run, note_failure
from tasks.record.settings import Evaluation, Gate, Generation, Pairing
from tasks.record.workspace import Cycle, Experiment, experiment_at
from tasks.report.page import write_report
from tasks.train import hand_over
from training.settings import Execution, Training

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
    generation: Generation = Generation(),
    pairing: Pairing = Pairing(),
    training: Training = Training(),
    evaluation: Evaluation = Evaluation(),
    gate: Gate = Gate(),
    execution: Execution = Execution(),
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


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """One run at a time in a folder, an experiment's or a training's: the lock goes with the process, however it
    ends."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.warning("another run works in %s; waiting for it to end", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def run_cycles(experiment: Experiment, recipe: Recipe, cycles: int) -> list[str]:
    """Begin a run or resume the unfinished one of these parameters; finished cycles are passed over."""
    path, run = begin_run(experiment, recipe, cycles)
    try:
        for number in run.cycles:
            cycle = experiment.cycle(number)
            if not cycle.finished.is_file():
                plan_cycle(experiment, run, number)
                run_cycle(experiment, cycle)
    except Exception as error:
        note_failure(path, run, error)
        raise
    end_run(path, run)
    return [str(experiment.cycle(number).report) for number in run.cycles]


def run_cycle(experiment: Experiment, cycle: Cycle) -> None:
    """One turn of the loop."""
    folder = Path(cycle.folder)
    stages.generate(folder, "training")
    stages.score(folder, "training")
    stages.pair(folder)
    stages.train(folder)
    stages.evaluate(folder)
    decision = promote(experiment, cycle)
    hand_over(cycle)
    report = write_report(experiment, cycle)
    write_json(cycle.finished, {"promoted": decision["promoted"]})
    log.info("cycle %s finished; report: %s", cycle.folder.name, report)
