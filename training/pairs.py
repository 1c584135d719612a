"""Columns of candidate, score and preference shards, the ids of their rows, and what a sound row is.

Knows names, types, hashes and meanings. Knows nothing of files (see `shards`), of models, or of how a
label is decided.

The meaning of a label, once for the whole project: `label_0` is 1 when side 0 won, 0 when side 1 won,
0.5 for a tie and null when nothing was decided; `label_1` is always `1 - label_0`. `soft_label_0` is the
probability that side 0 is preferred, null where nobody fitted one; `soft_label_1` is `1 - soft_label_0`.
"""

import hashlib
import io
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

SCHEMA_VERSION = "1.2"
"""major.minor. A minor step only adds nullable columns; a reader refuses any other major number."""

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
"""The storage of `datasets.Image`. Fields of this type stay nullable: `datasets` compares whole fields and
silently falls back to a plain dict when nullability differs."""

PICKAPIC = pa.schema(
    [("caption", pa.string()), ("jpg_0", pa.binary()), ("jpg_1", pa.binary())]
    + [("label_0", pa.float64()), ("label_1", pa.float64())]
    + [("has_label", pa.bool_()), ("are_different", pa.bool_())]
    + [(name, pa.string()) for name in ("model_0", "model_1", "image_0_uid", "image_1_uid")]
)
"""The columns of Pick-a-Pic that say something about a pair; images as plain bytes of any codec."""

Problem = tuple[int, str]
"""A row's index within its batch, and what is wrong with it."""


def canonical_json(value: object) -> str:
    """One text per value, whatever the order in which its keys were inserted."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _digest(value: object) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def prompt_id(prompt: str) -> str:
    """16 hex digits that identify a prompt; composed and decomposed accents give the same id."""
    text = unicodedata.normalize("NFC", prompt).strip()
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def candidate_id(prompt_id: str, seed: int, model: str, config_hash: str) -> str:
    """32 hex digits that identify an image before it exists, so that a rerun can recognise it."""
    key = {"prompt_id": prompt_id, "seed": int(seed), "model": model, "config_hash": config_hash}
    return _digest(key)[:32]


def pair_id(prompt_id: str, seed_0: int, seed_1: int, model_0: str, model_1: str, config_hash: str) -> str:
    """32 hex digits that identify a pair; the two orders of the same images are two ids."""
    key = {"prompt_id": prompt_id, "seed_0": int(seed_0), "seed_1": int(seed_1)}
    return _digest(key | {"model_0": model_0, "model_1": model_1, "config_hash": config_hash})[:32]


def image_uid(data: bytes) -> str:
    """sha256 of the encoded image: identity, deduplication and the integrity of a row in one."""
    return hashlib.sha256(data).hexdigest()


def seed_for(cycle_seed: int, prompt_id: str, index: int) -> int:
    """The seed of candidate `index` of a prompt, in [0, 2**63): it depends on no batch, shard or device."""
    digest = hashlib.sha256(canonical_json([int(cycle_seed), prompt_id, int(index)]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # 63 bits fit an Arrow int64 and a torch generator


def scorer_slug(scorer: str) -> str:
    """A scorer's name as part of a column or file name: `My.pkg:Judge` becomes `my_pkg_judge`."""
    return re.sub(r"[^a-z0-9_]", "_", scorer.lower())


def score_column(scorer: str, side: int) -> str:
    """The column that holds the raw score of one side, in the scorer's own unit."""
    return f"score_{scorer_slug(scorer)}_{side}"


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
    crops are told (`training.family.TIME_IDS`); without them every picture is whole, at its own size.
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


