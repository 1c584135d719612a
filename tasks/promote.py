"""Makes an accepted model the champion of its experiment, and keeps the history of all decisions."""

import logging

from prefect import task

from data.files import write_json
from tasks.record.champion import Champion, Decision
from tasks.record.plan import PlannedCycle
from tasks.record.results import Results

log = logging.getLogger(__name__)


@task(task_run_name="promote")
def promote(cycle: PlannedCycle) -> Decision:
    """Record the gate's decision; a promoted model becomes what the next cycle starts from.

    A model that was judged against a champion who has been replaced since is not promoted: nothing says that
    it is better than the present one. Doing it twice changes nothing.
    """
    if cycle.promotion.is_file():
        return Decision.model_validate_json(cycle.promotion.read_text())
    champion = Champion.read(cycle.experiment)
    decision = champion.decision(cycle.plan.cycle)  # there if it was killed after the champion was written
    if decision is None:
        decision = _decide(cycle, champion)
    write_json(cycle.promotion, decision.model_dump())
    return decision


def _decide(cycle: PlannedCycle, champion: Champion) -> Decision:
    """The decision, written into the history and, where it promotes, as the champion."""
    plan, results, (model, label) = cycle.plan, Results.read(cycle), cycle.tuned()
    promoted, reasons = results.decision.promoted, list(results.decision.reasons)
    if promoted and champion.cycle != plan.champion:
        promoted = False
        reasons.insert(0, f"Not promoted: cycle {champion.cycle} became champion while this cycle ran.")
    decision = Decision(cycle=plan.cycle, promoted=promoted, reasons=reasons, sha256=cycle.trained().record.sha256)
    changes = {
        "cycle": plan.cycle,
        "model": model,
        "label": label,
        "labellers": sorted({*plan.labellers, *results.labelled_by}),
    }
    champion.decided(decision, **(changes if promoted else {})).write(cycle.experiment)
    log.info("cycle %d: %s", plan.cycle, reasons[0])
    return decision
