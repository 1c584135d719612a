"""Turns scored candidates into a sealed folder of preference shards."""

import dataclasses
import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from prefect import task

from data.card import dataset_card
from data.files import write_text
from data.ids import pair_id, score_column
from data.manifest import MANIFEST, make_manifest, read_manifest, write_manifest
from data.schema import pair_schema, read_metadata
from data.shards import ShardRecord, read_shard, write_shard
from scoring.labels.expressions import Expression
from tasks.record.labels import Labels, label
from tasks.record.plan import Plan, PlannedCycle
from tasks.record.recipe import ParameterError
from tasks.record.scores import read_scores
from tasks.record.settings import Pairing
from tasks.record.workspace import shard_name

log = logging.getLogger(__name__)


@task(task_run_name="pair-candidates")
def pair_candidates(cycle: PlannedCycle) -> int:
    """Write and seal the preference shards of a cycle; returns the number of pairs.

    Raises ParameterError when no pair remains.
    """
    plan = cycle.plan
    return write_pairs(cycle, plan.labelling(), plan.recipe.pairing, plan.scorer_names("candidates"), cycle.preferences)


def write_pairs(cycle: PlannedCycle, expression: Expression, pairing: Pairing, scorers: list[str], target: Path) -> int:
    """Label a cycle's candidates by an expression into a sealed folder; returns the number of pairs.

    scorers: whose scores the pairs carry, those of the expression among them; all have scored the candidates. A
    folder that is sealed is left as it is. Raises ParameterError when no pair remains.
    """
    if (target / MANIFEST).is_file():
        return read_manifest(target).rows
    plan, scored = cycle.plan, read_scores(cycle, "candidates", scorers)
    labels = label(expression, pairing, scored, plan.recipe.generation.candidates)
    if not labels.prompts_with_pairs():
        raise ParameterError(
            f"pairing.min_margin={pairing.min_margin}: no two candidates of a prompt differ that much under "
            f"{expression}; lower it or raise generation.candidates (now {plan.recipe.generation.candidates})"
        )
    metadata = {
        **plan.provenance(),
        "scorers": [{**dataclasses.asdict(info), "column": name} for name, info in scored.infos.items()],
        "label_rule": {"by": str(expression), "unit": labels.unit, **pairing.model_dump()},
    }
    shards = range(cycle.shards("candidates"))
    records = [_write_shard(cycle, index, labels, scored.scores, metadata, target) for index in shards]
    _seal(target, plan, records, metadata)
    rows = sum(record.rows for record in records)
    log.info("%d pairs from %d prompts, labelled by %s", rows, len(labels.pairs), expression)
    return rows


def _write_shard(
    cycle: PlannedCycle,
    index: int,
    labels: Labels,
    scores: dict[str, np.ndarray],
    metadata: dict[str, Any],
    target: Path,
) -> ShardRecord:
    """The pairs of the prompts of one candidate shard."""
    files, each = cycle.part("candidates"), cycle.plan.recipe.generation.candidates
    candidates, embeddings = read_shard(files.candidates(index)), read_shard(files.embeddings(index))
    first = index * cycle.prompts_per_shard("candidates")
    prompts = range(len(embeddings))
    chosen = [(prompt, pair) for prompt in prompts for pair in labels.pairs[first + prompt]]
    sure = [probability for prompt in prompts for probability in labels.probabilities[first + prompt]]
    # Which side the winner stands on is a coin flip by content, so that no reader can learn "side 0 wins".
    sides = [_ordered(candidates, prompt * each + pair.winner, prompt * each + pair.loser) for prompt, pair in chosen]
    columns = _pair_columns(candidates, sides)
    own = pa.array([prompt for prompt, _ in chosen], pa.int64())
    for name, column in {"embedding": "prompt_embedding", "pooled": "pooled_embedding"}.items():
        if name in embeddings.schema.names:
            columns[column] = embeddings[name].combine_chunks().take(own)
    offset = first * each
    for name, values in scores.items():
        for side in (0, 1):
            taken = values[[offset + rows[side] for rows in sides]]
            columns[score_column(name, side)] = pa.array(taken, pa.float32())
    won = [rows[0] == prompt * each + pair.winner for rows, (prompt, pair) in zip(sides, chosen, strict=True)]
    columns |= _label_columns(won, sure)
    columns["margin"] = pa.array([pair.margin for _, pair in chosen], pa.float32())
    shapes = {
        "latent": read_metadata(candidates.schema)["latent"],
        "embedding": read_metadata(embeddings.schema)["embedding"],
    }
    schema = pair_schema(
        candidates.schema.field("latent").type.list_size, embeddings.schema.field("embedding").type.list_size,
        list(scores), {**metadata, **shapes}, _size(embeddings.schema, "pooled"),
    )  # fmt: skip
    table = pa.table({name: columns[name] for name in schema.names}, schema=schema)
    return write_shard(target / shard_name(index, files.shards), table, schema)


def _label_columns(won: list[bool], sure: list[float | None]) -> dict[str, pa.Array]:
    """Hard and soft labels; won: whether side 0 did; sure: P(winner preferred) where it is known."""
    first = [p if p is None or w else 1 - p for w, p in zip(won, sure, strict=True)]
    return {
        "label_0": pa.array([float(w) for w in won], pa.float32()),
        "label_1": pa.array([float(not w) for w in won], pa.float32()),
        "soft_label_0": pa.array(first, pa.float32()),
        "soft_label_1": pa.array([p if p is None else 1 - p for p in first], pa.float32()),
        "has_label": pa.array([True] * len(won), pa.bool_()),
    }


def _size(schema: pa.Schema, column: str) -> int | None:
    """Numbers a row of a fixed-size column, None when it is not there."""
    return schema.field(column).type.list_size if column in schema.names else None


def _ordered(candidates: pa.Table, winner: int, loser: int) -> tuple[int, int]:
    """(row of side 0, row of side 1): by the pictures' hashes, which know nothing of the scores."""
    uids = [candidates["image_uid"][row].as_py() for row in (winner, loser)]
    return (winner, loser) if uids[0] <= uids[1] else (loser, winner)


def _pair_columns(candidates: pa.Table, sides: list[tuple[int, int]]) -> dict[str, pa.Array]:
    """What both sides bring along, by column name of a preference shard."""
    taken = [candidates.take(pa.array([rows[side] for rows in sides], pa.int64())).combine_chunks() for side in (0, 1)]
    columns = {name: taken[0][name] for name in ("prompt_id", "caption", "config_hash")}
    for side, table in enumerate(taken):
        columns |= {f"{name}_{side}": table[name] for name in ("image", "latent", "seed", "model")}
        columns[f"image_{side}_uid"] = table["image_uid"]
    keys = ("prompt_id", "seed_0", "seed_1", "model_0", "model_1", "config_hash")
    identities = zip(*(columns[key].to_pylist() for key in keys), strict=True)
    columns["pair_id"] = pa.array([pair_id(*identity) for identity in identities], pa.string())
    uids = zip(columns["image_0_uid"].to_pylist(), columns["image_1_uid"].to_pylist(), strict=True)
    columns["are_different"] = pa.array([a != b for a, b in uids], pa.bool_())
    return columns


def _seal(target: Path, plan: Plan, records: list[ShardRecord], metadata: dict[str, Any]) -> None:
    """Card first, manifest last: its existence says that the folder is complete."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    manifest = make_manifest({"train": records}, plan.config_hash(), created)
    write_text(target / "README.md", dataset_card(manifest, metadata))
    write_manifest(target, {"train": records}, plan.config_hash(), created)
