"""Scores images that are simply there: a folder with captions or a table, in shards, with one scorer at a time."""

import dataclasses
import hashlib
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
from prefect import task

from data.captioned import Captioned, read_captioned
from data.schema import read_metadata, score_schema
from data.shards import read_shard, write_shard
from scoring.scorers.pair_judge import is_pair_judge
from scoring.scorers.registry import ScorerSource
from scoring.scorers.scorer import Scorer, info_of, score_images
from tasks.models import scorer_for
from tasks.progress import progress
from tasks.record.recipe import ParameterError
from tasks.record.workspace import CandidateSet
from training.settings import Execution

log = logging.getLogger(__name__)


@task(task_run_name="score-set-{scorer}")
def score_set(
    source: str,
    scorer: str,
    target: Path,
    sources: dict[str, ScorerSource],
    execution: Execution,
    caption_column: str | None = None,
) -> None:
    """Publish one scorer's scores of all images, shard by shard; shards that are there are kept.

    Raises ParameterError when the folder holds scores of other images or captions, or by other weights.
    """
    images = read_captioned(source, caption_column)
    judge = scorer_for(scorer, sources, execution.device)
    if is_pair_judge(judge):
        raise ParameterError(f"scorer={scorer!r}: it compares two images and cannot score a set; leave out its mode")
    starts = range(0, len(images), execution.images_per_shard)
    where = CandidateSet(target, len(starts))
    with progress(f"{scorer} scores {source}", len(images), "image") as advance:
        for index, start in enumerate(starts):
            part = images[start : start + execution.images_per_shard]
            _score_shard(where.scores(scorer, index), part, judge, execution.score_batch_size)
            advance(len(part))


def _score_shard(path: Path, images: Captioned, judge: Scorer, batch_size: int) -> None:
    """One shard; its metadata says what was scored and by whom."""
    inputs = hashlib.sha256("".join(image.digest() for image in images).encode()).hexdigest()
    schema = score_schema({"scorer": dataclasses.asdict(info_of(judge)), "inputs": inputs})
    if path.is_file():
        return _check_same(path, schema)
    scores = []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        scores.append(score_images(judge, [image.open() for image in batch], [image.prompt for image in batch]))
    columns = [pa.array([image.id for image in images]), pa.array(np.concatenate(scores), pa.float32())]
    write_shard(path, pa.table(columns, schema=schema), schema)


def _check_same(path: Path, schema: pa.Schema) -> None:
    there, wanted = read_metadata(read_shard(path).schema), read_metadata(schema)
    for what, old, new in [
        ("other images or captions", there.get("inputs"), wanted["inputs"]),
        ("other weights or settings", there["scorer"]["fingerprint"], wanted["scorer"]["fingerprint"]),
    ]:
        if old != new:
            raise ParameterError(f"output: {path} holds scores of {what} ({old}, now {new}); give another folder")
