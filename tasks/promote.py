"""Makes an accepted model the champion of its experiment, and keeps the history of all decisions."""

import json
import logging
from typing import Any

from prefect import task

from data.files import write_json
from tasks.evaluate import Results
from tasks.generate import trained_model
from tasks.record.champion import read_champion
from tasks.record.plan import read_plan
from tasks.record.workspace import Cycle, Experiment
from training.loop.checkpoint import CheckpointRecord

log = logging.getLogger(__name__)


@task(task_run_name="promote")
def promote(experiment: Experiment, cycle: Cycle) -> dict[str, Any]:
    """Record the gate's decision; a promoted model becomes what the next cycle starts from.

    A model that was judged against a champion who has been replaced since is not promoted: nothing says that
    it is better than the present one. Doing it twice changes nothing.
    """
    if cycle.promotion.is_file():
        decided: dict[str, Any] = json.loads(cycle.promotion.read_text())
        return decided
    plan, results = read_plan(cycle), Results.read(cycle)
    record = CheckpointRecord.read(cycle.training)
    assert record is not None, "judged without a trained model"
    champion = read_champion(experiment)
    known = [entry for entry in champion["history"] if entry["cycle"] == plan.cycle]
    if known:  # killed after the champion was written: that was the decision
        write_json(cycle.promotion, known[0])
        return dict(known[0])
    promoted, reasons = results.decision.promoted, list(results.decision.reasons)
    if promoted and champion["cycle"] != plan.champion:
        promoted = False
        reasons.insert(0, f"Not promoted: cycle {champion['cycle']} became champion while this cycle ran.")
    decision = {"cycle": plan.cycle, "promoted": promoted, "reasons": reasons, "sha256": record.sha256}
    if promoted:
        model, label = trained_model(plan, cycle, record)
        labellers = sorted({*plan.labellers, *results.labelled_by})
        champion |= {"cycle": plan.cycle, "model": model.to_dict(), "label": label, "labellers": labellers}
    champion["history"].append(decision)
    write_json(experiment.champion, champion)
    write_json(cycle.promotion, decision)
    log.info("cycle %d: %s", plan.cycle, reasons[0])
    return decision
