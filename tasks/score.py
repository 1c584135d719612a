"""Scores the candidates of one shard with one scorer and publishes the scores."""

import dataclasses
import logging

import numpy as np
import pyarrow as pa
from prefect import task

from scoring.scorer import ScorerInfo, score_images
from tasks.generate import decode_image
from tasks.models import scorer_for
from tasks.plan import read_plan
from tasks.progress import progress
from tasks.workspace import Cycle, Part
from training.pairs import read_metadata, score_schema
from training.shards import ShardError, adopt_shard, read_shard, write_shard

log = logging.getLogger(__name__)


@task(task_run_name="score-{part}-{scorer}-{index:05d}")
def score_shard(cycle: Cycle, part: Part, scorer: str, index: int) -> bool:
    """Publish the scores of one shard; True when scored now, False when they lay there complete.

    What is scored is the stored file, decoded: so scores can be computed again from the shard alone.
    """
    plan = read_plan(cycle)
    where = cycle.part(part, plan.shards(part))
    candidates = read_shard(where.candidates(index), ["candidate_id", "caption", "image"])
    if adopt_shard(where.scores(scorer, index), None, candidates.num_rows):
        log.info("%s: complete, kept", where.scores(scorer, index))
        return False
    judge = scorer_for(scorer, plan.sources().get(scorer), plan.recipe.execution.device)
    scores, batch = [], plan.recipe.execution.score_batch_size
    what = f"{scorer} scores {part} shard {index + 1}/{plan.shards(part)}"
    with progress(what, candidates.num_rows, "image") as advance:
        for start in range(0, candidates.num_rows, batch):
            rows = candidates.slice(start, batch).to_pydict()
            images = [decode_image(image["bytes"]) for image in rows["image"]]
            scores.append(score_images(judge, images, rows["caption"]))
            advance(len(images))
    schema = score_schema({"scorer": {f.name: getattr(judge.info, f.name) for f in dataclasses.fields(ScorerInfo)}})
    columns = [candidates["candidate_id"].combine_chunks(), pa.array(np.concatenate(scores), pa.float32())]
    write_shard(where.scores(scorer, index), pa.table(columns, schema=schema), schema)
    return True


def read_scores(cycle: Cycle, part: Part, scorer: str) -> tuple[np.ndarray, ScorerInfo]:
    """All scores of a part in the order of its candidates, float32 (n,), and who gave them.

    Raises ShardError when two shards were scored by different weights or settings of the scorer.
    """
    plan = read_plan(cycle)
    where = cycle.part(part, plan.shards(part))
    tables = [read_shard(where.scores(scorer, index)) for index in range(plan.shards(part))]
    infos = {ScorerInfo(**read_metadata(table.schema)["scorer"]) for table in tables}
    if len(infos) > 1:
        raise ShardError(
            f"{where.scores(scorer, 0).parent}: scored by {len(infos)} different versions of {scorer!r} "
            f"({', '.join(sorted(info.fingerprint for info in infos))}); delete the folder to score all again"
        )
    return np.concatenate([table["score"].to_numpy() for table in tables]), infos.pop()
