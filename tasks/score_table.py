"""Writes the scores of a set of images as one table."""

from pathlib import Path

import pyarrow as pa
from prefect import task
from pyarrow import csv

from data.captioned import read_captioned
from data.files import write_text
from data.ids import score_column
from data.shards import read_shard
from tasks.record.workspace import CandidateSet
from training.settings import Execution


@task(task_run_name="write-table")
def write_table(
    source: str, scorers: list[str], target: Path, execution: Execution, caption_column: str | None = None
) -> Path:
    """All scores as one table, `scores.csv`: id, prompt and a column a scorer."""
    images = read_captioned(source, caption_column)
    shards = len(range(0, len(images), execution.images_per_shard))
    where = CandidateSet(target, shards)
    columns: dict[str, object] = {"id": [image.id for image in images], "prompt": [image.prompt for image in images]}
    for scorer in scorers:
        tables = [read_shard(where.scores(scorer, index), ["score"]) for index in range(shards)]
        columns[score_column(scorer, 0).removesuffix("_0")] = pa.concat_tables(tables)["score"]
    text = pa.BufferOutputStream()
    csv.write_csv(pa.table(columns), text)
    write_text(target / "scores.csv", text.getvalue().to_pybytes().decode())
    return target / "scores.csv"
