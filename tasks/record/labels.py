"""Labels of a cycle's candidates: which pairs an expression makes of their scores, and how two labellings agree."""

import json
from dataclasses import dataclass

import numpy as np

from scoring.labels.combine import winner_probabilities
from scoring.labels.expressions import Expression
from scoring.labels.pairing import Pair, pair_groups
from scoring.verdict.pair_statistics import clustered_interval
from tasks.record.plan import PlannedCycle
from tasks.record.scores import Scored, read_scores
from tasks.record.settings import Pairing
from tasks.record.workspace import CycleFolder


@dataclass(frozen=True)
class Labels:
    """What a labelling decided: the pairs of each prompt, and of each pair P(winner preferred) where it is known."""

    pairs: list[list[Pair]]
    probabilities: list[list[float | None]]
    unit: str

    def prompts_with_pairs(self) -> int:
        """How many prompts have a pair at all."""
        return sum(bool(group) for group in self.pairs)

    def preferences(self) -> set[tuple[int, int, int]]:
        """(prompt, winner, loser) of all pairs, by their places."""
        return {(prompt, pair.winner, pair.loser) for prompt, group in enumerate(self.pairs) for pair in group}


def label(expression: Expression, pairing: Pairing, scored: Scored, candidates: int) -> Labels:
    """Decide the pairs of all prompts; the smallest margin is in units of the spread over all of them."""
    order = scored.order(expression, candidates)
    margins = (order.margins(prompt) for prompt in range(order.prompts()))
    pairs = pair_groups(margins, order.spread, pairing.rule, pairing.min_margin)
    flat = [(prompt, pair) for prompt, group in enumerate(pairs) for pair in group]
    winners = np.array([(prompt, pair.winner) for prompt, pair in flat]).reshape(-1, 2)
    losers = np.array([(prompt, pair.loser) for prompt, pair in flat]).reshape(-1, 2)
    size = np.array([pair.margin for _, pair in flat])
    groups = scored.groups(expression, candidates)
    probabilities = winner_probabilities(expression, winners, losers, groups, scored.infos, size)
    in_order = iter([None] * len(flat) if probabilities is None else probabilities.tolist())
    return Labels(pairs, [[next(in_order) for _ in group] for group in pairs], order.unit)


@dataclass(frozen=True, kw_only=True)
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


def compare_labels(
    cycle: PlannedCycle, expression: Expression, pairing: Pairing, source: PlannedCycle
) -> LabelAgreement:
    """An expression's pairs of a cycle's candidates against those that `source`, with the same ones, trained on."""
    candidates, old = cycle.plan.recipe.generation.candidates, source.plan
    scored = read_scores(source, "candidates", old.recipe.scorer.leaves)
    other = scored.order(old.recipe.scorer, candidates)
    ours = label(expression, pairing, read_scores(cycle, "candidates", expression.leaves), candidates)
    theirs = label(old.recipe.scorer, old.recipe.pairing, scored, candidates)
    preferences, confidence = sorted(ours.preferences()), cycle.plan.recipe.gate.confidence
    votes = np.array([(1 + np.sign(other.margins(prompt)[winner, loser])) / 2 for prompt, winner, loser in preferences])
    agreement, low, high = clustered_interval(votes, [str(prompt) for prompt, _, _ in preferences], confidence)
    return LabelAgreement(
        labelled_by=str(expression), other=str(old.recipe.scorer), pairs=len(preferences),
        other_pairs=len(theirs.preferences()), same_pairs=len(ours.preferences() & theirs.preferences()),
        prompts=ours.prompts_with_pairs(), agreement=agreement, low=low, high=high, confidence=confidence,
    )  # fmt: skip


def comparisons(cycle: CycleFolder) -> list[LabelAgreement]:
    """What is known of other labellings of a cycle's candidates, the cycle's own source first."""
    files = [cycle.comparison, *sorted(cycle.folder.glob("relabelled/*/comparison.json"))]
    return [LabelAgreement(**json.loads(file.read_text())) for file in files if file.is_file()]
