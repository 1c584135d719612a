"""Other labels for candidates that exist: pairs by another scorer, compared with those of the first, nothing drawn.

Two ways: beside a cycle's own pairs (`relabelled/<scorer>/`, for looking and for other tools), or as a new cycle
that trains on them, whose candidates are links to the old one's files.
"""

import dataclasses
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from prefect import task

from data.files import write_json
from data.manifest import MANIFEST
from scoring.labels.expressions import leaves, parse
from scoring.verdict.pair_statistics import clustered_interval
from tasks.pair import Labels, label, write_pairs
from tasks.record.plan import read_plan, source_cycle
from tasks.record.recipe import ParameterError
from tasks.record.settings import Pairing
from tasks.record.workspace import Cycle, Part, safe_name
from tasks.score import read_scores

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelAgreement:
    """How often two labellings of the same candidates agree.

    Of the pairs by `labelled_by`, `agreement` is the share whose winner `other` prefers too; no preference counts
    half. low and high: its interval, which allows for pairs that share a prompt. same_pairs: pairs that both
    labellings made, winner and loser alike.
    """

    labelled_by: str
    other: str
    pairs: int
    other_pairs: int
    same_pairs: int
    prompts: int
    agreement: float
    low: float
    high: float
    confidence: float


@task(task_run_name="relabel-{scorer}")
def relabel(cycle: Cycle, scorer: str, pairing: Pairing) -> LabelAgreement | None:
    """Pair a cycle's candidates anew by an expression whose scorers have scored them.

    pairing: what differs from the cycle's own rule. Returns how the labels agree with the cycle's own, None where
    its own scorers have not scored. Raises ParameterError when the folder holds pairs by another rule or scores.
    """
    plan, expression, target = read_plan(cycle), parse(scorer), relabelled(cycle, scorer)
    complete = Pairing(**{**plan.recipe.pairing.model_dump(), **pairing.given()})
    infos = read_scores(cycle, "training", leaves(expression)).infos
    scorers = {name: [info.fingerprint, info.preference_scale] for name, info in infos.items()}
    rule = {"expression": str(expression), "scorers": scorers, "pairing": complete.model_dump()}
    there, sealed = target / "rule.json", (target / MANIFEST).is_file()
    if sealed and json.loads(there.read_text()) != rule:
        raise ParameterError(f"pairing={pairing.given()}: {target} holds pairs by another rule; move it away first")
    write_json(there, rule)
    own = leaves(plan.labelling()) if _scored(cycle) else []
    write_pairs(cycle, expression, complete, list(dict.fromkeys([*leaves(expression), *own])), target)
    if not own:
        log.warning("%s: not scored by %s, so there is nothing to compare with", cycle.folder, plan.labelling())
        return None
    found = compare(cycle, scorer, complete, cycle)
    write_json(target / "comparison.json", dataclasses.asdict(found))
    return found


def _scored(cycle: Cycle) -> bool:
    """Whether the scorers that label a cycle have scored all its candidates."""
    plan = read_plan(cycle)
    where, shards = cycle.part("training", plan.shards("training")), range(plan.shards("training"))
    return all(where.scores(name, index).is_file() for name in leaves(plan.labelling()) for index in shards)


def relabelled(cycle: Cycle, scorer: str) -> Path:
    """Where the pairs by another scorer lie."""
    return cycle.folder / "relabelled" / safe_name(str(parse(scorer)))


def comparisons(cycle: Cycle) -> list[LabelAgreement]:
    """What is known of other labellings of a cycle's candidates, the cycle's own source first."""
    files = [cycle.comparison, *sorted(cycle.folder.glob("relabelled/*/comparison.json"))]
    return [LabelAgreement(**json.loads(file.read_text())) for file in files if file.is_file()]


def compare(cycle: Cycle, scorer: str, pairing: Pairing, source: Cycle) -> LabelAgreement:
    """`scorer`'s pairs of a cycle's candidates against those that `source`, with the same candidates, trained on."""
    plan, old = read_plan(cycle), read_plan(source)
    candidates = plan.recipe.generation.candidates
    scored = read_scores(source, "training", leaves(old.labelling()))
    other = scored.order(old.labelling(), candidates)
    new = label(parse(scorer), pairing, read_scores(cycle, "training", leaves(parse(scorer))), candidates)
    theirs = label(old.labelling(), old.recipe.pairing, scored, candidates)
    pairs, confidence = sorted(_named(new)), plan.recipe.gate.confidence
    votes = np.array([(1 + np.sign(other.margins(prompt)[winner, loser])) / 2 for prompt, winner, loser in pairs])
    agreement, low, high = clustered_interval(votes, [str(prompt) for prompt, _, _ in pairs], confidence)
    return LabelAgreement(
        str(parse(scorer)), str(old.labelling()), len(pairs), len(_named(theirs)),
        len(_named(new) & _named(theirs)), new.prompts_with_pairs(), agreement, low, high, confidence,
    )  # fmt: skip


def _named(labels: Labels) -> set[tuple[int, int, int]]:
    return {(prompt, pair.winner, pair.loser) for prompt, group in enumerate(labels.pairs) for pair in group}


def link_candidates(cycle: Cycle) -> None:
    """Give a cycle the pictures of the one it labels anew: links where the disk can, else copies.

    Also the evaluation's pictures of the base, which depend on nothing that a label can change, if they were drawn by
    the same code in the same precision as the tuned ones will be.
    """
    plan = read_plan(cycle)
    if plan.recipe.candidates_of is None:
        return
    source = source_cycle(plan.recipe)
    parts: list[Part] = ["training", "base", "control"] if _same_evaluation(cycle, source) else ["training"]
    for part in parts:
        shards = plan.shards(part)
        ours, theirs = cycle.part(part, shards), source.part(part, shards)
        for index in range(shards):
            _link(theirs.embeddings(index), ours.embeddings(index))
            _link(theirs.candidates(index), ours.candidates(index))


@task(task_run_name="compare-labels")
def compare_with_source(cycle: Cycle) -> None:
    """Write how a cycle's labels compare with those of the cycle whose candidates it uses, if it does."""
    plan = read_plan(cycle)
    if plan.recipe.candidates_of is None:
        return
    if not _scored(source_cycle(plan.recipe)):
        log.warning("%s: not scored, so there is nothing to compare with", plan.recipe.candidates_of)
        return
    found = compare(cycle, plan.recipe.scorer, plan.recipe.pairing, source_cycle(plan.recipe))
    write_json(cycle.comparison, dataclasses.asdict(found))


def _same_evaluation(cycle: Cycle, source: Cycle) -> bool:
    """Whether both would draw the same pictures of the base."""
    ours, theirs = (json.loads(where.prompts.read_text())["evaluation"] for where in (cycle, source))
    new, old = read_plan(cycle), read_plan(source)
    precision = [(plan.recipe.execution.device, plan.recipe.execution.dtype, plan.code) for plan in (new, old)]
    return bool(ours == theirs and precision[0] == precision[1])


def _link(old: Path, new: Path) -> None:
    if new.exists() or not old.is_file():
        return
    new.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(old, new)
    except OSError:  # another disk, or one without links
        shutil.copyfile(old, new.with_suffix(".copy"))
        new.with_suffix(".copy").replace(new)
