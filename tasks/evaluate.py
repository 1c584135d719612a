"""Judges the tuned model against the one it started from, on held-out prompts with equal seeds."""

import logging

from prefect import task

from scoring.scorers.scorer import identities
from scoring.verdict.gates import gate
from scoring.verdict.verdict import Verdict, judge_pairs, with_holm
from tasks.record.plan import PlannedCycle
from tasks.record.results import Results, read_judged
from tasks.record.scores import read_scores
from tasks.record.workspace import Part

log = logging.getLogger(__name__)


@task(task_run_name="judge")
def judge_models(cycle: PlannedCycle) -> Results:
    """Every judge's verdict and the gate's decision, written to `evaluation/results.json`."""
    plan = cycle.plan
    labelled_by = identities(read_scores(cycle, "candidates", plan.recipe.scorer.leaves).infos.values())
    labellers = {*plan.labellers, *labelled_by}
    verdicts = _verdicts(cycle, "tuned", labellers)
    control = _verdicts(cycle, "control", labellers) if plan.recipe.evaluation.null_control else []
    results = Results(verdicts, control, gate(verdicts), sorted(labelled_by))
    results.write(cycle)
    for line in results.decision.reasons:
        log.info(line)
    return results


def _verdicts(cycle: PlannedCycle, part: Part, labellers: set[str]) -> list[Verdict]:
    """`part` against base, judge by judge; Holm's correction over the judges.

    Held out is who labelled neither this cycle's pairs nor those of any champion it descends from, told apart by
    weights: another name, variant or setting of the same weights is no second opinion, nor is a combination that
    holds them.
    """
    ids = [prompt.id for prompt in cycle.prompts("base")]
    verdicts = []
    for judge in cycle.plan.recipe.judges:
        seen = read_judged(cycle, judge, part)
        held_out = identities(seen.infos.values()).isdisjoint(labellers)
        verdicts.append(
            judge_pairs(
                judge.text,
                seen.base,
                seen.other,
                ids,
                seen.higher_is_better,
                held_out=held_out,
                confidence=cycle.plan.recipe.gate.confidence,
            )
        )
    return with_holm(verdicts)
