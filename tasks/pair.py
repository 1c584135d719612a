"""Turns scored candidates into a sealed folder of preference shards."""

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from prefect import task

from data.manifest import MANIFEST, read_manifest
from data.preference_rows import Pairs, Side, preference_table
from data.schema import pair_schema, read_metadata
from data.sealing import seal
from data.shards import ShardRecord, read_shard, write_shard
from scoring.labels.combine import winner_probabilities
from scoring.labels.expressions import Expression, leaves
from scoring.labels.pairing import Pair, pair_groups
from tasks.generate import generation_metadata
from tasks.record.plan import Plan, read_plan
from tasks.record.recipe import ParameterError
from tasks.record.settings import Pairing
from tasks.record.workspace import Cycle, shard_name
from tasks.score import Scored, read_scores

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Labels:
    """What a labelling decided: the pairs of each prompt, and of each pair P(winner preferred) where it is known."""

    pairs: list[list[Pair]]
    probabilities: list[list[float | None]]
    unit: str

    def prompts_with_pairs(self) -> int:
        return sum(bool(group) for group in self.pairs)


@task(task_run_name="pair-candidates")
def pair_candidates(cycle: Cycle) -> int:
    """Write and seal the preference shards of a cycle; returns the number of pairs.

    Raises ParameterError when no pair remains.
    """
    plan = read_plan(cycle)
    return write_pairs(cycle, plan.labelling(), plan.recipe.pairing, plan.scorer_names("training"), cycle.preferences)


def write_pairs(cycle: Cycle, expression: Expression, pairing: Pairing, scorers: list[str], target: Path) -> int:
    """Label a cycle's candidates by an expression into a sealed folder; returns the number of pairs.

    scorers: whose scores the pairs carry, those of the expression among them; all have scored the candidates. A
    folder that is sealed is left as it is. Raises ParameterError when no pair remains.
    """
    if (target / MANIFEST).is_file():
        return read_manifest(target).rows
    plan, scored = read_plan(cycle), read_scores(cycle, "training", scorers)
    labels = label(expression, pairing, scored, plan.recipe.generation.candidates)
    if not labels.prompts_with_pairs():
        raise ParameterError(
            f"pairing.min_margin={pairing.min_margin}: no two candidates of a prompt differ that much under "
            f"{expression}; lower it or raise generation.candidates (now {plan.recipe.generation.candidates})"
        )
    metadata = {
        **generation_metadata(plan),
        "scorers": [{**dataclasses.asdict(info), "column": name} for name, info in scored.infos.items()],
        "label_rule": {"by": str(expression), "unit": labels.unit, **pairing.model_dump()},
    }
    shards = range(plan.shards("training"))
    records = [_write_shard(cycle, plan, index, labels, scored.scores, metadata, target) for index in shards]
    seal(target, {"train": records}, plan.config_hash(), metadata)
    rows = sum(record.rows for record in records)
    log.info("%d pairs from %d prompts, labelled by %s", rows, len(labels.pairs), expression)
    return rows


def label(expression: Expression, pairing: Pairing, scored: Scored, candidates: int) -> Labels:
    """Decide the pairs of all prompts; the smallest margin is in units of the spread over all of them."""
    order = scored.order(expression, candidates)
    margins = (order.margins(prompt) for prompt in range(order.prompts()))
    pairs = pair_groups(margins, order.spread, pairing.rule, pairing.min_margin)
    flat = [(prompt, pair) for prompt, group in enumerate(pairs) for pair in group]
    groups = {name: scored.scores[name].reshape(-1, candidates) for name in leaves(expression)}
    winners = np.array([(prompt, pair.winner) for prompt, pair in flat]).reshape(-1, 2)
    losers = np.array([(prompt, pair.loser) for prompt, pair in flat]).reshape(-1, 2)
    size = np.array([pair.margin for _, pair in flat])
    found = winner_probabilities(expression, winners, losers, groups, scored.infos, size)
    known = iter([None] * len(flat) if found is None else found.tolist())
    return Labels(pairs, [[next(known) for _ in group] for group in pairs], order.unit)


