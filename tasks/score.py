"""Scores the pictures of one shard of a cycle with one scorer and publishes the scores."""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
from prefect import task

from data.schema import read_metadata, score_schema
from data.shards import ShardError, read_shard, write_shard
from scoring.scorers.scorer import Scorer, info_of, score_images
from tasks.compare import compared_scores
from tasks.models import scorer_for
from tasks.pictures import pictures
from tasks.progress import progress
from tasks.record.plan import PlannedCycle
from tasks.record.workspace import Part
from training.settings import Execution

log = logging.getLogger(__name__)


@task(task_run_name="score-{part}-{scorer}-{index:05d}")
def score_shard(cycle: PlannedCycle, part: Part, scorer: str, index: int, execution: Execution | None = None) -> bool:
    """Publish one scorer's scores of one shard; True when scored now, False when they lay there complete.

    What is scored is the stored file, decoded, or what was drawn where that is the same: so scores can be computed
    again from the shard alone. execution: None = the plan's.
    Raises ShardError when what lies there was scored by other weights or settings, or of other candidates.
    """
    files, execution = cycle.part(part), execution or cycle.plan.recipe.execution
    shard, target = files.candidates(index), files.scores(scorer, index)
    candidates = read_shard(shard, ["candidate_id", "caption", "image"])
    judge = scorer_for(scorer, cycle.plan.sources(), execution.device)
    if target.is_file():
        _check_adopted(target, candidates, judge)
        log.info("%s: complete, kept", target)
        return False
    title = f"{scorer} scores {part} shard {index + 1}/{files.shards}"
    with progress(title, candidates.num_rows, "image") as advance:
        if getattr(judge, "compares", False):
            stored, prompts = ([row[name] for row in candidates.to_pylist()] for name in ("image", "caption"))
            images = pictures(shard, slice(None), [image["bytes"] for image in stored])
            scores = compared_scores(judge, cycle, part, index, images, prompts, advance)
        else:
            scores = _scores(judge, candidates, shard, execution.score_batch_size, advance)
    schema = score_schema({"scorer": dataclasses.asdict(info_of(judge))})
    columns = [candidates["candidate_id"].combine_chunks(), pa.array(scores, pa.float32())]
    write_shard(target, pa.table(columns, schema=schema), schema)
    return True


def _check_adopted(path: Path, candidates: pa.Table, judge: Scorer) -> None:
    """Refuse scores that lie there and are not those that would be made now. Raises ShardError."""
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
    """float32 (n,) of the pictures of one shard, decoded `size` at a time."""
    scores = []
    for start in range(0, candidates.num_rows, size):
        batch = candidates.slice(start, size).to_pydict()
        images = pictures(shard, slice(start, start + size), [image["bytes"] for image in batch["image"]])
        scores.append(score_images(judge, images, batch["caption"]))
        advance(len(images))
    return np.concatenate(scores)
