"""Pairs of a cycle's candidates by another scorer, beside the cycle's own: for looking, and for other tools."""

import dataclasses
import json
import logging

from prefect import task

from data.files import write_json
from data.manifest import MANIFEST
from scoring.labels.expressions import Expression
from tasks.pair import write_pairs
from tasks.record.labels import LabelAgreement, compare_labels
from tasks.record.plan import PlannedCycle
from tasks.record.recipe import ParameterError
from tasks.record.scores import is_scored, read_scores
from tasks.record.settings import GivenPairing, Pairing

log = logging.getLogger(__name__)


@task(task_run_name="relabel-{scorer}")
def relabel(cycle: PlannedCycle, scorer: Expression, pairing: GivenPairing) -> LabelAgreement | None:
    """Pair a cycle's candidates anew by an expression whose scorers have scored them, into `relabelled/<scorer>/`.

    pairing: what differs from the cycle's own rule. Returns how the labels agree with the cycle's own, None where
    its own scorers have not scored. Raises ParameterError when the folder holds pairs by another rule or scores.
    """
    own = cycle.plan.recipe.scorer
    complete: Pairing = pairing.on(cycle.plan.recipe.pairing)
    target = cycle.relabelled(scorer)
    infos = read_scores(cycle, "candidates", scorer.leaves).infos
    scorers = {name: [info.fingerprint, info.preference_scale] for name, info in infos.items()}
    rule = {"expression": str(scorer), "scorers": scorers, "pairing": complete.model_dump()}
    there = target / "rule.json"
    if (target / MANIFEST).is_file() and json.loads(there.read_text()) != rule:
        raise ParameterError(f"pairing={pairing.values()}: {target} holds pairs by another rule; move it away first")
    write_json(there, rule)
    comparable = is_scored(cycle, own)
    carried = list(dict.fromkeys([*scorer.leaves, *(own.leaves if comparable else [])]))
    write_pairs(cycle, scorer, complete, carried, target)
    if not comparable:
        log.warning("%s: not scored by %s, so there is nothing to compare with", cycle.folder, own)
        return None
    agreement = compare_labels(cycle, scorer, complete, cycle)
    write_json(target / "comparison.json", dataclasses.asdict(agreement))
    return agreement
