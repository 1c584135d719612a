"""Turns scored candidates into a sealed folder of preference shards."""

import dataclasses
import logging
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
from prefect import task

from scoring.pairing import Pair, pair_groups
from tasks.generate import generation_metadata
from tasks.plan import Plan, read_plan
from tasks.recipe import ParameterError
from tasks.score import read_scores
from tasks.workspace import Cycle, shard_name
from training.dataset_card import dataset_card
from training.pairs import pair_id, pair_schema, read_metadata, score_column
from training.shards import (
    MANIFEST,
    ShardRecord,
    make_manifest,
    read_manifest,
    read_shard,
    write_manifest,
    write_shard,
    write_text,
)  # fmt: skip

log = logging.getLogger(__name__)
Scores = dict[str, np.ndarray]


@task(task_run_name="pair-candidates")
def pair_candidates(cycle: Cycle) -> int:
    """Write and seal the preference shards of a cycle; returns the number of pairs.

    The smallest margin is in units of the spread over the whole cycle, so pairing needs all scores at once.
    Raises ParameterError when no pair remains.
    """
    plan = read_plan(cycle)
    if (cycle.preferences / MANIFEST).is_file():
        return read_manifest(cycle.preferences).rows
    scored = {name: read_scores(cycle, "training", name) for name in plan.scorer_names("training")}
    scores = {name: values for name, (values, _) in scored.items()}
    label = scored[plan.recipe.scorer][1]
    pairing, candidates = plan.recipe.pairing, plan.recipe.generation.candidates
    groups = scores[plan.recipe.scorer].reshape(-1, candidates)
    pairs = pair_groups(groups, pairing.rule, label.higher_is_better, pairing.min_margin)
    if not any(pairs):
        raise ParameterError(
            f"pairing.min_margin={pairing.min_margin}: no two candidates of a prompt differ that much under "
            f"{label.name}; lower it or raise generation.candidates (now {candidates})"
        )
    metadata = {
        **generation_metadata(plan),
        "scorers": [dataclasses.asdict(info) for _, info in scored.values()],
        "label_rule": {"by": label.name, **pairing.model_dump()},
    }
    records = [_write_shard(cycle, plan, index, pairs, scores, metadata) for index in range(plan.shards("training"))]
    _seal(cycle, plan, records, metadata)
    log.info("%d pairs from %d prompts, labelled by %s", sum(r.rows for r in records), len(groups), label.name)
    return sum(record.rows for record in records)


def _write_shard(
    cycle: Cycle, plan: Plan, index: int, pairs: list[list[Pair]], scores: Scores, metadata: dict[str, Any]
) -> ShardRecord:
    """The pairs of the prompts of one candidate shard."""
    where, each = cycle.part("training", plan.shards("training")), plan.recipe.generation.candidates
    candidates, embeddings = read_shard(where.candidates(index)), read_shard(where.embeddings(index))
    first = index * plan.prompts_per_shard("training")
    chosen = [(prompt, pair) for prompt in range(len(embeddings)) for pair in pairs[first + prompt]]
    # Which side the winner stands on is a coin flip by content, so that no reader can learn "side 0 wins".
    sides = [_ordered(candidates, prompt * each + pair.winner, prompt * each + pair.loser) for prompt, pair in chosen]
    columns = _pair_columns(candidates, sides)
    own = pa.array([prompt for prompt, _ in chosen], pa.int64())
    columns["prompt_embedding"] = embeddings["embedding"].combine_chunks().take(own)
    offset = first * each
    for name, values in scores.items():
        for side in (0, 1):
            taken = values[[offset + rows[side] for rows in sides]]
            columns[score_column(name, side)] = pa.array(taken, pa.float32())
    won = [rows[0] == prompt * each + pair.winner for rows, (prompt, pair) in zip(sides, chosen, strict=True)]
    columns["label_0"] = pa.array([float(w) for w in won], pa.float32())
    columns["label_1"] = pa.array([float(not w) for w in won], pa.float32())
    columns["has_label"] = pa.array([True] * len(chosen), pa.bool_())
    columns["margin"] = pa.array([pair.margin for _, pair in chosen], pa.float32())
    shapes = {
        "latent": read_metadata(candidates.schema)["latent"],
        "embedding": read_metadata(embeddings.schema)["embedding"],
    }
    schema = pair_schema(
        candidates.schema.field("latent").type.list_size, embeddings.schema.field("embedding").type.list_size,
        list(scores), {**metadata, **shapes},
    )  # fmt: skip
    table = pa.table({name: columns[name] for name in schema.names}, schema=schema)
    return write_shard(cycle.preferences / shard_name(index, plan.shards("training")), table, schema)


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


def _seal(cycle: Cycle, plan: Plan, records: list[ShardRecord], metadata: dict[str, Any]) -> None:
    """Card first, manifest last: its existence says that the folder is complete."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    manifest = make_manifest({"train": records}, plan.config_hash(), created)
    write_text(cycle.preferences / "README.md", dataset_card(manifest, metadata))
    write_manifest(cycle.preferences, {"train": records}, plan.config_hash(), created)
