"""Judges the tuned model against the one it started from, on held-out prompts with equal seeds."""

import dataclasses
import json
import logging

import numpy as np
from prefect import task

from data.files import write_json
from data.shards import ShardError
from scoring.labels.combine import order
from scoring.labels.expressions import Leaf, leaves, parse
from scoring.scorers.scorer import ScorerInfo, identities
from scoring.verdict.gates import GateDecision, gate
from scoring.verdict.verdict import Verdict, judge_pairs, with_holm
from tasks.record.plan import Plan, read_drawn_prompts, read_plan
from tasks.record.workspace import Cycle, Part
from tasks.score import read_scores

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Results:
    """verdicts: tuned against base. control: base against base with other seeds, which must come out even.

    labelled_by: fingerprints and weights of the scorers that labelled the cycle's pairs.
    """

    verdicts: list[Verdict]
    control: list[Verdict]
    decision: GateDecision
    labelled_by: list[str]

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
    labelled_by = identities(read_scores(cycle, "training", leaves(plan.labelling())).infos.values())
    labellers = {*plan.labellers, *labelled_by}
    verdicts = _verdicts(plan, cycle, "tuned", labellers)
    control = _verdicts(plan, cycle, "control", labellers) if plan.recipe.evaluation.null_control else []
    results = Results(verdicts, control, gate(verdicts), sorted(labelled_by))
    write_json(cycle.results, dataclasses.asdict(results))
    for line in results.decision.reasons:
        log.info(line)
    return results


@dataclasses.dataclass(frozen=True)
class Judged:
    """What one judge gave every held-out prompt, in the order of the prompts, and in what terms.

    Of a combination only the difference means something: base is 0, other the margin by which it is preferred.
    """

    base: np.ndarray
    other: np.ndarray
    unit: str
    higher_is_better: bool
    infos: dict[str, ScorerInfo]

    @property
    def gain(self) -> np.ndarray:
        """How much better the other picture is; positive = better, whatever the orientation."""
        gain: np.ndarray = self.other - self.base
        return gain if self.higher_is_better else -gain


def read_judged(cycle: Cycle, judge: str, part: Part) -> Judged:
    """One judge's view of `part` against base."""
    expression = parse(judge)
    base, other = (read_scores(cycle, side, leaves(expression)) for side in ("base", part))
    for name, info in base.infos.items():
        if info != other.infos[name]:
            raise ShardError(
                f"{cycle.evaluation}: {name} scored base and {part} with different weights or settings; delete its "
                "folders under scores to score both again"
            )
    if isinstance(expression, Leaf):
        name = str(expression)
        info = base.infos[name]
        return Judged(base.scores[name], other.scores[name], info.unit, info.higher_is_better, base.infos)
    together = {name: np.stack([base.scores[name], other.scores[name]], axis=1) for name in base.scores}
    found = order(expression, together, base.infos)
    margins = np.array([found.margins(prompt)[1, 0] for prompt in range(found.prompts())])
    return Judged(np.zeros_like(margins), margins, found.unit, True, base.infos)


def _verdicts(plan: Plan, cycle: Cycle, part: Part, labellers: set[str]) -> list[Verdict]:
    """`part` against base, judge by judge; Holm's correction over the judges.

    Held out is who labelled neither this cycle's pairs nor those of any champion it descends from, told apart by
    weights: another name, variant or setting of the same weights is no second opinion, nor is a combination that
    holds them.
    """
    ids = [key for key, _ in read_drawn_prompts(cycle, "base")]
    confidence = plan.recipe.gate.confidence
    found = []
    for judge in plan.recipe.judges:
        seen = read_judged(cycle, judge, part)
        held_out = identities(seen.infos.values()).isdisjoint(labellers)
        verdict = judge_pairs(
            judge, seen.base, seen.other, ids, seen.higher_is_better, held_out=held_out, confidence=confidence
        )
        found.append(verdict)
    return with_holm(found)
