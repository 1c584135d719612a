"""Turns human preference data into a sealed folder of preference shards for one base model, shard by shard."""

import dataclasses
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from prefect import task

from data.files import write_json
from data.human import Counts, HumanData, human_data
from data.ids import json_sha256
from data.manifest import MANIFEST, read_manifest
from data.schema import read_metadata
from data.sealing import seal
from data.shards import ShardRecord, adopt_shard, open_shard, write_shard
from data.tables import Row
from tasks.progress import progress
from tasks.record.recipe import ParameterError, Recipe
from training.model.devices import resolve_device
from training.model.families import family_for
from training.model.loading import load_encoders
from training.model.pair_encoder import PairEncoder
from training.model.picture_size import picture_size
from training.model.reference import ModelRef, model_digest

log = logging.getLogger(__name__)
ROWS_PER_SHARD = 512
"""Rows of the source; a killed import loses at most the shard it was in."""


@dataclass(frozen=True)
class Import:
    """What is imported for which model. The fields up to `rows_per_shard` decide the result.

    height, width: of the pictures trained on. max_pairs: the first so many; None = all. target: the folder of all
    imports. batch_size: pictures a forward pass.
    """

    source: str
    data: HumanData
    model: ModelRef
    digest: str
    height: int
    width: int
    max_pairs: int | None
    rows_per_shard: int
    target: Path
    device: str
    dtype: str
    batch_size: int

    def metadata(self) -> dict[str, Any]:
        """Provenance, as every shard carries it."""
        known: dict[str, Any] = {
            "base_model": {"id": self.model.base, "revision": self.model.revision, "digest": self.digest},
            "imported": self.data.identity(),
            "pictures": {"height": self.height, "width": self.width, "fit": "scaled to cover (Lanczos), centre crop"},
            "label_rule": {"by": "the source"},
            "max_pairs": self.max_pairs,
            "rows_per_shard": self.rows_per_shard,
        }  # fmt: skip
        return known | {"config_hash": json_sha256(known)[:16]}

    @property
    def config_hash(self) -> str:
        return str(self.metadata()["config_hash"])

    @property
    def folder(self) -> Path:
        """One for each source, model and size: trainings share it."""
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(self.source).name) or "pairs"
        return self.target / f"{name}-{self.config_hash[:8]}"

    def shard(self, index: int) -> Path:
        return self.folder / f"{index:05d}.arrow"

    def counts(self, index: int) -> Path:
        return self.folder / "counts" / f"{index:05d}.json"


def plan_import(
    source: str, recipe: Recipe, max_pairs: int | None, target: Path, rows_per_shard: int = ROWS_PER_SHARD
) -> Import:
    """Raises ParameterError for a source, model or size that will not do. Loads no weights."""
    model, execution = ModelRef(recipe.base_model, recipe.revision), recipe.execution
    height, width = picture_size(model, recipe.generation.height, recipe.generation.width)
    return Import(
        source, human_data(source), model, model_digest(model.base, model.revision), height, width, max_pairs,
        rows_per_shard, target, execution.device, execution.dtype, execution.batch_size,
    )  # fmt: skip


@task(task_run_name="import-pairs")
def import_pairs(job: Import) -> Path:
    """Publish what is missing of the shards, then seal the folder; returns it. A sealed one is left as it is.

    Raises ParameterError when no pair remains or too many pictures are broken.
    """
    if (job.folder / MANIFEST).is_file():
        log.info("%s: complete, kept (%d pairs)", job.folder, read_manifest(job.folder).rows)
        return job.folder
    encoder = _encoder(job)
    metadata = job.metadata()
    schema = encoder.schema(metadata)
    records, total = _adopted(job, schema)
    with progress(f"import {job.source}", job.data.count() or job.max_pairs or 1, "row") as advance:
        advance(total.rows)
        # Which rows make a shard depends on nothing but its number.
        rows = job.data.rows(len(records) * job.rows_per_shard)
        while total.pairs != job.max_pairs and (part := list(islice(rows, job.rows_per_shard))):
            counts = Counts()
            records.append(_write_shard(job, len(records), part, encoder, schema, total, counts))
            total += counts
            advance(counts.rows, f"{total.pairs} pairs")
    if not total.pairs:
        raise ParameterError(f"pairs={job.source!r}: no pair remains; {total.text()}")
    write_json(job.folder / "counts.json", dataclasses.asdict(total))
    told = read_metadata(open_shard(job.shard(0)).schema) | metadata | {"counts": total.text()}
    seal(job.folder, {"train": records}, job.config_hash, told)
    log.info("%s: %s", job.source, total.text())
    return job.folder


def _encoder(job: Import) -> PairEncoder:
    pipeline = load_encoders(job.model, resolve_device(job.device), job.dtype)
    return PairEncoder(pipeline, job.height, job.width, job.batch_size, family_for(job.model).takes_time_ids)


def _adopted(job: Import, schema: pa.Schema) -> tuple[list[ShardRecord], Counts]:
    """The shards that an earlier run published, and what became of their rows.

    A shard's counts are written before it is published, so a shard without them is none of ours.
    """
    records: list[ShardRecord] = []
    total = Counts()
    while job.counts(len(records)).is_file():
        counts = Counts(**json.loads(job.counts(len(records)).read_text()))
        record = adopt_shard(job.shard(len(records)), schema, counts.pairs)
        if record is None:
            break
        records.append(record)
        total += counts
    if records:
        log.info("%s: %d shards with %d pairs are there, kept", job.folder, len(records), total.pairs)
    return records, total


def _write_shard(
    job: Import,
    index: int,
    rows: list[Row],
    encoder: PairEncoder,
    schema: pa.Schema,
    total: Counts,
    counts: Counts,
) -> ShardRecord:
    limit = len(rows) if job.max_pairs is None else job.max_pairs - total.pairs

    def batches() -> Iterator[pa.RecordBatch]:
        yield from encoder.batches(rows, index * job.rows_per_shard, limit, counts, schema, job.config_hash)
        (total + counts).check()
        write_json(job.counts(index), dataclasses.asdict(counts))  # before the shard becomes visible

    try:
        return write_shard(job.shard(index), batches(), schema)
    except ValueError as error:
        first = index * job.rows_per_shard
        raise ParameterError(f"pairs={job.source!r}: rows {first} to {first + len(rows) - 1}: {error}") from error