def _write_shard(
    cycle: Cycle,
    plan: Plan,
    index: int,
    labels: Labels,
    scores: dict[str, np.ndarray],
    metadata: dict[str, Any],
    target: Path,
) -> ShardRecord:
    """The pairs of the prompts of one candidate shard."""
    where, each = cycle.part("training", plan.shards("training")), plan.recipe.generation.candidates
    candidates, embeddings = read_shard(where.candidates(index)), read_shard(where.embeddings(index))
    first = index * plan.prompts_per_shard("training")
    prompts = range(len(embeddings))
    chosen = [(prompt, pair) for prompt in prompts for pair in labels.pairs[first + prompt]]
    sure = [probability for prompt in prompts for probability in labels.probabilities[first + prompt]]
    # Which side the winner stands on is a coin flip by content, so that no reader can learn "side 0 wins".
    rows = [_ordered(candidates, prompt * each + pair.winner, prompt * each + pair.loser) for prompt, pair in chosen]
    won = [sides[0] == prompt * each + pair.winner for sides, (prompt, pair) in zip(rows, chosen, strict=True)]
    own = {name: scores[name][first * each :] for name in scores}
    sides = (_side(candidates, own, [left for left, _ in rows]), _side(candidates, own, [right for _, right in rows]))
    whose = candidates.take(pa.array([left for left, _ in rows], pa.int64()))
    prompt_rows = pa.array([prompt for prompt, _ in chosen], pa.int64())
    pairs = Pairs(
        prompt_ids=whose["prompt_id"],
        captions=whose["caption"],
        config_hashes=whose["config_hash"],
        sides=sides,
        label_0=[float(wins) for wins in won],
        soft_label_0=[p if p is None or wins else 1 - p for wins, p in zip(won, sure, strict=True)],
        margins=[pair.margin for _, pair in chosen],
        prompt_embeddings=embeddings["embedding"].take(prompt_rows),
        pooled_embeddings=embeddings["pooled"].take(prompt_rows) if "pooled" in embeddings.schema.names else None,
    )
    schema = _schema(candidates.schema, embeddings.schema, list(scores), metadata)
    return write_shard(target / shard_name(index, plan.shards("training")), preference_table(pairs, schema), schema)


def _side(candidates: pa.Table, scores: Mapping[str, np.ndarray], rows: list[int]) -> Side:
    """The candidates that stand on one side; scores: of the candidates."""
    taken = candidates.take(pa.array(rows, pa.int64()))
    return Side(
        images=taken["image"],
        uids=taken["image_uid"],
        latents=taken["latent"],
        seeds=taken["seed"],
        models=taken["model"],
        scores={name: values[rows] for name, values in scores.items()},
    )


def _schema(candidates: pa.Schema, embeddings: pa.Schema, scorers: list[str], metadata: dict[str, Any]) -> pa.Schema:
    """Of the shard, from those of the candidates and embeddings it is made of."""
    shapes = {
        "latent": read_metadata(candidates)["latent"],
        "embedding": read_metadata(embeddings)["embedding"],
    }
    return pair_schema(
        candidates.field("latent").type.list_size, embeddings.field("embedding").type.list_size, scorers,
        {**metadata, **shapes}, _size(embeddings, "pooled"),
    )  # fmt: skip


def _size(schema: pa.Schema, column: str) -> int | None:
    """Numbers a row of a fixed-size column, None when it is not there."""
    return schema.field(column).type.list_size if column in schema.names else None


def _ordered(candidates: pa.Table, winner: int, loser: int) -> tuple[int, int]:
    """(row of side 0, row of side 1): by the pictures' hashes, which know nothing of the scores."""
    uids = [candidates["image_uid"][row].as_py() for row in (winner, loser)]
    return (winner, loser) if uids[0] <= uids[1] else (loser, winner)
