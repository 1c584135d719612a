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
    """verdicts: tuned against base. control: base against base with other seeds, which must come out even."""

    verdicts: list[Verdict]
    control: list[Verdict]
    decision: GateDecision

    @classmethod
    def read(cls, cycle: Cycle) -> "Results":
        values = json.loads(cycle.results.read_text())
        return cls(
            [Verdict(**v) for v in values["verdicts"]],
            [Verdict(**v) for v in values["control"]],
            GateDecision(**values["decision"]),
        )


@task(task_run_name="judge")
def judge_models(cycle: Cycle) -> Results:
    """Every judge's verdict and the gate's decision, written to `evaluation/results.json`."""
    plan = read_plan(cycle)
    verdicts = _verdicts(plan, cycle, "tuned")
    control = _verdicts(plan, cycle, "control") if plan.recipe.evaluation.null_control else []
    results = Results(verdicts, control, gate(verdicts))
    write_json(cycle.results, dataclasses.asdict(results))
    for line in results.decision.reasons:
        log.info(line)
    return results


def _verdicts(plan: Plan, cycle: Cycle, part: Part) -> list[Verdict]:
    """`part` against base, judge by judge; Holm's correction over the judges."""
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
                held_out=judge != plan.recipe.scorer,
                confidence=plan.recipe.gate.confidence,
            )
        )
    return with_holm(found)
