"""Judges the tuned model against the one it started from, on held-out prompts with equal seeds."""

import dataclasses
import json
import logging

from prefect import task

from scoring.statistics import GateDecision, Verdict, gate, judge_pairs, with_holm
from tasks.plan import Plan, read_drawn_prompts, read_plan
from tasks.score import read_scores
from tasks.workspace import Cycle, Part
from training.shards import write_json

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Results:
    """verdicts: tuned against base. control: base against base with other seeds, which must come out even.

    labelled_by: fingerprint of the scorer that labelled the cycle's pairs.
    """

    verdicts: list[Verdict]
    control: list[Verdict]
    decision: GateDecision
    labelled_by: str

    @classmethod
    def read(cls, cycle: Cycle) -> "Results":
        values = json.loads(cycle.results.read_text())
        return cls(
            [Verdict(**v) for v in values["verdicts"]],
            [Verdict(**v) for v in values["control"]],
            GateDecision(**values["decision"]),
            values["labelled_by"],
        )


@task(task_run_name="judge")
def judge_models(cycle: Cycle) -> Results:
    """Every judge's verdict and the gate's decision, written to `evaluation/results.json`."""
    plan = read_plan(cycle)
    labelled_by = read_scores(cycle, "training", plan.recipe.scorer)[1].fingerprint
    labellers = {*plan.labellers, labelled_by}
    verdicts = _verdicts(plan, cycle, "tuned", labellers)
    control = _verdicts(plan, cycle, "control", labellers) if plan.recipe.evaluation.null_control else []
    results = Results(verdicts, control, gate(verdicts), labelled_by)
    write_json(cycle.results, dataclasses.asdict(results))
    for line in results.decision.reasons:
        log.info(line)
    return results


def _verdicts(plan: Plan, cycle: Cycle, part: Part, labellers: set[str]) -> list[Verdict]:
    """`part` against base, judge by judge; Holm's correction over the judges.

    Held out is who labelled neither this cycle's pairs nor those of any champion it descends from, told apart by
    fingerprint: another name for the same weights is no second opinion.
    """
    ids = [key for key, _ in read_drawn_prompts(cycle, "base")]
    found = []
    for judge in plan.recipe.judges:
        (base, info), (other, _) = (read_scores(cycle, side, judge) for side in ("base", part))
        found.append(
            judge_pairs(
                judge,
                base,
                other,
                ids,
                info.higher_is_better,
                held_out=info.fingerprint not in labellers,
                confidence=plan.recipe.gate.confidence,
            )
        )
    return with_holm(found)
