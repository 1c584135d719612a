"""Turns scored candidates into a sealed folder of preference shards."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from prefect import task

from data.manifest import MANIFEST, read_manifest
from data.preference_rows import Pairs, Side, preference_table
from data.schema import pair_schema, read_metadata
from data.sealing import seal
from data.shards import ShardRecord, read_shard, write_shard
from scoring.labels.expressions import Expression
from tasks.record.labels import Labels, label
from tasks.record.plan import PlannedCycle
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
    recipe, scorers = cycle.plan.recipe, cycle.plan.scorer_names("candidates")
    return write_pairs(cycle, recipe.scorer, recipe.pairing, scorers, cycle.preferences)


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
    seal(target, {"train": records}, plan.config_hash(), metadata)
    rows = sum(record.rows for record in records)
    log.info("%d pairs from %d prompts, labelled by %s", rows, len(labels.pairs), expression)
    return rows


class Choice(NamedTuple):
    """A pair by the rows of one candidate shard. sure: the probability that the winner is preferred, if it is known."""

    prompt: int
    winner: int
    loser: int
    margin: float
    sure: float | None


def _write_shard(
    cycle: PlannedCycle,
    index: int,
    labels: Labels,
    scores: Mapping[str, np.ndarray],
    metadata: Mapping[str, Any],
    target: Path,
) -> ShardRecord:
    """The pairs of the prompts of one candidate shard."""
    files, each = cycle.part("candidates"), cycle.plan.recipe.generation.candidates
    candidates, embeddings = read_shard(files.candidates(index)), read_shard(files.embeddings(index))
    first = index * cycle.prompts_per_shard("candidates")
    chosen = [
        Choice(prompt, prompt * each + pair.winner, prompt * each + pair.loser, pair.margin, sure)
        for prompt in range(len(embeddings))
        for pair, sure in zip(labels.pairs[first + prompt], labels.probabilities[first + prompt], strict=True)
    ]
    own = {name: values[first * each :] for name, values in scores.items()}
    schema = _schema(candidates.schema, embeddings.schema, list(scores), metadata)
    table = preference_table(_pairs(candidates, embeddings, own, chosen), schema)
    return write_shard(target / shard_name(index, files.shards), table, schema)


def _pairs(
    candidates: pa.Table, embeddings: pa.Table, scores: Mapping[str, np.ndarray], chosen: Sequence[Choice]
) -> Pairs:
    """What is known of the chosen pairs of one shard; scores: of its candidates."""
    # Which side the winner stands on is a coin flip by content, so that no reader can learn "side 0 wins".
    sides = [_ordered(candidates, choice.winner, choice.loser) for choice in chosen]
    won = [left == choice.winner for (left, _), choice in zip(sides, chosen, strict=True)]
    prompts = pa.array([choice.prompt for choice in chosen], pa.int64())
    left, right = (candidates.take(pa.array([rows[side] for rows in sides], pa.int64())) for side in (0, 1))
    return Pairs(
        prompt_ids=left["prompt_id"],
        captions=left["caption"],
        config_hashes=left["config_hash"],
        sides=(
            _side(left, {name: values[[row for row, _ in sides]] for name, values in scores.items()}),
            _side(right, {name: values[[row for _, row in sides]] for name, values in scores.items()}),
        ),
        label_0=[float(wins) for wins in won],
        soft_label_0=[
            choice.sure if choice.sure is None or wins else 1 - choice.sure
            for wins, choice in zip(won, chosen, strict=True)
        ],
        margins=[choice.margin for choice in chosen],
        prompt_embeddings=embeddings["embedding"].take(prompts),
        pooled_embeddings=embeddings["pooled"].take(prompts) if "pooled" in embeddings.column_names else None,
    )


def _side(taken: pa.Table, scores: Mapping[str, np.ndarray]) -> Side:
    """Candidates on one side of their pairs, and their scores."""
    return Side(
        images=taken["image"], uids=taken["image_uid"], latents=taken["latent"], seeds=taken["seed"],
        models=taken["model"], scores=scores,
    )  # fmt: skip


def _schema(
    candidates: pa.Schema, embeddings: pa.Schema, scorers: Sequence[str], metadata: Mapping[str, Any]
) -> pa.Schema:
    """The schema of a shard, from those of the candidates and embeddings it is made of."""
    shapes = {
        "latent": read_metadata(candidates)["latent"],
        "embedding": read_metadata(embeddings)["embedding"],
    }
    sizes = {name: embeddings.field(name).type.list_size for name in embeddings.names if name != "prompt_id"}
    return pair_schema(
        candidates.field("latent").type.list_size, sizes["embedding"], scorers, {**metadata, **shapes},
        pooled_size=sizes.get("pooled"),
    )  # fmt: skip


def _ordered(candidates: pa.Table, winner: int, loser: int) -> tuple[int, int]:
    """(row of side 0, row of side 1): by the pictures' hashes, which know nothing of the scores."""
    uids = [candidates["image_uid"][row].as_py() for row in (winner, loser)]
    return (winner, loser) if uids[0] <= uids[1] else (loser, winner)
