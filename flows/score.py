"""The flow `score`: scores without the rest, of images that are there."""

import logging
from pathlib import Path

from prefect import flow
from prefect.artifacts import create_table_artifact

from tasks.models import release
from tasks.progress import show_logs
from tasks.record.checks import check_leaves, check_trusted
from tasks.record.plan import PlannedCycle
from tasks.record.recipe import ParameterError, read_expression, read_preset, sources_of
from tasks.record.settings import GivenExecution, GivenPairing
from tasks.record.workspace import exclusive
from tasks.relabel import relabel
from tasks.score import score_shard
from tasks.score_set import score_set
from tasks.score_table import write_table
from tasks.write_report import write_report

log = logging.getLogger(__name__)


@flow(name="score", flow_run_name="score-{scorer}")
def score(
    source: str,
    scorer: str = "pickscore",
    preset: str = "shapes",
    output: str | None = None,
    caption_column: str | None = None,
    pairing: GivenPairing = GivenPairing(),
    execution: GivenExecution = GivenExecution(),
) -> str:
    """Score images with captions, or the candidates of a cycle, which are then paired anew; nothing is generated.

    A cycle gets `relabelled/<scorer>/`: sealed preference shards, and in its report how often these pairs agree with
    its own. Anything else gets `scores.csv` with a column a scorer. The same parameters after a crash go on.

    Args:
        source: folder of a cycle (with plan.json); folder of images with metadata.csv, metadata.jsonl, captions.json
            or a .txt beside each image; a .parquet, .arrow or .jsonl table.
        scorer: as in the full cycle, a scorer or an expression. Of a table or folder each of its scorers is written.
        preset: where the scorers' weights come from. A cycle has its own, but runs a plug-in that its plan names only
            if this preset names it too: a plan may be somebody else's file.
        output: folder for the scores of a folder or table; left out: scores/ and the name of the source.
        caption_column: column of the captions, if it is not text, prompt or caption.
        pairing: for a cycle, what differs from its own rule.
        execution: device and batch sizes, where they are to differ from the preset's or the cycle's.
    """
    show_logs()
    try:
        place = Path(source).expanduser()
        if (place / "plan.json").is_file():
            if output or caption_column:
                raise ParameterError(
                    f"output={output!r}, caption_column={caption_column!r}: not for a cycle; leave out"
                )
            return _relabel(PlannedCycle.open(place.resolve()), scorer, preset, pairing, execution)
        if not place.exists():
            raise ParameterError(f"source={source!r}: there is no such folder or file ({place.absolute()})")
        target = Path(output).expanduser() if output else Path("scores") / place.resolve().name
        return _score(source, scorer, preset, target, caption_column, execution)
    finally:
        release()


def _relabel(cycle: PlannedCycle, scorer: str, preset: str, pairing: GivenPairing, execution: GivenExecution) -> str:
    plan = cycle.plan
    expression = read_expression("scorer", scorer, plan.sources())
    check_leaves("scorer", expression, plan.sources())
    check_trusted(expression.leaves, plan, read_preset(preset))
    complete = execution.on(plan.recipe.execution)
    with exclusive(cycle.experiment.folder):
        for name in expression.leaves:
            for index in range(cycle.shards("candidates")):
                score_shard(cycle, "candidates", name, index, complete)
        agreement = relabel(cycle, expression, pairing)
        if agreement:
            log.info(
                "%d pairs by %s; in %.3f [%.3f, %.3f] of them %s prefers the same winner (%d prompts)",
                agreement.pairs, agreement.labelled_by, agreement.agreement, agreement.low, agreement.high,
                agreement.other, agreement.prompts,
            )  # fmt: skip
            create_table_artifact([{k: str(v) for k, v in vars(agreement).items()}], key="labels-compared")
        if cycle.finished.is_file():
            log.info("report: %s", write_report(cycle))
    return str(cycle.relabelled(expression))


def _score(
    source: str, scorer: str, preset: str, target: Path, caption_column: str | None, execution: GivenExecution
) -> str:
    values = read_preset(preset)
    sources = sources_of(values)
    expression = read_expression("scorer", scorer, sources)
    check_leaves("scorer", expression, sources)
    complete = execution.on(values.get("execution", {}))
    for name in expression.leaves:
        score_set(source, name, target, sources, complete, caption_column)
    path = write_table(source, expression.leaves, target, complete, caption_column)
    log.info("scores: %s", path)
    return str(path)