def latents(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Fixed-size float16 lists as an array (row, value): a read-only view of one chunk, a copy of several."""
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    parts = [_latent_view(chunk) for chunk in chunks]
    if len(parts) == 1:
        return parts[0]
    return np.concatenate([np.empty((0, column.type.list_size), np.float16), *parts])


def _latent_view(array: pa.FixedSizeListArray) -> np.ndarray:
    if array.null_count or array.values.null_count:
        raise ValueError(f"found null among {len(array)} latents or embeddings; expected numbers in each row")
    values = array.flatten()  # `.values` would ignore the offset of a slice and return other rows
    view = np.frombuffer(values.buffers()[1], np.float16, len(values), offset=2 * values.offset)
    return view.reshape(len(array), array.type.list_size)


def latent_column(values: np.ndarray) -> pa.FixedSizeListArray:
    """The inverse of `latents`: one fixed-size float16 list per row of an array (row, ...)."""
    rows = np.ascontiguousarray(values, np.float16).reshape(len(values), -1)
    numbers = pa.Array.from_buffers(pa.float16(), rows.size, [None, pa.py_buffer(rows)])
    return pa.FixedSizeListArray.from_arrays(numbers, type=pa.list_(pa.float16(), rows.shape[1]))


def trainable(table: pa.Table | pa.RecordBatch) -> pa.ChunkedArray | pa.BooleanArray:
    """A mask for `table.filter`: rows with a decision, between two different images, that is no tie."""
    decided = pc.and_(table.column("has_label"), table.column("are_different"))
    mask = pc.and_(decided, pc.not_equal(table.column("label_0"), pa.scalar(0.5, pa.float32())))
    return pc.fill_null(mask, False)


def row_problems(batch: pa.RecordBatch) -> Iterator[Problem]:
    """Everything that makes a row of any of the three schemas unfit for use."""
    yield from _null_problems(batch)
    for field in batch.schema:
        if field.type == IMAGE:
            yield from _image_problems(batch, field.name)
        elif pa.types.is_fixed_size_list(field.type) or pa.types.is_floating(field.type):
            yield from _number_problems(batch, field.name)
    if "label_0" in batch.schema.names:
        yield from _label_problems(batch)
    if "soft_label_0" in batch.schema.names:  # since schema 1.1
        yield from _soft_label_problems(batch)


def _null_problems(batch: pa.RecordBatch) -> Iterator[Problem]:
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if column.null_count and not name.startswith(("score_", "label_", "soft_label_", "margin")):
            yield column.is_null().index(True).as_py(), f"{name} is null"


def _image_problems(batch: pa.RecordBatch, name: str) -> Iterator[Problem]:
    from PIL import Image  # only a deep check decodes; importing this module must stay light

    images, uids = batch.column(name).to_pylist(), batch.column(f"{name}_uid").to_pylist()
    for row, (image, uid) in enumerate(zip(images, uids, strict=True)):
        data = (image or {}).get("bytes") or b""
        if image_uid(data) != uid:
            yield row, f"{name} hashes to {image_uid(data)}, {name}_uid says {uid}"
        try:
            Image.open(io.BytesIO(data)).load()
        except (OSError, SyntaxError, ValueError) as error:  # Pillow's words for damaged images
            yield row, f"{name} does not decode ({error})"


def _number_problems(batch: pa.RecordBatch, name: str) -> Iterator[Problem]:
    column = batch.column(name)
    for row in range(len(column)):
        values = column[row].values if pa.types.is_fixed_size_list(column.type) else column.slice(row, 1)
        numbers = np.asarray(values.drop_null()) if values is not None else np.zeros(0)
        if not np.isfinite(numbers).all():
            yield row, f"{name} is not finite"


def _label_problems(batch: pa.RecordBatch) -> Iterator[Problem]:
    names = ["label_0", "label_1", "has_label", "are_different", "image_0_uid", "image_1_uid"]
    for row, values in enumerate(batch.select(names).to_pylist()):
        first, second, has_label, different, uid_0, uid_1 = (values[name] for name in names)
        if (first, second) not in {(0.0, 1.0), (0.5, 0.5), (1.0, 0.0), (None, None)}:
            yield row, f"labels are {first} and {second}, expected 0, 0.5 or 1 and its complement"
        if has_label and first is None:
            yield row, "has_label is true but label_0 is null"
        if different != (uid_0 != uid_1):
            yield row, f"are_different is {different}, the image uids say {uid_0 != uid_1}"


def _soft_label_problems(batch: pa.RecordBatch) -> Iterator[Problem]:
    for row, values in enumerate(batch.select(["soft_label_0", "soft_label_1"]).to_pylist()):
        first, second = values.values()
        if (first, second) != (None, None) and not _complements(first, second):
            yield row, f"soft labels are {first} and {second}, expected a probability and its complement"


def _complements(first: float | None, second: float | None) -> bool:
    return first is not None and second is not None and 0 <= first <= 1 and abs(first + second - 1) < 1e-6


def repeated_ids(batch: pa.RecordBatch, seen: set[str]) -> Iterator[Problem]:
    """Rows whose id is in `seen`, which grows by the ids of the batch."""
    name = "pair_id" if "pair_id" in batch.schema.names else "candidate_id"
    for row, key in enumerate(batch.column(name).to_pylist()):
        if key in seen:
            yield row, f"{name} {key} occurs twice, expected unique ids"
        seen.add(key)


def pickapic_rows(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The rows of a preference batch under the names and types of Pick-a-Pic."""
    images = {f"jpg_{side}": pc.struct_field(batch.column(f"image_{side}"), "bytes") for side in (0, 1)}
    columns = [images[name] if name in images else batch.column(name) for name in PICKAPIC.names]
    arrays = [column.cast(field.type) for column, field in zip(columns, PICKAPIC, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=PICKAPIC)
