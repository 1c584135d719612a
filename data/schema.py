"""Columns of candidate, score and preference shards, their types, and what they mean.

Knows names, types and meanings. Knows nothing of files (see `data.shards`), of models, or of how a
label is decided.

The meaning of a label, once for the whole project: `label_0` is 1 when side 0 won, 0 when side 1 won,
0.5 for a tie and null when nothing was decided; `label_1` is always `1 - label_0`. `soft_label_0` is the
probability that side 0 is preferred, null where nobody fitted one; `soft_label_1` is `1 - soft_label_0`.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from data.ids import canonical_json, score_column, scorer_slug

SCHEMA_VERSION = "1.2"
"""major.minor. A minor step only adds nullable columns; a reader refuses any other major number."""
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
"""The storage of `datasets.Image`. Fields of this type stay nullable: `datasets` compares whole fields and
silently falls back to a plain dict when nullability differs."""


def candidate_schema(latent_size: int, metadata: Mapping[str, Any]) -> pa.Schema:
    """One row per generated image; `latent_size` = channels x height x width of the final latents."""
    fields = [
        ("candidate_id", pa.string()),
        ("prompt_id", pa.string()),
        ("caption", pa.string()),
        ("candidate_index", pa.int32()),
        ("image", IMAGE),
        ("image_uid", pa.string()),
        ("latent", pa.list_(pa.float16(), latent_size)),
        ("seed", pa.int64()),
        ("model", pa.string()),
        ("config_hash", pa.string()),
    ]
    return pa.schema(fields, metadata=_schema_metadata(metadata, ["image"]))


def pair_schema(
    latent_size: int,
    embedding_size: int | None,
    scorers: Sequence[str],
    metadata: Mapping[str, Any],
    pooled_size: int | None = None,
    time_ids: bool = False,
) -> pa.Schema:
    """One row per preference pair, with column names close to those of Pick-a-Pic.

    Scores are facts and labels a decision, therefore both are kept: labels can be decided again without a
    GPU. Scores, labels, soft labels and margin may be null. `embedding_size` = tokens x width of the text encoder's
    output. `pooled_size` = width of the pooled text embedding, for models that take one. `time_ids`: whether sizes and
    crops are told (`training.model.family.TIME_IDS`); without them every picture is whole, at its own size.
    """
    fields = [("pair_id", pa.string()), ("prompt_id", pa.string()), ("caption", pa.string())]
    fields += _sides("image", IMAGE)
    fields += [("image_0_uid", pa.string()), ("image_1_uid", pa.string())]
    fields += _sides("latent", pa.list_(pa.float16(), latent_size))
    if embedding_size is not None:
        fields.append(("prompt_embedding", pa.list_(pa.float16(), embedding_size)))
    if pooled_size is not None:
        fields.append(("pooled_embedding", pa.list_(pa.float16(), pooled_size)))
    if time_ids:
        fields += _sides("time_ids", pa.list_(pa.int32(), 6))
    fields += _sides("seed", pa.int64()) + _sides("model", pa.string())
    for scorer in _distinct(scorers):
        fields += [(score_column(scorer, side), pa.float32()) for side in (0, 1)]
    fields += _sides("label", pa.float32()) + _sides("soft_label", pa.float32())
    fields += [("has_label", pa.bool_()), ("are_different", pa.bool_())]
    fields += [("margin", pa.float32()), ("config_hash", pa.string())]
    return pa.schema(fields, metadata=_schema_metadata(metadata, ["image_0", "image_1"]))


def score_schema(metadata: Mapping[str, Any]) -> pa.Schema:
    """One row per candidate; the scorer's name, version, unit and fingerprint go into the metadata."""
    fields = [("candidate_id", pa.string()), ("score", pa.float32())]
    return pa.schema(fields, metadata=_schema_metadata(metadata, []))


def _sides(name: str, kind: pa.DataType) -> list[tuple[str, pa.DataType]]:
    return [(f"{name}_0", kind), (f"{name}_1", kind)]


def _distinct(scorers: Sequence[str]) -> Sequence[str]:
    slugs = [scorer_slug(scorer) for scorer in scorers]
    if len(set(slugs)) < len(slugs):
        raise ValueError(f"scorers {list(scorers)} give columns {slugs}; expected distinct ones, rename one")
    return scorers


def _schema_metadata(metadata: Mapping[str, Any], images: Sequence[str]) -> dict[str, str]:
    # No date and no host name in here: equal rows must give equal bytes. Dates live in the manifest.
    provenance = {"rlaif": canonical_json({**metadata, "schema_version": SCHEMA_VERSION})}
    if not images:
        return provenance
    features = {name: {"_type": "Image"} for name in images}
    return {"huggingface": canonical_json({"info": {"features": features}})} | provenance


def read_metadata(schema: pa.Schema) -> dict[str, Any]:
    """The provenance that was given to the schema, plus its `schema_version`."""
    text = (schema.metadata or {}).get(b"rlaif")
    if text is None:
        raise ValueError("the schema has no 'rlaif' metadata; expected a shard written by this project")
    metadata = json.loads(text)
    if not isinstance(metadata, dict):
        raise ValueError(f"the 'rlaif' metadata is {type(metadata).__name__}, expected a JSON object")
    return metadata


def check_version(found: object) -> None:
    """Refuse data whose major version this code cannot know."""
    major = SCHEMA_VERSION.split(".")[0]
    if str(found).split(".")[0] != major:
        raise ValueError(f"schema version {found}, this code reads {major}.x; use the release that wrote it")


def schema_difference(found: pa.Schema, expected: pa.Schema) -> str | None:
    """Name the first column, else the metadata keys, in which two schemas differ; None when equal."""
    columns = column_difference(found, expected)
    if columns is not None:
        return columns
    for ours, theirs in zip(expected, found, strict=True):
        if ours.nullable != theirs.nullable:
            return f"column {ours.name} has nullable={theirs.nullable}, expected {ours.nullable}"
    ours, theirs = _flat_metadata(expected), _flat_metadata(found)
    keys = [key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)]
    told = [f"{key} is {theirs.get(key, 'absent')}, expected {ours.get(key, 'absent')}" for key in keys]
    return f"metadata {'; '.join(told)}" if told else None


def column_difference(found: pa.Schema, expected: pa.Schema) -> str | None:
    """Compare names, types and order of columns only."""
    for name in expected.names:
        if name not in found.names:
            return f"column {name} is missing, expected {expected.field(name).type}"
        if found.field(name).type != expected.field(name).type:
            return f"column {name} is {found.field(name).type}, expected {expected.field(name).type}"
    for name in found.names:
        if name not in expected.names:
            return f"column {name} ({found.field(name).type}) is not expected"
    if found.names != expected.names:
        return f"columns are ordered {found.names}, expected {expected.names}"
    return None


def _flat_metadata(schema: pa.Schema) -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, text in (schema.metadata or {}).items():
        try:
            flat |= _flatten(key.decode(), json.loads(text))
        except ValueError:  # damaged, or another program's: compare it as it is
            flat[repr(key)] = repr(text)
    return {key.removeprefix("rlaif."): value for key, value in flat.items()}


def _flatten(prefix: str, value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not value:
        return {prefix: canonical_json(value)}
    return {k: v for name, child in value.items() for k, v in _flatten(f"{prefix}.{name}", child).items()}
