"""Scores the candidates of one shard with one scorer and publishes the scores."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from prefect import task

from data.schema import read_metadata, score_schema
from data.shards import ShardError, read_shard, write_shard
from scoring.labels.combine import Order, order
from scoring.labels.expressions import Expression, leaves
from scoring.scorers.registry import parse_spec
from scoring.scorers.scorer import Scorer, ScorerInfo, info_of, score_images
from tasks.compare import compared_scores
from tasks.models import scorer_for
from tasks.pictures import pictures
from tasks.progress import progress
from tasks.record.plan import read_plan
from tasks.record.workspace import Cycle, Part
from training.settings import Execution

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scored:
    """What some scorers gave the candidates of one part.

    scores: by scorer, float32 (n,), in the order of the candidates. infos: who gave them.
    """

    scores: dict[str, np.ndarray]
    infos: dict[str, ScorerInfo]

    def order(self, expression: Expression, candidates: int) -> Order:
        """Who is preferred among the candidates of each prompt, that many of them a prompt."""
        groups = {name: self.scores[name].reshape(-1, candidates) for name in leaves(expression)}
        return order(expression, groups, self.infos)


@task(task_run_name="score-{part}-{scorer}-{index:05d}")
def score_shard(cycle: Cycle, part: Part, scorer: str, index: int, execution: Execution | None = None) -> bool:
    """Publish one scorer's scores of one shard; True when scored now, False when they lay there complete.

    What is scored is the stored file, decoded, or what was drawn where that is the same: so scores can be computed
    again from the shard alone. execution: None = the plan's.
    Raises ShardError when what lies there was scored by other weights or settings, or of other candidates.
    """
    plan = read_plan(cycle)
    where = cycle.part(part, plan.shards(part))
    candidates = read_shard(where.candidates(index), ["candidate_id", "caption", "image"])
    execution = execution or plan.recipe.execution
    judge = scorer_for(scorer, plan.sources(), execution.device)
    if where.scores(scorer, index).is_file():
        _check_adopted(where.scores(scorer, index), candidates, judge)
        log.info("%s: complete, kept", where.scores(scorer, index))
        return False
    what = f"{scorer} scores {part} shard {index + 1}/{plan.shards(part)}"
    with progress(what, candidates.num_rows, "image") as advance:
        if getattr(judge, "compares", False):
            stored, prompts = ([row[name] for row in candidates.to_pylist()] for name in ("image", "caption"))
            images = pictures(where.candidates(index), slice(None), [image["bytes"] for image in stored])
            scores = compared_scores(judge, cycle, plan, part, index, images, prompts, advance)
        else:
            scores = _scores(judge, candidates, where.candidates(index), execution.score_batch_size, advance)
    schema = score_schema({"scorer": dataclasses.asdict(info_of(judge))})
    columns = [candidates["candidate_id"].combine_chunks(), pa.array(scores, pa.float32())]
    write_shard(where.scores(scorer, index), pa.table(columns, schema=schema), schema)
    return True


def _check_adopted(path: Path, candidates: pa.Table, judge: Scorer) -> None:
    there = read_shard(path)
    if there["candidate_id"].to_pylist() != candidates["candidate_id"].to_pylist():
        raise ShardError(f"{path}: holds scores of other candidates; delete the folder to score all again")
    old, new = read_metadata(there.schema)["scorer"]["fingerprint"], info_of(judge).fingerprint
    if old != new:
        raise ShardError(
            f"{path}: was scored by other weights or settings (fingerprint {old}, now {new}); put them back, or delete "
            "the folder to score all again"
        )


def _scores(judge: Scorer, candidates: pa.Table, shard: Path, size: int, advance: Callable[[int], None]) -> np.ndarray:
    """float32 (n,) of the candidates of one shard, decoded batch by batch."""
    scores = []
    for start in range(0, candidates.num_rows, size):
        batch = candidates.slice(start, size).to_pydict()
        images = pictures(shard, slice(start, start + size), [image["bytes"] for image in batch["image"]])
        scores.append(score_images(judge, images, batch["caption"]))
        advance(len(images))
    return np.concatenate(scores)


def read_scores(cycle: Cycle, part: Part, scorers: Sequence[str]) -> Scored:
    """All scores of a part by some scorers.

    Raises ShardError when two shards were scored by different weights or settings of one scorer.
    """
    found = {scorer: _read_scores(cycle, part, scorer) for scorer in scorers}
    return Scored({name: scores for name, (scores, _) in found.items()}, {n: info for n, (_, info) in found.items()})


def _read_scores(cycle: Cycle, part: Part, scorer: str) -> tuple[np.ndarray, ScorerInfo]:
    plan = read_plan(cycle)
    where = cycle.part(part, plan.shards(part))
    tables = [read_shard(where.scores(scorer, index)) for index in range(plan.shards(part))]
    infos = {ScorerInfo(**read_metadata(table.schema)["scorer"]) for table in tables}
    if len(infos) > 1:
        raise ShardError(
            f"{where.scores(scorer, 0).parent}: scored by {len(infos)} different versions of {scorer!r} "
            f"({', '.join(sorted(info.fingerprint for info in infos))}); delete the folder to score all again"
        )
    info, bound = infos.pop(), plan.sources().get(parse_spec(scorer).name)
    if bound and bound.preference_scale is not None and parse_spec(scorer).options.get("preference_scale") is None:
        info = replace(info, preference_scale=bound.preference_scale)  # it changes no score, so it may be newer
    return np.concatenate([table["score"].to_numpy() for table in tables]), info
