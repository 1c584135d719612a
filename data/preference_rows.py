"""Builds rows of preference shards: what is given a pair, and what follows from it, in the columns of a schema.

The one place where such rows are put together, so that labels, ids and hashes agree whoever makes them. Knows nothing
of where pictures, latents and labels come from.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from data.columns import latent_column
from data.ids import image_uid, pair_id, score_column
from data.schema import IMAGE

Column: TypeAlias = pa.Array | pa.ChunkedArray | np.ndarray | Sequence[Any]
"""One value a pair. Latents and embeddings may be arrays (pair, ...), pictures the encoded files."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two pictures of every pair.

    seeds: of its generator, -1 = not known. models: the checkpoint that drew it. scores: by the scorer's name, in its
    own unit. uids: None = hashed here. time_ids: None where the schema has none.
    """

    images: Column
    latents: Column
    seeds: Column
    models: Column
    scores: Mapping[str, Column] = field(default_factory=dict)
    uids: Column | None = None
    time_ids: Column | None = None


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """What is given of every pair.

    label_0: 1 = side 0 is preferred, 0 = side 1 is, 0.5 = neither, None = nobody decided. soft_label_0: the probability
    that side 0 is preferred, None = not known. margins: by how much the winner is. ids: None = made of prompts and
    seeds. Embeddings: None where the schema has none.
    """

    prompt_ids: Column
    captions: Column
    sides: tuple[Side, Side]
    label_0: Sequence[float | None]
    soft_label_0: Sequence[float | None] | None = None
    margins: Column | None = None
    config_hashes: Column
    ids: Column | None = None
    prompt_embeddings: Column | None = None
    pooled_embeddings: Column | None = None


def preference_table(pairs: Pairs, schema: pa.Schema) -> pa.Table:
    """The rows of these pairs. schema: see `data.schema.pair_schema`. Raises ValueError for a column not given."""
    columns = _given(pairs) | _labels(pairs)
    if pairs.ids is None:
        columns["pair_id"] = _pair_ids(columns)
    uids = zip(*(_values(columns[f"image_{side}_uid"]) for side in (0, 1)), strict=True)
    columns["are_different"] = [first != second for first, second in uids]
    if missing := [name for name in schema.names if columns.get(name) is None]:
        raise ValueError(f"pairs without {', '.join(missing)}; the schema of the shard has such columns")
    return pa.table([_array(columns[field.name], field.type) for field in schema], schema=schema)


def _given(pairs: Pairs) -> dict[str, Column | None]:
    columns: dict[str, Column | None] = {
        "pair_id": pairs.ids, "prompt_id": pairs.prompt_ids, "caption": pairs.captions,
        "prompt_embedding": pairs.prompt_embeddings, "pooled_embedding": pairs.pooled_embeddings,
        "margin": [None] * len(pairs.label_0) if pairs.margins is None else pairs.margins,
        "config_hash": pairs.config_hashes,
    }  # fmt: skip
    for index, side in enumerate(pairs.sides):
        columns |= {
            f"image_{index}": side.images, f"latent_{index}": side.latents, f"seed_{index}": side.seeds,
            f"model_{index}": side.models, f"time_ids_{index}": side.time_ids,
            f"image_{index}_uid": [image_uid(data) for data in side.images] if side.uids is None else side.uids,
        }  # fmt: skip
        columns |= {score_column(scorer, index): scores for scorer, scores in side.scores.items()}
    return columns


def _labels(pairs: Pairs) -> dict[str, Column | None]:
    """Both sides' labels; side 1 has what side 0 leaves of 1."""
    soft = [None] * len(pairs.label_0) if pairs.soft_label_0 is None else pairs.soft_label_0
    return {
        "label_0": pairs.label_0,
        "label_1": _complements(pairs.label_0),
        "soft_label_0": soft,
        "soft_label_1": _complements(soft),
        "has_label": [label is not None for label in pairs.label_0],
    }


def _complements(shares: Sequence[float | None]) -> list[float | None]:
    return [None if share is None else 1 - share for share in shares]


def _pair_ids(columns: Mapping[str, Column | None]) -> list[str]:
    keys = ("prompt_id", "seed_0", "seed_1", "model_0", "model_1", "config_hash")
    return [pair_id(*identity) for identity in zip(*(_values(columns[key]) for key in keys), strict=True)]


def _values(column: Any) -> list[Any]:
    return list(column.to_pylist() if isinstance(column, pa.Array | pa.ChunkedArray) else column)


def _array(values: Any, kind: pa.DataType) -> pa.Array | pa.ChunkedArray:
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return values
    if isinstance(values, np.ndarray) and values.ndim > 1:
        return latent_column(values)
    if kind == IMAGE:
        values = [{"bytes": data, "path": None} for data in values]
    return pa.array(values, kind)
