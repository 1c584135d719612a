"""The scores of a cycle's pictures, read from their shards."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from data.schema import read_metadata
from data.shards import ShardError, read_shard
from scoring.labels.combine import Order, order
from scoring.labels.expressions import Expression
from scoring.scorers.registry import parse_spec
from scoring.scorers.scorer import ScorerInfo
from tasks.record.plan import PlannedCycle
from tasks.record.workspace import Part


@dataclass(frozen=True)
class Scored:
    """What some scorers gave the pictures of one part.

    scores: by scorer, float32 (n,), in the order of the pictures. infos: who gave them.
    """

    scores: dict[str, np.ndarray]
    infos: dict[str, ScorerInfo]

    def groups(self, expression: Expression, candidates: int) -> dict[str, np.ndarray]:
        """The scores of an expression's scorers, (prompts, candidates) each."""
        return {name: self.scores[name].reshape(-1, candidates) for name in expression.leaves}

    def order(self, expression: Expression, candidates: int) -> Order:
        """Who is preferred among the candidates of each prompt, that many of them a prompt."""
        return order(expression, self.groups(expression, candidates), self.infos)


def read_scores(cycle: PlannedCycle, part: Part, scorers: Sequence[str]) -> Scored:
    """All scores of a part by some scorers.

    Raises ShardError when two shards were scored by different weights or settings of one scorer.
    """
    read = {scorer: _read_scores(cycle, part, scorer) for scorer in scorers}
    return Scored(
        {name: scores for name, (scores, _) in read.items()}, {name: info for name, (_, info) in read.items()}
    )


def is_scored(cycle: PlannedCycle, expression: Expression) -> bool:
    """Whether the scorers of an expression have scored all candidates of a cycle."""
    candidates = cycle.part("candidates")
    return all(
        candidates.scores(name, index).is_file() for name in expression.leaves for index in range(candidates.shards)
    )


def _read_scores(cycle: PlannedCycle, part: Part, scorer: str) -> tuple[np.ndarray, ScorerInfo]:
    pictures = cycle.part(part)
    tables = [read_shard(pictures.scores(scorer, index)) for index in range(pictures.shards)]
    infos = {ScorerInfo(**read_metadata(table.schema)["scorer"]) for table in tables}
    if len(infos) > 1:
        raise ShardError(
            f"{pictures.scores(scorer, 0).parent}: scored by {len(infos)} different versions of {scorer!r} "
            f"({', '.join(sorted(info.fingerprint for info in infos))}); delete the folder to score all again"
        )
    return np.concatenate([table["score"].to_numpy() for table in tables]), _with_scale(infos.pop(), cycle, scorer)


def _with_scale(info: ScorerInfo, cycle: PlannedCycle, scorer: str) -> ScorerInfo:
    """The scorer's info with the preset's preference scale, which changes no score and so may be newer than them."""
    spec = parse_spec(scorer)
    bound = cycle.plan.sources().get(spec.name)
    if bound is None or bound.preference_scale is None or spec.options.get("preference_scale") is not None:
        return info
    return replace(info, preference_scale=bound.preference_scale)
